"""Create models by name, with weights or without: this project's sizes, timm's plain models, files.

    create_model("vit_tiny", image_size=32, patch_size=4, num_classes=10)
    create_model("vit_small_patch16_224")                                             # timm's names, random weights
    create_model("vit_small_patch16_224.augreg_in1k", pretrained=True, image_size=384)
    create_model("vit_small_patch14_dinov2", weights="dinov2.safetensors")
    loaded = load_pretrained("vit_small_patch16_224.augreg_in1k", num_classes=10)     # with preprocessing and classes
    print(loaded.report.table())

The weights decide the architecture.  Only arguments for which weights can be resampled or start anew may differ: sizes
of images and patches, channels, classes, pooling.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vit.data.preprocess import Preprocessing
from vit.errors import VitError, did_you_mean
from vit.model import VisionTransformer
from vit.model import create_model as create_native
from vit.model.patches import pair
from vit.pretrained.fit import HEADS, Report, fit_weights
from vit.pretrained.preprocessing import adapt_channels
from vit.pretrained.registry import read_entry
from vit.pretrained.skip_init import SkipInit
from vit.pretrained.sources import ModelInfo, find_weights, read_info, read_weights

__all__ = ["ModelInfo", "PretrainedModel", "count_parameters", "create_model", "load_pretrained", "read_info"]

MAY_DIFFER = frozenset(
    {"image_size", "patch_size", "in_channels", "num_classes", "pool", "final_norm", "distillation_token"}
    | {"crop_to_patches", "dropout", "attention_dropout", "drop_path", "patch_dropout", "init"}
    | {"reduction", "reduction_rate", "reduction_schedule", "reduction_proportional"}
)
"""Arguments of `vit.VisionTransformer` that may differ from those of the weights."""


@dataclass
class PretrainedModel:
    """Holds a model with pretrained weights, its preprocessing and its classes.

    Attributes:
        model: the model in evaluation mode, on the CPU, in float32.
        preprocessing: the preprocessing of its images.
        class_names: one name for each output; None if the meaning of the outputs is unknown.
        report: which tensors were loaded, resampled, missing and unexpected, and whether the head was replaced.
        source: the exact source of the weights.
        pretrained_size: height and width of the images that the weights were trained on.
    """

    model: VisionTransformer
    preprocessing: Preprocessing
    class_names: list[str] | None
    report: Report
    source: str
    pretrained_size: tuple[int, int]

    @property
    def architecture(self) -> dict[str, Any]:
        """Get the arguments that build the model again."""
        return self.model.architecture


def create_model(
    name: str = "vit_tiny",
    *,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    head: str | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """Build a model by name.

    Args:
        name: "vit_" and a size ("vit_tiny"), which needs `image_size`, `patch_size` and `num_classes`; or a name of
            timm's registry ("vit_small_patch16_224", with or without a tag), which has them; or another source of
            `load_pretrained`.
        pretrained: whether to load the weights of the name; else the weights are random.
        weights: other weights to load, a source of `load_pretrained`.
        revision, head: see `load_pretrained`.
        num_classes: number of outputs; None: that of the name; 0: no head.
        overrides: other arguments of `vit.VisionTransformer`.

    Raises:
        VitError: if the name does not exist (the message has the nearest names) or is no plain Vision Transformer; and
            as in `load_pretrained`.
    """
    native = name.startswith("vit_") and name.count("_") == 1  # timm's names have a patch size or a family as well
    if native and (pretrained or weights is not None):
        raise VitError(f"{name} is an architecture without weights: expected a name such as vit_tiny_patch16_224")
    if pretrained or weights is not None:
        return load_pretrained(
            name, weights=weights, revision=revision, num_classes=num_classes, head=head, **overrides
        ).model
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    if native:
        return create_native(name, **overrides)
    return VisionTransformer(**{**read_entry(name).architecture, **overrides})


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    head: str | None = None,
    revision: str | None = None,
    **overrides: Any,
) -> PretrainedModel:
    """Load a model with pretrained weights, resampled to the requested sizes.

    Args:
        source: a timm name ("vit_small_patch16_224.augreg_in1k", perhaps @REVISION), "hf-hub:ORG/NAME",
            "local-dir:FOLDER", a run folder, a bundle or a checkpoint.
        weights: another source of the weights; `source` then gives only the architecture.
        num_classes, class_names: the requested outputs; None: those of the weights; 0: no head.
        head: "keep", "replace" or "drop".  None keeps the head if the classes are those of the weights, in any order
            (its rows are then reordered), drops it for `num_classes=0`, and otherwise replaces it by one of zeros.
        revision: branch, tag or commit on the hub.
        overrides: arguments of `vit.VisionTransformer` in `MAY_DIFFER`; others must equal those of the weights.

    Raises:
        VitError: if the source does not exist or needs a network that is missing, a file is damaged or would run code,
            an override contradicts the weights, or the weights do not fit (by the rule in `vit.pretrained.fit`).
    """
    same_source = weights is None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # building a model there draws random numbers too
        info = read_info(source, revision if same_source else None)
        location = info.location if same_source else find_weights(weights or "", revision)
        if location is None:
            raise VitError(f"timm has no weights for {info.name}: name a tag that has, or give weights=FILE")
        names = None if class_names is None else list(class_names)
        if names is not None and num_classes not in (None, len(names)):
            raise VitError(f"num_classes={num_classes} for {len(names)} class names")
        classes = len(names) if names is not None else 0 if head == "drop" and num_classes is None else num_classes
        arguments = _arguments(info, overrides)
        arguments["num_classes"] = info.architecture["num_classes"] if classes is None else classes
        _build(arguments, info.name)  # before the weights are fetched, so that an error comes at once
    old_classes, old_names = info.architecture["num_classes"], info.class_names
    if same_source:
        action = _choose_head(head, classes, names, old_classes, old_names, info.name)
    loaded = read_weights(location, info)
    state = loaded.state
    if not same_source:
        old_classes = len(state["head.weight"]) if "head.weight" in state and state["head.weight"].ndim else 0
        action = _choose_head(head, classes, names, old_classes, None, loaded.label)
    if same_source and action == "keep" and names is not None and old_names is not None:
        state = _reorder_head(state, old_names, names)
    # a new attention pool is initialised; all other tensors come from the weights
    new_pool = arguments.get("pool") == "attention" != info.architecture.get("pool")
    with contextlib.nullcontext() if new_pool else SkipInit():
        model = _build(arguments, info.name)
    grid = _position_grid(info, state) if same_source else None
    try:
        report = fit_weights(model, state, head=action, source=loaded.label, grid=grid)
    except VitError as error:
        raise VitError(f"{info.name}: {error}") from None
    report.notes[:0] = loaded.notes
    preprocessing = adapt_channels(info.preprocessing, arguments["in_channels"])
    preprocessing = replace(preprocessing, image_size=pair(model.architecture["image_size"], "data.image_size"))
    if names is None and same_source and report.head == "kept":
        names = old_names
    return PretrainedModel(model.eval(), preprocessing, names, report, loaded.label, info.preprocessing.image_size)


def count_parameters(architecture: dict[str, Any]) -> int:
    """Count the parameters of a model of this architecture without building it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VisionTransformer(**architecture).parameters())


def _choose_head(
    head: str | None,
    classes: int | None,
    names: list[str] | None,
    old_classes: int,
    old_names: list[str] | None,
    source: str,
) -> str:
    """Choose whether to keep, replace or drop a head of `old_classes` outputs called `old_names`.

    Raises `VitError` when `head` is "keep" and the requested classes differ.
    """
    if head is not None and head not in HEADS:
        raise VitError(f"head={head!r}: {did_you_mean(str(head), HEADS)}")
    other = None if classes in (None, old_classes) else f"{classes} classes"
    if other is None and names is not None and old_names is not None and sorted(old_names) != sorted(names):
        other = "classes of other names"
    if head == "keep" and other is not None:
        raise VitError(f"head=keep, but {source} has {old_classes} outputs and {other} are asked for: use head=replace")
    if head is not None:
        return head
    unknown = names is not None and old_names is None
    return "drop" if classes == 0 else "replace" if other is not None or unknown else "keep"


def _arguments(info: ModelInfo, overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge the weights' arguments with overrides of `MAY_DIFFER`."""
    arguments = dict(info.architecture)
    for key, value in overrides.items():
        pairs = key in ("image_size", "patch_size")
        value = list(pair(value, f"model.{key}")) if pairs else value
        equal = (key in arguments and arguments[key] == value) or (key == "size" and value is None)
        if key not in MAY_DIFFER and not equal:
            trained = f"{key}={arguments[key]!r}" if key in arguments else f"no {key}"
            raise VitError(f"{key}={value!r} is not what {info.name} was trained with: its weights have {trained}")
    if overrides.get("pool", arguments.get("pool")) != arguments.get("pool"):
        arguments["final_norm"] = None  # the default of the pooling
    return {**arguments, **{key: value for key, value in overrides.items() if key != "size"}}


def _build(arguments: dict[str, Any], name: str) -> VisionTransformer:
    try:
        return VisionTransformer(**arguments)
    except VitError as error:
        raise VitError(f"{name}: {error}") from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VitError(f"{name}: its architecture cannot be built: {error}") from None


def _reorder_head(state: dict[str, Tensor], old_names: list[str], names: list[str]) -> dict[str, Tensor]:
    """Reorder the rows of the heads to the order of `names`; equal names keep their order."""
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(old_names):
        indices.setdefault(name, []).append(index)
    order = torch.tensor([indices[name].pop(0) for name in names])
    return {
        key: value[order] if key.startswith(("head.", "head_dist.")) and len(value) == len(order) else value
        for key, value in state.items()
    }


def _position_grid(info: ModelInfo, state: dict[str, Tensor]) -> tuple[int, int] | None:
    """Compute the grid (rows, columns) of the position embeddings; None if the architecture has another number."""
    a, positions = info.architecture, state.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return None
    rows, columns = (image // patch for image, patch in zip(a["image_size"], a["patch_size"], strict=True))
    tokens = int(a.get("class_token", True)) + int(a.get("distillation_token", False)) + a.get("registers", 0)
    prefix = tokens if a.get("position_prefix", True) else 0
    return (rows, columns) if positions.shape[1] == prefix + rows * columns else None
