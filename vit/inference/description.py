"""Describe a trained model: everything but the weights, as plain JSON.

The same description is in a checkpoint (`checkpoint["vit"]`), in a bundle (`config.json`, key `vit`) and in an ONNX
file (`metadata_props["vit"]`), so no command asks for class names, preprocessing or temperature again.

Nothing read from a file is trusted: types, ranges and the consistency of the parts are checked here, before a model is
built, and every error is one line.  No torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

from vit.data.preprocess import Preprocessing
from vit.errors import VitError

FORMAT = 1
"""Version of the format of `Description.to_dict`; a new one means that older readers could misread it."""

_SIZES = {
    # argument: (minimum, maximum); the maxima are far beyond any ViT, and keep a wrong file from filling the memory
    "num_classes": (1, 10_000_000),
    "in_channels": (1, 4096),
    "width": (1, 65_536),
    "depth": (1, 1024),
    "heads": (1, 4096),
    "registers": (0, 65_536),
}
_FOLDERS = re.compile(r"^([\w.+~-]+=)?[\"']?(local-dir:)?(?:~|\.\.?|[A-Za-z]:)?[/\\](?:[^/\\]*[/\\])*")
_PIXELS = (1, 1_000_000)
_PATCHES = 65_536  # as of an image of 4096 x 4096 in patches of 16
_NUMBERS = 1 << 26  # in an image, over all channels: 256 MB as float32
_MAX_DEPTH, _MAX_VALUES = 50, 2_000_000
_TEMPERATURES = (1e-6, 1e6)


@dataclass
class Description:
    """Holds a model's architecture, classes, preprocessing, calibration and history.

    Attributes:
        architecture: the arguments of `vit.model.VisionTransformer` that build the model again.
        class_names: one name for each output, in order.  Names may repeat (ImageNet has two cranes); classes are
            identified by index.
        preprocessing: the preprocessing of images.
        temperature: probabilities are softmax(logits / temperature).
        data: the arguments that open the data set again (fields of `vit.data.catalogue.DataConfig`).
        metrics: metrics on the data, such as {"val": {...}, "test": {...}}.
        training: a short recipe, the seed, versions.
        format: version of the format.
    """

    architecture: dict[str, Any]
    class_names: list[str]
    preprocessing: Preprocessing
    temperature: float = 1.0
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types: tuples become lists, NumPy scalars numbers, NaN and infinities null."""
        return {
            "format": self.format,
            "architecture": plain(self.architecture),
            "class_names": [str(name) for name in self.class_names],
            "preprocessing": plain(self.preprocessing.to_dict()),
            "temperature": float(self.temperature),
            "data": plain(self.data),
            "metrics": plain(self.metrics),
            "training": plain(self.training),
        }

    def to_json(self, indent: int | None = None) -> str:
        """Convert to ASCII JSON; class names that are not valid Unicode are kept as escapes."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, value: Any, source: str | os.PathLike[str] = "the model") -> Description:
        """Read the result of `to_dict`; unknown keys are ignored.

        Raises `VitError`, naming `source` and the key, when a value is missing, malformed or contradictory.
        """
        source = os.fspath(source)
        value = _check_table(value, f"{source}: its description")
        check_plain({key: part for key, part in value.items() if key != "class_names"}, source)
        version = value.get("format")
        if not _is_int(version) or version < 1:
            raise VitError(f"{source}: its description has no valid format number ({_format_value(version)})")
        if version > FORMAT:
            raise VitError(
                f"{source} was written by a newer version of vit (format {version}, this one reads {FORMAT}): "
                "update vit"
            )
        architecture = _check_architecture(value.get("architecture"), source)
        description = cls(
            architecture=architecture,
            class_names=_check_class_names(value.get("class_names"), architecture["num_classes"], source),
            preprocessing=_read_preprocessing(value.get("preprocessing"), architecture, source),
            temperature=_check_temperature(value.get("temperature", 1.0), source),
            data=_check_table(value.get("data") or {}, f"{source}: data"),
            metrics=_check_table(value.get("metrics") or {}, f"{source}: metrics"),
            training=_check_table(value.get("training") or {}, f"{source}: training"),
            format=version,
        )
        return description

    @classmethod
    def from_json(cls, text: str | bytes, source: str | os.PathLike[str] = "the model") -> Description:
        """Read the result of `to_json`.  Raises `VitError` as `from_dict` does."""
        return cls.from_dict(parse_json(text, source), source)


def parse_json(text: str | bytes, source: str | os.PathLike[str]) -> Any:
    """Parse JSON; raise `VitError`, naming `source`, for invalid or too deeply nested text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VitError(f"{os.fspath(source)} is not valid JSON: {error}") from None


def plain(value: Any) -> Any:
    """Convert `value` to plain, strict JSON types (see `Description.to_dict`)."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and torch, scalars and arrays, without importing either
        return plain(value.tolist())
    return str(value)


def without_folders(value: Any) -> Any:
    """Convert `value` with `plain` and shorten paths with a start folder, also after `key=` and `local-dir:`, to the
    last name.
    """
    value = plain(value)
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return _FOLDERS.sub(r"\1\2", value) if isinstance(value, str) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _format_value(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list of lists without end
        text = f"a {type(value).__name__} that is too long to print"
    return text if len(text) <= 60 else text[:57] + "..."


def _check_table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise VitError(f"{what} should be a table of names and values, not {_format_value(value)}")
    return value


def _check_architecture(value: Any, source: str) -> dict[str, Any]:
    table = _check_table(value, f"{source}: architecture")
    for key, (minimum, maximum) in _SIZES.items():
        if key not in table and key == "registers":
            continue
        number = table.get(key)
        if number is None or not _is_int(number) or not minimum <= number <= maximum:
            raise VitError(
                f"{source}: architecture.{key} should be a whole number from {minimum} to {maximum}, not "
                f"{_format_value(number)}"
            )
    for key in ("image_size", "patch_size"):
        pair = table.get(key)
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(_is_int(number) and _PIXELS[0] <= number <= _PIXELS[1] for number in pair)
        ):
            raise VitError(
                f"{source}: architecture.{key} should be [height, width] in pixels, not {_format_value(pair)}"
            )
    patches = math.prod(image // patch for image, patch in zip(table["image_size"], table["patch_size"], strict=True))
    if not 1 <= patches <= _PATCHES:
        raise VitError(f"{source}: architecture makes {patches} patches an image; expected 1 to {_PATCHES}")
    numbers = math.prod(table["image_size"]) * table["in_channels"]
    if numbers > _NUMBERS:
        raise VitError(f"{source}: architecture takes images of {numbers} numbers; expected at most {_NUMBERS}")
    return table


def check_plain(value: Any, source: str | os.PathLike[str]) -> None:
    """Check that `value` from a file is at most 50 levels deep and has at most 2 million values.  Raises `VitError`.

    A shared list counts each time, since writing and printing visit it each time.
    """
    count, level = 0, [value]
    for _ in range(_MAX_DEPTH):
        children: list[Any] = []
        for item in level:
            if isinstance(item, int) and abs(item) >> 64:
                raise VitError(f"{os.fspath(source)}: its description holds a whole number of more than 64 bits")
            parts = [*item, *item.values()] if isinstance(item, dict) else item
            parts = parts if isinstance(parts, list | tuple) else ()
            count += len(parts)
            if count > _MAX_VALUES:
                raise VitError(f"{os.fspath(source)}: its description holds over {_MAX_VALUES} values")
            children += parts
        level = children
    if level:
        raise VitError(f"{os.fspath(source)}: its description is nested more than {_MAX_DEPTH} deep")


def _check_class_names(value: Any, count: int, source: str) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise VitError(f"{source}: class_names should be a list of names, not {_format_value(value)}")
    for name in value:
        try:
            name.encode("utf-8", "surrogateescape")  # what a folder can be called
        except UnicodeEncodeError:
            raise VitError(f"{source}: class_names holds {_format_value(name)}, which is not text") from None
    if len(value) != count:
        raise VitError(f"{source}: {len(value)} class names for a model of {count} outputs")
    return list(value)


def _read_preprocessing(value: Any, architecture: dict[str, Any], source: str) -> Preprocessing:
    table = _check_table(value, f"{source}: preprocessing")
    try:
        preprocessing = Preprocessing.from_dict(table)
    except VitError as error:
        raise VitError(f"{source}: {error}") from None
    except (TypeError, ValueError, KeyError) as error:
        raise VitError(f"{source}: preprocessing cannot be read: {error}") from None
    if tuple(preprocessing.image_size) != tuple(architecture["image_size"]):
        raise VitError(
            f"{source}: preprocessing makes images of {tuple(preprocessing.image_size)} (height, width) "
            f"for a model of {tuple(architecture['image_size'])}"
        )
    if preprocessing.channels != architecture["in_channels"]:
        raise VitError(
            f"{source}: preprocessing makes images of {preprocessing.channels} channels "
            f"for a model of {architecture['in_channels']}"
        )
    return preprocessing


def _check_temperature(value: Any, source: str) -> float:
    low, high = _TEMPERATURES
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise VitError(f"{source}: temperature should be a number from {low:g} to {high:g}, not {_format_value(value)}")
    return float(value)
