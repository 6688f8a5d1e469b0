"""Models by name, with weights or without: this project's own sizes, everything plain in timm's registry, files.

    create_model("vit_tiny", image_size=32, patch_size=4, num_classes=10)
    create_model("vit_small_patch16_224")                                             # timm's names, random weights
    create_model("vit_small_patch16_224.augreg_in1k", pretrained=True, image_size=384)
    create_model("vit_small_patch14_dinov2", weights="dinov2.safetensors")
    loaded = load_pretrained("vit_small_patch16_224.augreg_in1k", num_classes=10)     # and what goes with the weights
    print(loaded.report.table())

Notable: the architecture is the weights'.  What may be asked for differently is what weights can be resampled for, or
what starts afresh: sizes of images and patches, channels, classes, pooling.
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
from vit.model import create_model as create_own
from vit.model.patches import pair
from vit.pretrained.fit import HEADS, Report, fit_weights
from vit.pretrained.preprocessing import for_channels
from vit.pretrained.registry import entry
from vit.pretrained.skip_init import SkipInit
from vit.pretrained.sources import ModelInfo, look, place_of, read

__all__ = ["ModelInfo", "PretrainedModel", "count_parameters", "create_model", "load_pretrained", "look"]

MAY_DIFFER = frozenset(
    {"image_size", "patch_size", "in_channels", "num_classes", "pool", "final_norm", "distillation_token"}
    | {"crop_to_patches", "dropout", "attention_dropout", "drop_path", "patch_dropout", "init"}
    | {"reduction", "reduction_rate", "reduction_schedule", "reduction_proportional"}
)
"""Arguments of `vit.VisionTransformer` that may be another than the weights'."""


@dataclass
class PretrainedModel:
    """A model with somebody's weights, and what goes with them.

    Attributes
        model: in evaluation mode, on the CPU, in float32.
        preprocessing: how images become its inputs.
        class_names: one name an output; None where nobody says what the outputs mean.
        report: what was loaded, resampled, missing and unexpected, and what became of the head.
        source: where the weights are from, exactly.
        own_size: height and width of the images that the weights were made for.
    """

    model: VisionTransformer
    preprocessing: Preprocessing
    class_names: list[str] | None
    report: Report
    source: str
    own_size: tuple[int, int]

    @property
    def architecture(self) -> dict[str, Any]:
        """The arguments that build the model again."""
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

    Arguments
        name: "vit_" and a size ("vit_tiny"), which needs `image_size`, `patch_size` and `num_classes`; or a name of
            timm's registry ("vit_small_patch16_224", with a tag or without), which says them itself; or another
            source of `load_pretrained`.
        pretrained: whether to load the weights that go with the name; else they are random.
        weights: load these instead, a source of `load_pretrained`.
        revision, head: as `load_pretrained` takes them.
        num_classes: outputs; None for as many as the name has, 0 for no head.
        overrides: other arguments of `vit.VisionTransformer`.

    Raises `VitError` for a name that does not exist, with the nearest ones, or that is no plain Vision Transformer,
    and as `load_pretrained` does.
    """
    own = name.startswith("vit_") and name.count("_") == 1  # timm's have a patch size, or a family's name in front
    if own and (pretrained or weights is not None):
        raise VitError(f"{name} is an architecture without weights: expected a name such as vit_tiny_patch16_224")
    if pretrained or weights is not None:
        return load_pretrained(
            name, weights=weights, revision=revision, num_classes=num_classes, head=head, **overrides
        ).model
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    if own:
        return create_own(name, **overrides)
    return VisionTransformer(**{**entry(name).architecture, **overrides})


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
    """A model with somebody's weights, resampled to what is asked for.

    Arguments
        source: a name of timm's ("vit_small_patch16_224.augreg_in1k", perhaps @REVISION), "hf-hub:ORG/NAME",
            "local-dir:FOLDER", a run folder, a bundle, a checkpoint.
        weights: another source for the weights alone; then `source` says the architecture only.
        num_classes, class_names: what the outputs are to be; None for the weights' own, 0 for no head.
        head: "keep", "replace" or "drop"; None keeps it where the classes are the weights' own, in any order (its rows
            are then reordered), drops it for `num_classes=0`, and replaces it otherwise, by one that starts at zero.
        revision: branch, tag or commit on the hub.
        overrides: arguments of `vit.VisionTransformer` in `MAY_DIFFER`; others only as the weights have them.

    Raises `VitError`, and gives no model, when there is no such source, no network for it, a file is damaged or would
    run code, an override contradicts the weights, or the weights do not fit (the rule is in `vit.pretrained.fit`).
    """
    own = weights is None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # building there draws numbers as well
        known = look(source, revision if own else None)
        place = known.place if own else place_of(weights or "", revision)
        if place is None:
            raise VitError(f"timm has no weights for {known.name}: name a tag that has, or give weights=FILE")
        names = None if class_names is None else list(class_names)
        if names is not None and num_classes not in (None, len(names)):
            raise VitError(f"num_classes={num_classes} for {len(names)} class names")
        wanted = len(names) if names is not None else 0 if head == "drop" and num_classes is None else num_classes
        arguments = _arguments(known, overrides)
        arguments["num_classes"] = known.architecture["num_classes"] if wanted is None else wanted
        _built(arguments, known.name)  # before the weights are fetched, so that what cannot be is said at once
    has, own_names = known.architecture["num_classes"], known.class_names
    if own:
        decided = _decide(head, wanted, names, has, own_names, known.name)
    found = read(place, known)
    state = found.state
    if not own:
        has = len(state["head.weight"]) if "head.weight" in state and state["head.weight"].ndim else 0
        decided = _decide(head, wanted, names, has, None, found.label)
    if own and decided == "keep" and names is not None and own_names is not None:
        state = _reordered(state, own_names, names)
    # pooling by attention, where the weights do not, starts as any model does; all else is the weights' at once
    fresh = arguments.get("pool") == "attention" != known.architecture.get("pool")
    with contextlib.nullcontext() if fresh else SkipInit():
        model = _built(arguments, known.name)
    try:
        report = fit_weights(model, state, head=decided, source=found.label, grid=_grid(known, state) if own else None)
    except VitError as error:
        raise VitError(f"{known.name}: {error}") from None
    report.notes[:0] = found.notes
    preprocessing = for_channels(known.preprocessing, arguments["in_channels"])
    preprocessing = replace(preprocessing, image_size=pair(model.architecture["image_size"], "data.image_size"))
    if names is None and own and report.head == "kept":
        names = own_names
    return PretrainedModel(model.eval(), preprocessing, names, report, found.label, known.preprocessing.image_size)


def count_parameters(architecture: dict[str, Any]) -> int:
    """How many numbers the weights of a model of this architecture are, without building it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VisionTransformer(**architecture).parameters())


def _decide(
    head: str | None, wanted: int | None, names: list[str] | None, has: int, own: list[str] | None, source: str
) -> str:
    """What becomes of the head, where the weights have `has` outputs called `own`.

    Raises `VitError` when it is to be kept for other classes than it has.
    """
    if head is not None and head not in HEADS:
        raise VitError(f"head={head!r}: {did_you_mean(str(head), HEADS)}")
    other = None if wanted in (None, has) else f"{wanted} classes"
    if other is None and names is not None and own is not None and sorted(own) != sorted(names):
        other = "classes of other names"
    if head == "keep" and other is not None:
        raise VitError(f"head=keep, but {source} has {has} outputs and {other} are asked for: use head=replace")
    if head is not None:
        return head
    unknown = names is not None and own is None
    return "drop" if wanted == 0 else "replace" if other is not None or unknown else "keep"


def _arguments(known: ModelInfo, overrides: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model: the weights' own, but for what may differ."""
    own = dict(known.architecture)
    for key, value in overrides.items():
        pairs = key in ("image_size", "patch_size")
        value = list(pair(value, f"model.{key}")) if pairs else value
        if key not in MAY_DIFFER and not (key in own and own[key] == value) and not (key == "size" and value is None):
            told = f"{key}={own[key]!r}" if key in own else f"no {key}"
            raise VitError(f"{key}={value!r} is not what {known.name} was trained with: its weights have {told}")
    if overrides.get("pool", own.get("pool")) != own.get("pool"):
        own["final_norm"] = None  # where the pooling suggests
    return {**own, **{key: value for key, value in overrides.items() if key != "size"}}


def _built(arguments: dict[str, Any], name: str) -> VisionTransformer:
    try:
        return VisionTransformer(**arguments)
    except VitError as error:
        raise VitError(f"{name}: {error}") from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VitError(f"{name}: its architecture cannot be built: {error}") from None


def _reordered(state: dict[str, Tensor], own: list[str], names: list[str]) -> dict[str, Tensor]:
    """Heads with their rows in the order of `names`; of equal names the first comes first."""
    places: dict[str, list[int]] = {}
    for index, name in enumerate(own):
        places.setdefault(name, []).append(index)
    order = torch.tensor([places[name].pop(0) for name in names])
    return {
        key: value[order] if key.startswith(("head.", "head_dist.")) and len(value) == len(order) else value
        for key, value in state.items()
    }


def _grid(known: ModelInfo, state: dict[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of patches that the positions are for, where the architecture's are as many."""
    a, positions = known.architecture, state.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return None
    rows, columns = (image // patch for image, patch in zip(a["image_size"], a["patch_size"], strict=True))
    tokens = [a.get("class_token", True), a.get("distillation_token", False)]
    prefix = sum(map(int, tokens)) + a.get("registers", 0) if a.get("position_prefix", True) else 0
    return (rows, columns) if positions.shape[1] == prefix + rows * columns else None
