"""The arguments of a Vision Transformer: which there are, what they imply, and which contradict each other.

Notable: every refusal is one line that names the argument as a configuration spells it (`model.heads`) and ends with
something that would work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vit.errors import VitError, did_you_mean
from vit.model.blocks import ACTIVATIONS
from vit.model.initialisation import SCHEMES
from vit.model.norms import NORMS
from vit.model.patches import pair
from vit.model.reduction import DEFAULT_SCHEDULE, METHODS, REDUCTION, SCHEDULES, max_removable, schedule


class Size(NamedTuple):
    """Width of a token, number of blocks, number of heads."""

    width: int
    depth: int
    heads: int


SIZES = {
    "nano": Size(64, 4, 4),
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}
"""Tiny and small are those of Touvron et al. 2021; base to huge of Dosovitskiy et al. 2021; nano, for small images."""

CHOICES = {
    "size": tuple(SIZES),
    "attention": ("multi_head", "scaled_dot_product", "dot_product", "differential"),
    "mlp": ("plain", "swiglu", "swiglu_packed"),
    "activation": tuple(ACTIVATIONS),
    "norm": ("pre", "post"),
    "norm_layer": tuple(NORMS),
    "embed_norm": ("none", "patches", "tokens"),
    "final_norm": ("tokens", "pooled", "none"),
    "position": ("learned", "sincos", "rotary", "rotary_box", "none"),
    "pool": ("token", "mean", "attention"),
    "init": SCHEMES,
}

ROTARY = ("rotary", "rotary_box")
SWITCHES = (
    *("class_token", "distillation_token", "position_prefix", "pool_prefix", "qk_norm", "attention_norm", "mlp_norm"),
    *("qkv_bias", "proj_bias", "patch_bias", "crop_to_patches"),
)


def resolve(given: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of `VisionTransformer` and fill in what they imply.

    Returns a new dictionary of plain JSON types, without `size` and with every number that it stood for; given to
    `resolve` again, it stays as it is.  Raises `VitError` when an argument is impossible or two contradict each other.
    """
    a = dict(given)
    if a["final_norm"] is None:  # timm's places: before a class token or a pooling head, after a mean
        a["final_norm"] = "none" if a["norm"] == "post" else "pooled" if a["pool"] == "mean" else "tokens"
    for key, choices in CHOICES.items():
        if a[key] not in choices:
            raise VitError(f"model.{key}: no {a[key]!r}; {did_you_mean(str(a[key]), choices)}")
    for key, value in SIZES[a.pop("size")]._asdict().items():
        a[key] = value if a[key] is None else a[key]
    if a["attention"] in ("scaled_dot_product", "dot_product"):
        a["heads"] = 1
    if a["class_token"] is None:
        a["class_token"] = a["pool"] == "token" or a["distillation_token"]
    if a["qk_norm"] is None:
        a["qk_norm"] = a["attention"] != "dot_product"
    for key in ("width", "depth", "heads", "in_channels"):
        _check(key, a[key], type(a[key]) is int and a[key] >= 1, "a whole number, at least 1")
    for key in ("num_classes", "registers"):
        _check(key, a[key], type(a[key]) is int and a[key] >= 0, "a whole number, at least 0")
    for key in SWITCHES:
        _check(key, a[key], isinstance(a[key], bool), "true or false")
    for key in ("dropout", "attention_dropout", "drop_path", "patch_dropout"):
        _check(key, a[key], _number(a[key]) and 0 <= a[key] < 1, "a share from 0 to under 1")
    for key in ("mlp_ratio", "norm_eps"):
        _check(key, a[key], _number(a[key]) and a[key] > 0, "a positive number")
    scale = a["layer_scale"]
    _check("layer_scale", scale, scale is None or _number(scale), "a number such as 1e-5, or null for none")
    a["image_size"] = list(pair(a["image_size"], "data.image_size"))
    a["patch_size"] = list(pair(a["patch_size"], "model.patch_size"))
    _check_fits(a)
    resolve_reduction(a)
    return a


def maps_per_head(a: Mapping[str, Any]) -> int:
    """Return how many maps of weights each head of attention has in a model of these arguments."""
    return 2 if a.get("attention") == "differential" else 1


def resolve_reduction(a: dict[str, Any]) -> None:
    """Check the arguments of token reduction among resolved others.  Raises `VitError` when they cannot be."""
    if a["reduction"] not in METHODS:
        raise VitError(f"model.reduction: no {a['reduction']!r}; {did_you_mean(str(a['reduction']), METHODS)}")
    rate, proportional = a["reduction_rate"], a["reduction_proportional"]
    _check("reduction_rate", rate, _number(rate) and 0 <= rate < 1, "a share from 0 to under 1")
    right = proportional is None or isinstance(proportional, bool)
    _check("reduction_proportional", proportional, right, "true, false or null")
    if isinstance(a["reduction_schedule"], list | tuple):
        a["reduction_schedule"] = list(a["reduction_schedule"])
    removed_per_layer(a)


def removed_per_layer(a: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return how many patch tokens each layer of a model of these arguments removes; None where all stay.

    Raises `VitError` when the schedule is none, or cannot be.
    """
    a = {**REDUCTION, **a}
    method, plan, depth = a["reduction"], a["reduction_schedule"], a["depth"]
    patches = math.prod(image // patch for image, patch in zip(a["image_size"], a["patch_size"], strict=True))
    if plan is None or isinstance(plan, str):
        if plan not in (None, *SCHEDULES):
            raise VitError(f"model.reduction_schedule: no {plan!r}; {did_you_mean(str(plan), SCHEDULES)}")
        if method == "none":
            return None
        found = schedule(method, a["reduction_rate"], plan or DEFAULT_SCHEDULE[method], patches, depth)
        return found if any(found) else None
    whole = isinstance(plan, list | tuple) and all(type(each) is int and each >= 0 for each in plan)
    expected = f"{', '.join(SCHEDULES)}, or whole numbers of tokens, one for each of {depth} layers"
    _check("reduction_schedule", plan, whole and len(plan) == depth, expected)
    for layer, count in enumerate(plan if method != "none" else ()):
        if count > max_removable(method, patches):
            raise VitError(
                f"model.reduction_schedule: layer {layer} (from 0) has {patches} patch tokens, and model.reduction="
                f"{method} can do without {max_removable(method, patches)} of them at most, not {count}"
            )
        patches -= count
    return tuple(plan) if method != "none" and any(plan) else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(key: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise VitError(f"model.{key}: expected {expected}, not {value!r}")


def _near(candidates: Iterable[int], wanted: int) -> str:
    """The three candidates closest to `wanted`, in order."""
    return ", ".join(map(str, sorted(sorted(candidates, key=lambda n: abs(n - wanted))[:3])))


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _check_fits(a: dict[str, Any]) -> None:
    """Raise `VitError` when two arguments, each possible alone, contradict each other."""
    width, heads = a["width"], a["heads"]
    if a["attention"] == "dot_product":
        nothing = "model.attention=dot_product has no queries and keys"
        if a["qk_norm"]:
            raise VitError(f"model.qk_norm: {nothing} to normalise; set model.qk_norm=false")
        if a["position"] in ROTARY:
            raise VitError(f"model.position: {nothing} to rotate; choose from learned, sincos, none")
        if a["attention_norm"]:
            raise VitError(
                "model.attention_norm: model.attention=dot_product has no heads to mix after it; "
                "set model.attention_norm=false"
            )
    maps = maps_per_head(a)
    of_two = " of two maps each" if maps > 1 else ""
    if width % (maps * heads):
        fits = _near(_divisors(width // maps) if width % maps == 0 else [], heads)
        raise VitError(
            f"model.heads: width {width} does not divide into {heads} heads{of_two}; "
            + (f"heads that divide it: {fits}" if fits else "set an even model.width")
        )
    if a["position"] == "sincos" and width % 4:
        fits = _near(range(4, width + 8, 4), width)
        raise VitError(f"model.width: sine-cosine positions need a width divisible by 4, not {width}, such as {fits}")
    if a["position"] in ROTARY and width // heads % (4 * maps):
        fits = _near([n for n in _divisors(width) if width // n % (4 * maps) == 0], heads)
        raise VitError(
            f"model.heads: rotary positions need a width per head divisible by {4 * maps}, not {width} / {heads} = "
            f"{width // heads}; " + (f"heads that give one: {fits}; or " if fits else "") + "set model.position=learned"
        )
    if width * a["mlp_ratio"] < 1:
        raise VitError(
            f"model.mlp_ratio: {a['mlp_ratio']!r} of a width of {width} leaves the MLP no hidden channel; "
            f"at least {math.ceil(1e4 / width) / 1e4:g}"
        )
    for image, patch, axis in zip(a["image_size"], a["patch_size"], ("height", "width"), strict=True):
        if image % patch and not (a["crop_to_patches"] and image > patch):
            whole = "" if image < patch else f", or set model.crop_to_patches=true to lose the last {image % patch}"
            raise VitError(
                f"model.patch_size: an image {axis} of {image} pixels does not divide into patches of {patch}; "
                f"sizes that divide it: {_near(_divisors(image), patch)}{whole}"
            )
    if a["mlp"] != "plain" and a["activation"] != "gelu":
        raise VitError(
            f"model.activation: model.mlp={a['mlp']} has its own, the SiLU of its gate; "
            "set model.activation=gelu, or model.mlp=plain"
        )
    if a["pool"] == "token" and not a["class_token"]:
        raise VitError("model.pool=token reads the class token: set model.class_token=true, or pool=mean or attention")
    if a["pool"] == "token" and a["pool_prefix"]:
        raise VitError(
            "model.pool_prefix: model.pool=token reads the class token alone; set model.pool_prefix=false, or "
            "pool=mean or attention"
        )
    if a["distillation_token"] and a["pool"] != "token":
        raise VitError(
            f"model.distillation_token: its head stands beside the class token's, not beside model.pool={a['pool']}; "
            "set model.pool=token"
        )
