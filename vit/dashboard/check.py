"""Check the fields of a record before it goes to the page: names, types, sizes.

A record that decodes may still come from another program.  A bad record is refused with a reason, and the page shows
the others.  A record may have more fields than those checked here.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit.dashboard.format import PAIRS, PROBE, RUN, STEPS, RecordError
from vit.map_methods import BY_CLASS

_LARGEST_SIDE = 1 << 24

Check = Callable[[Any], bool]


def check(tag: str, record: Mapping[str, Any]) -> None:
    """Check a decoded record of `tag`; raise `RecordError` with the path of a wrong field."""
    checks = {RUN: _check_run, STEPS: _check_steps, PROBE: _check_probe, PAIRS: _check_pairs}
    for name, check_record in checks.items():
        if tag == name or (name.endswith("/") and tag.startswith(name)):
            return check_record(record)
    raise RecordError(f"there is no such record as {tag}")


def _check_run(record: Mapping[str, Any]) -> None:
    _require(record, name=_is_text, classes=_list_of(_is_text), grid=_is_pair, image=_is_pair, patch=_is_pair)
    _require(record, prefix=_is_count, layers=_is_positive, heads=_is_positive, readout=_is_text)
    _require(record, methods=_list_of(_is_text), probes=_list_of(_is_object))
    for i, probe in enumerate(record["probes"]):
        _require(probe, f"probes[{i}].", name=_is_text, png=_is_base64)
        _check_class(record, probe.get("label"), f"probes[{i}].label")
    _check_class(record, record.get("asked"), "asked")
    if "reduction" in record:
        _require(record, reduction=_is_text)


def _check_class(record: Mapping[str, Any], label: Any, path: str) -> None:
    if label is not None and not (_is_count(label) and label < len(record["classes"])):
        raise RecordError(f"the record is damaged: {path}")


def _check_steps(record: Mapping[str, Any]) -> None:
    _require(record, step=_is_count, probes=_list_of(_is_object))
    for i, probe in enumerate(record["probes"]):
        path = f"probes[{i}]."
        _require(probe, path, predicted=_is_count, probability=_is_fraction)
        _require(probe, path, label_probability=_optional(_is_fraction))
        _require(probe, path, top=_list_of(_is_ranked), faithfulness=_optional(_is_object), sink=_is_object)
        _require(probe["sink"], path + "sink.", top_mass=_is_fraction, outliers=_is_fraction)
        for method, areas in (probe["faithfulness"] or {}).items():
            if not _is_object(areas):
                raise RecordError(f"the record is damaged: {path}faithfulness")
            _require(areas, f"{path}faithfulness.{method}.", deletion=_is_fraction, insertion=_is_fraction)


def _check_probe(record: Mapping[str, Any]) -> None:
    _require(record, step=_is_count, rows=_packed_array(3), rollout=_is_object)
    _require(record, targets=_list_of(_optional(_is_count)))
    _require(record["rollout"], "rollout.", mean=_packed_array(2), max=_packed_array(2), min=_packed_array(2))
    if len(record["targets"]) != 2 or record["targets"][0] is None:
        raise RecordError("the record is damaged: targets")
    rows = sum(target is not None for target in record["targets"])
    for method in BY_CLASS:
        if method in record:
            _require(record, "", **{method: _packed_array(2, rows)})
    if "reduced" in record:
        _require(record, reduced=_token_assignment(record["rows"]["shape"][-1]))


def _check_pairs(record: Mapping[str, Any]) -> None:
    _require(record, step=_is_count, per_head=lambda value: isinstance(value, bool), attention=_packed_array(4))
    shape = record["attention"]["shape"]
    if shape[-1] != shape[-2]:
        raise RecordError("the record is damaged: attention is not square")


def _require(values: Mapping[str, Any], path: str = "", /, **checks: Check) -> None:
    for name, is_valid in checks.items():
        if name not in values or not is_valid(values[name]):
            raise RecordError(f"the record is damaged: {path}{name}")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and -1e-3 <= value <= 1.001  # sums of float32


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_positive(item) for item in value)


def _is_ranked(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_count(value[0]) and _is_fraction(value[1])


def _is_base64(value: Any) -> bool:
    try:
        base64.b64decode(value, validate=True)
    except (ValueError, TypeError):
        return False
    return isinstance(value, str)


def _token_assignment(patches: int) -> Check:
    """Make a check of token assignments: after which layer each patch is removed, and into which earlier patch."""

    def is_valid(value: Any) -> bool:
        if not _is_object(value) or not all(_is_base64(value.get(key)) for key in ("gone", "into")):
            return False
        gone, into = (base64.b64decode(value[key]) for key in ("gone", "into"))
        if not len(gone) == len(into) == 2 * patches:
            return False
        return bool((np.frombuffer(into, "<u2") <= np.arange(patches)).all())

    return is_valid


def _list_of(is_valid: Check) -> Check:
    return lambda value: isinstance(value, list) and all(is_valid(item) for item in value)


def _optional(is_valid: Check) -> Check:
    return lambda value: value is None or is_valid(value)


def _packed_array(dimensions: int, rows: int | None = None) -> Check:
    """Make a check of an array of `format.pack` with this number of dimensions, and of rows if `rows` is given."""

    def is_valid(value: Any) -> bool:
        if not _is_object(value) or not isinstance(shape := value.get("shape"), list):
            return False
        if len(shape) != dimensions or not all(_is_count(n) and n < _LARGEST_SIDE for n in shape):
            return False
        sizes = {"codes": math.prod(shape), "peaks": 4 * math.prod(shape[:-1])}
        return (rows is None or shape[0] == rows) and all(
            _is_base64(value.get(key)) and len(base64.b64decode(value[key])) == size for key, size in sizes.items()
        )

    return is_valid
