"""Dataclass fields that say what they are for and which values they take.

One declaration serves everyone: `build` checks a person's values against it, and the documentation prints it.

    @dataclass(frozen=True)
    class OptimConfig:
        name: str = option("muon", "the optimiser", choices=("muon", "adamw"))  # with a default
        lr: float = setting("learning rate", gt=0)  # has to be given

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

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What is said about a field beside its type: help in one line, and the values that it takes."""

    help: str = ""
    choices: tuple[str, ...] = ()  # all that text may be; other types of a union stand beside them
    ge: float | None = None
    le: float | None = None
    gt: float | None = None  # strictly greater
    lt: float | None = None  # strictly less
    path: bool = False  # of a file or a folder: `~` is the home folder
    part_of: type | None = None  # a dictionary of any of this dataclass's keys; those that are null are left out


def option(default: Any, help: str, **rule: Any) -> Any:
    """A dataclass field with a default and a `Rule`."""
    return field(default=default, metadata={"rule": Rule(help, **rule)})


def setting(help: str, **rule: Any) -> Any:
    """A dataclass field with a `Rule` that has to be given: its default is in a configuration file."""
    return field(metadata={"rule": Rule(help, **rule)})


# resolving annotations takes longer than all the checks
_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


@dataclass(frozen=True)
class Key:
    """One key of a configuration, by its dotted name."""

    name: str
    type: Any
    rule: Rule


def keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every key of a dataclass and of the dataclasses in it, in the order they are declared."""
    hints = _hints(schema)
    for entry in fields(schema):
        name, kind = prefix + entry.name, hints[entry.name]
        rule = entry.metadata.get("rule", Rule())
        section = kind if is_dataclass(kind) else rule.part_of
        if section is not None:
            yield from keys(section, name + ".")  # type: ignore[arg-type]
        else:
            yield Key(name, kind, rule)


def sections(schema: type) -> dict[str, type]:
    """The dataclasses in a dataclass, by their names."""
    return {name: kind for name, kind in _hints(schema).items() if is_dataclass(kind)}  # type: ignore[misc]


def build(schema: type[T], values: Mapping[str, Any], prefix: str = "", known: Sequence[str] = ()) -> T:
    """Make a `schema` of nested plain values, checking names, types and values.

    Raises `VitError` naming the dotted key: one that does not exist (with the nearest that do), one that is missing,
    one whose value has the wrong type or is not allowed.
    """
    known = known or [key.name for key in keys(schema)]
    hints = _hints(schema)
    entries = {entry.name: entry for entry in fields(schema)}  # type: ignore[arg-type]
    _names_of(entries, values, prefix, known)
    result: dict[str, Any] = {}
    for name, entry in entries.items():
        full = prefix + name
        if name not in values:
            raise VitError(f"{full}: is missing; it was deleted, or a file of conf/ lacks it")
        value, kind, rule = values[name], hints[name], entry.metadata.get("rule", Rule())
        if not is_dataclass(kind) and rule.part_of is None:
            result[name] = convert(full, value, kind, rule)
        elif not isinstance(value, Mapping):
            some = ", ".join([key for key in known if key.startswith(full + ".")][:4])
            raise VitError(f"{full}: expected a section with keys such as {some}, got {show(value)}")
        elif rule.part_of is None:
            result[name] = build(kind, value, full + ".", known)
        else:
            parts = {key.name: key for key in keys(rule.part_of)}
            _names_of(parts, value, full + ".", known)
            result[name] = {
                part: convert(f"{full}.{part}", each, parts[part].type, parts[part].rule)
                for part, each in value.items()
                if each is not None
            }
    return schema(**result)


def _names_of(entries: Mapping[str, Any], values: Mapping[str, Any], prefix: str, known: Sequence[str]) -> None:
    for name, value in values.items():
        if name not in entries:
            raise VitError(unknown(f"{prefix}{_leaf(str(name), value)}", known))


def fit(instance: Any, prefix: str) -> None:
    """Check every field of a dataclass that has been made, and give it the declared type; for `__post_init__`.

    Raises `VitError` naming `prefix` and the field.
    """
    hints = _hints(type(instance))
    for entry in fields(instance):
        rule = entry.metadata.get("rule", Rule())
        value = convert(prefix + entry.name, getattr(instance, entry.name), hints[entry.name], rule)
        object.__setattr__(instance, entry.name, value)


def unknown(name: str, known: Sequence[str]) -> str:
    """The line for a key that does not exist: `modle.size: no such key; did you mean 'model.size'?`."""
    for key in known:
        if name.startswith(key + "."):
            return f"{name}: no such key; {key} is a value and has no keys in it"
    close = similar(name, known)
    if close:
        return f"{name}: no such key; did you mean {' or '.join(map(repr, close))}?"
    section = name.rpartition(".")[0]
    inside = [key.rpartition(".")[2] for key in known if section and key.rpartition(".")[0] == section]
    if inside:
        return f"{name}: no such key; {section} has {', '.join(inside)}"
    return f"{name}: no such key; there are {', '.join(dict.fromkeys(key.split('.')[0] for key in known))}"


def similar(name: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Up to `count` of the known keys that `name` may have meant, best first.

    Dotted names are compared part by part and end to end: `optim.lrr` means `optim.lr` before anything that is alike
    only because it is in `optim` too; and `lr` alone finds every `lr` there is.
    """
    if "." not in name:
        ends = [key for key in known if key.rpartition(".")[2] == name]
        if ends:
            return ends[:count]
    scored = sorted(((_alike(name, key), key) for key in known), key=lambda pair: -pair[0])
    least = max(0.6, scored[0][0] - 0.15) if scored else 0
    return [key for score, key in scored if score >= least][:count]


def _alike(name: str, key: str) -> float:
    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    name, key = name.lower(), key.lower()
    whole = ratio(name, key)
    if "." not in name or "." not in key:
        return whole
    (section, _, leaf), (key_section, _, key_leaf) = name.rpartition("."), key.rpartition(".")
    # both parts have to be alike: a long common section must not hide that the ends differ
    return (whole + min(ratio(section, key_section), ratio(leaf, key_leaf))) / 2


def _leaf(name: str, value: Any) -> str:
    """The first dotted name in a stray value: `new: {key: 1}` is `new.key`."""
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    return name


def convert(name: str, value: Any, kind: Any, rule: Rule) -> Any:
    """`value` as the type `kind`: whole numbers serve as floats, lists as tuples; else `VitError`."""
    # text last: it would take numbers too
    for each in sorted(_members(kind), key=lambda member: member is str):
        good, result = _fit(value, each, rule)
        if good:
            return result
    close = did_you_mean(value, rule.choices) if isinstance(value, str) and rule.choices else ""
    hint = f"; {close}" if close.startswith("did you mean") else ""
    raise VitError(f"{name}: expected {describe(kind, rule)}, got {show(value)}{hint}")


def show(value: Any) -> str:
    """A value as a person would write it in a configuration file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {show(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(each) for each in value) + "]"
    return repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def expand(text: str) -> str:
    """A path with `~` as the home folder, also behind `local-dir:`.  Raises `VitError` where no home is known."""
    scheme = "local-dir:" if text.startswith("local-dir:") else ""
    rest = text.removeprefix(scheme)
    path = os.path.expanduser(rest)
    if path == rest and re.match(r"~(/|\Z)", rest):
        raise VitError(f"{text}: no home folder is known here: set HOME, or write the whole path")
    return scheme + path


def expand_paths(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values with `expand` done on every path of `schema`; for who reads them before `build` does."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key in keys(schema):
        section, _, leaf = key.name.rpartition(".")
        part = result.get(section) if section else result
        if key.rule.path and isinstance(part, dict) and isinstance(part.get(leaf), str):
            part[leaf] = expand(part[leaf])
    return result


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fit(value: Any, kind: Any, rule: Rule) -> tuple[bool, Any]:
    if kind is type(None):
        return value is None, None
    if kind is bool:
        return isinstance(value, bool), value
    if kind is str:
        # `precision=32` and `name=2024` arrive as numbers and mean text
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if rule.path and isinstance(text, str):
            text = expand(text)
        # a zero byte ends every path and every line that the text would go into
        return isinstance(text, str) and "\0" not in text and (not rule.choices or text in rule.choices), text
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (kind is float and isinstance(value, float)):
            return False, value
        if whole and not -(2**63) <= value < 2**63:  # which no library takes
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
        fitted = [_fit(each, part, rule) for each, part in zip(value, parts, strict=True)]
        return all(good for good, _ in fitted), tuple(each for _, each in fitted)
    raise TypeError(f"a configuration cannot hold {kind}")


def _in_range(value: float, rule: Rule) -> bool:
    return (
        math.isfinite(value)
        and (rule.ge is None or value >= rule.ge)
        and (rule.le is None or value <= rule.le)
        and (rule.gt is None or value > rule.gt)
        and (rule.lt is None or value < rule.lt)
    )


def describe(kind: Any, rule: Rule) -> str:
    """What a key takes, in words: "a whole number of at least 1, or null"."""
    words: list[str] = []
    for each in sorted(_members(kind), key=lambda member: member is type(None)):
        words += ["null"] if each is type(None) else ["true", "false"] if each is bool else [_describe_one(each, rule)]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _describe_one(kind: Any, rule: Rule) -> str:
    if kind is str:
        return (
            "one of " + ", ".join(map(str, rule.choices))
            if len(rule.choices) > 1
            else (str(rule.choices[0]) if rule.choices else "text")
        )
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        each = _plural(_describe_one(parts[0], rule))
        return f"a list of {each}" if parts[-1] is Ellipsis else f"a list of {len(parts)} {each}"
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
