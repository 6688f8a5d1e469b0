"""Going on with a run: its own configuration, with what is typed now on top."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vit.data.assemble import listing
from vit.errors import VitError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def checkpoint_of(resume: str) -> Path:
    """The checkpoint that `resume=` means: a `.ckpt`, or the last one of a run folder.  Raises `VitError`."""
    path = Path(resume)
    for candidate in (path, path / "checkpoints" / "last.ckpt"):
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
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


def check_fits(
    checkpoint: Path,
    weights: Mapping[str, Tensor],
    optimizer: Optimizer,
    class_names: Sequence[str],
    epochs: int | None,
) -> None:
    """Raise `VitError` unless training can go on from the file `checkpoint`; imports torch.

    Args:
        weights: of all that is trained, as they are before; their names and shapes are compared.
        optimizer: whose groups are compared.
        class_names: of the data.
        epochs: how many there are to be in all; None: no limit.
    """
    from vit.pretrained.reading import read_pickled

    told = f"resume={checkpoint}"
    saved = read_pickled(checkpoint)
    if not isinstance(saved, dict) or not {"vit", "state_dict", "loops", "optimizer_states", "epoch"} <= saved.keys():
        raise VitError(
            f"{told}: it holds no training to go on with: expected a checkpoint that training wrote; to start from its "
            f"weights, model=pretrained model.name={checkpoint}"
        )
    if saved["vit"].get("class_names") != list(class_names):
        raise VitError(
            f"{told}: that run learns {listing(saved['vit'].get('class_names') or [], 5)}, and the data has "
            f"{listing(class_names, 5)}: leave data.* as that run has it"
        )
    before, now = ({key: tuple(each.shape) for key, each in state.items()} for state in (saved["state_dict"], weights))
    differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differ:
        raise VitError(
            f"{told}: that run trains other weights ({listing(differ)}): leave model.*, lora.*, ema.* and data.* as "
            "it has them"
        )
    if _steps(saved["optimizer_states"][0]["param_groups"]) != _steps(optimizer.param_groups):
        raise VitError(
            f"{told}: that run steps its weights otherwise: leave optim.name, optim.layer_decay, optim.head_lr and "
            "finetune.freeze as it has them"
        )
    if epochs is not None and saved["epoch"] >= epochs:
        raise VitError(f"{told}: that run is in epoch {saved['epoch'] + 1}: raise trainer.max_epochs={epochs}")


def _steps(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What cannot be another when an optimiser goes on: its kind, and which weights are a group."""
    return [(len(g["params"]), g.get("name"), *(key in g for key in ("muon", "betas", "nesterov"))) for g in groups]


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
