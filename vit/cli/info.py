"""Run `vit info`: print the description of a model.  Imports torch only for a checkpoint or a timm name."""

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
_MAX_NAMES = 20
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0.  Raises `VitError` when there is no such model or it is damaged."""
    resolved = locate(arguments.model)
    info = None if resolved.name is None else _read_info(resolved.name)
    description, parameters = _read_description(resolved) if info is None else _describe(info)
    grid = [
        image // patch
        for image, patch in zip(
            description.architecture["image_size"], description.architecture["patch_size"], strict=True
        )
    ]
    if arguments.format == "json":
        head = {"model": arguments.model, "kind": KINDS[resolved.kind], "parameters": parameters, "grid": grid}
        files = {"onnx": str(resolved.onnx) if resolved.onnx else None}
        if info is not None:
            files |= {"weights": _format_location(info), "license": info.license}
        print(json.dumps({**head, **files, **description.to_dict()}, indent=2))
        return 0
    sections = _sections(arguments.model, resolved, description, parameters, grid)
    if info is not None:
        rows = [("name", info.name), ("weights", _format_location(info)), ("license", info.license or "not said")]
        sections[0][1].extend((key, printable(value)) for key, value in rows)
    for title, rows in sections:
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")
    return 0


def _read_info(name: str) -> ModelInfo:
    from vit.pretrained.create import read_info

    return read_info(name)


def _format_location(info: ModelInfo) -> str:
    from vit.pretrained.locations import format_location

    return format_location(info.location)


def _describe(info: ModelInfo) -> tuple[Description, int]:
    """Make the description of a named model and count its parameters, without its weights."""
    from vit.pretrained.create import count_parameters

    if info.description is not None:
        description = Description.from_dict(info.description, info.name)
    else:
        description = Description(info.architecture, list(info.class_names or ()), info.preprocessing)
    return description, count_parameters(info.architecture)


def _read_description(resolved: ResolvedModel) -> tuple[Description, int | None]:
    """Read the description and the number of parameters; None if the file does not give it without building a model."""
    if resolved.bundle is not None:
        weights = resolved.bundle / WEIGHTS
        return read_bundle(resolved.bundle), count_safetensors(weights) if weights.is_file() else None
    if resolved.checkpoint is not None:
        from vit.inference.weights import load_checkpoint

        tensors, description = load_checkpoint(resolved.checkpoint)
        return description, sum(tensor.numel() for tensor in tensors.values())
    assert resolved.onnx is not None
    from vit.inference.onnx_backend import open_session, session_description

    return session_description(open_session(resolved.onnx), resolved.onnx), None


def count_safetensors(path: Path) -> int:
    """Count the numbers in a `.safetensors` file from its header.  Raises `VitError` when it is damaged."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, os.fstat(file.fileno()).st_size):
                raise VitError(f"{path} is truncated or not a safetensors file")
            header = parse_json(file.read(length), path)
    except OSError as error:
        raise VitError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        dtypes = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        return sum((end - start) // sizes[dtype] for (start, end), dtype in zip(offsets, dtypes, strict=True))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise VitError(f"{path} is damaged: its header lists no tensors of numbers") from None


def _sections(
    model: str, resolved: ResolvedModel, description: Description, parameters: int | None, grid: list[int]
) -> list[tuple[str, list[tuple[str, str]]]]:
    a, preprocessing = description.architecture, description.preprocessing
    prefix_tokens = [a.get("class_token", True), a.get("distillation_token", False)]
    tokens = grid[0] * grid[1] + sum(map(bool, prefix_tokens)) + int(a.get("registers", 0))
    left_out = {"image_size", "patch_size", "in_channels", "num_classes", "width", "depth", "heads"}
    if a.get("reduction", "none") == "none":
        left_out |= {"reduction", "reduction_rate", "reduction_schedule", "reduction_proportional"}
    options = {key: value for key, value in a.items() if key not in left_out and value not in (None, False, 0, 0.0, "")}
    sections = [
        (
            f"{printable(model)}: {KINDS[resolved.kind]}",
            [
                ("answers through", _format_backends(resolved)),
                *([("parameters", f"{parameters:,}")] if parameters is not None else []),
            ],
        ),
        (
            "architecture",
            [
                ("image", f"{_format_pair(a['image_size'])} pixels, {a['in_channels']} channels"),
                ("patches", f"{_format_pair(a['patch_size'])} pixels, a grid of {_format_pair(grid)}, {tokens} tokens"),
                ("blocks", f"{a['depth']}, width {a['width']}, {a['heads']} heads"),
                *((key, _format_value(value)) for key, value in options.items()),
            ],
        ),
        ("preprocessing", [(key, _format_value(value)) for key, value in preprocessing.to_dict().items()]),
        ("classes", _class_rows(description)),
    ]
    for title, table in (
        ("data", about_data(description.data)),
        ("figures", description.metrics),
        ("recipe", description.training),
    ):
        rows = [(key, _format_value(value)) for key, value in _flatten(plain(table)) if value is not None]
        sections.append((title, rows or [("not recorded", "")]))
    return sections


def _format_backends(resolved: ResolvedModel) -> str:
    if resolved.onnx is None:
        return "torch"
    has_weights = resolved.bundle is not None and (resolved.bundle / WEIGHTS).is_file()
    return "ONNX Runtime on a CPU, torch elsewhere" if has_weights else "ONNX Runtime"


def _format_pair(pair: list[int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def _class_rows(description: Description) -> list[tuple[str, str]]:
    names = description.class_names
    if not names:
        outputs = description.architecture["num_classes"]
        return [("none", f"a backbone, {f'{outputs} outputs that are no classes' if outputs else 'no head'}")]
    rows = [(str(index), printable(name)) for index, name in enumerate(names[:_MAX_NAMES])]
    if len(names) > _MAX_NAMES:
        rows.append(("...", f"{len(names)} in all (--format json lists them)"))
    return [*rows, ("temperature", f"{description.temperature:.4g}")]


def _flatten(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested tables to dotted names, without long lists (per-class rows, a confusion matrix)."""
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = printable(f"{prefix}{key}")
        if isinstance(value, dict):
            rows += _flatten(value, f"{name}.")
        elif not (isinstance(value, list) and (len(value) > 8 or any(isinstance(item, dict | list) for item in value))):
            rows.append((name, value))
    return rows


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_format_value(item) for item in value)
    return printable(value)
