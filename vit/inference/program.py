"""Export a model as a `.pt2` file: torch's own export format, for programs that have torch but not `vit`.

The file has the graph of `torch.export` with a dynamic batch, and the model's `Description` as JSON (extra file
`vit.json`).  AOTInductor compiles it; Python runs it with

    extra = {"vit.json": ""}
    program = torch.export.load("model.pt2", extra_files=extra)
    logits = program.module()(images)

`load_program` loads it after a comparison with its checksum.  Such a file is not a MODEL: no command of `vit` reads it,
because `torch.export.load` may run code from the file.
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
    from vit.inference.export import AddRollout
    from vit.model import VisionTransformer

EXTRA = "vit.json"


def load_program(path: str | os.PathLike[str]) -> Any:
    """Load the `torch.export.ExportedProgram` in a trusted file, since loading may run code.

    Raises `VitError` when the file cannot be read, or has changed since it was written.
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
    with_rollout: AddRollout | None = None,
) -> float:
    """Write `model` to `path`, verified and atomically; return the largest difference from the model.

    Arguments as for `vit.inference.export.export_onnx`; with `with_rollout` the program gives (logits, rollout).
    Raises `VitError` when it cannot be exported or written, or the result disagrees with the model.
    """
    import torch

    twin = export_copy(model)
    # exporters give modes back, to all that is inside
    shown = twin if with_rollout is None else with_rollout(twin).eval()
    images = stable_images(twin, images_to_check(description, images))
    with atomic_write(path) as part, torch.inference_mode(False), torch.no_grad(), quiet():
        try:
            free = ({0: torch.export.Dim("batch", min=1)},)
            # the example becomes part of the file, which must not hold a user's images
            example = torch.zeros(2, *images.shape[1:])
            program = torch.export.export(shown, (example,), dynamic_shapes=free)
        except Exception as error:  # the library's exceptions share no base class
            reason = str(error).strip().partition("\n")[0][:160]
            raise VitError(f"cannot write {os.fspath(path)}: torch.export cannot trace the model: {reason}") from None
        modules = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
        for node in (node for module in modules for node in module.graph.nodes):
            node.meta.pop("stack_trace", None)  # it has paths of this machine
        with open(part, "wb") as file:
            torch.export.save(program, file, extra_files={EXTRA: description.to_json()})
        add_archive_checksum(part)
        loaded = load_program(part).module()

        def run(batch: np.ndarray) -> list[np.ndarray]:
            outputs = loaded(torch.from_numpy(batch))
            return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

        return check(path, run, images, expected(twin, shown, images), "the program")
