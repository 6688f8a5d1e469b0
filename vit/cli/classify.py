"""Run `vit classify`: label images.  Imports no torch with an ONNX file, except for --explain."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vit.cli import close_stdout
from vit.cli.output import choose_format, make_formatter, open_output
from vit.data.walk import describe
from vit.errors import VitError, printable
from vit.files import check_folder_name
from vit.inference.classifier import Prepared
from vit.inference.loading import load, load_torch
from vit.inference.sources import expand_sources


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0 when all inputs were labelled, 1 when some could not be used.

    Raises `VitError` when the model, the sources or the output are wrong.
    """
    format_name = choose_format(arguments.output, arguments.format)
    if arguments.explain is not None:
        check_folder_name(arguments.explain, "--explain")
    # paths on standard input may take long to arrive, and a wrong model should be reported before
    block = "-" in arguments.sources
    throughput = not block and (len(arguments.sources) > 1 or not _is_image(arguments.sources[0]))
    options = {"device": arguments.device, "backend": arguments.backend, "reduction": arguments.reduction}
    classifier = load(arguments.model, block=block, throughput=throughput, **options)
    formatter = make_formatter(format_name, classifier.description.class_names)
    channels = classifier.description.preprocessing.channels
    passed_over, errors = Counter[str](), Counter[str]()
    sources = expand_sources(
        arguments.sources, recursive=arguments.recursive, channels=channels, passed_over=passed_over
    )
    explain = _make_explainer(arguments) if arguments.explain is not None else None
    batches = classifier.classify_batches(sources, arguments.top_k, arguments.batch_size)
    done = 0
    try:
        with open_output(arguments.output) as output, progress(to_terminal=_is_terminal(output)) as advance:
            for rows, results in batches:
                for result in results:
                    output.write(((formatter.head() if done == 0 else "") + formatter.row(result)).encode())
                    output.flush()
                    done += 1
                    if result.error is not None:
                        errors[result.error] += 1
                    advance()
                if explain is not None:
                    explain(rows)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        close_stdout()
        return int(bool(errors))
    except OSError as error:
        raise VitError(f"cannot write the results: {error.strerror or error}") from error
    report_passed_over(passed_over)
    if errors:
        [(reason, count)] = errors.most_common(1)
        main_reason = f" (of {count}: {printable(reason)})" if count > 1 else ""
        total = f"{errors.total()} of {done} inputs could not be used"
        print(f"vit: {total}; their rows say why{main_reason}", file=sys.stderr)
    return int(bool(errors))


def report_passed_over(passed_over: Counter[str]) -> None:
    """Print the number of files in folders that are not images, by kind, to standard error."""
    if passed_over:
        print(f"vit: passed over: {describe(passed_over)}", file=sys.stderr)


def _make_explainer(arguments: argparse.Namespace) -> Callable[[Sequence[Prepared]], None]:
    """Make the function that writes the overlays of a batch into the folder of --explain.  Imports torch."""
    from vit.cli.maps import Folder

    folder = Folder(arguments.explain)
    model, description = load_torch(arguments.model, device=arguments.device, reduction=arguments.reduction)
    from vit.explain.maps import Mapper

    mapper = Mapper(model, description.preprocessing)

    def explain(rows: Sequence[Prepared]) -> None:
        named = [(path or "", pixels) for path, pixels in rows if not isinstance(pixels, str)]
        named = [(path, pixels) for path, pixels in named if not folder.has_overlay(path)]
        for (path, pixels), mapped in zip(named, mapper.maps([pixels for _, pixels in named]), strict=True):
            if mapped is not None:
                folder.save(path, pixels, mapped)

    return explain


def _is_image(source: str) -> bool:
    return os.path.isfile(source) and not source.lower().endswith(".txt")


def _is_terminal(output: Any) -> bool:
    try:
        return bool(output.isatty())
    except ValueError:
        return False


@contextlib.contextmanager
def progress(to_terminal: bool) -> Iterator[Any]:
    """Show a count on standard error if it is a terminal and the results go elsewhere."""
    if to_terminal or not sys.stderr.isatty():
        yield lambda count=1: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed} images"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda count=1: bar.advance(task, count)
