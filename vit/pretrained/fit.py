"""Load pretrained weights into a model, resample them where sizes differ, and report on each tensor.

One rule decides whether weights fit, before anything is changed:

- model and weights must have the same tensors in the body (tokens, positions, patch embedding, blocks, norms);
  otherwise the architectures differ and the weights are refused;
- positions and the patch embedding may differ in size and are resampled (`vit.pretrained.resample`); no other tensor
  may;
- the head, and a pooling layer under it, are kept, replaced or dropped as requested;
- at most `MAX_UNEXPECTED` of all tensors may be others that the model does not use.

A replaced head starts at zero (Dosovitskiy et al. 2021, section 3.2), so all classes are equally likely at first and no
random numbers are drawn.  Imports torch.
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
from vit.pretrained.resample import Pair, resample_channels, resample_patches, resample_positions, square_grid

HEADS = ("keep", "replace", "drop")
MAX_UNEXPECTED = 0.05
_HEAD = ("head.", "head_dist.")
_POOL = "attn_pool."
_BODY = re.compile(r"(blocks|patch_embed|norm|norm_pre|fc_norm|attn_pool)\.|((cls|dist|reg)_token|pos_embed)$")


@dataclass(frozen=True)
class Resampled:
    """Records the shapes of a resampled tensor."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass
class Report:
    """Reports which tensors were loaded.

    Attributes:
        source: the source of the weights.
        loaded: names of tensors loaded unchanged.
        resampled: tensors loaded after resampling.
        missing: names of the model's tensors that start anew, since the weights have none for them.
        unexpected: names of tensors in the weights that the model does not use.
        head: "kept", "replaced", "dropped", or "none" if neither has one.
        classes: number of classes (before, after).
        notes: other decisions, as text.
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
        """Format the report as plain text for a terminal of eighty columns."""
        width = max((len(entry.name) for entry in self.resampled), default=0)
        rows = [
            ("weights", [self.source]),
            ("loaded", [f"{len(self.loaded)} tensors as they are"]),
            (
                "resampled",
                [f"{r.name:<{width}}  {_format_shape(r.before)} -> {_format_shape(r.after)}" for r in self.resampled],
            ),
            ("missing", _truncate(self.missing)),
            ("unexpected", _truncate(self.unexpected)),
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
        """Convert the report to plain JSON types, with the number of loaded tensors."""
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
    """Load the weights of `state`, under this project's names, into `model` in place, in the model's dtype.

    Args:
        model: the model.
        state: the weights.
        head: "keep" (the head of the weights, of the model's size), "replace" (a new head of zeros) or "drop" (the
            model has no head).
        source: the name of the weights in messages and the report.
        grid: grid (rows, columns) of the weights' positions; None: a square.

    Raises:
        VitError: if the weights do not fit by the rule above; the model is then unchanged.
    """
    if head not in HEADS:
        raise VitError(f"head={head!r}: {did_you_mean(str(head), HEADS)}")
    expected, report = model.state_dict(), Report(source)
    weights = _rename_norm(expected, dict(state), report)
    fitted = _fit_head(expected, weights, head, report)
    fresh = _new_tensors(expected, weights, report) if head != "keep" else {}
    misshapen, absent = [], []
    for name, target in expected.items():
        if name.startswith(_HEAD):
            continue
        if name in fresh:
            report.missing.append(name)
            fitted[name] = fresh[name].to("cpu", target.dtype)
        elif name not in weights:
            absent.append(name)
        else:
            value = _check_floating(name, weights.pop(name), source)
            fitted[name] = _resize(name, value, target, model, grid, report).to("cpu", target.dtype)
            if fitted[name].shape != target.shape:
                misshapen.append(f"{name} {_format_shape(value.shape)} instead of {_format_shape(target.shape)}")
            elif name not in (entry.name for entry in report.resampled):
                report.loaded.append(name)
    report.unexpected = sorted(weights)
    refused = [name for name in report.unexpected if _BODY.match(name)]
    if len(report.unexpected) > MAX_UNEXPECTED * len(state):
        refused = report.unexpected
    problems = [
        f"{kind} {format_names(names)}"
        for kind, names in (("missing", absent), ("misshapen", misshapen), ("unexpected", refused))
        if names
    ]
    if problems:
        raise VitError(f"{source} does not fit this model: {'; '.join(problems)}")
    model.load_state_dict({**expected, **fitted})
    return report


def _rename_norm(expected: Mapping[str, Tensor], weights: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Rename the last norm if the model pools otherwise than the weights: its name depends on the pooling."""
    for old, new in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        in_model = {prefix: any(name.startswith(prefix) for name in expected) for prefix in (old, new)}
        in_weights = {prefix: any(name.startswith(prefix) for name in weights) for prefix in (old, new)}
        if in_model == {old: False, new: True} and in_weights == {old: True, new: False}:
            report.notes.append(f"{old}* is used as {new}*, since the model pools otherwise")
            return {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in weights.items()}
    return weights


def _new_tensors(expected: Mapping[str, Tensor], weights: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Initialise tensors that start anew with a new head; remove those of the old head from `weights`.

    Attention pooling keeps the model's initialisation.  A missing distillation token starts as a copy of the class
    token, at its position, so that both see the same at first.
    """
    fresh = {}
    in_model = [name for name in expected if name.startswith(_POOL)]
    in_weights = [name for name in weights if name.startswith(_POOL)]
    if in_model and not in_weights:
        fresh = {name: expected[name] for name in in_model}
        report.notes.append("attn_pool is new, since the model pools otherwise than the weights did")
    elif in_weights and not in_model:
        for name in in_weights:
            del weights[name]
        report.notes.append("attn_pool is left out, since the model pools otherwise than the weights did")
    if "dist_token" in expected and "dist_token" not in weights and isinstance(weights.get("cls_token"), Tensor):
        fresh["dist_token"] = weights["cls_token"]
        report.notes.append("dist_token is new: a copy of cls_token, at its position")
    return fresh


def _fit_head(
    expected: Mapping[str, Tensor], weights: dict[str, Tensor], head: str, report: Report
) -> dict[str, Tensor]:
    """Choose the tensors of the model's head; remove the head from `weights`."""
    new_head = {name: tensor for name, tensor in expected.items() if name.startswith(_HEAD)}
    old_head = {name: weights.pop(name) for name in [*weights] if name.startswith(_HEAD)}
    old_weight = old_head.get("head.weight")
    before = old_weight.shape[0] if old_weight is not None and old_weight.ndim else 0
    after = new_head["head.weight"].shape[0] if new_head else 0
    report.classes = before, after
    if head == "drop":
        if new_head:
            raise VitError(f"head=drop, but the model has one of {after} outputs: set num_classes=0, or head=replace")
        report.head = "dropped" if old_head else "none"
        return {}
    if not new_head:
        if old_head:
            raise VitError(f"head={head}, but the model has none: set num_classes={before}, or head=drop")
        return {}
    if head == "replace":
        report.head = "replaced"
        report.missing += sorted(new_head)
        return {name: torch.zeros_like(tensor) for name, tensor in new_head.items()}
    old_shapes, new_shapes = ({name: tuple(t.shape) for name, t in part.items()} for part in (old_head, new_head))
    if old_shapes != new_shapes:
        size = f"a head of {before} outputs" if old_head else "no head"
        raise VitError(f"{report.source} has {size}, the model one of {after}: a new one is had by head=replace")
    report.head = "kept"
    report.loaded += sorted(old_head)
    tensors = {name: _check_floating(name, value, report.source) for name, value in old_head.items()}
    return {name: tensor.to("cpu", new_head[name].dtype) for name, tensor in tensors.items()}


def _resize(
    name: str, value: Tensor, target: Tensor, model: VisionTransformer, grid: Pair | None, report: Report
) -> Tensor:
    """Resample `value` to the size of `target` if possible, and report it; else return it unchanged."""
    new = value
    try:
        if name == "patch_embed.proj.weight" and value.ndim == 4:
            new = resample_patches(resample_channels(value, target.shape[1]), (target.shape[2], target.shape[3]))
        elif name == "pos_embed" and value.ndim == 3:
            prefix = target.shape[1] - model.grid[0] * model.grid[1]
            if prefix and "dist_token" in report.missing:
                new = torch.cat([value[:, :1], value], dim=1)
            if grid is None and square_grid(new.shape[1] - prefix) is None and new.shape == target.shape:
                grid = model.grid  # not a square, but the model's number of positions
            new = resample_positions(new, model.grid, prefix=prefix, old=grid)
    except VitError as error:
        raise VitError(f"{report.source}: {error}") from None
    if new is not value and new.shape == target.shape:
        report.resampled.append(Resampled(name, tuple(value.shape), tuple(target.shape)))
    return new if new.shape == target.shape else value


def _check_floating(name: str, value: object, source: str) -> Tensor:
    """Check that `value` is a plain tensor of floating-point numbers, and return it."""
    if not isinstance(value, Tensor):
        raise VitError(f"{source}: {name} is {type(value).__name__}, not a tensor")
    if not value.is_floating_point() or value.layout != torch.strided or value.is_quantized:
        raise VitError(f"{source}: {name} holds {value.dtype}, not plain floating-point numbers")
    return value


def format_names(names: Iterable[str], count: int = 3) -> str:
    """Format the first names and the number of the others."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _format_shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes)) or "one number"


def _truncate(names: list[str], count: int = 6) -> list[str]:
    return [*names[:count], *([f"and {len(names) - count} more"] if len(names) > count else [])]
