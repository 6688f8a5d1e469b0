"""Converts labels from a program, texts or whole numbers, to class names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import normalize

from vit.errors import VitError


def name_labels(
    given: Mapping[str, tuple[Sequence[Any], Sequence[str] | None]],
) -> tuple[dict[str, list[str]], list[str], bool]:
    """Return the class name of each image by split, the class map, and whether labels are numbers without names.

    Args:
        given: by split, the labels, and what the numbers 0, 1, ... among them are called, where that is known.

    The class map is those names, or the labels of train in their order (2 before 10).  Names that repeat get their
    number.  Raises `VitError` for a label that is missing, is of another kind than the others, or has no name.
    """
    labels: dict[str, list[str]] = {}
    kinds: dict[type, tuple[str, Any]] = {}
    class_names: list[str] = []
    used: set[Any] = set()
    for split, (raw, names) in given.items():
        values: list[Any] = [_label(value, f"{split} image {i}") for i, value in enumerate(raw)]
        for i, value in enumerate(values):
            kinds.setdefault(type(value), (f"{split} image {i}", value))
        if len(kinds) > 1:
            (_, first), (where, other) = list(kinds.values())[:2]
            raise VitError(f"labels are of two kinds, {first!r} and {other!r} ({where}): give texts, or whole numbers")
        if split == "train" or "train" not in given:
            used |= set(values)
        if names is None or int not in kinds:
            labels[split] = [str(value) for value in values]
            continue
        occurrences = Counter(names)  # ImageNet has two cranes
        named = [f"{name} ({k})" if occurrences[name] > 1 else name for k, name in enumerate(names)]
        if wrong := [value for value in values if not 0 <= value < len(named)]:
            raise VitError(f"{split}: label {wrong[0]}, but there are {len(named)} class names")
        class_names = class_names or named
        labels[split] = [named[value] for value in values]
    if class_names:
        return labels, class_names, False
    return labels, [str(value) for value in sorted(used)], int in kinds


def names_of(data: Any) -> list[str] | None:
    """Return the `classes` of a data set as torchvision has them, or of the one that it is a subset of."""
    for _ in range(8):
        names = getattr(data, "classes", None)
        if isinstance(names, list | tuple) and names:
            return [normalize("NFC", str(name)) for name in names]
        data = getattr(data, "dataset", None)
    return None


def _label(value: Any, where: str) -> str | int | bool:
    if isinstance(value, str):  # NumPy's, too
        return normalize("NFC", str(value))
    if hasattr(value, "item"):
        try:
            value = value.item()  # of NumPy or torch, with one value
        except (ValueError, RuntimeError):
            shape = "(" + ", ".join(map(str, value.shape)) + ")"
            raise VitError(f"{where} has a label of shape {shape}: expected one; of one-hot labels argmax(1)") from None
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) and value != value:
        raise VitError(f"{where} has no label")
    raise VitError(f"{where} has the label {value!r}: expected a text or a whole number")
