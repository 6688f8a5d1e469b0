"""State dicts as other projects name them, brought to timm's names.

Three steps, each leaves alone what it does not know:

1. `unwrap`: of a checkpoint of many things, the weights; averaged ones where there are both, as timm does.
2. `in_timms_names`: names of Hugging Face's transformers and of the original DINOv3 by the tables below, and what timm
   itself knows (OpenAI's CLIP, OpenCLIP, the original DINOv2, DeiT III, BEiT-3, AIMv2, I-JEPA and more) by timm's own
   function; then, whatever it is called before its first layer ("module.", "backbone.", ...) goes.
3. What belongs to other parts of a larger model (a text tower, a decoder) is left aside, and said to be.

Imports torch; timm where its function is needed.
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
from vit.pretrained.fit import some
from vit.pretrained.reading import is_state_dict

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model", "module", "encoder", "net", "params"),
)
"""Where checkpoints keep weights, in the order in which they are taken."""

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
"""transformers' ViT, DeiT and DINOv2, as files have them and as version 5 calls them, without the front ("vit.")."""
_HF_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")
_JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}
_ASIDE = re.compile(r"(.*\.)?(mask_token|decoder.*|pooler\..*|pre_logits\..*)")
"""Of pretraining only: a masked image's token, a decoder, a layer between body and head."""


def unwrap(content: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in what was read from a file, and remarks on which were taken.

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


def in_timms_names(
    state: Mapping[str, Tensor], architecture: Mapping[str, Any], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under the names that timm's model of this architecture has for them, and remarks.

    Names that are not known stay, for whoever fits the weights to refuse.  Raises `VitError` when timm's function
    cannot take them.
    """
    state = dict(state)
    notes: list[str] = []
    hugging = next((key for key in state if key.endswith(_HF_PATCHES)), None)
    if hugging is not None:
        state = _from_transformers(state, hugging.removesuffix(_HF_PATCHES), notes)
    elif "storage_tokens" in state:
        state = _from_dinov3(state, architecture)
    else:
        state = _from_known(state, architecture, source, notes)
    prefixes = {key.removesuffix(_PATCHES) for key in state if key.endswith(_PATCHES)}
    if len(prefixes) == 1 and (prefix := prefixes.pop()):
        _note_aside([key for key in state if not key.startswith(prefix)], notes)
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    aside = [key for key in state if _ASIDE.fullmatch(key)]
    _note_aside(aside, notes)
    return _with_registers({key: value for key, value in state.items() if key not in aside}, architecture), notes


def _note_aside(names: list[str], notes: list[str]) -> None:
    if names:
        what = "tensor of another part is" if len(names) == 1 else "tensors of other parts are"
        notes.append(f"{len(names)} {what} left aside: {some(names)}")


def _from_transformers(state: dict[str, Tensor], prefix: str, notes: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    aside = [key for key in state if not key.startswith((prefix, *_HF_HEADS))]
    _note_aside(aside, notes)
    for key in state.keys() - aside:
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
    """DINOv2 with registers has a position for the class token alone; where none of the front tokens has one, add it.

    Same sum, so same model (Darcet et al. 2024 give registers no position).
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
    """Meta's own DINOv3: its keys' biases are masked, its positions computed."""
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


def _from_known(
    state: dict[str, Tensor], architecture: Mapping[str, Any], source: str, notes: list[str]
) -> dict[str, Tensor]:
    """Names that timm's own `checkpoint_filter_fn` knows."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    for prefix in ("visual.", "module.visual.", "vision_encoder.", "radio_model.model."):
        if any(key.startswith(prefix) for key in state):
            _note_aside([key for key in state if not key.startswith(prefix)], notes)
    # sizes stay as the weights have them, so that what is resampled later is all that is resampled
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
