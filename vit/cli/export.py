"""Run `vit export`: write a model as an ONNX file in float32 or int8, as a `.pt2` program or as a bundle folder."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.data.decode import printable
from vit.errors import VitError
from vit.files import check_folder_name
from vit.inference.loading import load_torch

if TYPE_CHECKING:
    from vit.inference.description import Description
    from vit.inference.sample import Sample
    from vit.model import VisionTransformer


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0.

    Raises `VitError` when the model cannot be read, the output cannot be written, the options contradict each other, or
    there are no images to calibrate int8 with.
    """
    output, ending = arguments.output, os.path.splitext(arguments.output)[1].lower()
    _check(arguments, ending)
    model, description = load_torch(arguments.model, device="cpu", reduction=arguments.reduction)
    images = Images(description, arguments.calibration, integers=arguments.int8)
    options: dict[str, Any] = {"images": images.compared and images.compared.images}
    if arguments.with_rollout:
        from vit.explain.with_rollout import WithRollout

        options["with_rollout"] = WithRollout
    messages: list[str] = []
    difference: float | None
    if arguments.int8:
        difference, messages = _write_int8(output, model, description, images, options)
    elif ending == ".onnx":
        from vit.inference.export import export_onnx

        difference = export_onnx(output, model, description, **options)
    elif ending == ".pt2":
        from vit.inference.program import export_program

        difference = export_program(output, model, description, **options)
    else:
        difference = _write_bundle(output, model, description, options)
    if difference is not None:
        messages.insert(0, f"compared with torch on {images}: they differ by {difference:.0e} at most")
    usable = "" if ending == ".pt2" else f"; try: vit classify {_quoted(output)} photo.jpg"
    print(*messages, f"wrote {printable(output)}{usable}", sep="\n")
    return 0


def _write_bundle(
    output: str, model: VisionTransformer, description: Description, options: dict[str, Any]
) -> float | None:
    from vit.inference.bundle import write_bundle
    from vit.inference.export import fits_onnx

    fits = fits_onnx(model)
    difference = write_bundle(output, model, description, onnx=fits, **options)
    if not fits:
        print("vit: the model is too large for one ONNX file (2 GB); the bundle has none", file=sys.stderr)
    return difference


def _write_int8(
    output: str, model: VisionTransformer, description: Description, images: Images, options: dict[str, Any]
) -> tuple[float, list[str]]:
    """Write an int8 file; return the difference of the float32 file from torch, and lines about the cost of int8."""
    from vit.inference.export import export_onnx
    from vit.inference.quantise import quantise

    with tempfile.TemporaryDirectory() as folder:
        float32_file = Path(folder) / "float32.onnx"
        difference = export_onnx(float32_file, model, description, **options)
        figures = quantise(output, float32_file, *images.integers)
        before, after = os.path.getsize(float32_file), os.path.getsize(output)
    messages = [
        f"fitted to {figures['calibration_images']} images ({figures['calibrated_on']}), "
        f"measured on {figures['images']} images ({figures['measured_on']})",
        f"the same class as in float32: {figures['agreement']:.1%}",
    ]
    if "top1" in figures:
        messages.append(f"top-1 accuracy: {figures['top1']:.1%}, in float32 {figures['top1_float32']:.1%}")
    if "rollout_overlap" in figures:
        messages.append(f"rollout shared with float32: {figures['rollout_overlap']:.1%}")
    return difference, [*messages, f"{after / 1e6:.1f} MB, in float32 {before / 1e6:.1f} MB"]


class Images:
    """Loads the images of an export.

    Attributes:
        compared: images for the comparison with torch; None if there are none, then noise is used.
        integers: images to calibrate int8 with and images to measure it on; empty without int8.
    """

    def __init__(self, description: Description, sources: list[str] | None, *, integers: bool) -> None:
        from vit.inference.sample import COMPARED, to_compare, to_quantise

        self.compared: Sample | None = None
        self.integers: tuple[Sample, ...] = ()
        if integers:
            self.integers = to_quantise(description, sources)
            self.compared = self.integers[0][:COMPARED]
            return
        try:
            self.compared = to_compare(description, sources)
        except VitError as error:
            if sources is not None:
                raise
            self._reason = str(error)

    def __str__(self) -> str:
        if self.compared is None:
            return f"noise, as there are no real images ({self._reason})"
        return f"{len(self.compared)} images ({self.compared.origin})"


def _check(arguments: argparse.Namespace, ending: str) -> None:
    """Check the options before anything is loaded.  Raises `VitError`."""
    output = arguments.output
    if ending not in (".onnx", ".pt2"):
        check_folder_name(output, "export", ".onnx or .pt2")
    if arguments.int8 and ending != ".onnx":
        raise VitError(f"--int8 is for an ONNX file, and {printable(output)} is none: expected a name ending in .onnx")
    if arguments.with_rollout and ending not in (".onnx", ".pt2"):
        raise VitError(
            f"--with-rollout is for a file, and {printable(output)} is to be a folder: expected a name ending in "
            ".onnx or .pt2"
        )
    if ending in (".onnx", ".pt2") and os.path.isdir(output):
        raise VitError(f"cannot write {output}: it is a folder")


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(printable(path))
