"""Start from pretrained weights: `model=pretrained model.name=...`.

One rule: keys that are null in the configuration get the values of the weights; other keys keep their values.

- `conf/model/pretrained.yaml` leaves the architecture and the preprocessing open, in place of the data set's size and
  statistics.  Overrides and experiments take precedence over it.
- The architecture must be that of the weights.  Image size, patch size, channels, pooling and distillation token may
  differ; weights are then resampled or newly initialised where necessary.
- Images have at most `MAX_DEFAULT_SIZE` pixels a side by default, since cost grows with the number of tokens and many
  weights are for 384 or 518 pixels.
- The open keys are filled in first, so `config.yaml`, checkpoints and bundle hold the values, and a resumed run does
  not need the weights.

torch and timm are imported by the functions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from vit import options
from vit.errors import VitError
from vit.training.sections import SOURCE_KEYS, ModelConfig

if TYPE_CHECKING:
    from vit.data.dataset import ImageData, Split
    from vit.model import VisionTransformer
    from vit.training.config import Config

log = logging.getLogger("vit")

EXAMPLES = "a name of timm's such as vit_small_patch16_224.augreg_in1k, a run folder or a bundle"

DATA_KEYS = ("image_size", "channels", "patch_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Keys of `data` that get the value of the weights if they are null."""

MAX_DEFAULT_SIZE = 224
"""Largest default of `data.image_size`, in pixels a side, if the weights are for larger images."""

FOLLOWED_KEYS = {"image_size": "image_size", "patch_size": "patch_size", "in_channels": "channels"}
"""Keys of `model` that follow a key of `data`."""


def has_open_keys(values: Mapping[str, Any]) -> bool:
    """Return whether a configuration has keys that pretrained weights must fill in.

    Raises:
        VitError: it has, but there is no `model.name`.
    """
    model, data = values.get("model"), values.get("data")
    if not isinstance(model, Mapping) or not isinstance(data, Mapping):
        return False
    open_keys = [key for key in _open_keys() if key in model and model[key] is None]
    if model.get("name") is None:
        if "size" in open_keys and "depth" in open_keys and "mlp" in open_keys:
            raise VitError(f"model.name: whose weights to start from has to be said: {EXAMPLES}")
        return False
    return "mlp" in open_keys or any(data.get(key, "") is None for key in DATA_KEYS if key not in ("mean", "std"))


def fill_placeholders(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill open keys with valid placeholders, so that the other keys can be checked."""
    rules = {key.name: key for key in options.list_keys(ModelConfig)}
    model = {key: _placeholder(rules[key]) if value is None and key in rules else value
             for key, value in values["model"].items()}  # fmt: skip
    data = dict(values["data"])
    for key, stand_in in zip(DATA_KEYS, (0, 0, 0, None, None, "bicubic", 1.0, "center"), strict=True):
        data[key] = stand_in if data.get(key) is None or key in ("mean", "std") else data[key]
    return {**values, "model": model, "data": data}


def fill_from_weights(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the open keys of a configuration with the values of the weights of `model.name`.

    Raises:
        VitError: there are no such weights, or a key contradicts them.
    """
    model, data = dict(values["model"]), dict(values["data"])
    name = str(model["name"])
    if model.get("size") is not None:
        raise VitError(size_conflict_message(name, model["size"]))
    from vit.pretrained.create import MAY_DIFFER

    full_name, a, preprocessing = _read_weights_info(name, model["revision"])
    model["name"] = full_name
    if model["pool"] not in (None, a["pool"]):
        a["final_norm"] = None  # as the pooling suggests
    for key in _open_keys():
        if key in FOLLOWED_KEYS or key == "size" or key not in model:
            continue
        if model[key] is None:
            model[key] = a[key]
        elif key not in MAY_DIFFER and model[key] != a[key]:
            raise VitError(
                f"model.{key}={options.format_value(model[key])}: the weights of {name} have "
                f"{options.format_value(a[key])}, and their architecture stays as it is: leave model.{key} out, or "
                "choose other weights"
            )
    patch = next((size for size in (model["patch_size"], data["patch_size"]) if size), a["patch_size"])
    sizes = default_image_size(preprocessing["image_size"], [patch, patch] if isinstance(patch, int) else patch)
    from_weights = {
        **preprocessing,
        "patch_size": _collapse_square(a["patch_size"]),
        "image_size": _collapse_square(sizes),
    }
    for key in DATA_KEYS:
        if key in ("mean", "std") and data["channels"] is not None and data["channels"] != preprocessing["channels"]:
            from_weights[key] = [sum(from_weights[key]) / len(from_weights[key])] * data["channels"]
    for key in DATA_KEYS:
        if data[key] is None:
            data[key] = from_weights[key]
    for key, followed in FOLLOWED_KEYS.items():
        if model[key] is None:
            model[key] = data[followed]
    _check_image_size(name, model)
    return {**values, "model": model, "data": data}


def default_image_size(image_size: Sequence[int], patch: Sequence[int]) -> list[int]:
    """Return the height and width for fine-tuning: the weights' size, at most `MAX_DEFAULT_SIZE` in whole patches."""
    return [
        side if side <= MAX_DEFAULT_SIZE else max(pixels, MAX_DEFAULT_SIZE // pixels * pixels)
        for side, pixels in zip(image_size, patch, strict=True)
    ]


def size_conflict_message(name: str, size: str) -> str:
    """Return the message for a configuration with both `model.name` and `model.size`."""
    return (
        f"model.name={name}: its weights are of their own size, and model.size={size} is another model: "
        f"write model=pretrained model.name={name}, without a size"
    )


def fetch_weights(config: Config) -> None:
    """Download the weights of `model.name` if necessary.  Raises `VitError` if that fails."""
    from vit.pretrained import locations
    from vit.pretrained.sources import find_weights

    locations.fetch_weights(find_weights(config.model.weights or str(config.model.name), config.model.revision))


def pretrained_model(config: Config, data: ImageData) -> VisionTransformer:
    """Load the model of `config` with the weights of `model.name` and a head for the classes of `data`; log a report.

    The pretrained head is kept if `model.head` allows it and its classes are those of the data, in any order.

    Raises:
        VitError: the weights do not fit; `model.head=keep` with other classes; or, with LoRA, a part other than the
            head would be newly initialised.
    """
    from vit.pretrained.create import MAY_DIFFER, load_pretrained

    m = config.model
    arguments = {key: value for key, value in m.arguments(len(data.class_names)).items() if key in MAY_DIFFER}
    del arguments["num_classes"]
    loaded = load_pretrained(
        str(m.name),
        weights=m.weights,
        class_names=data.class_names,
        head=None if m.head == "auto" else m.head,
        revision=m.revision,
        **arguments,
    )
    if config.lora.rank is not None and any(name.startswith("attn_pool.") for name in loaded.report.missing):
        raise VitError(
            f"model.pool=attention: new to the weights of {m.name}, and with lora.rank={config.lora.rank} it would not "
            "learn: leave out one of the two"
        )
    log.info(
        "%s\n%s",
        loaded.report.table(),
        describe_resolution(loaded.architecture, loaded.pretrained_size, data.splits["train"]),
    )
    return loaded.model.train()  # Lightning does not change the mode of a module


def describe_resolution(architecture: Mapping[str, Any], own: tuple[int, int], split: Split) -> str:
    """Describe the image size in a line: patches and FLOPs, and the cost of another size.

    The other size is `own`, that of the weights; if it is the same, that of the images, if smaller.
    """
    from vit.model.cost import flops

    (height, width), patch = architecture["image_size"], architecture["patch_size"]

    def tokens(sides: Sequence[int]) -> int:
        return (sides[0] // patch[0]) * (sides[1] // patch[1])

    cost = flops(architecture)
    line = f"image size  {height} x {width}: {tokens((height, width)):,} patches, {cost / 1e9:.3g} GFLOPs an image"
    other_size, about = list(own), "the weights' own"
    if (height, width) == tuple(own):
        native = split.native_size or (np.median(split.sizes, axis=0) if split.sizes is not None else own)
        other_size = [max(p, int(side) // p * p) for side, p in zip(native, patch, strict=True)]
        about = "about that of the images"
        if tokens(other_size) >= tokens((height, width)):
            return line
    ratio = flops({**architecture, "image_size": other_size}) / cost
    size = str(_collapse_square(other_size)).replace(" ", "")
    return f"{line}; data.image_size={size}, {about}: {tokens(other_size):,} patches, {ratio:.2g} times the cost"


def _open_keys() -> list[str]:
    """List the keys of `model` that may be left to the weights."""
    return [key.name for key in options.list_keys(ModelConfig) if key.name not in SOURCE_KEYS]


def _placeholder(key: options.Key) -> Any:
    if type(None) in get_args(key.type):
        return None
    if key.rule.choices:
        return key.rule.choices[0]
    return False if key.type is bool else 1 if key.rule.ge is None else int(key.rule.ge)


def _read_weights_info(name: str, revision: str | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read the name, architecture and preprocessing of pretrained weights, as plain types.

    A timm name without a tag gets the tag of its current default weights, which another version of timm may change.
    """
    import torch

    from vit.model import VisionTransformer
    from vit.pretrained.create import read_info

    info = read_info(name, revision)
    with torch.device("meta"):  # adds options that older models lack
        architecture = VisionTransformer(**info.architecture).architecture
    preprocessing = info.preprocessing.to_dict()
    preprocessing_values = {
        key: list(value) if isinstance(value, tuple) else value for key, value in preprocessing.items()
    }
    return info.name + "".join(name.partition("@")[1:]) if info.trusted else name, architecture, preprocessing_values


def _collapse_square(pair: Any) -> Any:
    """Return a square size as one number."""
    sides: Sequence[Any] = list(pair)
    return sides[0] if sides[0] == sides[1] else list(sides)


def _check_image_size(name: str, model: Mapping[str, Any]) -> None:
    """Raise `VitError` if images do not divide into the weights' patches, and name sizes that do."""
    if model["crop_to_patches"]:
        return
    sizes, patches = ([value, value] if isinstance(value, int) else list(value)
                      for value in (model["image_size"], model["patch_size"]))  # fmt: skip
    for size, patch in zip(sizes, patches, strict=True):
        if size % patch:
            fits = [str(fit) for fit in (size // patch * patch, -(-size // patch) * patch) if fit]
            raise VitError(
                f"data.image_size={size}: the weights of {name} take patches of {patch} pixels, which do not divide "
                f"it: set data.image_size={' or '.join(fits)}, or another data.patch_size"
            )
