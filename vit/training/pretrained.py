"""Starting from somebody's weights: `model=pretrained model.name=...`.

One rule: what the configuration leaves open (null) is as the weights have it; what it says is as it says.

- `conf/model/pretrained.yaml` leaves the architecture open, and how images are prepared: it wins over the data set's
  own size and statistics.  What is typed, or written in an experiment, wins over it.
- An architecture cannot be told otherwise than the weights have it; the size of images and patches, channels, the
  pooling and a distillation token can, and weights are resampled, or start afresh, where they have to.
- One thing is not as the weights have it: images are at most `WORKING_SIZE` pixels a side, since cost grows with the
  number of tokens and many weights come for 384 or 518 pixels.
- The blanks are filled in before anything else is done, so a run's `config.yaml`, its checkpoints and its bundle say
  what was used, and a resumed run asks for no weights again.

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
"""Keys of `data` that are as the weights have them where they are null."""

MAX_DEFAULT_SIZE = 224
"""Pixels a side of the model's images, where `data.image_size` is null and the weights were made for more."""

FOLLOWED_KEYS = {"image_size": "image_size", "patch_size": "patch_size", "in_channels": "channels"}
"""Keys of `model` that follow one of `data`."""


def has_open_keys(values: Mapping[str, Any]) -> bool:
    """Whether the values of a configuration leave anything to pretrained weights.

    Raises `VitError` when they do and there is no `model.name`.
    """
    model, data = values.get("model"), values.get("data")
    if not isinstance(model, Mapping) or not isinstance(data, Mapping):
        return False
    blank = [key for key in _open_keys() if key in model and model[key] is None]
    if model.get("name") is None:
        if "size" in blank and "depth" in blank and "mlp" in blank:
            raise VitError(f"model.name: whose weights to start from has to be said: {EXAMPLES}")
        return False
    return "mlp" in blank or any(data.get(key, "") is None for key in DATA_KEYS if key not in ("mean", "std"))


def fill_placeholders(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with something possible where they leave a blank, so that the others can be checked."""
    rules = {key.name: key for key in options.list_keys(ModelConfig)}
    model = {key: _placeholder(rules[key]) if value is None and key in rules else value
             for key, value in values["model"].items()}  # fmt: skip
    data = dict(values["data"])
    for key, stand_in in zip(DATA_KEYS, (0, 0, 0, None, None, "bicubic", 1.0, "center"), strict=True):
        data[key] = stand_in if data.get(key) is None or key in ("mean", "std") else data[key]
    return {**values, "model": model, "data": data}


def fill_from_weights(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration with its blanks filled in as the weights of `model.name` have it.

    Raises `VitError` when there are no such weights, or something contradicts them.
    """
    model, data = dict(values["model"]), dict(values["data"])
    name = str(model["name"])
    if model.get("size") is not None:
        raise VitError(size_conflict_message(name, model["size"]))
    from vit.pretrained.create import MAY_DIFFER

    whole, a, preprocessing = _read_weights_info(name, model["revision"])
    model["name"] = whole
    if model["pool"] not in (None, a["pool"]):
        a["final_norm"] = None  # where the pooling suggests
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
    patch = next((each for each in (model["patch_size"], data["patch_size"]) if each), a["patch_size"])
    sizes = default_image_size(preprocessing["image_size"], [patch, patch] if isinstance(patch, int) else patch)
    theirs = {**preprocessing, "patch_size": _collapse_square(a["patch_size"]), "image_size": _collapse_square(sizes)}
    for key in DATA_KEYS:
        if key in ("mean", "std") and data["channels"] is not None and data["channels"] != preprocessing["channels"]:
            theirs[key] = [sum(theirs[key]) / len(theirs[key])] * data["channels"]
    for key in DATA_KEYS:
        if data[key] is None:
            data[key] = theirs[key]
    for key, followed in FOLLOWED_KEYS.items():
        if model[key] is None:
            model[key] = data[followed]
    _check_image_size(name, model)
    return {**values, "model": model, "data": data}


def default_image_size(own: Sequence[int], patch: Sequence[int]) -> list[int]:
    """Height and width to fine-tune at: the weights' own, or `WORKING_SIZE` in whole patches where that is less."""
    return [
        side if side <= MAX_DEFAULT_SIZE else max(pixels, MAX_DEFAULT_SIZE // pixels * pixels)
        for side, pixels in zip(own, patch, strict=True)
    ]


def size_conflict_message(name: str, size: str) -> str:
    """The line for weights and a size of a model beside each other."""
    return (
        f"model.name={name}: its weights are of their own size, and model.size={size} is another model: "
        f"write model=pretrained model.name={name}, without a size"
    )


def fetch_weights(config: Config) -> None:
    """Have the weights of `model.name` on this machine.  Raises `VitError` when they cannot be had."""
    from vit.pretrained.locations import local
    from vit.pretrained.sources import place_of

    local(place_of(config.model.weights or str(config.model.name), config.model.revision))


def pretrained_model(config: Config, data: ImageData) -> VisionTransformer:
    """The model of `config` with the weights of `model.name`, and a head for the classes of `data`; logs the report.

    The head is the weights' own where `model.head` allows it and its classes are the data's, in any order; else a new
    one.  Raises `VitError` when the weights do not fit, `model.head=keep` and the classes are others, or with LoRA
    something else than the head would start afresh.
    """
    from vit.pretrained.create import MAY_DIFFER, load_pretrained

    m = config.model
    given = {key: value for key, value in m.arguments(len(data.class_names)).items() if key in MAY_DIFFER}
    del given["num_classes"]
    loaded = load_pretrained(
        str(m.name),
        weights=m.weights,
        class_names=data.class_names,
        head=None if m.head == "auto" else m.head,
        revision=m.revision,
        **given,
    )
    if config.lora.rank is not None and any(name.startswith("attn_pool.") for name in loaded.report.missing):
        raise VitError(
            f"model.pool=attention: new to the weights of {m.name}, and with lora.rank={config.lora.rank} it would not "
            "learn: leave out one of the two"
        )
    log.info(
        "%s\n%s", loaded.report.table(), describe_resolution(loaded.architecture, loaded.own_size, data.splits["train"])
    )
    return loaded.model.train()  # Lightning leaves a module in the mode that it comes in


def describe_resolution(architecture: Mapping[str, Any], own: tuple[int, int], split: Split) -> str:
    """A line on the size of the model's images: tokens and operations, and what another size would cost.

    The other size is the weights' `own`; where they agree, that of the images, if it is smaller.
    """
    from vit.model.cost import flops

    (height, width), patch = architecture["image_size"], architecture["patch_size"]

    def tokens(sides: Sequence[int]) -> int:
        return (sides[0] // patch[0]) * (sides[1] // patch[1])

    here = flops(architecture)
    line = f"image size  {height} x {width}: {tokens((height, width)):,} patches, {here / 1e9:.3g} GFLOPs an image"
    other, whose = list(own), "the weights' own"
    if (height, width) == tuple(own):
        found = split.native_size or (np.median(split.sizes, axis=0) if split.sizes is not None else own)
        other = [max(p, int(side) // p * p) for side, p in zip(found, patch, strict=True)]
        whose = "about that of the images"
        if tokens(other) >= tokens((height, width)):
            return line
    times = flops({**architecture, "image_size": other}) / here
    typed = str(_collapse_square(other)).replace(" ", "")
    return f"{line}; data.image_size={typed}, {whose}: {tokens(other):,} patches, {times:.2g} times the cost"


def _open_keys() -> list[str]:
    """Keys of `model` that may be left to the weights."""
    return [key.name for key in options.list_keys(ModelConfig) if key.name not in SOURCE_KEYS]


def _placeholder(key: options.Key) -> Any:
    if type(None) in get_args(key.type):
        return None
    if key.rule.choices:
        return key.rule.choices[0]
    return False if key.type is bool else 1 if key.rule.ge is None else int(key.rule.ge)


def _read_weights_info(name: str, revision: str | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, architecture and preprocessing of somebody's weights, as plain types.

    A name of timm's without a tag gets that of the weights it means now, which another timm may choose otherwise.
    """
    import torch

    from vit.model import VisionTransformer
    from vit.pretrained.create import look

    known = look(name, revision)
    with torch.device("meta"):  # an older model does not say what it could not have
        architecture = VisionTransformer(**known.architecture).architecture
    preprocessing = known.preprocessing.to_dict()
    plain = {key: list(each) if isinstance(each, tuple) else each for key, each in preprocessing.items()}
    return known.name + "".join(name.partition("@")[1:]) if known.trusted else name, architecture, plain


def _collapse_square(pair: Any) -> Any:
    """A square as one number."""
    sides: Sequence[Any] = list(pair)
    return sides[0] if sides[0] == sides[1] else list(sides)


def _check_image_size(name: str, model: Mapping[str, Any]) -> None:
    """Images that do not divide into the weights' patches: say which sizes do."""
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
