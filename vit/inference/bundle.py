"""Write and read bundles: folders with the weights, configuration, model card and ONNX file of a trained model.

A bundle has `model.safetensors` (with timm's names if timm has the model), `config.json` (timm's local-dir format, with
the model's description under `vit`), `README.md` (the model card) and, by default, `model.onnx`.

Writing is atomic: a bundle is built in a hidden folder beside it and then renamed.  An older bundle stays until the new
one is complete; a folder with other files is never replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
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
    """Write the bundle atomically, with a verified `model.onnx` if `onnx` is true.

    `images`, normalised float32 (N, C, H, W), are used to compare that file with torch; None: noise.  Returns the
    largest difference, or None without an ONNX file.
    The model keeps its device, dtype and mode; the weights are written as float32.
    Raises `VitError` when the description does not fit the model, the folder holds other files, the disk is full or
    cannot be written, or the ONNX file cannot be made (`vit.inference.export.fits_onnx` checks the size before).
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
        except SafetensorError as error:  # such as a full disk
            raise CannotWrite(f"cannot write {os.fspath(folder)}: {error}") from None
        config = with_checksum({**timm_config(description), "vit": description.to_dict()})
        # ASCII keeps class names that are not valid Unicode
        (part / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="ascii")
        count = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(description, parameters=count, onnx=onnx)
        (part / CARD).write_text(card, encoding="utf-8")
        return export_onnx(part / ONNX, model, description, images=images) if onnx else None


def read_bundle(folder: str | os.PathLike[str]) -> Description:
    """Read the description in a bundle's `config.json`, without weights or torch.

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
    """Check whether the folder has a `config.json` and weights or an ONNX file."""
    return (folder / CONFIG).is_file() and ((folder / WEIGHTS).is_file() or (folder / ONNX).is_file())


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `folder` on a clean exit and is removed on an exception.

    Raises `VitError` when `folder` exists and is neither empty nor a bundle, or when it cannot be written; `folder` is
    then unchanged.
    """
    target = Path(os.path.realpath(folder))
    _check_replaceable(target, os.fspath(folder))
    part, old = target.parent / f".{target.name[:80]}.{os.urandom(4).hex()}.part", None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        mask = os.umask(0)
        os.umask(mask)
        for file in part.iterdir():
            _flush(file)
            file.chmod(0o666 & ~mask)  # safetensors writes private files
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
