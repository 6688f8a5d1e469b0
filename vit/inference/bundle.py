"""A trained model as a folder: weights, configuration, model card, ONNX file.  Any tool of the field can take it up.

`model.safetensors` (timm's names, where timm has the model), `config.json` (timm's local-dir format, with the model's
description under `vit`), `README.md` (the model card) and, unless left out, `model.onnx`.

Notable: a bundle appears whole or not at all.  It is built in a hidden neighbour and renamed; one that is there
already stays until its successor is complete; and a folder that holds anything else is never replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vit.checksums import KEY, ZEROS, add_safetensors_checksum, read_config, with_checksum
from vit.errors import VitError
from vit.files import CannotWrite
from vit.inference.description import Description

if TYPE_CHECKING:
    import numpy as np

    from vit.model import VisionTransformer

WEIGHTS, CONFIG, CARD, ONNX = "model.safetensors", "config.json", "README.md", "model.onnx"
FILES = (WEIGHTS, CONFIG, CARD, ONNX)


def write_bundle(
    folder: str | os.PathLike[str],
    model: VisionTransformer,
    description: Description,
    *,
    onnx: bool = True,
    images: np.ndarray | None = None,
) -> float | None:
    """Write the bundle, whole or not at all, with a verified `model.onnx` where `onnx` is true.

    `images`, normalised, float32 (N, C, H, W), are what that file is compared with torch on; None: noise.  Returns by
    how much they differ, None where there is no such file.
    The model is left as it is: on its device, in its precision and mode; the weights are written as float32.
    Raises `VitError` when the description does not fit the model, the folder holds other files, the disk is full or
    cannot be written, or the ONNX file cannot be made (`vit.inference.export.fits_onnx` tells ahead for size).
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from vit.inference.card import model_card
    from vit.inference.export import export_onnx
    from vit.inference.timm_config import timm_config, timm_obstacle
    from vit.pretrained.convert import to_timm

    description = Description.from_dict(description.to_dict(), "the model to be written")
    weights = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.state_dict().items()}
    if timm_obstacle(description.architecture) is None:
        weights = to_timm(weights, description.architecture)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    with replace_folder(folder) as part:
        try:
            save_file(weights, part / WEIGHTS, metadata={"format": "pt", KEY: ZEROS})
            add_safetensors_checksum(part / WEIGHTS)
        except SafetensorError as error:  # a full disk, in the library's words
            raise CannotWrite(f"cannot write {os.fspath(folder)}: {error}") from None
        config = with_checksum({**timm_config(description), "vit": description.to_dict()})
        # ASCII, so that class names which are no valid Unicode survive
        (part / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="ascii")
        count = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(description, parameters=count, onnx=onnx)
        (part / CARD).write_text(card, encoding="utf-8")
        return export_onnx(part / ONNX, model, description, images=images) if onnx else None


def read_bundle(folder: str | os.PathLike[str]) -> Description:
    """The description in a bundle's `config.json`; the weights stay where they are.  No torch.

    Raises `VitError` when there is no such file, it is damaged, or another tool wrote it.
    """
    path = Path(folder) / CONFIG
    if not path.exists():
        raise VitError(f"{os.fspath(folder)} is not a model: it has no {CONFIG}")
    config = read_config(path)
    if "vit" not in config:
        raise VitError(f"{path} was not written by vit: it does not describe classes and preprocessing (key 'vit')")
    return Description.from_dict(config["vit"], path)


def is_bundle(folder: Path) -> bool:
    """Whether the folder looks like a bundle: it has a `config.json` and weights or an ONNX file."""
    return (folder / CONFIG).is_file() and ((folder / WEIGHTS).is_file() or (folder / ONNX).is_file())


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty temporary folder that becomes `folder` on a clean exit and vanishes on an exception.

    Raises `VitError` when `folder` exists and is anything but an empty folder or an earlier bundle, or when it
    cannot be written; what was there is then still there.
    """
    target = Path(os.path.realpath(folder))
    _check_replaceable(target, os.fspath(folder))
    part, old = target.parent / f".{target.name[:80]}.{secrets.token_hex(4)}.part", None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        mask = os.umask(0)
        os.umask(mask)
        for file in part.iterdir():
            _flush(file)
            file.chmod(0o666 & ~mask)  # safetensors makes its files private
        part.chmod(0o777 & ~mask)
        if target.exists():
            old = part.with_suffix(".old")
            os.replace(target, old)
        try:
            os.replace(part, target)
        except BaseException:
            if old is not None:
                os.replace(old, target)
                old = None
            raise
    except OSError as error:
        raise CannotWrite.of(folder, error) from error
    finally:
        for leftover in (part, old):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


def _check_replaceable(target: Path, name: str) -> None:
    try:
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise VitError(f"cannot write the model to {name}: it is a file (an ONNX file is asked for by .onnx)")
        others = sorted(entry.name for entry in target.iterdir() if entry.name not in FILES)
    except OSError as error:
        raise VitError(f"cannot write {name}: {error.strerror or error}") from None
    if others:
        raise VitError(f"cannot write the model to {name}: it holds other files ({others[0]!r}); name a new folder")


def _flush(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
