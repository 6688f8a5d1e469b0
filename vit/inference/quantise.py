"""An ONNX file in integers: static quantisation by ONNX Runtime, fitted to real images and measured on others.

The linear layers of the blocks multiply 8-bit integers (Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference"): weights with a scale for each output, activations with a
scale for each tensor, from the range they have on the calibration images.  The rest is float32: the patch embedding,
norms, softmax, GELU, products of attention, residual sums, the head, a rollout.  The file's description says under
`metrics.int8` what that cost; it holds no weights for torch (`vit_weights`), so it classifies and does nothing else.

What was measured, on digits (D, 359 test images), a small model of CIFAR-10 (C, 400 to 2,000 of them) and features of
a DINOv2 ViT-S/14 with a linear classifier (V, 300 images of CIFAR-10); agreement of the top-1 class with float32:

| settings | D | C | V |
| --- | --- | --- | --- |
| as here: linear layers, float outputs, 7-bit weights, least and greatest value | 99.7% | 98.9% | 94.0% |
| 8-bit weights | 99.7% | 99.3% | 95.3% |
| 8-bit weights, on a processor whose sums saturate | 98.6% | 98.0% | |
| products of attention as well | | | 81.3% |
| 8-bit weights, products of attention as well | 99.2% | 98.9% | |
| 8-bit weights, attention, outputs and patch embedding as well | 99.2% | 98.5% | |
| 8-bit weights, one scale a matrix | 99.2% | | |
| activations' range by percentile (99.99) | | | 76.0% |
| activations' range by entropy | | | 94.0% |

- Weights have 7 bits (`reduce_range`).  Processors with AVX2 or AVX-512 but not VNNI add pairs of 8-bit products in 16
  bits, where the sum of two products is cut off at 32,767; with full weights 0.1% of the pairs are, and the logits'
  mean error on D goes from 1.1% to 17% (computed in torch, as this machine has VNNI).  With 7 bits no pair can reach
  it (2 * 255 * 64 = 32,640), so what is measured here holds everywhere; that costs 0.3 to 0.4% in the logits.
- The range of activations is not clipped: a few large ones carry much of what a pretrained ViT computes.
- Leaving the second layer of the MLP in float gained nothing on V (92.3%).
- ViT-Ti/16 at 224 takes half the time of the float32 file: 15 and 28 ms an image on one core with VNNI.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vit.checksums import add_onnx_checksum
from vit.data.parallel import progress
from vit.errors import VitError
from vit.files import atomic_write
from vit.inference.export import describe, quiet
from vit.inference.onnx_backend import INPUT, METADATA_KEY, OUTPUT, ROLLOUT, open_session, runtime, session_description
from vit.inference.sample import Sample

FLOOR = 0.9
"""The least share of images whose top-1 class is that of float32; a file below it is not written."""
_BATCH = 8


def quantise(
    path: str | os.PathLike[str], source: str | os.PathLike[str], calibration: Sample, measured: Sample
) -> dict[str, Any]:
    """Write the ONNX file `source`, of this project and in float32, to `path` in integers, whole or not at all.

    Arguments
        calibration: images to fit the scales to.
        measured: others, to compare with float32 on.

    Returns what the file's description says under `metrics.int8`: `agreement` (share of equal top-1 classes), `top1`
    and `top1_float32` where the images have labels, `rollout_overlap` (mean over images of the smaller share, summed
    over patches: 1 for equal maps) where the file has a rollout, and how many images of what these are from.
    Raises `VitError` when the file cannot be written, or agrees with float32 on less than `FLOOR` of the images.
    """
    import onnx

    with atomic_write(path) as part, tempfile.TemporaryDirectory() as folder:
        integers = Path(folder) / "int8.onnx"
        to_integers(os.fspath(source), str(integers), calibration.images)
        before, after = (
            _outputs(file, measured.images, kind) for file, kind in ((source, "float32"), (integers, "int8"))
        )
        figures = _figures(before, after, measured, calibration)
        if not figures["agreement"] >= FLOOR:
            raise VitError(
                f"{os.fspath(path)} was not written: in integers the model agrees with float32 on only "
                f"{figures['agreement']:.1%} of {len(measured)} images ({measured.origin}; at least {FLOOR:.0%} "
                "expected): other --calibration images may help"
            )
        description = session_description(open_session(source), source)
        description = replace(description, metrics={**description.metrics, "int8": figures})
        message = onnx.load(str(integers))
        describe(message, {METADATA_KEY: description.to_json()})
        part.write_bytes(add_onnx_checksum(message.SerializeToString()))
    return figures


def linear_layers(message: Any) -> list[str]:
    """The nodes of an `onnx.ModelProto` that multiply by a matrix of weights, but for the head."""
    weights = {each.name for each in message.graph.initializer if len(each.dims) == 2}
    outputs = {each.name for each in message.graph.output}
    ends = {name for node in message.graph.node if set(node.output) & outputs for name in node.input}
    return [
        node.name
        for node in message.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and not set(node.output) & (ends | outputs)
    ]


def to_integers(source: str, target: str, images: np.ndarray) -> None:
    """Write the float32 file `source` to `target` in integers, fitted to `images`; what that costs is not measured."""
    import onnx

    runtime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = _batches(images, "Fitting")

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    with quiet():
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=linear_layers(onnx.load(source, load_external_data=False)),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
    message = onnx.load(target)
    del message.metadata_props[:]  # copied, with the checksum of the file in float32
    onnx.save(message, target)


def _batches(images: np.ndarray, label: str) -> Iterator[np.ndarray]:
    """The images, a few at a time, under a progress bar."""
    with progress(label, len(images)) as advance:
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            yield batch
            advance(len(batch))


def _outputs(file: str | os.PathLike[str], images: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Logits and, where there is one, the rollout."""
    session = open_session(file)
    names = [node.name for node in session.get_outputs()]
    parts = [session.run(names, {INPUT: batch}) for batch in _batches(images, f"Measuring {kind}")]
    return {name: np.concatenate(each) for name, each in zip(names, zip(*parts, strict=True), strict=True)}


def _figures(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], measured: Sample, calibration: Sample
) -> dict[str, Any]:
    was, is_ = before[OUTPUT].argmax(axis=1), after[OUTPUT].argmax(axis=1)
    finite = np.isfinite(after[OUTPUT]).all(axis=1)
    figures: dict[str, Any] = {"agreement": float((finite & (was == is_)).mean())}
    if measured.labels is not None:
        figures["top1"] = float((is_ == measured.labels).mean())
        figures["top1_float32"] = float((was == measured.labels).mean())
    if ROLLOUT in before:
        smaller = np.minimum(before[ROLLOUT], after[ROLLOUT]).sum(axis=(1, 2))
        figures["rollout_overlap"] = float(smaller.mean())
    return {
        **figures,
        "images": len(measured),
        "measured_on": measured.origin,
        "calibration_images": len(calibration),
        "calibrated_on": calibration.origin,
    }
