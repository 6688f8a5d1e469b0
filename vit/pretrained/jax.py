"""The original checkpoints of the Vision Transformer: `.npz` files of JAX arrays, by their names, as timm's.

Facts of the format (https://github.com/google-research/vision_transformer, https://github.com/google-research/big_vision):

- kernels multiply from the right, so a linear layer's is (in, out) and a convolution's (height, width, in, out);
- attention keeps its heads apart: query, key and value are (D, H, d), `out` is (H, d, D);
- blocks are `encoderblock_0`, ...; a model scanned over its layers has one `encoderblock` with a first axis for them;
- layers inside a block are numbered as they were made, which differs between the two projects, so norms are told apart
  by their order;
- parameters may stand under `opt/target/`, `params/` or `params/img/`; bfloat16 arrives as two bytes of nothing.

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
_MOST_PACKED = 20
"""Weights hardly shrink when packed: a file that promises this many times its size is there to fill the memory."""
_PLAIN = {
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
    """All arrays of an `.npz` file, in float32.

    Raises `VitError` when it is missing, truncated, no such file, or holds what only code could read.
    """
    path = Path(path)
    check_readable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_PACKED * path.stat().st_size:
                raise VitError(f"{path} would unpack to over {_MOST_PACKED} times its size: no weights do")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _numbers(arrays[name]) for name in arrays.files}
    except MemoryError:  # an array that says it is larger than the file
        raise VitError(f"{path} holds an array that does not fit into memory") from None
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0][:120]
        raise VitError(f"{path} is truncated or not an .npz file of arrays: {reason}") from None


def from_jax(arrays: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, Tensor], int | None]:
    """Arrays of an original checkpoint -> a state dict with timm's names, and how many heads attention has.

    Arrays that are no part of a model keep their names.  Raises `VitError` when there is no Vision Transformer in them.
    """
    root = next((root for root in _ROOTS if root + _PATCHES in arrays), None)
    if root is None:
        raise VitError(f"{source} holds no original Vision Transformer: it has no array {_PATCHES}")
    own = {name.removeprefix(root): array for name, array in arrays.items() if name.startswith(root)}
    kernel = own.pop(_PATCHES)
    if kernel.ndim != 4:
        raise VitError(f"{source}: {_PATCHES} has {kernel.ndim} axes, not height, width, channels and width of a token")
    state = {"patch_embed.proj.weight": torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())}
    blocks: dict[int, dict[str, np.ndarray]] = {}
    rest = {}
    for name, array in own.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            rest[name] = array
        elif match[1] is not None:
            blocks.setdefault(int(match[1]), {})[f"{match[2]}_{match[3]}/{match[4]}"] = array
        else:
            for layer, part in enumerate(array):
                blocks.setdefault(layer, {})[f"{match[2]}_{match[3]}/{match[4]}"] = part
    heads = None
    try:
        for layer, parts in blocks.items():
            found, heads = _block(parts)
            state |= {f"blocks.{layer}.{name}": tensor for name, tensor in found.items()}
        state |= _around(rest)
    except (KeyError, ValueError, IndexError) as error:
        raise VitError(f"{source} is no Vision Transformer as its authors save it ({error})") from None
    return state, heads


def _around(rest: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """What is not in a block."""
    state, pooling = {}, {}
    for name, array in rest.items():
        if name in _PLAIN:
            state[_PLAIN[name]] = _tensor(array)
        elif name == "head/kernel":
            state["head.weight"] = _tensor(array.T)
        elif name.startswith("MAPHead_0/"):
            pooling[name.removeprefix("MAPHead_0/")] = array
        elif not name.startswith("pre_logits/"):  # of pretraining only; what is fine-tuned goes without
            state[name] = _tensor(array)
    if pooling:
        query, key, value = (
            _rows(pooling, "MultiHeadDotProductAttention_0/" + name) for name in ("query", "key", "value")
        )
        state |= {f"attn_pool.q.{kind}": _tensor(query[kind]) for kind in ("weight", "bias")}
        state |= {f"attn_pool.kv.{k}": _tensor(np.concatenate([key[k], value[k]])) for k in ("weight", "bias")}
        state |= {f"attn_pool.proj.{k}": t for k, t in _out(pooling, "MultiHeadDotProductAttention_0/out").items()}
        state |= {f"attn_pool.mlp.{name}": t for name, t in _mlp(pooling, "MlpBlock_0").items()}
    return state


def _block(parts: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], int]:
    """One block's arrays by their names inside it, and its number of heads."""
    layers = sorted({name.split("/")[0] for name in parts}, key=lambda name: int(name.split("_")[-1]))
    norms = [name for name in layers if name.startswith("LayerNorm")]
    attention = next(name for name in layers if name.startswith("MultiHeadDotProductAttention"))
    mlp = next(name for name in layers if name.startswith("MlpBlock"))
    if len(norms) != 2:
        raise ValueError(f"{len(norms)} norms in a block")
    state: dict[str, Tensor] = {}
    for norm, name in zip(norms, ("norm1", "norm2"), strict=True):
        state |= {f"{name}.weight": _tensor(parts[f"{norm}/scale"]), f"{name}.bias": _tensor(parts[f"{norm}/bias"])}
    three = [_rows(parts, f"{attention}/{name}") for name in ("query", "key", "value")]
    state |= {f"attn.qkv.{k}": _tensor(np.concatenate([each[k] for each in three])) for k in ("weight", "bias")}
    state |= {f"attn.proj.{k}": t for k, t in _out(parts, f"{attention}/out").items()}
    state |= {f"mlp.{name}": t for name, t in _mlp(parts, mlp).items()}
    return state, parts[f"{attention}/query/kernel"].shape[1]


def _rows(parts: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """A projection into heads, (D, H, d) and (H, d), as a linear layer's (H d, D) and (H d)."""
    kernel = parts[f"{name}/kernel"]
    return {"weight": kernel.reshape(kernel.shape[0], -1).T, "bias": parts[f"{name}/bias"].reshape(-1)}


def _out(parts: Mapping[str, np.ndarray], name: str) -> dict[str, Tensor]:
    """The projection out of heads, (H, d, D), as a linear layer's (D, H d)."""
    kernel = parts[f"{name}/kernel"]
    return {"weight": _tensor(kernel.reshape(-1, kernel.shape[-1]).T), "bias": _tensor(parts[f"{name}/bias"])}


def _mlp(parts: Mapping[str, np.ndarray], name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number in (0, 1):
        state[f"fc{number + 1}.weight"] = _tensor(parts[f"{name}/Dense_{number}/kernel"].T)
        state[f"fc{number + 1}.bias"] = _tensor(parts[f"{name}/Dense_{number}/bias"])
    return state


def _numbers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, which NumPy does not know
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
