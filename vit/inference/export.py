"""A model as one ONNX file that runs anywhere and describes itself.

Input `image` float32 (B, C, H, W), normalised; output `logits` float32 (B, K); B is free.  The file's metadata entry
`vit` is the model's `Description` as JSON, so class names, preprocessing and temperature need no second file; entry
`vit_weights` says where each parameter is, so torch can have the model back (`vit.inference.onnx_weights`).

Notable
- Exporter: torch's tracer (`dynamo=False`), with its newer one (`dynamo=True`) only where a future torch has dropped
  the tracer.  Measured on ViT-Ti/16 with torch 2.14, one core: 0.4 s against 6 s, after a training run that takes a
  minute; after ONNX Runtime's own optimisation the traced graph is the faster one on batches (16 images 0.35 s
  against 0.38 to 0.42 s, GELU fused at any opset) and equal on single images.  A Vision Transformer has no control
  flow that depends on data, which is where tracing would fall short, and the newer exporter writes the source paths
  of the machine into the file.
- Opset 17 is the first with LayerNormalization as one node; everything that reads ONNX today reads it.
- Nothing is kept unverified: the file runs in ONNX Runtime on several batch sizes and must agree with torch to 1e-4
  before it takes its name.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.errors import VitError
from vit.files import atomic_write
from vit.inference.description import Description
from vit.inference.onnx_backend import INPUT, METADATA_KEY, OUTPUT, open_session
from vit.inference.onnx_weights import TABLE_KEY, index

if TYPE_CHECKING:
    from vit.model import VisionTransformer

OPSET = 17
TOLERANCE = 1e-4
_LARGEST = 2_000_000_000  # an ONNX file is one protobuf message, which ends at 2 GiB


def fits_onnx(model: VisionTransformer) -> bool:
    """Whether the weights fit one ONNX file (up to some 500 million parameters)."""
    return sum(tensor.numel() * 4 for tensor in model.state_dict().values()) < _LARGEST


def export_onnx(path: str | os.PathLike[str], model: VisionTransformer, description: Description) -> None:
    """Write `model` to `path`, verified, whole or not at all.

    The model may be on any device, in any precision and in training mode: a float32 copy on the CPU in evaluation
    mode is exported, and the model is left as it was.
    Raises `VitError` when the model is too large for one file, the disk is full, or the result disagrees with torch.
    """
    import torch

    if not fits_onnx(model):
        raise VitError(f"cannot write {os.fspath(path)}: the model is too large for one ONNX file (2 GB)")
    twin = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    height, width = description.architecture["image_size"]
    channels = description.architecture["in_channels"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, channels, height, width, generator=generator)
    with atomic_write(path) as part, torch.inference_mode(False):
        message = _trace(twin, images[:2])
        state = {key: value.numpy() for key, value in twin.state_dict().items()}
        _describe(message, description, index(message, state))
        part.write_bytes(message.SerializeToString())
        with torch.no_grad():
            expected = twin(images).numpy()
        difference = disagreement(part, images.numpy(), expected)
        if not difference <= TOLERANCE:
            raise VitError(
                f"{os.fspath(path)} was not written: ONNX Runtime and torch disagree by {difference:.1e} on the same "
                f"images (at most {TOLERANCE:.0e} allowed)"
            )


def disagreement(path: str | os.PathLike[str], images: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between the file's logits and `expected`, all images at once and one by one.

    Relative to the logits' own size where that is over 1, as float32 is; NaN when either has one.
    """
    session = open_session(path)
    together = session.run([OUTPUT], {INPUT: images})[0]
    alone = np.concatenate([session.run([OUTPUT], {INPUT: images[i : i + 1]})[0] for i in range(len(images))])
    scale = max(1.0, float(np.abs(expected).max()))
    return float(max(np.abs(together - expected).max(), np.abs(alone - expected).max())) / scale


def _trace(model: VisionTransformer, images: Any) -> Any:
    """The ONNX message of `model`: by torch's tracer, or by its successor where the tracer is gone or fails."""
    try:
        return trace(model, images, dynamo=False)
    except Exception:  # whatever a future torch raises for an exporter that it no longer has
        return trace(model, images, dynamo=True)


def trace(model: VisionTransformer, images: Any, *, dynamo: bool) -> Any:
    """The `onnx.ModelProto` of `model`, B free, as one of torch's two exporters writes it, without its chatter."""
    import onnx
    import torch

    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "opset_version": OPSET}
    with _quiet():
        if dynamo:
            # the oldest opset that this exporter writes is 18
            free = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.onnx.export(
                model, (images,), dynamo=True, dynamic_shapes=free, verbose=False, **{**names, "opset_version": 18}
            )
            message = program.model_proto  # type: ignore[union-attr]
        else:
            axes = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
            with tempfile.TemporaryDirectory() as folder:
                file = os.path.join(folder, "model.onnx")
                torch.onnx.export(model, (images,), file, dynamo=False, dynamic_axes=axes, **names)
                message = onnx.load(file)
    for part in (message, message.graph, *message.graph.node, *message.graph.value_info):
        part.doc_string = ""  # stack traces, with the paths of this machine
        del part.metadata_props[:]
    return message


def _describe(message: Any, description: Description, table: str) -> None:
    for key, value in ((METADATA_KEY, description.to_json()), (TABLE_KEY, table)):
        entry = message.metadata_props.add()
        entry.key, entry.value = key, value
    message.producer_name = "vit"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings about themselves, their logging and their prints from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
