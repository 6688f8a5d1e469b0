"""`vit info`: what a model says about itself.  Imports torch for a checkpoint or a name of timm's only."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.data.decode import printable
from vit.errors import VitError
from vit.inference.bundle import WEIGHTS, read_bundle
from vit.inference.card import about_data
from vit.inference.description import Description, parse_json, plain
from vit.inference.loading import ResolvedModel, locate

if TYPE_CHECKING:
    from vit.pretrained.sources import ModelInfo

KINDS = {"run": "run folder", "bundle": "bundle", "checkpoint": "checkpoint", "onnx": "ONNX file", "timm": "timm model"}
_MOST_NAMES = 20
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0.  Raises `VitError` when there is no such model or it is damaged."""
    found = locate(arguments.model)
    known = None if found.name is None else _look(found.name)
    description, parameters = _read(found) if known is None else _told(known)
    grid = [
        image // patch
        for image, patch in zip(
            description.architecture["image_size"], description.architecture["patch_size"], strict=True
        )
    ]
    if arguments.format == "json":
        head = {"model": arguments.model, "kind": KINDS[found.kind], "parameters": parameters, "grid": grid}
        files = {"onnx": str(found.onnx) if found.onnx else None}
        if known is not None:
            files |= {"weights": _whereabouts(known), "license": known.license}
        print(json.dumps({**head, **files, **description.to_dict()}, indent=2))
        return 0
    sections = _sections(arguments.model, found, description, parameters, grid)
    if known is not None:
        told = [("name", known.name), ("weights", _whereabouts(known)), ("license", known.license or "not said")]
        sections[0][1].extend((key, printable(value)) for key, value in told)
    for title, rows in sections:
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")
    return 0


def _look(name: str) -> ModelInfo:
    from vit.pretrained.create import look

    return look(name)


def _whereabouts(known: ModelInfo) -> str:
    from vit.pretrained.locations import whereabouts

    return whereabouts(known.place)


def _told(known: ModelInfo) -> tuple[Description, int]:
    """What is said of a model of that name, and how many parameters it has; its weights stay where they are."""
    from vit.pretrained.create import count_parameters

    if known.own is not None:
        description = Description.from_dict(known.own, known.name)
    else:
        description = Description(known.architecture, list(known.class_names or ()), known.preprocessing)
    return description, count_parameters(known.architecture)


def _read(found: ResolvedModel) -> tuple[Description, int | None]:
    """The description and, where the file tells without loading it into a model, the number of parameters."""
    if found.bundle is not None:
        weights = found.bundle / WEIGHTS
        return read_bundle(found.bundle), count_safetensors(weights) if weights.is_file() else None
    if found.checkpoint is not None:
        from vit.inference.weights import load_checkpoint

        tensors, description = load_checkpoint(found.checkpoint)
        return description, sum(tensor.numel() for tensor in tensors.values())
    assert found.onnx is not None
    from vit.inference.onnx_backend import open_session, session_description

    return session_description(open_session(found.onnx), found.onnx), None


def count_safetensors(path: Path) -> int:
    """How many numbers a `.safetensors` file holds, from its header alone.  Raises `VitError` when it is damaged."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, os.fstat(file.fileno()).st_size):
                raise VitError(f"{path} is truncated or not a safetensors file")
            header = parse_json(file.read(length), path)
    except OSError as error:
        raise VitError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        kinds = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        return sum((end - start) // sizes[kind] for (start, end), kind in zip(ends, kinds, strict=True))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise VitError(f"{path} is damaged: its header lists no tensors of numbers") from None


def _sections(
    model: str, found: ResolvedModel, description: Description, parameters: int | None, grid: list[int]
) -> list[tuple[str, list[tuple[str, str]]]]:
    a, preprocessing = description.architecture, description.preprocessing
    front = [a.get("class_token", True), a.get("distillation_token", False)]
    tokens = grid[0] * grid[1] + sum(map(bool, front)) + int(a.get("registers", 0))
    shown = {"image_size", "patch_size", "in_channels", "num_classes", "width", "depth", "heads"}
    if a.get("reduction", "none") == "none":
        shown |= {"reduction", "reduction_rate", "reduction_schedule", "reduction_proportional"}
    options = {key: value for key, value in a.items() if key not in shown and value not in (None, False, 0, 0.0, "")}
    sections = [
        (
            f"{printable(model)}: {KINDS[found.kind]}",
            [
                ("answers through", "ONNX Runtime on a CPU, torch elsewhere" if _both(found) else _only(found)),
                *([("parameters", f"{parameters:,}")] if parameters is not None else []),
            ],
        ),
        (
            "architecture",
            [
                ("image", f"{_by(a['image_size'])} pixels, {a['in_channels']} channels"),
                ("patches", f"{_by(a['patch_size'])} pixels, a grid of {_by(grid)}, {tokens} tokens"),
                ("blocks", f"{a['depth']}, width {a['width']}, {a['heads']} heads"),
                *((key, _value(value)) for key, value in options.items()),
            ],
        ),
        ("preprocessing", [(key, _value(value)) for key, value in preprocessing.to_dict().items()]),
        ("classes", _classes(description)),
    ]
    for title, table in (
        ("data", about_data(description.data)),
        ("figures", description.metrics),
        ("recipe", description.training),
    ):
        rows = [(key, _value(value)) for key, value in _flat(plain(table)) if value is not None]
        sections.append((title, rows or [("not recorded", "")]))
    return sections


def _both(found: ResolvedModel) -> bool:
    return found.onnx is not None and found.bundle is not None and (found.bundle / WEIGHTS).is_file()


def _only(found: ResolvedModel) -> str:
    return "ONNX Runtime" if found.onnx is not None else "torch"


def _by(pair: list[int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def _classes(description: Description) -> list[tuple[str, str]]:
    names = description.class_names
    if not names:
        outputs = description.architecture["num_classes"]
        return [("none", f"a backbone, {f'{outputs} outputs that are no classes' if outputs else 'no head'}")]
    rows = [(str(index), printable(name)) for index, name in enumerate(names[:_MOST_NAMES])]
    if len(names) > _MOST_NAMES:
        rows.append(("...", f"{len(names)} in all (--format json lists them)"))
    return [*rows, ("temperature", f"{description.temperature:.4g}")]


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested tables as dotted names; what is long (per-class rows, a confusion matrix) is left to `--format json`."""
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = printable(f"{prefix}{key}")
        if isinstance(value, dict):
            rows += _flat(value, f"{name}.")
        elif not (isinstance(value, list) and (len(value) > 8 or any(isinstance(item, dict | list) for item in value))):
            rows.append((name, value))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    return printable(value)
