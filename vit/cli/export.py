"""`vit export`: a model as one ONNX file or as a bundle folder."""

from __future__ import annotations

import argparse
import os
import sys

from vit.data.decode import printable
from vit.errors import VitError
from vit.inference.loading import load_torch


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0.  Raises `VitError` when the model cannot be read or the output not be written."""
    output = arguments.output
    onnx = output.lower().endswith(".onnx")
    if onnx and os.path.isdir(output):
        raise VitError(f"cannot write {output}: it is a folder")
    model, description = load_torch(arguments.model, device="cpu")
    if onnx:
        from vit.inference.export import export_onnx

        export_onnx(output, model, description)
    else:
        from vit.inference.bundle import write_bundle
        from vit.inference.export import fits_onnx

        fits = fits_onnx(model)
        write_bundle(output, model, description, onnx=fits)
        if not fits:
            print("vit: the model is too large for one ONNX file (2 GB); the bundle has none", file=sys.stderr)
    print(f"wrote {printable(output)}; try: vit classify {_quoted(output)} photo.jpg")
    return 0


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(printable(path))
