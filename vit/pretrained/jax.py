"""Convert the original checkpoints of the Vision Transformer, `.npz` files of JAX arrays, to timm's names.

The format (https://github.com/google-research/vision_transformer, https://github.com/google-research/big_vision):

- kernels multiply from the right: a linear layer has (in, out), a convolution (height, width, in, out);
- attention has separate heads: query, key and value are (D, H, d), `out` is (H, d, D);
- blocks are `encoderblock_0`, ...; a model scanned over its layers has one `encoderblock` with the layers as first
  axis;
- layers in a block are numbered in the order of creation, which differs between the two projects, so norms are
  identified by their order;
- parameters may be under `opt/target/`, `params/` or `params/img/`; bfloat16 has a NumPy type of two opaque bytes.

Imports torch.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit.errors import VitError
from vit.pretrained.reading import check_readable

_ROOTS = ("", "opt/target/", "params/", "params/img/")
_PATCHES = "embedding/kernel"
_BLOCK = re.compile(r"Transformer/encoderblock(?:_(\d+))?/(\w+?)_(\d+)/(.+)")
_MAX_COMPRESSION = 20
"""Largest ratio of unpacked to packed size: weights hardly compress, so a larger one is an attack on the memory."""
_NAMES = {
    "embedding/bias": "patch_embed.proj.bias",
    "cls": "cls_token",
    "pos_embedding": "pos_embed",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "head/bias": "head.bias",
    "MAPHead_0/probe": "attn_pool.latent",
    "MAPHead_0/LayerNorm_0/scale": "attn_pool.norm.weight",
    "MAPHead_0/LayerNorm_0/bias": "attn_pool.norm.bias",
}


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all arrays of an `.npz` file, in float32.

    Raises `VitError` when it is missing, truncated, not such a file, or holds pickled objects.
    """
    path = Path(path)
    check_readable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_COMPRESSION * path.stat().st_size:
                raise VitError(f"{path} would unpack to over {_MAX_COMPRESSION} times its size: no weights do")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _to_float32(arrays[name]) for name in arrays.files}
    except MemoryError:  # an array that says it is larger than the file
        raise VitError(f"{path} holds an array that does not fit into memory") from None
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0][:120]
        raise VitError(f"{path} is truncated or not an .npz file of arrays: {reason}") from None


def from_jax(arrays: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, Tensor], int | None]:
    """Convert arrays of an original checkpoint to a state dict with timm's names; return it and the number of heads.

    Other arrays keep their names.  Raises `VitError` when the arrays hold no Vision Transformer.
    """
    root = next((root for root in _ROOTS if root + _PATCHES in arrays), None)
    if root is None:
        raise VitError(f"{source} holds no original Vision Transformer: it has no array {_PATCHES}")
    named = {name.removeprefix(root): array for name, array in arrays.items() if name.startswith(root)}
    kernel = named.pop(_PATCHES)
    if kernel.ndim != 4:
        raise VitError(f"{source}: {_PATCHES} has {kernel.ndim} axes, not height, width, channels and width of a token")
    state = {"patch_embed.proj.weight": torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())}
    blocks: dict[int, dict[str, np.ndarray]] = {}
    others = {}
    for name, array in named.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            others[name] = array
        elif match[1] is not None:
            blocks.setdefault(int(match[1]), {})[f"{match[2]}_{match[3]}/{match[4]}"] = array
        else:
            for layer, part in enumerate(array):
                blocks.setdefault(layer, {})[f"{match[2]}_{match[3]}/{match[4]}"] = part
    heads = None
    try:
        for layer, parts in blocks.items():
            found, heads = _convert_block(parts)
            state |= {f"blocks.{layer}.{name}": tensor for name, tensor in found.items()}
        state |= _other_tensors(others)
    except (KeyError, ValueError, IndexError) as error:
        raise VitError(f"{source} is no Vision Transformer as its authors save it ({error})") from None
    return state, heads


def _other_tensors(others: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert the arrays outside the blocks."""
    state, pooling = {}, {}
    for name, array in others.items():
        if name in _NAMES:
            state[_NAMES[name]] = _tensor(array)
        elif name == "head/kernel":
            state["head.weight"] = _tensor(array.T)
        elif name.startswith("MAPHead_0/"):
            pooling[name.removeprefix("MAPHead_0/")] = array
        elif not name.startswith("pre_logits/"):  # used only in pretraining
            state[name] = _tensor(array)
    if pooling:
        query, key, value = (
            _convert_qkv(pooling, "MultiHeadDotProductAttention_0/" + name) for name in ("query", "key", "value")
        )
        state |= {f"attn_pool.q.{kind}": _tensor(query[kind]) for kind in ("weight", "bias")}
        state |= {f"attn_pool.kv.{k}": _tensor(np.concatenate([key[k], value[k]])) for k in ("weight", "bias")}
        out = _convert_out(pooling, "MultiHeadDotProductAttention_0/out")
        state |= {f"attn_pool.proj.{kind}": tensor for kind, tensor in out.items()}
        state |= {f"attn_pool.mlp.{name}": t for name, t in _convert_mlp(pooling, "MlpBlock_0").items()}
    return state


def _convert_block(parts: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], int]:
    """Convert the arrays of one block; return them by their names inside it, and the number of heads."""
    layers = sorted({name.split("/")[0] for name in parts}, key=lambda name: int(name.split("_")[-1]))
    norms = [name for name in layers if name.startswith("LayerNorm")]
    attention = next(name for name in layers if name.startswith("MultiHeadDotProductAttention"))
    mlp = next(name for name in layers if name.startswith("MlpBlock"))
    if len(norms) != 2:
        raise ValueError(f"{len(norms)} norms in a block")
    state: dict[str, Tensor] = {}
    for norm, name in zip(norms, ("norm1", "norm2"), strict=True):
        state |= {f"{name}.weight": _tensor(parts[f"{norm}/scale"]), f"{name}.bias": _tensor(parts[f"{norm}/bias"])}
    qkv = [_convert_qkv(parts, f"{attention}/{name}") for name in ("query", "key", "value")]
    state |= {f"attn.qkv.{k}": _tensor(np.concatenate([part[k] for part in qkv])) for k in ("weight", "bias")}
    state |= {f"attn.proj.{k}": t for k, t in _convert_out(parts, f"{attention}/out").items()}
    state |= {f"mlp.{name}": t for name, t in _convert_mlp(parts, mlp).items()}
    return state, parts[f"{attention}/query/kernel"].shape[1]


def _convert_qkv(parts: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Convert a projection into heads, (D, H, d) and (H, d), to a linear layer's (H d, D) and (H d)."""
    kernel = parts[f"{name}/kernel"]
    return {"weight": kernel.reshape(kernel.shape[0], -1).T, "bias": parts[f"{name}/bias"].reshape(-1)}


def _convert_out(parts: Mapping[str, np.ndarray], name: str) -> dict[str, Tensor]:
    """Convert the projection out of heads, (H, d, D), to a linear layer's (D, H d)."""
    kernel = parts[f"{name}/kernel"]
    return {"weight": _tensor(kernel.reshape(-1, kernel.shape[-1]).T), "bias": _tensor(parts[f"{name}/bias"])}


def _convert_mlp(parts: Mapping[str, np.ndarray], name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number in (0, 1):
        state[f"fc{number + 1}.weight"] = _tensor(parts[f"{name}/Dense_{number}/kernel"].T)
        state[f"fc{number + 1}.bias"] = _tensor(parts[f"{name}/Dense_{number}/bias"])
    return state


def _to_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, which NumPy does not know
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
