"""A model as a `.pt2` file: torch's own export format, for programs that have torch but not `vit`.

The graph of `torch.export` with a free batch, and beside it the model's `Description` as JSON (extra file `vit.json`).
AOTInductor compiles it; from Python it runs by

    extra = {"vit.json": ""}
    program = torch.export.load("model.pt2", extra_files=extra)
    logits = program.module()(images)

`load_program` loads it after a comparison with its checksum.  Such a file is an end, not a MODEL: no command of `vit`
reads one, because `torch.export.load` may run code that a stranger put there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.checksums import add_archive_checksum, check_archive
from vit.errors import VitError
from vit.files import atomic_write
from vit.inference.description import Description
from vit.inference.export import check, expected, export_copy, images_to_check, quiet, stable_images

if TYPE_CHECKING:
    from vit.inference.export import Observer
    from vit.model import VisionTransformer

EXTRA = "vit.json"


def load_program(path: str | os.PathLike[str]) -> Any:
    """Load the `torch.export.ExportedProgram` in a file that you trust, as it may run code.

    Raises `VitError` when the file cannot be read, or is not as it was written.
    """
    import torch

    try:
        check_archive(path)
        with open(path, "rb") as file:
            return torch.export.load(file)
    except OSError as error:
        raise VitError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from None


def export_program(
    path: str | os.PathLike[str],
    model: VisionTransformer,
    description: Description,
    *,
    images: np.ndarray | None = None,
    observer: Observer | None = None,
) -> float:
    """Write `model` to `path`, verified, whole or not at all; returns by how much it differs from the model, at most.

    Arguments as for `vit.inference.export.export_onnx`; with an observer the program gives (logits, rollout).
    Raises `VitError` when it cannot be exported or written, or the result disagrees with the model.
    """
    import torch

    twin = export_copy(model)
    shown = twin if observer is None else observer(twin).eval()  # exporters give modes back, to all that is inside
    images = stable_images(twin, images_to_check(description, images))
    with atomic_write(path) as part, torch.inference_mode(False), torch.no_grad(), quiet():
        try:
            free = ({0: torch.export.Dim("batch", min=1)},)
            # the example becomes part of the file, where a person's images have no place
            example = torch.zeros(2, *images.shape[1:])
            made = torch.export.export(shown, (example,), dynamic_shapes=free)
        except Exception as error:  # the library's exceptions share no base class
            reason = str(error).strip().partition("\n")[0][:160]
            raise VitError(f"cannot write {os.fspath(path)}: torch.export cannot trace the model: {reason}") from None
        for graph in (each.graph for each in made.graph_module.modules() if isinstance(each, torch.fx.GraphModule)):
            for node in graph.nodes:
                node.meta.pop("stack_trace", None)  # it has the paths of this machine
        with open(part, "wb") as written:
            torch.export.save(made, written, extra_files={EXTRA: description.to_json()})
        add_archive_checksum(part)
        loaded = load_program(part).module()

        def run(batch: np.ndarray) -> list[np.ndarray]:
            answer = loaded(torch.from_numpy(batch))
            return [each.numpy() for each in (answer if isinstance(answer, tuple) else (answer,))]

        return check(path, run, images, expected(twin, shown, images), "the program")
