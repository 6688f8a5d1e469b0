"""Run `vit explain`: write attention maps of images as overlays, arrays and a page to explore.  Imports torch."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit.cli import close_stdout
from vit.cli.classify import progress, report_passed_over
from vit.cli.maps import Folder
from vit.cli.viewer import NAME, Viewer, is_page
from vit.data.decode import printable
from vit.errors import VitError
from vit.files import check_folder_name
from vit.inference.classifier import NO_NUMBER, Classifier, Prepared
from vit.inference.loading import load_torch
from vit.inference.sources import expand_sources
from vit.map_methods import BY_CLASS

if TYPE_CHECKING:
    from vit.explain.maps import Mapper


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0 when all images were explained, 1 when some could not be used.

    Raises `VitError` when the model, the sources, the class, the layer or the folder are wrong.
    """
    check_folder_name(arguments.output, "--output")
    folder = Folder(arguments.output)
    if arguments.index:
        folder.check_replaceable(folder.path / NAME, is_page)  # before the work
    model, description = load_torch(arguments.model, device=arguments.device, reduction=arguments.reduction)
    from vit.explain.maps import Mapper, class_index
    from vit.inference.torch_backend import TorchBackend

    target = class_index(arguments.target, description.class_names)
    mapper = Mapper(
        model,
        description.preprocessing,
        method=arguments.method,
        target=target,
        layer=arguments.layer,
        temperature=description.temperature,
    )
    if target is not None and arguments.method not in BY_CLASS:
        print(
            f"vit: {arguments.method} does not depend on the class: its maps are the same for every --target "
            f"(those of {', '.join(BY_CLASS)} are not)",
            file=sys.stderr,
        )
    viewer = Viewer(mapper, description.class_names, arguments.model, arguments.index)
    writer = _Writer(folder, mapper, viewer, description.class_names, arguments.save_maps)
    passed_over, channels = Counter[str](), description.preprocessing.channels
    sources = expand_sources(
        arguments.sources, recursive=arguments.recursive, channels=channels, passed_over=passed_over
    )
    classifier = Classifier(TorchBackend(model, description))
    batches = classifier.prepare_batches(folder.without_overlays(sources), arguments.batch_size)
    with progress(to_terminal=sys.stdout.isatty()) as advance:
        for rows in batches:
            writer.write_batch(rows)
            advance(len(rows))
    if len(viewer):
        viewer.write(folder.check_replaceable(folder.path / NAME, is_page))
    report_passed_over(passed_over)
    writer.report(page=folder.path / NAME if len(viewer) else None)
    return int(writer.failed > 0)


class _Writer:
    """Writes the maps of images, one batch at a time."""

    def __init__(
        self, folder: Folder, mapper: Mapper, viewer: Viewer, class_names: Sequence[str], arrays: bool
    ) -> None:
        self._folder, self._mapper, self._viewer = folder, mapper, viewer
        self._class_names, self._arrays = class_names, arrays
        self._width = min(30, max([5, *(len(printable(name)) for name in class_names)]))
        self.done = self.failed = 0

    def write_batch(self, rows: Sequence[Prepared]) -> None:
        """Write the overlays of some inputs, in their order."""
        maps = iter(self._mapper.maps([pixels for _, pixels in rows if not isinstance(pixels, str)]))
        explained = []
        for path, pixels in rows:
            name = path or ""
            if isinstance(pixels, str):
                self._fail(name, pixels)
            elif (mapped := next(maps)) is None:
                self._fail(name, NO_NUMBER)
            else:
                label = self._class_names[mapped.index]
                written = self._folder.save(
                    name, self._mapper.seen(pixels), mapped, array=self._arrays, label=label, method=self._mapper.method
                )
                explained.append((name, pixels))
                self._print_row(name, label, mapped.probability, written)
        self._viewer.add(explained)

    def report(self, page: Path | None) -> None:
        """Print a summary to standard error."""
        if self.failed:
            count = f"{self.failed} of {self.done + self.failed} inputs could not be used"
            print(f"vit: {count}", file=sys.stderr)
        if page is not None:
            if self._viewer.left_out:
                print(
                    f"vit: {NAME} shows the first {len(self._viewer)} images (--index N changes that); the other "
                    f"{self._viewer.left_out} have overlays only",
                    file=sys.stderr,
                )
            print(f"vit: open {printable(page)} in a browser", file=sys.stderr)

    def _fail(self, path: str, reason: str) -> None:
        self.failed += 1
        self._viewer.add_problem(path, reason)
        print(f"vit: {printable(path)}: {printable(reason)}", file=sys.stderr)

    def _print_row(self, path: str, label: str, probability: float, written: Path) -> None:
        self.done += 1
        head = f"{'LABEL':<{self._width}}  {'PROB':>7}  PATH -> OVERLAY\n" if self.done == 1 else ""
        line = f"{printable(label):<{self._width}}  {probability:>7.2%}  {printable(path)} -> {printable(written)}\n"
        try:
            sys.stdout.write(head + line)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe; the files are still written
            close_stdout()
        except OSError as error:
            raise VitError(f"cannot write the results: {error.strerror or error}") from error
