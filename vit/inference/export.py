"""A model as one ONNX file that runs anywhere and describes itself.

Input `image` float32 (B, C, H, W), normalised; output `logits` float32 (B, K), and where it is asked for `rollout`
float32 (B, rows, columns), attention rollout on the patch grid, of sum 1; B is free.  The file's metadata entry `vit`
is the model's `Description` as JSON, so class names, preprocessing and temperature need no second file; entry
`vit_weights` says where each parameter is, so torch can have the model back (`vit.inference.onnx_weights`).

Notable
- Exporter: torch's tracer (`dynamo=False`), with its newer one (`dynamo=True`) only where a future torch has dropped
  the tracer.  Measured on ViT-Ti/16 with torch 2.14, one core: 0.4 s against 6 s, after a training run that takes a
  minute; after ONNX Runtime's own optimisation the traced graph is the faster one on batches (16 images 0.35 s
  against 0.38 to 0.42 s, GELU fused at any opset) and equal on single images.  A Vision Transformer has no control
  flow that depends on data, which is where tracing would fall short, and the newer exporter writes the source paths
  of the machine into the file.
- Opset 17 is the first with LayerNormalization as one node; everything that reads ONNX today reads it.
- Nothing is kept unverified: the file runs in ONNX Runtime on several batch sizes, on real images where there are
  some, and must agree with torch to 1e-4 before it takes its name.
- With a rollout, the head's row is carried down through the layers, a vector times a matrix each: on ViT-Ti/16 at 224
  that takes 3 to 4% longer, on one core of this machine.
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

    Observer = Callable[[VisionTransformer], nn.Module]
    """Makes of a model a module that gives (logits, rollout): `vit.explain.observer.Observer`."""

OPSET = 17
TOLERANCE = 1e-4
_LARGEST = 2_000_000_000  # an ONNX file is one protobuf message, which ends at 2 GiB


def fits_onnx(model: VisionTransformer) -> bool:
    """Whether the weights fit one ONNX file (up to some 500 million parameters)."""
    return sum(tensor.numel() * 4 for tensor in model.state_dict().values()) < _LARGEST


def export_onnx(
    path: str | os.PathLike[str],
    model: VisionTransformer,
    description: Description,
    *,
    images: np.ndarray | None = None,
    observer: Observer | None = None,
) -> float:
    """Write `model` to `path`, verified, whole or not at all; returns by how much it differs from torch, at most.

    The model may be on any device, in any precision and in training mode: a float32 copy on the CPU in evaluation
    mode is exported, and the model is left as it was.

    Arguments
        images: to compare on, normalised, float32 (N, C, H, W); the first `COMPARED` of them.  None: noise of mean
            0 and deviation 1, which is what normalised images have.
        observer: what adds the output `rollout`; None: there is none.

    Raises `VitError` when the model is too large for one file, the disk is full, or the result disagrees with torch.
    """
    import torch

    if not fits_onnx(model):
        raise VitError(f"cannot write {os.fspath(path)}: the model is too large for one ONNX file (2 GB)")
    twin = export_copy(model)
    shown = twin if observer is None else observer(twin).eval()  # exporters give modes back, to all that is inside
    images = stable_images(twin, images_to_check(description, images))
    with atomic_write(path) as part, torch.inference_mode(False):
        message = _trace(shown, torch.from_numpy(images[:2]))
        simplify(message)
        state = {key: value.numpy() for key, value in twin.state_dict().items()}
        describe(message, {METADATA_KEY: description.to_json(), TABLE_KEY: index(message, state)})
        part.write_bytes(add_onnx_checksum(message.SerializeToString()))
        session = open_session(part)
        names = [OUTPUT] if observer is None else [OUTPUT, ROLLOUT]
        return check(path, lambda batch: session.run(names, {INPUT: batch}), images, expected(twin, shown, images))


def export_copy(model: VisionTransformer) -> VisionTransformer:
    """A copy of the model to export: float32, on the CPU, in evaluation mode, without gradients."""
    import torch

    return copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)


def images_to_check(description: Description, images: np.ndarray | None) -> np.ndarray:
    """The images to compare on: at least three, so that batches differ in size; noise where none are given."""
    if images is not None and len(images):
        return np.resize(images[:COMPARED], (max(3, len(images[:COMPARED])), *images.shape[1:]))
    height, width = description.architecture["image_size"]
    shape = (3, description.architecture["in_channels"], height, width)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def stable_images(twin: VisionTransformer, images: np.ndarray) -> np.ndarray:
    """Of the images to compare on, as many, those whose logits do not jump with a rounding of their pixels.

    Token reduction may find two patches so much alike that rounding decides which of them goes, and two runtimes round
    differently.  Where every image is so, or tokens are not reduced, all of them.
    """
    import torch

    if twin.reduction is None:
        return images
    random = np.random.default_rng(0)
    with torch.no_grad():
        logits = twin(torch.from_numpy(images))
        allowed = TOLERANCE * max(1.0, float(logits.abs().max()))
        calm = np.ones(len(images), dtype=bool)
        for _ in range(3):
            noise = 1 + 3e-6 * random.standard_normal(images.shape, dtype=np.float32)
            moved = (twin(torch.from_numpy(images * noise)) - logits).abs().amax(dim=1)
            calm &= (moved <= allowed).numpy()
    return np.resize(images[calm], images.shape) if calm.any() else images


def expected(twin: VisionTransformer, shown: nn.Module, images: np.ndarray) -> list[np.ndarray]:
    """Torch's outputs: logits, as the model itself gives them, and what else `shown` gives."""
    import torch

    with torch.no_grad():
        batch = torch.from_numpy(images)
        logits = twin(batch).numpy()
        return [logits] if shown is twin else [logits, *(each.numpy() for each in shown(batch)[1:])]


def check(
    path: str | os.PathLike[str],
    run: Callable[[np.ndarray], list[np.ndarray]],
    images: np.ndarray,
    wanted: list[np.ndarray],
    runtime: str = "ONNX Runtime",
) -> float:
    """The largest difference between the outputs of `run` and those of torch, all images at once and one by one.

    Relative to the logits' own size where that is over 1, as float32 is, and to the rollout's largest value.
    Raises `VitError` when it is over `TOLERANCE`, or not a number.
    """
    together = run(images)
    alone = [np.concatenate(each) for each in zip(*(run(images[i : i + 1]) for i in range(len(images))), strict=True)]
    worst = 0.0
    for want, got, single in zip(wanted, together, alone, strict=True):
        scale = float(np.abs(want).max())
        scale = max(1.0, scale) if want is wanted[0] else scale
        difference = float(max(np.abs(got - want).max(), np.abs(single - want).max())) / scale
        if not difference <= TOLERANCE:
            raise VitError(
                f"{os.fspath(path)} was not written: {runtime} and torch disagree by {difference:.1e} on the same "
                f"images (at most {TOLERANCE:.0e} allowed)"
            )
        worst = max(worst, difference)
    return worst


def _trace(model: nn.Module, images: Any) -> Any:
    """The ONNX message of `model`: by torch's tracer, or by its successor where the tracer is gone or fails."""
    try:
        return trace(model, images, dynamo=False)
    except Exception:  # whatever a future torch raises for an exporter that it no longer has
        return trace(model, images, dynamo=True)


def trace(model: nn.Module, images: Any, *, dynamo: bool) -> Any:
    """The `onnx.ModelProto` of `model`, B free, as one of torch's two exporters writes it, without its chatter."""
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
    """Give the message these metadata entries, and no others."""
    del message.metadata_props[:]
    for key, value in entries.items():
        entry = message.metadata_props.add()
        entry.key, entry.value = key, value
    message.producer_name = "vit"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings about themselves, their logging and their prints from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
