"""Weights from files, and models from weights.

Notable
- A checkpoint is read with `weights_only=True`: tensors and plain containers.  A file that needs anything else would
  run code of its author's choosing, so it is refused, and the message says what it asked for.
- Files are mapped, not read into memory: of a training checkpoint only the weights asked for get there.
- A checkpoint's checksums are compared (under a second a GB), which torch does not do: changed bytes are no weights.
- Weights fit a model exactly or not at all: missing, unexpected and misshapen entries are named.
- Sizes in a description are compared with the tensors beside it before anything of that size is allocated.

Imports torch.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vit.errors import VitError
from vit.inference.description import Description
from vit.model import VisionTransformer


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Description]:
    """The weights of the model in a training checkpoint (`.ckpt`) and its description.

    Raises `VitError` when the file is missing, empty, truncated, not a checkpoint, not one of this project's, or
    would need code to load.
    """
    path = Path(path)
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("vit"), dict):
        what = "a plain state dict" if _is_state_dict(checkpoint) else "a foreign checkpoint"
        raise VitError(f"{path} is {what} that does not describe its model: expected one that train.py wrote")
    description = Description.from_dict(checkpoint["vit"], path)
    prefix = checkpoint["vit"].get("weights_prefix", "model.")
    entries = checkpoint.get("state_dict")
    if not isinstance(prefix, str) or not isinstance(entries, Mapping):
        raise VitError(f"{path} describes a model but holds no weights for it (state_dict, weights_prefix)")
    weights = {key[len(prefix) :]: value for key, value in entries.items() if str(key).startswith(prefix)}
    if not weights:
        raise VitError(f"{path} holds no weights whose name starts with {prefix!r}")
    return weights, description


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file, on the CPU.  Raises `VitError` when it cannot be read as one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    _check_readable(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise VitError(f"{path} is truncated or not a safetensors file: {error}") from None
    except OSError as error:
        raise VitError(f"cannot read {path}: {error.strerror or error}") from None


def build(
    description: Description, weights: Mapping[str, Any], source: str | os.PathLike[str] = "the weights"
) -> VisionTransformer:
    """The described model with these weights, on the CPU in float32, in evaluation mode.

    Raises `VitError`, naming `source`, when the architecture is impossible or the weights do not fit it exactly.
    """
    source = os.fspath(source)
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise VitError(f"{source}: {key} is {type(value).__name__}, not a tensor")
    _check_sizes(description.architecture, weights, source)
    try:
        with _Undrawn():
            # any scheme would do, the weights follow; this one computes nothing
            model = VisionTransformer(**{**description.architecture, "init": "trunc_normal"})
    except VitError as error:
        raise VitError(f"{source}: {error}") from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VitError(f"{source}: its architecture cannot be built: {error}") from None
    model.architecture = dict(description.architecture)
    _check_fit(model, weights, source)
    model.load_state_dict(dict(weights))
    return model.eval()


def _read(path: Path) -> Any:
    _check_readable(path)
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # torch's format since 1.6; only this one can be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how foreign files were pickled
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global:?|class|builtin)\s+`?([A-Za-z_][\w.]*\.\w+)", str(error))
        name = asked.group(1) if asked else None if zipped else _asked_for(path)
        if name:
            raise VitError(
                f"{path} was refused: loading it would run code ({name}), which could do anything to this "
                "computer; only checkpoints of tensors and plain values are read"
            ) from None
        raise VitError(f"{path} is not a checkpoint, or a damaged one") from None
    except Exception as error:  # torch meets damaged bytes with many kinds
        reason = str(error).partition("\n")[0].partition(". ")[0][:120]
        told = f": {reason}" if " " in reason else ""  # some say but a number
        raise VitError(f"{path} is truncated or not a checkpoint{told}") from None
    if zipped and not _sums_fit(path):
        raise VitError(f"{path} is damaged: its checksums do not fit what is in it")
    return content


def _sums_fit(path: Path) -> bool:
    """Whether every part of a file in torch's format, a zip archive, has the bytes that were written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile):
        return False


def _asked_for(path: Path) -> str | None:
    """The first name that a bare pickle would import, read off its instructions without obeying any."""
    words: list[str] = []
    try:
        with open(path, "rb") as file:
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL" and isinstance(argument, str):
                    return argument.replace(" ", ".")
                if code.name == "STACK_GLOBAL" and len(words) == 2:
                    return ".".join(words)
                if isinstance(argument, str):
                    words = [*words[-1:], argument]
    except Exception:  # not a pickle at all
        return None
    return None


def _check_readable(path: Path) -> None:
    try:
        if path.is_dir():
            raise VitError(f"{path} is a folder, not a file of weights")
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise VitError(f"cannot read {path}: {error.strerror or error}") from None
    if empty:
        raise VitError(f"{path} is empty")


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _check_sizes(architecture: dict[str, Any], weights: Mapping[str, Tensor], source: str) -> None:
    """Compare what decides the model's size with the tensors at hand, so that no text can ask for more memory."""
    expected = {
        "head.weight": (architecture["num_classes"], architecture["width"]),
        "patch_embed.proj.weight": (architecture["width"], architecture["in_channels"], *architecture["patch_size"]),
    }
    for key, shape in expected.items():
        if key not in weights:
            raise VitError(f"{source} has no weight called {key}: it does not hold a Vision Transformer of this kind")
        if tuple(weights[key].shape) != shape:
            raise VitError(f"{source}: {key} has shape {tuple(weights[key].shape)}, its description says {shape}")
    layers = {match.group(1) for key in weights if (match := re.match(r"blocks\.(\d+)\.", str(key)))}
    if len(layers) != architecture["depth"]:
        raise VitError(f"{source} has weights for {len(layers)} blocks, its description says {architecture['depth']}")
    hidden = next((tensor.shape[0] for key, tensor in weights.items() if str(key).endswith("mlp.fc1.bias")), None)
    ratio = architecture.get("mlp_ratio", 4.0)
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or int(architecture["width"] * ratio) != hidden:
        raise VitError(f"{source}: blocks have {hidden} hidden channels, its description says mlp_ratio {ratio!r}")
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    if registers != architecture.get("registers", 0):
        raise VitError(f"{source}: {registers} registers, its description says {architecture.get('registers', 0)}")


def _check_fit(model: VisionTransformer, weights: Mapping[str, Tensor], source: str) -> None:
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    misshapen = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    complaints = [
        f"{name} {_first(keys)}"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if complaints:
        raise VitError(f"{source}: the weights do not fit the described model: {'; '.join(complaints)}")


def _first(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


class _Undrawn(TorchFunctionMode):
    """Zeros in place of torch's random draws while a model is built whose weights are replaced at once.

    Drawing takes seconds for a ViT-B.  Zeros, not whatever is in memory: some of torch's initialisers draw again
    until the values lie in a range.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == "torch.nn.init":
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)
