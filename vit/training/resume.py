"""Going on with a run: its own configuration, with what is typed now on top."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vit.errors import VitError


def checkpoint_of(resume: str) -> Path:
    """The checkpoint that `resume=` means: a `.ckpt`, or the last one of a run folder.  Raises `VitError`."""
    path = Path(resume)
    for candidate in (path, path / "checkpoints" / "last.ckpt"):
        if candidate.is_file():
            return candidate
    raise VitError(f"resume={resume}: expected a .ckpt file or a run folder that holds checkpoints/last.ckpt")


def folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, None for one that was moved out of it."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def configuration(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values of the run that `values["resume"]` names, changed by `overrides` alone.

    Args:
        values: what the command line composes to, from the defaults.
        overrides: what was typed: `key=value`, or `group=name`, which replaces the whole group.

    Returns:
        Nested plain values.  `values` as they are, where the checkpoint lies outside a run folder.

    Raises:
        VitError: nothing to resume, an unreadable `config.yaml`, or `experiment=`/`debug=`, which would replace the
            run's own recipe by another.
    """
    folder = folder_of(checkpoint_of(str(values["resume"])))
    path = None if folder is None else folder / "config.yaml"
    if path is None or not path.is_file():
        return dict(values)
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VitError(f"resume={values['resume']}: cannot read {path}: {error}") from error
    if not isinstance(saved, dict):
        raise VitError(f"resume={values['resume']}: {path} is not a configuration")
    for override in [*overrides, "resume="]:
        key = override.split("=", 1)[0].lstrip("+~")
        if key in ("experiment", "debug"):
            raise VitError(f"resume= goes on with the run's own configuration: leave out {override}")
        _copy(values, saved, key.split("."))
    _fill(saved, values)
    return saved


def _fill(saved: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Give keys that a run's configuration does not have, since it is older than they are, their defaults."""
    for key, value in values.items():
        if key not in saved:
            saved[key] = copy.deepcopy(value)
        elif isinstance(saved[key], dict) and isinstance(value, Mapping):
            _fill(saved[key], value)


def _copy(source: Mapping[str, Any], target: dict[str, Any], keys: list[str]) -> None:
    """Set `target` at the path `keys` to what `source` has there."""
    *parents, last = keys
    for key in parents:
        if key not in source or not isinstance(target.get(key), dict):
            return
        source, target = source[key], target[key]
    if last in source:
        target[last] = copy.deepcopy(source[last])
