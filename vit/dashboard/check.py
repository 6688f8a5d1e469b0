"""What a record must hold before it goes to the page: names, types, sizes.

A record that decodes may still have been written by something else, or by hand.  Here it is refused with a reason, so
that one bad record costs itself and not the whole page.  Beyond what is named here a record may hold more.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit.dashboard.format import PAIRS, PROBE, RUN, STEPS, RecordError

_MOST_DIMENSIONS, _LARGEST_SIDE = 4, 1 << 24

Check = Callable[[Any], bool]


def check(tag: str, record: Mapping[str, Any]) -> None:
    """Raise `RecordError`, naming the place, where a decoded record of `tag` is not what the page expects."""
    kind = {RUN: _run, STEPS: _steps}.get(tag) or (_probe if tag.startswith(PROBE) else _pairs)
    if kind is _pairs and not tag.startswith(PAIRS):
        raise RecordError(f"there is no such record as {tag}")
    kind(record)


def _run(record: Mapping[str, Any]) -> None:
    _need(record, name=_text, classes=_all(_text), grid=_pair, image=_pair, patch=_pair, prefix=_count)
    _need(record, layers=_positive, heads=_positive, readout=_text, methods=_all(_text), probes=_all(_object))
    for i, probe in enumerate(record["probes"]):
        _need(probe, f"probes[{i}].", name=_text, png=_base64)
        _class_of(record, probe.get("label"), f"probes[{i}].label")
    _class_of(record, record.get("asked"), "asked")
    if "reduction" in record:
        _need(record, reduction=_text)


def _class_of(record: Mapping[str, Any], label: Any, place: str) -> None:
    if label is not None and not (_count(label) and label < len(record["classes"])):
        raise RecordError(f"the record is damaged: {place}")


def _steps(record: Mapping[str, Any]) -> None:
    _need(record, step=_count, probes=_all(_object))
    for i, probe in enumerate(record["probes"]):
        place = f"probes[{i}]."
        _need(probe, place, predicted=_count, probability=_share, label_probability=_or_null(_share))
        _need(probe, place, top=_all(_ranked), faithfulness=_or_null(_object), sink=_object)
        _need(probe["sink"], place + "sink.", top_mass=_share, outliers=_share)
        for method, areas in (probe["faithfulness"] or {}).items():
            if not _object(areas):
                raise RecordError(f"the record is damaged: {place}faithfulness")
            _need(areas, f"{place}faithfulness.{method}.", deletion=_share, insertion=_share)


def _probe(record: Mapping[str, Any]) -> None:
    _need(record, step=_count, rows=_packed(3), rollout=_object, targets=_all(_or_null(_count)))
    _need(record["rollout"], "rollout.", mean=_packed(2), max=_packed(2), min=_packed(2))
    if len(record["targets"]) != 2 or record["targets"][0] is None:
        raise RecordError("the record is damaged: targets")
    rows = sum(target is not None for target in record["targets"])
    for method in ("relevance", "gradient_rollout", "legrad"):
        if method in record:
            _need(record, "", **{method: _packed(2, rows)})
    if "reduced" in record:
        _need(record, reduced=_fates(record["rows"]["shape"][-1]))


def _pairs(record: Mapping[str, Any]) -> None:
    _need(record, step=_count, per_head=lambda value: isinstance(value, bool), attention=_packed(4))
    shape = record["attention"]["shape"]
    if shape[-1] != shape[-2]:
        raise RecordError("the record is damaged: attention is not square")


def _need(values: Mapping[str, Any], place: str = "", /, **checks: Check) -> None:
    for name, good in checks.items():
        if name not in values or not good(values[name]):
            raise RecordError(f"the record is damaged: {place}{name}")


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _positive(value: Any) -> bool:
    return _count(value) and value > 0


def _share(value: Any) -> bool:
    return type(value) in (int, float) and -1e-3 <= value <= 1.001  # sums of float32


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_positive(each) for each in value)


def _ranked(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _count(value[0]) and _share(value[1])


def _base64(value: Any) -> bool:
    try:
        base64.b64decode(value, validate=True)
    except (ValueError, TypeError):
        return False
    return isinstance(value, str)


def _fates(patches: int) -> Check:
    """After which layer each patch was gone, and into which patch in front of it."""

    def good(value: Any) -> bool:
        if not _object(value) or not all(_base64(value.get(key)) for key in ("gone", "into")):
            return False
        gone, into = (base64.b64decode(value[key]) for key in ("gone", "into"))
        if not len(gone) == len(into) == 2 * patches:
            return False
        return bool((np.frombuffer(into, "<u2") <= np.arange(patches)).all())

    return good


def _all(good: Check) -> Check:
    return lambda value: isinstance(value, list) and all(good(each) for each in value)


def _or_null(good: Check) -> Check:
    return lambda value: value is None or good(value)


def _packed(dimensions: int, rows: int | None = None) -> Check:
    """An array as `format.pack` makes it, of so many dimensions, and of `rows` rows where that is known."""

    def good(value: Any) -> bool:
        if not _object(value) or not isinstance(shape := value.get("shape"), list):
            return False
        if len(shape) != dimensions or not all(_count(n) and n < _LARGEST_SIDE for n in shape):
            return False
        sizes = {"codes": math.prod(shape), "peaks": 4 * math.prod(shape[:-1])}
        return (rows is None or shape[0] == rows) and all(
            _base64(value.get(key)) and len(base64.b64decode(value[key])) == size for key, size in sizes.items()
        )

    return good
