"""Write timm's configuration of a model: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads a bundle.

Notes:
- A configuration is JSON, so it cannot hold a class.  Options that timm takes as text (activations, norms) are written;
  options that it takes only as a class (gated MLPs, norms of another eps, the distilled and DINOv3's models) come from
  a registered name that has them, with all of its arguments given.
- Models that timm does not have (rotary positions in grid steps, plain dot-product attention, post-norm blocks) are not
  approximated: the configuration of such a bundle gives the reason as its architecture.
"""

from __future__ import annotations

import math
from typing import Any

from vit.inference.description import Description

# any entry would work, as every argument is given; these are the expected names
_NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
_BASES: dict[tuple[str, str, float], tuple[str, dict[str, str]]] = {
    # MLP, norm, eps: a name of timm's that has the MLP's class, and where its norm is another one, the norm as text
    ("plain", "layer", 1e-6): ("", {}),
    ("plain", "layer", 1e-5): ("vit_base_patch16_clip_224", {}),
    ("plain", "rms", 1e-6): ("", {"norm_layer": "rmsnorm"}),
    ("swiglu", "layer", 1e-6): ("aimv2_large_patch14_224", {"norm_layer": "layernorm"}),
    ("swiglu", "rms", 1e-6): ("aimv2_large_patch14_224", {"norm_layer": "rmsnorm"}),
    ("swiglu", "rms", 1e-5): ("aimv2_large_patch14_224", {}),
    ("swiglu_packed", "layer", 1e-6): ("vit_giant_patch14_dinov2", {}),
    ("swiglu_packed", "rms", 1e-6): ("vit_giant_patch14_dinov2", {"norm_layer": "rmsnorm"}),
}
_DISTILLED = "deit_base_distilled_patch16_224"
_DINOV3 = "vit_base_patch16_dinov3"
_POOLS = {"token": "token", "mean": "avg", "attention": "map"}
_POSITIONS = {"learned": "learn", "sincos": "learn", "none": "none"}
_DEFAULTS: dict[str, Any] = {
    # of arguments that descriptions of older models lack
    **{"mlp": "plain", "mlp_ratio": 4.0, "activation": "gelu", "attention": "multi_head", "norm": "pre"},
    **{"norm_layer": "layer", "norm_eps": 1e-6, "embed_norm": "none", "attention_norm": False, "mlp_norm": False},
    **{"final_norm": None, "position": "learned", "position_prefix": True, "pool": "token", "pool_prefix": False},
    **{"class_token": True, "distillation_token": False, "registers": 0, "layer_scale": None, "qk_norm": False},
    **{"qkv_bias": True, "proj_bias": True, "patch_bias": True, "crop_to_patches": False, "reduction": "none"},
}
_KNOWN = {
    *("image_size", "patch_size", "num_classes", "in_channels", "width", "depth", "heads", *_DEFAULTS),
    # without effect on a trained model
    *("init", "dropout", "attention_dropout", "drop_path", "patch_dropout"),
    *("reduction", "reduction_rate", "reduction_schedule", "reduction_proportional"),
}


def timm_obstacle(architecture: dict[str, Any]) -> str | None:
    """Describe why timm cannot build this model; None if it can."""
    a = _whole(architecture)
    if a["attention"] == "dot_product":
        return "attention without parameters"
    if a["norm"] != "pre":
        return "post-norm blocks"
    if a["reduction"] != "none":
        return "token reduction"
    if a["position"] == "rotary_box":
        found = _dinov3_obstacle(a)
    elif a["position"] not in _POSITIONS:
        return f"{a['position']} positions"
    else:
        found = _plain_obstacle(a)
    if a["pool"] not in _POOLS:
        return f"{a['pool']} pooling"
    if (a["embed_norm"] == "tokens") == a["patch_bias"]:
        bias = "a bias" if a["patch_bias"] else "no bias"
        return f"{bias} of the patches with model.embed_norm={a['embed_norm']}"
    if a["mlp"] != "plain" and a["pool"] == "attention":
        return "attention pooling with a plain MLP over gated ones"
    # an option that is unknown here and switched on may change what the model computes
    unknown = [key for key, value in a.items() if key not in _KNOWN and value]
    return found or (f"the option {unknown[0]}" if unknown else None)


def _plain_obstacle(a: dict[str, Any]) -> str | None:
    kind = (a["mlp"], a["norm_layer"], a["norm_eps"])
    if kind not in _BASES:
        return f"{a['mlp']} MLPs with {a['norm_layer']} norms of eps {a['norm_eps']:g}"
    if a["embed_norm"] == "patches" and kind == ("plain", "layer", 1e-5):
        return "a norm of the patches of eps 1e-05"
    if a["distillation_token"]:
        if a["registers"]:
            return "registers beside a distillation token"
        if a["position"] == "none" or not a["position_prefix"]:
            return "a distillation token without a position"
        if a["final_norm"] == "pooled":
            return "a norm after pooling beside a distillation token"
        if _BASES[kind][0]:
            return f"a distillation token with {a['mlp']} MLPs and norms of eps {a['norm_eps']:g}"
    return None


def _dinov3_obstacle(a: dict[str, Any]) -> str | None:
    """timm has these in a class of its own, which knows fewer options, and none for keys' biases."""
    front = a["class_token"] or a["registers"]  # timm's mean leaves them out, its attention pooling does not
    wrong = {
        "differential attention": a["attention"] == "differential",
        "biases of the keys": a["qkv_bias"],
        "norms other than LayerNorm of eps 1e-05": (a["norm_layer"], a["norm_eps"]) != ("layer", 1e-5),
        "no LayerScale": a["layer_scale"] is None,
        "no bias in the MLPs": not a["proj_bias"],
        "a norm of the patches": a["embed_norm"] == "patches",
        f"the activation {a['activation']}": a["activation"] != "gelu",
        "a distillation token": a["distillation_token"],
        "a norm inside packed MLPs": a["mlp"] == "swiglu_packed" and a["mlp_norm"],
        f"pooling with pool_prefix={str(a['pool_prefix']).lower()}": front
        and {"mean": a["pool_prefix"], "attention": not a["pool_prefix"], "token": False}.get(a["pool"], False),
    }
    obstacle = next((name for name, present in wrong.items() if present), None)
    return obstacle and f"{obstacle} beside DINOv3's positions"


def timm_config(description: Description) -> dict[str, Any]:
    """Make the contents of a timm `config.json`: architecture, model_args, pretrained_cfg, label_names."""
    a, preprocessing = _whole(description.architecture), description.preprocessing
    obstacle = timm_obstacle(a)
    config: dict[str, Any] = {
        "architecture": _NAMES.get(a["width"], "vit_base_patch16_224"),
        "num_classes": a["num_classes"],
        "num_features": a["width"],
        "label_names": list(description.class_names),
    }
    if obstacle is None:
        config["global_pool"] = _POOLS[a["pool"]]
        name, arguments = _dinov3(a) if a["position"] == "rotary_box" else _plain(a)
        config["architecture"] = name or config["architecture"]
        config["model_args"] = {**_shared(a), **arguments}
    else:
        config["architecture"] = f"not in timm (a ViT with {obstacle}): load it with vit"
    config["pretrained_cfg"] = {
        "input_size": [a["in_channels"], *a["image_size"]],
        "fixed_input_size": True,
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": preprocessing.crop_mode,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "num_classes": a["num_classes"],
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if a["distillation_token"] else "head",
    }
    return config


def _whole(architecture: dict[str, Any]) -> dict[str, Any]:
    a = {**_DEFAULTS, **architecture}
    if a["final_norm"] is None:  # as vit.model.arguments has it
        a["final_norm"] = "none" if a["norm"] == "post" else "pooled" if a["pool"] == "mean" else "tokens"
    return a


def _shared(a: dict[str, Any]) -> dict[str, Any]:
    """Make the arguments that both of timm's classes have."""
    return {
        "img_size": list(a["image_size"]),
        "patch_size": list(a["patch_size"]),
        "in_chans": a["in_channels"],
        "embed_dim": a["width"],
        "depth": a["depth"],
        "num_heads": a["heads"],
        "mlp_ratio": a["mlp_ratio"],
        "qkv_bias": a["qkv_bias"],
        "qk_norm": a["qk_norm"],
        "class_token": a["class_token"],
        "global_pool": _POOLS[a["pool"]],
        "no_embed_class": not a["position_prefix"],
        "dynamic_img_size": False,
    }


def _plain(a: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Make a registered name (empty if any works) and arguments of timm's `VisionTransformer`.

    No argument is null: timm ignores null, and the registered name's own value would remain.
    """
    kind = (a["mlp"], a["norm_layer"], a["norm_eps"])
    name, norm = _BASES[kind]
    args: dict[str, Any] = {
        "act_layer": a["activation"] if a["mlp"] == "plain" else "silu",
        "scale_attn_norm": a["attention_norm"],
        "scale_mlp_norm": a["mlp_norm"],
        "proj_bias": a["proj_bias"],
        "init_values": 0.0 if a["layer_scale"] is None else a["layer_scale"] or 1e-5,
        "pos_embed": _POSITIONS[a["position"]],
        "pre_norm": a["embed_norm"] == "tokens",
        "final_norm": a["final_norm"] != "none",
        "fc_norm": a["final_norm"] == "pooled",
        "pool_include_prefix": a["pool_prefix"],
        "reg_tokens": a["registers"],
        **({"attn_layer": "diff"} if a["attention"] == "differential" else {}),
        **norm,
    }
    if a["mlp"] == "swiglu_packed":
        args["mlp_ratio"] = _ratio(2 * int(a["width"] * a["mlp_ratio"]), a["width"])
    if a["embed_norm"] != "patches":
        args["embed_norm_layer"] = ""
    elif kind != ("swiglu", "rms", 1e-5):  # that name has this norm already
        args["embed_norm_layer"] = {"layer": "layernorm", "rms": "rmsnorm"}[a["norm_layer"]]
    return _DISTILLED if a["distillation_token"] else name, args


def _dinov3(a: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Make the registered name and arguments of timm's `Eva` for DINOv3; the name has its positions and norms."""
    return _DINOV3, {
        "scale_attn_inner": a["attention_norm"],
        "scale_mlp": a["mlp_norm"],
        "swiglu_mlp": a["mlp"] != "plain",
        "swiglu_align_to": int(a["mlp"] == "swiglu"),  # the two matrices are separate only with an alignment
        "init_values": a["layer_scale"],
        "use_pre_transformer_norm": a["embed_norm"] == "tokens",
        "use_post_transformer_norm": a["final_norm"] == "tokens",
        "use_fc_norm": a["final_norm"] == "pooled",
        "num_reg_tokens": a["registers"],
    }


def _ratio(hidden: int, width: int) -> float:
    """Compute the ratio whose product with the width rounds down to the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
