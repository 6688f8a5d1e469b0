"""Read weights and descriptions that this project saved: checkpoints, bundle folders, run folders.

The description is returned unchecked, as the plain table in the file (`vit.inference.description` explains it); the
caller checks the parts that it uses.  Imports torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vit.checksums import read_config
from vit.errors import VitError
from vit.pretrained.lora import merge_lora
from vit.pretrained.reading import is_state_dict, load_safetensors, read_pickled

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a training checkpoint (`.ckpt`); return the model's weights, with LoRA merged, and its description.

    Raises `VitError` when the file is missing, empty, truncated, not a checkpoint of this project, or would need code
    to load.
    """
    path = Path(path)
    return split_checkpoint(read_pickled(path), path)


def split_checkpoint(checkpoint: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the contents of a checkpoint into weights and description; see `read_checkpoint`."""
    if not is_native_checkpoint(checkpoint):
        what = "a plain state dict" if is_state_dict(checkpoint) else "a foreign checkpoint"
        raise VitError(f"{path} is {what} that does not describe its model: expected one that this project wrote")
    table = checkpoint["vit"]
    prefix, entries = table.get("weights_prefix", "model."), checkpoint.get("state_dict")
    if not isinstance(prefix, str) or not isinstance(entries, Mapping):
        raise VitError(f"{path} describes a model but holds no weights for it (state_dict, weights_prefix)")
    weights = {
        key[len(prefix) :]: value for key, value in entries.items() if isinstance(key, str) and key.startswith(prefix)
    }
    for key, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise VitError(f"{path}: the weight {key} is {kind}: expected a tensor of floating-point numbers")
    if not weights:
        raise VitError(f"{path} holds no weights whose name starts with {prefix!r}")
    if table.get("lora") is not None:
        weights = merge_lora(weights, table["lora"], path)
    return weights, table


def is_native_checkpoint(checkpoint: Any) -> bool:
    """Check whether the contents of a file are a checkpoint of this project."""
    return isinstance(checkpoint, dict) and isinstance(checkpoint.get("vit"), dict)


def find_native(folder: Path) -> Path | None:
    """Find the best model in a run folder or a bundle: its bundle, else its best checkpoint, else its last.

    Returns the bundle's folder or the checkpoint; None if there is neither.
    """
    for bundle in (folder, folder / "model"):
        if (bundle / WEIGHTS).is_file() and (bundle / CONFIG).is_file() and "vit" in read_config(bundle / CONFIG):
            return bundle
    for name in ("best.ckpt", "last.ckpt"):
        if (folder / "checkpoints" / name).is_file():
            return folder / "checkpoints" / name
    return None


def read_native(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and description of a checkpoint, a bundle folder or a bundle's file of weights.

    Raises `VitError` when it cannot be read.
    """
    if path.is_file() and path.suffix != ".safetensors":
        return read_checkpoint(path)
    folder = path if path.is_dir() else path.parent
    table = read_config(folder / CONFIG).get("vit")
    if not isinstance(table, dict):
        raise VitError(f"{folder / CONFIG} does not describe its model (key 'vit')")
    return load_safetensors(folder / WEIGHTS), table


def check_sizes(architecture: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> None:
    """Compare the sizes in an architecture with the tensors, so that no description can ask for more memory.

    Raises `VitError` when they differ.
    """
    try:
        _check_sizes(architecture, weights, source)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise VitError(f"{source}: its architecture cannot be read ({type(error).__name__}: {error})") from None


def _check_sizes(a: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> None:
    expected: dict[str, tuple[int, ...]] = {"head.weight": (a["num_classes"], a["width"])} if a["num_classes"] else {}
    expected["patch_embed.proj.weight"] = (a["width"], a["in_channels"], *a["patch_size"])
    for key, shape in expected.items():
        if key not in weights:
            raise VitError(f"{source} has no weight called {key}: it does not hold a Vision Transformer of this kind")
        if tuple(weights[key].shape) != shape:
            raise VitError(f"{source}: {key} has shape {tuple(weights[key].shape)}, its description says {shape}")
    layers = {match.group(1) for key in weights if (match := re.match(r"blocks\.(\d+)\.", str(key)))}
    if len(layers) != a["depth"]:
        raise VitError(f"{source} has weights for {len(layers)} blocks, its description says {a['depth']}")
    hidden = next((tensor.shape[0] for key, tensor in weights.items() if _HIDDEN.search(str(key))), None)
    if hidden is not None and a.get("mlp") == "swiglu_packed":
        hidden //= 2
    ratio = a.get("mlp_ratio", 4.0)
    finite = isinstance(ratio, int | float) and not isinstance(ratio, bool) and math.isfinite(ratio)
    if not finite or int(a["width"] * ratio) != hidden:
        raise VitError(f"{source}: blocks have {hidden} hidden channels, its description says mlp_ratio {ratio!r}")
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    if registers != a.get("registers", 0):
        raise VitError(f"{source}: {registers} registers, its description says {a.get('registers', 0)}")


_HIDDEN = re.compile(r"^blocks\.\d+\.mlp\.fc1(_g)?\.weight$")
