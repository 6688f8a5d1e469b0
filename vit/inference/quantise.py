"""Quantise an ONNX file to int8 with ONNX Runtime, calibrated on real images and measured on others.

The linear layers of the blocks multiply 8-bit integers (Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference"): weights with a scale for each output, activations with a
scale for each tensor, from their range on the calibration images.  The rest is float32: the patch embedding, norms,
softmax, GELU, products of attention, residual sums, the head, a rollout.  The loss of accuracy is in the file's
description under `metrics.int8`.  The file has no weights for torch (`vit_weights`), so it can only classify.

Measured on digits (D, 359 test images), a small model of CIFAR-10 (C, 400 to 2,000 images) and features of a DINOv2
ViT-S/14 with a linear classifier (V, 300 images of CIFAR-10); agreement of the top-1 class with float32:

| settings | D | C | V |
| --- | --- | --- | --- |
| as here: linear layers, float outputs, 7-bit weights, range by minimum and maximum | 99.7% | 98.9% | 94.0% |
| 8-bit weights | 99.7% | 99.3% | 95.3% |
| 8-bit weights, on a processor whose sums saturate | 98.6% | 98.0% | |
| products of attention as well | | | 81.3% |
| 8-bit weights, products of attention as well | 99.2% | 98.9% | |
| 8-bit weights, attention, outputs and patch embedding as well | 99.2% | 98.5% | |
| 8-bit weights, one scale a matrix | 99.2% | | |
| activations' range by percentile (99.99) | | | 76.0% |
| activations' range by entropy | | | 94.0% |

- Weights have 7 bits (`reduce_range`).  Processors with AVX2 or AVX-512 but without VNNI add pairs of 8-bit products in
  16 bits, which saturates at 32,767.  With 8-bit weights 0.1% of the pairs saturate, and the mean error of the logits
  on D rises from 1.1% to 17% (computed in torch, as this machine has VNNI).  With 7 bits no pair saturates
  (2 * 255 * 64 = 32,640), so the results hold on every processor; this costs 0.3 to 0.4% in the logits.
- The range of activations is not clipped: a few large activations are important in a pretrained ViT.
- The second layer of the MLP in float gained nothing on V (92.3%).
- ViT-Ti/16 at 224 takes half the time of the float32 file: 15 and 28 ms for an image on one core with VNNI.
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
"""Smallest fraction of images with the top-1 class of float32; below it no file is written."""
_BATCH = 8


def quantise(
    path: str | os.PathLike[str], source: str | os.PathLike[str], calibration: Sample, measured: Sample
) -> dict[str, Any]:
    """Write the float32 ONNX file `source` of this project to `path` in int8, atomically.

    Args:
        path: the file to write.
        source: the float32 file.
        calibration: images to calibrate the scales with.
        measured: other images, to compare with float32.

    Returns:
        The metrics under `metrics.int8` of the file's description: `agreement` (fraction of equal top-1 classes),
        `top1` and `top1_float32` if the images have labels, `rollout_overlap` (the smaller value of both maps, summed
        over patches, mean over images: 1 for equal maps) if the file has a rollout, and the number and origin of the
        images.

    Raises:
        VitError: if the file cannot be written, or agrees with float32 on less than `FLOOR` of the images.
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
    """List the nodes of an `onnx.ModelProto` that multiply by a weight matrix, without the head."""
    weights = {tensor.name for tensor in message.graph.initializer if len(tensor.dims) == 2}
    outputs = {output.name for output in message.graph.output}
    ends = {name for node in message.graph.node if set(node.output) & outputs for name in node.input}
    return [
        node.name
        for node in message.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and not set(node.output) & (ends | outputs)
    ]


def to_integers(source: str, target: str, images: np.ndarray) -> None:
    """Write the float32 file `source` to `target` in int8, calibrated on `images`, without measuring it."""
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
    del message.metadata_props[:]  # a copy, with the checksum of the float32 file
    onnx.save(message, target)


def _batches(images: np.ndarray, label: str) -> Iterator[np.ndarray]:
    """Yield the images in batches, with a progress bar."""
    with progress(label, len(images)) as advance:
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            yield batch
            advance(len(batch))


def _outputs(file: str | os.PathLike[str], images: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Compute the logits and, if the file has it, the rollout."""
    session = open_session(file)
    names = [node.name for node in session.get_outputs()]
    parts = [session.run(names, {INPUT: batch}) for batch in _batches(images, f"Measuring {kind}")]
    return {name: np.concatenate(batches) for name, batches in zip(names, zip(*parts, strict=True), strict=True)}


def _figures(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], measured: Sample, calibration: Sample
) -> dict[str, Any]:
    old_classes, new_classes = before[OUTPUT].argmax(axis=1), after[OUTPUT].argmax(axis=1)
    finite = np.isfinite(after[OUTPUT]).all(axis=1)
    figures: dict[str, Any] = {"agreement": float((finite & (old_classes == new_classes)).mean())}
    if measured.labels is not None:
        figures["top1"] = float((new_classes == measured.labels).mean())
        figures["top1_float32"] = float((old_classes == measured.labels).mean())
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
