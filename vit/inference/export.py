"""Export a model as one ONNX file that needs no other file.

Input `image` float32 (B, C, H, W), normalised; output `logits` float32 (B, K), and on request `rollout` float32
(B, rows, columns), attention rollout on the patch grid, of sum 1; B is dynamic.  The metadata entry `vit` is the
model's `Description` as JSON with class names, preprocessing and temperature; entry `vit_weights` is a table of the
parameters, so that torch can load the model from the file (`vit.inference.onnx_weights`).

Notes:
- Exporter: torch's tracer (`dynamo=False`); its newer exporter (`dynamo=True`) only if a future torch drops the tracer.
  Measured on ViT-Ti/16 with torch 2.14, one core: 0.4 s against 6 s, after a training run of a minute.  After ONNX
  Runtime's optimisation the traced graph is faster on batches (16 images 0.35 s against 0.38 to 0.42 s, GELU fused at
  any opset) and equal on single images.  Tracing is exact, since a Vision Transformer has no control flow that depends
  on data, and the newer exporter writes source paths of the machine into the file.
- Opset 17 is the first with LayerNormalization as one node; all current software for ONNX reads it.
- Every file is verified before it gets its name: it runs in ONNX Runtime on several batch sizes, on real images if
  there are any, and must agree with torch to 1e-4.
- A rollout propagates the row of the head down through the layers, one vector-matrix product each: on ViT-Ti/16 at 224
  this takes 3 to 4% longer, on one core of this machine.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.checksums import add_onnx_checksum
from vit.errors import VitError
from vit.files import atomic_write
from vit.inference.description import Description
from vit.inference.onnx_backend import INPUT, METADATA_KEY, OUTPUT, ROLLOUT, open_session
from vit.inference.onnx_graph import simplify
from vit.inference.onnx_weights import TABLE_KEY, index
from vit.inference.sample import COMPARED

if TYPE_CHECKING:
    from torch import nn

    from vit.model import VisionTransformer

    AddRollout = Callable[[VisionTransformer], nn.Module]
    """Turns a model into a module that returns (logits, rollout): `vit.explain.with_rollout.WithRollout`."""

OPSET = 17
TOLERANCE = 1e-4
_MAX_BYTES = 2_000_000_000  # an ONNX file is one protobuf message of at most 2 GiB


def fits_onnx(model: VisionTransformer) -> bool:
    """Check whether the weights fit into one ONNX file (up to about 500 million parameters)."""
    return sum(tensor.numel() * 4 for tensor in model.state_dict().values()) < _MAX_BYTES


def export_onnx(
    path: str | os.PathLike[str],
    model: VisionTransformer,
    description: Description,
    *,
    images: np.ndarray | None = None,
    with_rollout: AddRollout | None = None,
) -> float:
    """Write `model` to `path`, verified and atomically; return the largest difference from torch.

    The model may be on any device, in any dtype and in training mode: a float32 copy on the CPU in evaluation mode is
    exported, and the model is unchanged.

    Arguments
        images: to compare on, normalised, float32 (N, C, H, W); the first `COMPARED` of them.  None: noise of mean
            0 and deviation 1, which is what normalised images have.
        with_rollout: what adds the output `rollout`; None: there is none.

    Raises `VitError` when the model is too large for one file, the disk is full, or the result disagrees with torch.
    """
    import torch

    if not fits_onnx(model):
        raise VitError(f"cannot write {os.fspath(path)}: the model is too large for one ONNX file (2 GB)")
    twin = export_copy(model)
    # exporters give modes back, to all that is inside
    shown = twin if with_rollout is None else with_rollout(twin).eval()
    images = stable_images(twin, images_to_check(description, images))
    with atomic_write(path) as part, torch.inference_mode(False):
        message = _trace(shown, torch.from_numpy(images[:2]))
        simplify(message)
        state = {key: value.numpy() for key, value in twin.state_dict().items()}
        describe(message, {METADATA_KEY: description.to_json(), TABLE_KEY: index(message, state)})
        part.write_bytes(add_onnx_checksum(message.SerializeToString()))
        session = open_session(part)
        names = [OUTPUT] if with_rollout is None else [OUTPUT, ROLLOUT]
        return check(path, lambda batch: session.run(names, {INPUT: batch}), images, expected(twin, shown, images))


def export_copy(model: VisionTransformer) -> VisionTransformer:
    """Copy the model for export: float32, on the CPU, in evaluation mode, without gradients."""
    import torch

    return copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)


def images_to_check(description: Description, images: np.ndarray | None) -> np.ndarray:
    """Choose the images for the comparison: at least three, so that batches differ in size; noise without images."""
    if images is not None and len(images):
        return np.resize(images[:COMPARED], (max(3, len(images[:COMPARED])), *images.shape[1:]))
    height, width = description.architecture["image_size"]
    shape = (3, description.architecture["in_channels"], height, width)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def stable_images(twin: VisionTransformer, images: np.ndarray) -> np.ndarray:
    """Replace images whose logits jump with rounding of their pixels by other images of the comparison.

    With token reduction, rounding may decide which of two similar patches is removed, and two runtimes round
    differently.  All images are returned if none is stable, or without token reduction.
    """
    import torch

    if twin.reduction is None:
        return images
    rng = np.random.default_rng(0)
    with torch.no_grad():
        logits = twin(torch.from_numpy(images))
        tolerance = TOLERANCE * max(1.0, float(logits.abs().max()))
        stable = np.ones(len(images), dtype=bool)
        for _ in range(3):
            noise = 1 + 3e-6 * rng.standard_normal(images.shape, dtype=np.float32)
            difference = (twin(torch.from_numpy(images * noise)) - logits).abs().amax(dim=1)
            stable &= (difference <= tolerance).numpy()
    return np.resize(images[stable], images.shape) if stable.any() else images


def expected(twin: VisionTransformer, shown: nn.Module, images: np.ndarray) -> list[np.ndarray]:
    """Compute torch's outputs: the logits of the model itself, and the other outputs of `shown`."""
    import torch

    with torch.no_grad():
        batch = torch.from_numpy(images)
        logits = twin(batch).numpy()
        return [logits] if shown is twin else [logits, *(output.numpy() for output in shown(batch)[1:])]


def check(
    path: str | os.PathLike[str],
    run: Callable[[np.ndarray], list[np.ndarray]],
    images: np.ndarray,
    torch_outputs: list[np.ndarray],
    runtime: str = "ONNX Runtime",
) -> float:
    """Compute the largest difference of the outputs of `run` from those of torch, in one batch and one by one.

    It is relative to the largest logit if that is over 1, as float32's precision is, and to the largest value of the
    rollout.  Raises `VitError` when it is over `TOLERANCE`, or not a number.
    """
    batched = run(images)
    singles = [np.concatenate(x) for x in zip(*(run(images[i : i + 1]) for i in range(len(images))), strict=True)]
    worst = 0.0
    for target, batch, single in zip(torch_outputs, batched, singles, strict=True):
        scale = float(np.abs(target).max())
        scale = max(1.0, scale) if target is torch_outputs[0] else scale
        difference = float(max(np.abs(batch - target).max(), np.abs(single - target).max())) / scale
        if not difference <= TOLERANCE:
            raise VitError(
                f"{os.fspath(path)} was not written: {runtime} and torch disagree by {difference:.1e} on the same "
                f"images (at most {TOLERANCE:.0e} allowed)"
            )
        worst = max(worst, difference)
    return worst


def _trace(model: nn.Module, images: Any) -> Any:
    """Make the ONNX message of `model` with torch's tracer, or with the newer exporter if the tracer fails."""
    try:
        return trace(model, images, dynamo=False)
    except Exception:  # a future torch may have no tracer
        return trace(model, images, dynamo=True)


def trace(model: nn.Module, images: Any, *, dynamo: bool) -> Any:
    """Make the `onnx.ModelProto` of `model`, with dynamic B, with one of torch's two exporters, without its output."""
    import onnx
    import torch

    from vit.model import VisionTransformer

    outputs = [OUTPUT] if isinstance(model, VisionTransformer) else [OUTPUT, ROLLOUT]
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": outputs, "opset_version": OPSET}
    with quiet():
        if dynamo:
            # the oldest opset that this exporter writes is 18
            free = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.onnx.export(
                model, (images,), dynamo=True, dynamic_shapes=free, verbose=False, **{**names, "opset_version": 18}
            )
            message = program.model_proto  # type: ignore[union-attr]
        else:
            axes = {name: {0: "batch"} for name in (INPUT, *outputs)}
            with tempfile.TemporaryDirectory() as folder:
                file = os.path.join(folder, "model.onnx")
                torch.onnx.export(model, (images,), file, dynamo=False, dynamic_axes=axes, **names)
                message = onnx.load(file)
    for part in (message, message.graph, *message.graph.node, *message.graph.value_info):
        part.doc_string = ""  # stack traces, with the paths of this machine
        del part.metadata_props[:]
    return message


def describe(message: Any, entries: Mapping[str, str]) -> None:
    """Replace the metadata of the message by these entries."""
    del message.metadata_props[:]
    for key, value in entries.items():
        entry = message.metadata_props.add()
        entry.key, entry.value = key, value
    message.producer_name = "vit"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' warnings, logging and prints."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
