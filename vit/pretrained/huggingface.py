"""Convert state dicts of other projects to timm's names.

Three steps; each leaves unknown names unchanged:

1. `unwrap` takes the weights out of a checkpoint; averaged weights come first, as in timm.
2. `to_timm_names` converts names of Hugging Face's transformers and of the original DINOv3 by the tables below, and
   names that timm knows (OpenAI's CLIP, OpenCLIP, the original DINOv2, DeiT III, BEiT-3, AIMv2, I-JEPA and more) by
   timm's own function; then it removes the common prefix ("module.", "backbone.", ...).
3. Tensors of other parts of a larger model (a text tower, a decoder) are left out, and reported.

Imports torch; timm only where its function is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vit.errors import VitError
from vit.pretrained.convert import is_dinov3
from vit.pretrained.fit import format_names
from vit.pretrained.reading import is_state_dict

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model", "module", "encoder", "net", "params"),
)
"""Keys under which checkpoints keep weights; the first one found is taken."""

_PATCHES = "patch_embed.proj.weight"
_HF_PATCHES = "embeddings.patch_embeddings.projection.weight"
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
_HF = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
        (_LAYER + r"(?:layernorm_before|norm1)\.(.+)", r"blocks.\1.norm1.\2"),
        (_LAYER + r"(?:layernorm_after|norm2)\.(.+)", r"blocks.\1.norm2.\2"),
        (_LAYER + r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.(.+)", r"blocks.\1.attn.\2.\3"),
        (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
        (_LAYER + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (_LAYER + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (_LAYER + r"mlp\.(gate|up)_proj\.(.+)", r"blocks.\1.mlp.\2.\3"),
        (_LAYER + r"layer_scale(1|2)\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"layernorm\.(weight|bias)", r"norm.\1"),
        (r"(?:cls_)?classifier\.(weight|bias)", r"head.\1"),
        (r"distillation_classifier\.(weight|bias)", r"head_dist.\1"),
    )
]
"""Names in transformers' ViT, DeiT and DINOv2, in files and in version 5, without the prefix ("vit.")."""
_HF_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")
_JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}
_IGNORED = re.compile(r"(.*\.)?(mask_token|decoder.*|pooler\..*|pre_logits\..*)")
"""Names used only in pretraining: the token of masked patches, a decoder, a layer between body and head."""


def unwrap(content: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Take the weights out of the contents of a file; return them and notes on the choice.

    Raises `VitError` when there are none.
    """
    notes: list[str] = []
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        inner = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if is_state_dict(content) or (tensors and not inner):
            return tensors, notes
        if not inner:
            break
        if len(inner) > 1:
            notes.append(f"of {' and '.join(inner)} in the file, {inner[0]} was taken")
        content = content[inner[0]]
    raise VitError(f"{source} holds no weights: expected tensors by name, perhaps under {', '.join(WRAPPERS[:6])}")


def to_timm_names(
    state: Mapping[str, Tensor], architecture: Mapping[str, Any], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename weights to the names of timm's model of this architecture; return them and notes.

    Unknown names stay, so that fitting the weights refuses them.  Raises `VitError` when timm's function cannot convert
    the weights.
    """
    state = dict(state)
    notes: list[str] = []
    hf_key = next((key for key in state if key.endswith(_HF_PATCHES)), None)
    if hf_key is not None:
        state = _from_transformers(state, hf_key.removesuffix(_HF_PATCHES), notes)
    elif "storage_tokens" in state:
        state = _from_dinov3(state, architecture)
    else:
        state = _from_timm_filter(state, architecture, source, notes)
    prefixes = {key.removesuffix(_PATCHES) for key in state if key.endswith(_PATCHES)}
    if len(prefixes) == 1 and (prefix := prefixes.pop()):
        _note_left_out([key for key in state if not key.startswith(prefix)], notes)
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    left_out = [key for key in state if _IGNORED.fullmatch(key)]
    _note_left_out(left_out, notes)
    return _with_registers({key: value for key, value in state.items() if key not in left_out}, architecture), notes


def _note_left_out(names: list[str], notes: list[str]) -> None:
    if names:
        what = "tensor of another part is" if len(names) == 1 else "tensors of other parts are"
        notes.append(f"{len(names)} {what} left aside: {format_names(names)}")


def _from_transformers(state: dict[str, Tensor], prefix: str, notes: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    left_out = [key for key in state if not key.startswith((prefix, *_HF_HEADS))]
    _note_left_out(left_out, notes)
    for key in state.keys() - left_out:
        name = key.removeprefix(prefix)
        matches = ((pattern.fullmatch(name), replacement) for pattern, replacement in _HF)
        found[next((match.expand(new) for match, new in matches if match), name)] = state[key]
    for whole, parts in _JOINED.items():
        first = f".{parts[0]}."
        for key in [key for key in found if first in key]:
            names = [key.replace(first, f".{part}.") for part in parts]
            if all(name in found for name in names):
                found[key.replace(first, f".{whole}.")] = torch.cat([found.pop(name) for name in names])
    return found


def _with_registers(state: dict[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """Add the position of the class token to the token if the architecture has no positions for prefix tokens.

    DINOv2 with registers has a position only for the class token.  The sum is the same, so the model is the same
    (Darcet et al. 2024 give registers no position).
    """
    tokens, positions = state.get("cls_token"), state.get("pos_embed")
    if architecture.get("position_prefix", True) or architecture.get("position") != "learned":
        return state
    if tokens is None or positions is None or positions.ndim != 3 or tokens.shape[::2] != positions.shape[::2]:
        return state
    root = round((positions.shape[1] - 1) ** 0.5)
    if positions.shape[1] < 2 or root * root != positions.shape[1] - 1:
        return state
    return {**state, "cls_token": tokens + positions[:, :1], "pos_embed": positions[:, 1:]}


def _from_dinov3(state: dict[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert names of Meta's DINOv3, which masks the biases of the keys and computes its positions."""
    found = {}
    for key, value in state.items():
        if key.endswith((".bias_mask", ".periods")) or key.startswith("local_cls_norm."):
            continue
        name = key.replace("storage_tokens", "reg_token")
        name = name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
        if key.endswith("attn.qkv.bias"):
            if architecture.get("qkv_bias"):
                found[name.replace("qkv.bias", "q_bias")], _, found[name.replace("qkv.bias", "v_bias")] = value.chunk(3)
            continue
        found[name] = value
    return found


def _from_timm_filter(
    state: dict[str, Tensor], architecture: Mapping[str, Any], source: str, notes: list[str]
) -> dict[str, Tensor]:
    """Convert names with timm's own `checkpoint_filter_fn`."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    for prefix in ("visual.", "module.visual.", "vision_encoder.", "radio_model.model."):
        if any(key.startswith(prefix) for key in state):
            _note_left_out([key for key in state if not key.startswith(prefix)], notes)
    # the sizes of the weights stay, so that all resampling happens later
    width, channels = architecture["width"], architecture["in_channels"]
    kernel = next((value for key, value in state.items() if key.endswith(_PATCHES) and value.ndim == 4), None)
    shape = (width, channels, *architecture["patch_size"]) if kernel is None else tuple(kernel.shape)
    stand_in: Any = SimpleNamespace(
        patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=torch.empty(shape, device="meta"))),
        pos_embed=None,
        head=nn.utils.skip_init(nn.Linear, 1, 1) if architecture["num_classes"] else nn.Identity(),
    )
    scaled = any(re.search(r"\.gamma_[12]$", key) for key in state)
    try:
        return dict(checkpoint_filter_fn(state, stand_in, adapt_layer_scale=scaled and not is_dinov3(architecture)))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise VitError(f"{source} holds weights that timm cannot take ({type(error).__name__}: {error})") from None
