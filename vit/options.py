"""Declare dataclass fields with a help text and the values that they may take.

`build` checks configuration values against the declaration, and the documentation prints it.

    @dataclass(frozen=True)
    class OptimConfig:
        name: str = option("muon", "the optimiser", choices=("muon", "adamw"))  # with a default
        lr: float = setting("learning rate", gt=0)  # required

Types are those of configuration files: int, float, bool, str, tuples of them, and unions of these with None.
Standard library only.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from vit.errors import VitError, did_you_mean

Schema = TypeVar("Schema")


@dataclass(frozen=True)
class Rule:
    """The constraints of a field beside its type: the allowed values, and a help text of one line."""

    help: str = ""
    choices: tuple[str, ...] = ()  # the allowed strings; the other types of a union are not restricted
    ge: float | None = None
    le: float | None = None
    gt: float | None = None  # strictly greater
    lt: float | None = None  # strictly less
    path: bool = False  # names a file or a folder: `~` is the home folder
    subset_of: type | None = None  # a dictionary with some of this dataclass's keys; null values are dropped


def option(default: Any, help: str, **rule: Any) -> Any:
    """Declare a dataclass field with a default and a `Rule`."""
    return field(default=default, metadata={"rule": Rule(help, **rule)})


def setting(help: str, **rule: Any) -> Any:
    """Declare a required dataclass field with a `Rule`; its default is in a configuration file."""
    return field(metadata={"rule": Rule(help, **rule)})


# resolving annotations takes longer than all the checks
_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


@dataclass(frozen=True)
class Key:
    """A configuration key: its dotted name, its type and its rule."""

    name: str
    type: Any
    rule: Rule


def list_keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """Yield all keys of a dataclass and of nested dataclasses, in the order of declaration."""
    hints = _hints(schema)
    for entry in fields(schema):
        name, kind = prefix + entry.name, hints[entry.name]
        rule = entry.metadata.get("rule", Rule())
        section = kind if is_dataclass(kind) else rule.subset_of
        if section is not None:
            yield from list_keys(section, name + ".")  # type: ignore[arg-type]
        else:
            yield Key(name, kind, rule)


def list_sections(schema: type) -> dict[str, type]:
    """Return the nested dataclasses of a dataclass, by field name."""
    return {name: kind for name, kind in _hints(schema).items() if is_dataclass(kind)}  # type: ignore[misc]


def build(schema: type[Schema], values: Mapping[str, Any], prefix: str = "", names: Sequence[str] = ()) -> Schema:
    """Build a `schema` instance from nested plain values; check names, types and values.

    Raises:
        VitError: a key does not exist (the message names similar keys), is missing, or has a value that is not allowed.
    """
    names = names or [key.name for key in list_keys(schema)]
    hints = _hints(schema)
    entries = {entry.name: entry for entry in fields(schema)}  # type: ignore[arg-type]
    _check_names(entries, values, prefix, names)
    result: dict[str, Any] = {}
    for name, entry in entries.items():
        full = prefix + name
        if name not in values:
            raise VitError(f"{full}: is missing; it was deleted, or a file of conf/ lacks it")
        value, kind, rule = values[name], hints[name], entry.metadata.get("rule", Rule())
        if not is_dataclass(kind) and rule.subset_of is None:
            result[name] = convert(full, value, kind, rule)
        elif not isinstance(value, Mapping):
            examples = ", ".join([key for key in names if key.startswith(full + ".")][:4])
            raise VitError(f"{full}: expected a section with keys such as {examples}, got {format_value(value)}")
        elif rule.subset_of is None:
            result[name] = build(kind, value, full + ".", names)
        else:
            parts = {key.name: key for key in list_keys(rule.subset_of)}
            _check_names(parts, value, full + ".", names)
            result[name] = {
                leaf: convert(f"{full}.{leaf}", item, parts[leaf].type, parts[leaf].rule)
                for leaf, item in value.items()
                if item is not None
            }
    return schema(**result)


def _check_names(entries: Mapping[str, Any], values: Mapping[str, Any], prefix: str, names: Sequence[str]) -> None:
    for name, value in values.items():
        if name not in entries:
            raise VitError(unknown_key_message(f"{prefix}{_first_leaf(str(name), value)}", names))


def check_fields(instance: Any, prefix: str) -> None:
    """Check each field of a dataclass instance and convert it to its declared type; for `__post_init__`.

    Raises:
        VitError: a value is not allowed; the message names `prefix` and the field.
    """
    hints = _hints(type(instance))
    for entry in fields(instance):
        rule = entry.metadata.get("rule", Rule())
        value = convert(prefix + entry.name, getattr(instance, entry.name), hints[entry.name], rule)
        object.__setattr__(instance, entry.name, value)


def unknown_key_message(name: str, names: Sequence[str]) -> str:
    """Return the message for a key that does not exist: `modle.size: no such key; did you mean 'model.size'?`."""
    for key in names:
        if name.startswith(key + "."):
            return f"{name}: no such key; {key} is a value and has no keys in it"
    close = similar_keys(name, names)
    if close:
        return f"{name}: no such key; did you mean {' or '.join(map(repr, close))}?"
    section = name.rpartition(".")[0]
    leaves = [key.rpartition(".")[2] for key in names if section and key.rpartition(".")[0] == section]
    if leaves:
        return f"{name}: no such key; {section} has {', '.join(leaves)}"
    return f"{name}: no such key; there are {', '.join(dict.fromkeys(key.split('.')[0] for key in names))}"


def similar_keys(name: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Return up to `count` keys that are similar to `name`, best first.

    Dotted names are compared as a whole and part by part, so `optim.lrr` finds `optim.lr` before other keys of `optim`.
    A name without dots, such as `lr`, finds every key that ends in it.
    """
    if "." not in name:
        matches = [key for key in names if key.rpartition(".")[2] == name]
        if matches:
            return matches[:count]
    scored = sorted(((_similarity(name, key), key) for key in names), key=lambda pair: -pair[0])
    threshold = max(0.6, scored[0][0] - 0.15) if scored else 0
    return [key for score, key in scored if score >= threshold][:count]


def _similarity(name: str, key: str) -> float:
    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    name, key = name.lower(), key.lower()
    whole = ratio(name, key)
    if "." not in name or "." not in key:
        return whole
    (section, _, leaf), (key_section, _, key_leaf) = name.rpartition("."), key.rpartition(".")
    # both parts have to be alike: a long common section must not hide that the ends differ
    return (whole + min(ratio(section, key_section), ratio(leaf, key_leaf))) / 2


def _first_leaf(name: str, value: Any) -> str:
    """Return the first dotted name in an unknown value: `new: {key: 1}` is `new.key`."""
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    return name


def convert(name: str, value: Any, kind: Any, rule: Rule) -> Any:
    """Convert `value` to the type `kind`; raise `VitError` where that is not possible.

    Integers are accepted as floats, lists as tuples.
    """
    # str comes last, because it accepts numbers too
    for member in sorted(_union_members(kind), key=lambda member: member is str):
        valid, result = _try_convert(value, member, rule)
        if valid:
            return result
    close = did_you_mean(value, rule.choices) if isinstance(value, str) and rule.choices else ""
    hint = f"; {close}" if close.startswith("did you mean") else ""
    raise VitError(f"{name}: expected {describe_type(kind, rule)}, got {format_value(value)}{hint}")


def format_value(value: Any) -> str:
    """Format a value as it is written in a configuration file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    return repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def expand_path(text: str) -> str:
    """Replace `~` in a path by the home folder, also after `local-dir:`; raise `VitError` without a home folder."""
    scheme = "local-dir:" if text.startswith("local-dir:") else ""
    rest = text.removeprefix(scheme)
    path = os.path.expanduser(rest)
    if path == rest and re.match(r"~(/|\Z)", rest):
        raise VitError(f"{text}: no home folder is known here: set HOME, or write the whole path")
    return scheme + path


def expand_paths(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Apply `expand_path` to every path in nested plain values, for code that reads them before `build`."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key in list_keys(schema):
        section, _, leaf = key.name.rpartition(".")
        part = result.get(section) if section else result
        if key.rule.path and isinstance(part, dict) and isinstance(part.get(leaf), str):
            part[leaf] = expand_path(part[leaf])
    return result


def _union_members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _try_convert(value: Any, kind: Any, rule: Rule) -> tuple[bool, Any]:
    if kind is type(None):
        return value is None, None
    if kind is bool:
        return isinstance(value, bool), value
    if kind is str:
        # `precision=32` and `name=2024` are parsed as numbers but mean text
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if rule.path and isinstance(text, str):
            text = expand_path(text)
        # a zero byte would end a path or a line of a file
        return isinstance(text, str) and "\0" not in text and (not rule.choices or text in rule.choices), text
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (kind is float and isinstance(value, float)):
            return False, value
        if whole and not -(2**63) <= value < 2**63:  # libraries take 64 bits at most
            return False, value
        return _in_range(value, rule), kind(value)
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if not isinstance(value, list | tuple):
            return False, value
        if parts[-1] is Ellipsis:
            parts = (parts[0],) * len(value)
        if len(parts) != len(value):
            return False, value
        converted = [_try_convert(item, part, rule) for item, part in zip(value, parts, strict=True)]
        return all(valid for valid, _ in converted), tuple(item for _, item in converted)
    raise TypeError(f"a configuration cannot hold {kind}")


def _in_range(value: float, rule: Rule) -> bool:
    return (
        math.isfinite(value)
        and (rule.ge is None or value >= rule.ge)
        and (rule.le is None or value <= rule.le)
        and (rule.gt is None or value > rule.gt)
        and (rule.lt is None or value < rule.lt)
    )


def describe_type(kind: Any, rule: Rule) -> str:
    """Describe the allowed values of a key in words: "a whole number of at least 1, or null"."""
    words: list[str] = []
    for member in sorted(_union_members(kind), key=lambda kind: kind is type(None)):
        words += (
            ["null"]
            if member is type(None)
            else ["true", "false"]
            if member is bool
            else [_describe_member(member, rule)]
        )
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _describe_member(kind: Any, rule: Rule) -> str:
    if kind is str:
        return (
            "one of " + ", ".join(map(str, rule.choices))
            if len(rule.choices) > 1
            else (str(rule.choices[0]) if rule.choices else "text")
        )
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        item = _plural(_describe_member(parts[0], rule))
        return f"a list of {item}" if parts[-1] is Ellipsis else f"a list of {len(parts)} {item}"
    text = "a whole number" if kind is int else "a number"
    if rule.ge is not None and rule.le is not None:
        return f"{text} from {rule.ge:g} to {rule.le:g}"
    if rule.ge is not None and rule.lt is not None:
        return f"{text} from {rule.ge:g} to under {rule.lt:g}"
    if rule.gt is not None and (rule.le is not None or rule.lt is not None):
        return f"{text} above {rule.gt:g} and " + (
            f"up to {rule.le:g}" if rule.le is not None else f"under {rule.lt:g}"
        )
    limits = {"of at least": rule.ge, "above": rule.gt, "of at most": rule.le, "under": rule.lt}
    return next((f"{text} {words} {limit:g}" for words, limit in limits.items() if limit is not None), text)


def _plural(text: str) -> str:
    return text.replace("a whole number", "whole numbers").replace("a number", "numbers").replace("text", "texts")
