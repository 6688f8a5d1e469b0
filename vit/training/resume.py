"""Going on with a run: its own configuration, with what is typed now on top."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vit.data.assemble import quote_names
from vit.data.run_splits import FILE
from vit.errors import VitError
from vit.options import format_value

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from vit.inference.description import Description

log = logging.getLogger("vit")


FIXED = frozenset(
    """
    method seed tune run.root run.name
    data.name data.image_size data.channels data.patch_size data.batch_size data.val_fraction data.test_fraction
    data.split_seed data.mean data.std data.interpolation data.crop_pct data.crop_mode data.max_images data.objects
    data.object_scale data.clutter data.train_images data.val_images data.test_images data.kinds data.image_column
    data.label_column data.content
    model.name model.weights model.revision model.head model.size model.width model.depth model.heads model.image_size
    model.patch_size model.in_channels model.mlp model.mlp_ratio model.activation model.attention model.norm
    model.norm_layer model.norm_eps model.embed_norm model.attention_norm model.mlp_norm model.final_norm model.position
    model.position_prefix model.pool model.pool_prefix model.class_token model.distillation_token model.registers
    model.layer_scale model.qk_norm model.qkv_bias model.proj_bias model.patch_bias model.crop_to_patches
    model.reduction model.reduction_rate model.reduction_schedule model.reduction_proportional model.init
    optim.name optim.layer_decay optim.head_lr ema.decay finetune.head finetune.freeze lora.rank lora.alpha lora.targets
    """.split()  # noqa: SIM905
)
"""Keys that a run keeps for good; what is typed for any other key holds from where the run goes on."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from.

    Attributes
        path: the file.
        values: what it holds.
        splits: the file that says which image is in which split; None where there is none.
    """

    path: Path
    values: dict[str, Any]
    splits: Path | None

    @property
    def description(self) -> Description:
        """What it says of its model and data."""
        from vit.inference.description import Description

        return Description.from_dict(self.values["vit"])


def checkpoint_of(resume: str) -> Path:
    """The checkpoint that `resume=` means: a `.ckpt`, or the last one of a run folder.  Raises `VitError`."""
    path = Path(resume).expanduser()
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        for candidate in (path, path / "checkpoints" / "last.ckpt", path / "checkpoints" / "best.ckpt"):
            if candidate.is_file():
                return candidate
        if (path / "config.yaml").is_file():
            raise VitError(f"resume={resume}: that run ended before its first checkpoint: start it without resume=")
    raise VitError(f"resume={resume}: expected a .ckpt file or a run folder that holds checkpoints/last.ckpt")


def read(resume: str) -> Saved:
    """Read the checkpoint that `resume=` means; of a run folder, the best one where the last is damaged.

    Imports torch.  Raises `VitError` when nothing can be read, or what is read holds no training.
    """
    path = checkpoint_of(resume)
    try:
        return _read(path)
    except VitError as error:
        best = path.with_name("best.ckpt")
        if Path(resume).is_file() or path == best or not best.is_file():
            raise
        log.warning("%s; going on from %s", error, best)
        return _read(best)


def _read(path: Path) -> Saved:
    from vit.pretrained.reading import read_pickled

    values = read_pickled(path)
    needed = {"vit", "state_dict", "loops", "optimizer_states", "epoch", "callbacks"}
    if not isinstance(values, dict) or not needed <= values.keys():
        raise VitError(
            f"resume={path}: it holds no training to go on with: expected a checkpoint that training wrote; to start "
            f"from its weights, model=pretrained model.name={path}"
        )
    folder = folder_of(path)
    splits = None if folder is None or not (folder / FILE).is_file() else folder / FILE
    return Saved(path, values, splits)


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
        VitError: nothing to resume, an unreadable `config.yaml`, another value for a key that cannot change, or
            `experiment=`/`debug=`, which would replace the run's own recipe by another.
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
    _fill(saved, values)
    own = copy.deepcopy(saved)
    for override in [*overrides, "resume="]:
        key = override.split("=", 1)[0].lstrip("+~")
        if key in ("experiment", "debug"):
            raise VitError(f"resume= goes on with the run's own configuration: leave out {override}")
        _copy(values, saved, key.split("."))
    for key in sorted(FIXED):
        before, after = (_value(each, key) for each in (own, saved))
        # the decay of an average may change, but not whether there is one
        if str(before) != str(after) and (key != "ema.decay" or None in (before, after)):
            raise VitError(
                f"resume={values['resume']}: {key}={format_value(after)} cannot hold in a run that has "
                f"{key}={format_value(before)}: leave it out, or start another run"
            )
    return saved


def check_fits(
    saved: Saved,
    weights: Mapping[str, Tensor],
    optimizer: Optimizer,
    class_names: Sequence[str],
    epochs: int | None,
    patience: int | None,
) -> None:
    """Raise `VitError` unless training can go on from `saved`.

    Args:
        weights: of all that is trained, as they are before; their names and shapes are compared.
        optimizer: whose groups are compared.
        class_names: of the data.
        epochs: how many there are to be in all; None: no limit.
        patience: validations without a better one that end the run; None: they never do.
    """
    from vit.training.folder import is_finished

    where, values = f"resume={saved.path}", saved.values
    if saved.description.class_names != list(class_names):
        raise VitError(
            f"{where}: that run learns {quote_names(saved.description.class_names, 5)}, and the data has "
            f"{quote_names(class_names, 5)}: leave data.* as that run has it"
        )
    before, now = ({key: tuple(each.shape) for key, each in state.items()} for state in (values["state_dict"], weights))
    differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differ:
        raise VitError(
            f"{where}: that run trains other weights ({quote_names(differ)}): leave model.*, lora.*, ema.* and data.* "
            "as it has them"
        )
    if _steps(values["optimizer_states"][0]["param_groups"]) != _steps(optimizer.param_groups):
        raise VitError(
            f"{where}: that run steps its weights otherwise: leave optim.name, optim.layer_decay, optim.head_lr and "
            "finetune.freeze as it has them"
        )
    if epochs is not None and values["epoch"] >= epochs:
        raise VitError(f"{where}: that run is in epoch {values['epoch'] + 1}: raise trainer.max_epochs={epochs}")
    since = max(state.get("since", 0) for state in values["callbacks"].values())
    folder = folder_of(saved.path)
    if patience is not None and since >= patience and folder is not None and is_finished(folder):
        raise VitError(
            f"{where}: that run ended after {since} validations without a better one: raise trainer.patience"
        )


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


def _value(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(part)  # type: ignore[assignment]
    return values


def _copy(source: Mapping[str, Any], target: dict[str, Any], keys: list[str]) -> None:
    """Set `target` at the path `keys` to what `source` has there."""
    *parents, last = keys
    for key in parents:
        if key not in source or not isinstance(target.get(key), dict):
            return
        source, target = source[key], target[key]
    if last in source:
        target[last] = copy.deepcopy(source[last])
