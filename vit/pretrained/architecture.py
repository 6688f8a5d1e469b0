"""Read the arguments of `vit.VisionTransformer` from a timm model.

Nothing is copied from timm's tables: timm builds the model without memory, its modules are read, and the result is
compared with it: same names, same shapes.  Models for which this project has no option are refused with the reason,
never approximated.  timm is imported by the functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.pretrained.convert import from_timm


def read_architecture(model: nn.Module) -> dict[str, Any]:
    """Read all arguments of `vit.VisionTransformer` that build timm's `model`, as plain JSON.

    Supports timm's `VisionTransformer` and `VisionTransformerDistilled` with plain blocks, and `Eva` with the positions
    of DINOv3.  `num_classes` is 0 if timm's model has no head.
    Raises `VitError` with the reason, without a name, when this project has no such model.
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as Plain

    readers: dict[type, Any] = {Plain: _plain, VisionTransformerDistilled: _plain, Eva: _dinov3}
    if type(model) not in readers:
        raise VitError(f"its class, timm's {type(model).__name__}, is not a plain Vision Transformer")
    specific = readers[type(model)](model)  # first, as it checks that the blocks have the shared options
    with torch.device("meta"):
        twin = VisionTransformer(**(_shared(model) | specific))
    _compare(model, twin)
    return twin.architecture


def _shared(model: Any) -> dict[str, Any]:
    """Read the options that all of timm's Vision Transformers have in common."""
    from timm.layers.patch_embed import PatchEmbed

    embed, block = model.patch_embed, model.blocks[0]
    if type(embed) is not PatchEmbed:
        raise VitError(f"its patches come from a convolutional network or another embedding ({type(embed).__name__})")
    if embed.dynamic_img_pad:
        raise VitError("it pads images to whole patches")
    norms = [name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name), nn.Identity)]
    embed_norms = {"patches": embed.norm, "tokens": model.norm_pre}
    extra = [name for name, norm in embed_norms.items() if not isinstance(norm, nn.Identity)]
    if len(norms) > 1 or len(extra) > 1:
        raise VitError("it has two norms in a place where one is known here")
    image_size, patch_size = list(embed.img_size), list(embed.patch_size)
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "crop_to_patches": any(image % patch for image, patch in zip(image_size, patch_size, strict=True)),
        "patch_bias": embed.proj.bias is not None,
        "in_channels": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "proj_bias": block.attn.proj.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "attention_norm": not isinstance(block.attn.norm, nn.Identity),
        "class_token": model.cls_token is not None,
        "registers": 0 if model.reg_token is None else model.reg_token.shape[1],
        "position_prefix": not model.no_embed_class,
        "embed_norm": extra[0] if extra else "none",
        "final_norm": {"norm": "tokens", "fc_norm": "pooled"}[norms[0]] if norms else "none",
        **_pool(model),
        **_mlp(block.mlp, model.embed_dim),
        **_norm(model),
    }


def _plain(model: Any) -> dict[str, Any]:
    """Read the other options of timm's `VisionTransformer`."""
    from timm.layers.attention import Attention
    from timm.layers.diff_attention import DiffAttention
    from timm.models.vision_transformer import Block

    kinds = {Attention: "multi_head", DiffAttention: "differential"}
    for block in model.blocks:
        if type(block) is not Block:
            raise VitError(f"its blocks are not the plain ones but timm's {type(block).__name__}")
        if type(block.attn) not in kinds or getattr(block.attn, "dual_lambda", False):
            raise VitError(f"its attention is not the plain one but timm's {type(block.attn).__name__}")
    block = model.blocks[0]
    return {
        "attention": kinds[type(block.attn)],
        "position": "none" if model.pos_embed is None else "learned",
        "distillation_token": hasattr(model, "dist_token"),
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_scale": None if isinstance(block.ls1, nn.Identity) else float(block.ls1.init_values),
    }


def _dinov3(model: Any) -> dict[str, Any]:
    """Read the other options of timm's `Eva`, if it is a DINOv3."""
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
    from timm.models.eva import EvaAttention, EvaBlock

    rope = model.rope
    if type(rope) is not RotaryEmbeddingDinoV3:
        raise VitError("of timm's class Eva only the DINOv3 models are known here, and its positions are others")
    expected = {
        **{"temperature": 100.0, "min_period": None, "normalize_coords": "separate", "grid_offset": 0.0},
        **{"grid_indexing": "ij", "rotate_half": True},
    }
    for key, value in expected.items():
        if getattr(rope, key) != value:
            raise VitError(f"its rotary positions differ from DINOv3's ({key} is {getattr(rope, key)})")
    for block in model.blocks:
        if type(block) is not EvaBlock or type(block.attn) is not EvaAttention or block.attn.qkv is None:
            raise VitError("its blocks differ from DINOv3's")
    block = model.blocks[0]
    # the model takes any size; the size of training is in its configuration
    size = model.pretrained_cfg.get("input_size") if model.dynamic_img_size else None
    return {
        **({"image_size": list(size[1:])} if size else {}),
        "position": "rotary_box",
        "qkv_bias": block.attn.q_bias is not None,
        "layer_scale": None if block.gamma_1 is None else float(block.init_values),
        "pool_prefix": model.attn_pool is not None,
    }


def _pool(model: Any) -> dict[str, Any]:
    pools = {"token": "token", "avg": "mean", "map": "attention"}
    if model.global_pool not in pools:
        raise VitError(f"its pooling ({model.global_pool}) is not known here")
    pool, block = model.attn_pool, model.blocks[0]
    if pool is not None:
        if pool.num_heads != block.attn.num_heads or pool.pool != "token":
            raise VitError("its pooling head has another number of heads than its blocks, or another way to end")
        if _activation(pool.mlp) != _mlp(block.mlp, model.embed_dim)["activation"]:
            raise VitError("its pooling head has another activation than its blocks")
    prefix = model.global_pool != "token" and getattr(model, "pool_include_prefix", False)
    return {"pool": pools[model.global_pool], "pool_prefix": prefix}


def _mlp(mlp: Any, width: int) -> dict[str, Any]:
    """Read kind, ratio, activation and inner norm of a block's MLP."""
    from timm.layers.mlp import GluMlp, Mlp, SwiGLU

    kinds = {Mlp: "plain", GluMlp: "swiglu_packed", SwiGLU: "swiglu"}
    kind, activation = kinds.get(type(mlp)), _activation(mlp)
    gated = kind in ("swiglu", "swiglu_packed")
    if None in (kind, activation) or (activation == "silu") != gated or getattr(mlp, "gate_last", False):
        raise VitError(f"its MLP, timm's {type(mlp).__name__} with {type(mlp.act).__name__}, is not known here")
    hidden = mlp.fc2.in_features
    ratio = hidden / width
    if int(width * ratio) != hidden:  # rounding made it one too small
        ratio = math.nextafter(ratio, math.inf)
    return {
        "mlp": kind,
        "mlp_ratio": ratio,
        "activation": "gelu" if gated else activation,
        "mlp_norm": not isinstance(mlp.norm, nn.Identity),
    }


def _activation(mlp: Any) -> str | None:
    from timm.layers.activations import GELU, GELUTanh, QuickGELU

    names: dict[type, str] = {nn.GELU: "gelu", GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}
    return {**names, nn.SiLU: "silu"}.get(type(mlp.act))


def _norm(model: Any) -> dict[str, Any]:
    """Kind and eps of the norms, which have to be the same everywhere but inside differential attention."""
    from timm.layers.norm import LayerNorm, RmsNorm

    kinds = {LayerNorm: "layer", nn.LayerNorm: "layer", RmsNorm: "rms"}
    norms = [module for name, module in model.named_modules() if hasattr(module, "eps") and "sub_norm" not in name]
    found = {(kinds.get(type(module)), module.eps) for module in norms}
    kind, eps = next(iter(found))
    if len(found) != 1 or kind is None:
        raise VitError("its norms are of several kinds, or of one that is not known here")
    return {"norm_layer": kind, "norm_eps": float(eps)}


def _compare(model: nn.Module, twin: VisionTransformer) -> None:
    """Compare the weights of timm's model with ours.  Raises `VitError` when a name or shape differs."""
    theirs = {key: tuple(value.shape) for key, value in from_timm(model.state_dict(), twin.architecture).items()}
    ours = {key: tuple(value.shape) for key, value in twin.state_dict().items()}
    if theirs != ours:
        different = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        raise VitError(f"its weights are not those of a plain Vision Transformer ({different[0]})")
