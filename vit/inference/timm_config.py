"""The same model in timm's words, so that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads a bundle.

Notable: what timm's `VisionTransformer` cannot express (rotary positions, plain dot-product attention, post-norm
blocks) is not approximated: such a bundle names an architecture that timm does not have, in words that say why.
"""

from __future__ import annotations

from typing import Any

from vit.inference.description import Description

# any entry would do, as every argument is given; these are the ones a reader expects
_NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
_POOLS = {"token": "token", "mean": "avg", "attention": "map"}
_POSITIONS = {"learned": "learn", "sincos": "learn", "none": "none"}
_KNOWN = {
    *("image_size", "patch_size", "num_classes", "in_channels", "width", "depth", "heads", "mlp_ratio", "attention"),
    *("norm", "position", "position_prefix", "pool", "class_token", "registers", "layer_scale", "qk_norm", "qkv_bias"),
    # of no matter to a model that is trained
    *("init", "dropout", "attention_dropout", "drop_path", "patch_dropout"),
}


def timm_obstacle(architecture: dict[str, Any]) -> str | None:
    """What keeps timm's `VisionTransformer` from being this model, in a few words; None when nothing does."""
    if architecture.get("attention", "multi_head") == "dot_product":
        return "attention without parameters"
    if architecture.get("norm", "pre") != "pre":
        return "post-norm blocks"
    position = architecture.get("position", "learned")
    if position not in _POSITIONS:
        return f"{position} positions"
    if architecture.get("pool", "token") not in _POOLS:
        return f"{architecture['pool']} pooling"
    # an option that is unknown here and switched on may change what the model computes
    unknown = [key for key, value in architecture.items() if key not in _KNOWN and value]
    return f"the option {unknown[0]}" if unknown else None


def timm_config(description: Description) -> dict[str, Any]:
    """The contents of a timm `config.json`: architecture, model_args, pretrained_cfg, label_names."""
    a, preprocessing = description.architecture, description.preprocessing
    obstacle = timm_obstacle(a)
    config: dict[str, Any] = {
        "architecture": _NAMES.get(a["width"], "vit_base_patch16_224"),
        "num_classes": a["num_classes"],
        "num_features": a["width"],
        "label_names": list(description.class_names),
    }
    if obstacle is None:
        config["global_pool"] = _POOLS[a.get("pool", "token")]
        config["model_args"] = {
            "img_size": list(a["image_size"]),
            "patch_size": list(a["patch_size"]),
            "in_chans": a["in_channels"],
            "embed_dim": a["width"],
            "depth": a["depth"],
            "num_heads": a["heads"],
            "mlp_ratio": a.get("mlp_ratio", 4.0),
            "qkv_bias": a.get("qkv_bias", True),
            "qk_norm": a.get("qk_norm", False),
            "init_values": a.get("layer_scale"),
            "class_token": a.get("class_token", True),
            "reg_tokens": a.get("registers", 0),
            "pos_embed": _POSITIONS[a.get("position", "learned")],
            "no_embed_class": not a.get("position_prefix", True),
            "global_pool": config["global_pool"],
            "fc_norm": config["global_pool"] == "avg",
        }
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
        "classifier": "head",
    }
    return config
