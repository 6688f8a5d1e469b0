"""Foreign weights into a model: all that belongs, resampled where sizes differ, and a report of what became of each.

What fits is decided by one rule, before anything is changed:

- the body (tokens, positions, patch embedding, blocks, norms) must be in the model and in the weights alike; a tensor
  of it that only one of them has means that they are not the same architecture, and the weights are refused;
- positions and the patch embedding may differ in size, and are resampled (`vit.pretrained.resample`); nothing else may;
- the head, and a pooling layer under it, are kept, replaced or dropped as asked;
- of what remains, tensors that no part of the model could use, at most `MOST_UNEXPECTED` of all may be left over.

A replaced head starts at zero (Dosovitskiy et al. 2021, section 3.2), so all classes are equally likely at first and
nothing is drawn at random.  Imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vit.errors import VitError, did_you_mean
from vit.model import VisionTransformer
from vit.pretrained.resample import Pair, resample_channels, resample_patches, resample_positions, square

HEADS = ("keep", "replace", "drop")
MOST_UNEXPECTED = 0.05
_HEAD = ("head.", "head_dist.")
_POOL = "attn_pool."
_BODY = re.compile(r"(blocks|patch_embed|norm|norm_pre|fc_norm|attn_pool)\.|((cls|dist|reg)_token|pos_embed)$")


@dataclass(frozen=True)
class Resampled:
    """A tensor that was brought to another size."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass
class Report:
    """What became of every tensor.

    Attributes
        source: where the weights are from.
        loaded: names of those taken as they were; resampled: of those brought to another size.
        missing: of the model's own that start afresh, since the weights have none for them.
        unexpected: of those in the weights that the model has no use for.
        head: "kept", "replaced", "dropped", or "none" where neither has one; classes: (before, after).
        notes: what else was decided, in words.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resampled: list[Resampled] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    head: str = "none"
    classes: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """The report as plain text, one line a fact, for a terminal of eighty columns."""
        width = max((len(entry.name) for entry in self.resampled), default=0)
        rows = [
            ("weights", [self.source]),
            ("loaded", [f"{len(self.loaded)} tensors as they are"]),
            (
                "resampled",
                [f"{each.name:<{width}}  {_shape(each.before)} -> {_shape(each.after)}" for each in self.resampled],
            ),
            ("missing", _wrapped(self.missing)),
            ("unexpected", _wrapped(self.unexpected)),
            ("head", [self._head()]),
            ("notes", self.notes),
        ]
        lines = []
        for title, texts in rows:
            if title == "notes" and not texts:
                continue
            for number, text in enumerate(texts or ["none"]):
                lines.append(f"{title if number == 0 else '':<11} {text}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; of what was loaded, the number."""
        return {
            "source": self.source,
            "loaded": len(self.loaded),
            "resampled": [[each.name, list(each.before), list(each.after)] for each in self.resampled],
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "head": self.head,
            "notes": list(self.notes),
        }

    def _head(self) -> str:
        before, after = self.classes
        if self.head == "kept":
            return f"kept, {after} outputs"
        if self.head == "replaced":
            return f"replaced: {before or 'none'} -> {after} outputs, from zero"
        return f"dropped, {before} outputs" if self.head == "dropped" else "none"


def fit_weights(
    model: VisionTransformer,
    state: Mapping[str, Tensor],
    *,
    head: str = "keep",
    source: str = "the weights",
    grid: Pair | None = None,
) -> Report:
    """Give `model` the weights of `state`, whose names are this project's, in place; in the model's own precision.

    Arguments
        head: "keep" (the weights' own, which must be of the model's size), "replace" (a new one, zero) or "drop" (the
            model has none).
        source: how messages and the report call the weights.
        grid: rows and columns of patches that the weights' positions are for; None: a square.

    Raises `VitError` when the weights do not fit by the rule above; the model is then as it was.
    """
    if head not in HEADS:
        raise VitError(f"head={head!r}: {did_you_mean(str(head), HEADS)}")
    own, report = model.state_dict(), Report(source)
    given = _moved_norm(own, dict(state), report)
    fitted = _fit_head(own, given, head, report)
    fresh = _fresh(own, given, report) if head != "keep" else {}
    misshapen, absent = [], []
    for name, target in own.items():
        if name.startswith(_HEAD):
            continue
        if name in fresh:
            report.missing.append(name)
            fitted[name] = fresh[name].to("cpu", target.dtype)
        elif name not in given:
            absent.append(name)
        else:
            value = _numbers(name, given.pop(name), source)
            fitted[name] = _resized(name, value, target, model, grid, report).to("cpu", target.dtype)
            if fitted[name].shape != target.shape:
                misshapen.append(f"{name} {_shape(value.shape)} instead of {_shape(target.shape)}")
            elif name not in (entry.name for entry in report.resampled):
                report.loaded.append(name)
    report.unexpected = sorted(given)
    foreign = [name for name in report.unexpected if _BODY.match(name)]
    if len(report.unexpected) > MOST_UNEXPECTED * len(state):
        foreign = report.unexpected
    complaints = [
        f"{what} {some(names)}"
        for what, names in (("missing", absent), ("misshapen", misshapen), ("unexpected", foreign))
        if names
    ]
    if complaints:
        raise VitError(f"{source} does not fit this model: {'; '.join(complaints)}")
    model.load_state_dict({**own, **fitted})
    return report


def _moved_norm(own: Mapping[str, Tensor], given: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """The last norm is called by its place: pooling otherwise than the weights did renames it."""
    for old, new in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        wants = {prefix: any(name.startswith(prefix) for name in own) for prefix in (old, new)}
        has = {prefix: any(name.startswith(prefix) for name in given) for prefix in (old, new)}
        if wants == {old: False, new: True} and has == {old: True, new: False}:
            report.notes.append(f"{old}* is used as {new}*, since the model pools otherwise")
            return {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in given.items()}
    return given


def _fresh(own: Mapping[str, Tensor], given: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """What belongs to the head and may start afresh with it; takes out of `given` what goes with the old head.

    Attention pooling starts as the model has it.  A distillation token that the weights lack starts as their class
    token, at its position, so that at first it sees what that sees.
    """
    fresh = {}
    has = {"own": [n for n in own if n.startswith(_POOL)], "given": [n for n in given if n.startswith(_POOL)]}
    if has["own"] and not has["given"]:
        fresh = {name: own[name] for name in has["own"]}
        report.notes.append("attn_pool is new, since the model pools otherwise than the weights did")
    elif has["given"] and not has["own"]:
        for name in has["given"]:
            del given[name]
        report.notes.append("attn_pool is left out, since the model pools otherwise than the weights did")
    if "dist_token" in own and "dist_token" not in given and isinstance(given.get("cls_token"), Tensor):
        fresh["dist_token"] = given["cls_token"]
        report.notes.append("dist_token is new: a copy of cls_token, at its position")
    return fresh


def _fit_head(own: Mapping[str, Tensor], given: dict[str, Tensor], head: str, report: Report) -> dict[str, Tensor]:
    """The head's tensors for the model; takes those of the weights out of `given`."""
    wanted = {name: tensor for name, tensor in own.items() if name.startswith(_HEAD)}
    had = {name: given.pop(name) for name in [*given] if name.startswith(_HEAD)}
    before = had["head.weight"].shape[0] if had.get("head.weight") is not None and had["head.weight"].ndim else 0
    after = wanted["head.weight"].shape[0] if wanted else 0
    report.classes = before, after
    if head == "drop":
        if wanted:
            raise VitError(f"head=drop, but the model has one of {after} outputs: set num_classes=0, or head=replace")
        report.head = "dropped" if had else "none"
        return {}
    if not wanted:
        if had:
            raise VitError(f"head={head}, but the model has none: set num_classes={before}, or head=drop")
        return {}
    if head == "replace":
        report.head = "replaced"
        report.missing += sorted(wanted)
        return {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (had, wanted)]
    if shapes[0] != shapes[1]:
        what = f"a head of {before} outputs" if had else "no head"
        raise VitError(f"{report.source} has {what}, the model one of {after}: a new one is had by head=replace")
    report.head = "kept"
    report.loaded += sorted(had)
    return {name: _numbers(name, value, report.source).to("cpu", wanted[name].dtype) for name, value in had.items()}


def _resized(
    name: str, value: Tensor, target: Tensor, model: VisionTransformer, grid: Pair | None, report: Report
) -> Tensor:
    """`value` brought to the size of `target` where this can be done, and reported; else as it is."""
    new = value
    try:
        if name == "patch_embed.proj.weight" and value.ndim == 4:
            new = resample_patches(resample_channels(value, target.shape[1]), (target.shape[2], target.shape[3]))
        elif name == "pos_embed" and value.ndim == 3:
            prefix = target.shape[1] - model.grid[0] * model.grid[1]
            if prefix and "dist_token" in report.missing:
                new = torch.cat([value[:, :1], value], dim=1)
            if grid is None and square(new.shape[1] - prefix) is None and new.shape == target.shape:
                grid = model.grid  # no square, and as many as the model has
            new = resample_positions(new, model.grid, prefix=prefix, old=grid)
    except VitError as error:
        raise VitError(f"{report.source}: {error}") from None
    if new is not value and new.shape == target.shape:
        report.resampled.append(Resampled(name, tuple(value.shape), tuple(target.shape)))
    return new if new.shape == target.shape else value


def _numbers(name: str, value: object, source: str) -> Tensor:
    """`value`, which should be a plain tensor of floating-point numbers."""
    if not isinstance(value, Tensor):
        raise VitError(f"{source}: {name} is {type(value).__name__}, not a tensor")
    if not value.is_floating_point() or value.layout != torch.strided or value.is_quantized:
        raise VitError(f"{source}: {name} holds {value.dtype}, not plain floating-point numbers")
    return value


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes)) or "one number"


def _wrapped(names: list[str], most: int = 6) -> list[str]:
    return [*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])]
