"""Resume a run: read its checkpoint, and apply new overrides to its configuration."""

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


FIXED_KEYS = frozenset(
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
"""Keys that cannot change in a resumed run; overrides of other keys apply from there on."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint to resume from.

    Attributes:
        path: the file.
        values: its content.
        splits: the file with the split of each image, or None.
    """

    path: Path
    values: dict[str, Any]
    splits: Path | None

    @property
    def description(self) -> Description:
        """The description of its model and data."""
        from vit.inference.description import Description

        return Description.from_dict(self.values["vit"])


def find_checkpoint(resume: str) -> Path:
    """Find the checkpoint for `resume=`: a `.ckpt`, or the last one of a run folder.  Raises `VitError`."""
    path = Path(resume).expanduser()
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        for candidate in (path, path / "checkpoints" / "last.ckpt", path / "checkpoints" / "best.ckpt"):
            if candidate.is_file():
                return candidate
        if (path / "config.yaml").is_file():
            raise VitError(f"resume={resume}: that run ended before its first checkpoint: start it without resume=")
    raise VitError(f"resume={resume}: expected a .ckpt file or a run folder that holds checkpoints/last.ckpt")


def read_checkpoint(resume: str) -> SavedCheckpoint:
    """Read the checkpoint for `resume=`; of a run folder, the best one if the last is damaged.  Imports torch.

    Raises:
        VitError: no checkpoint can be read, or it was not written by training.
    """
    path = find_checkpoint(resume)
    try:
        return _read_file(path)
    except VitError as error:
        best = path.with_name("best.ckpt")
        if Path(resume).is_file() or path == best or not best.is_file():
            raise
        log.warning("%s; going on from %s", error, best)
        return _read_file(best)


def _read_file(path: Path) -> SavedCheckpoint:
    from vit.pretrained.reading import read_pickled

    values = read_pickled(path)
    needed = {"vit", "state_dict", "loops", "optimizer_states", "epoch", "callbacks"}
    if not isinstance(values, dict) or not needed <= values.keys():
        raise VitError(
            f"resume={path}: it holds no training to go on with: expected a checkpoint that training wrote; to start "
            f"from its weights, model=pretrained model.name={path}"
        )
    folder = find_run_folder(path)
    splits = None if folder is None or not (folder / FILE).is_file() else folder / FILE
    return SavedCheckpoint(path, values, splits)


def find_run_folder(checkpoint: Path) -> Path | None:
    """Return the run folder of a checkpoint, None if it is outside of one."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def resume_config(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of the run that `values["resume"]` names, changed only by `overrides`.

    Args:
        values: the composed configuration of the command line.
        overrides: the overrides: `key=value`, or `group=name`, which replaces the whole group.

    Returns:
        Nested plain values; `values` unchanged if the checkpoint is outside a run folder.

    Raises:
        VitError: nothing to resume, an unreadable `config.yaml`, another value for a fixed key, or `experiment=` or
            `debug=`, which would replace the run's settings.
    """
    folder = find_run_folder(find_checkpoint(str(values["resume"])))
    path = None if folder is None else folder / "config.yaml"
    if path is None or not path.is_file():
        return dict(values)
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VitError(f"resume={values['resume']}: cannot read {path}: {error}") from error
    if not isinstance(saved, dict):
        raise VitError(f"resume={values['resume']}: {path} is not a configuration")
    _fill_defaults(saved, values)
    original = copy.deepcopy(saved)
    for override in [*overrides, "resume="]:
        key = override.split("=", 1)[0].lstrip("+~")
        if key in ("experiment", "debug"):
            raise VitError(f"resume= goes on with the run's own configuration: leave out {override}")
        _copy_key(values, saved, key.split("."))
    for key in sorted(FIXED_KEYS):
        before, after = (_get_value(config, key) for config in (original, saved))
        # the decay of a moving average may change, but not whether there is one
        if str(before) != str(after) and (key != "ema.decay" or None in (before, after)):
            raise VitError(
                f"resume={values['resume']}: {key}={format_value(after)} cannot hold in a run that has "
                f"{key}={format_value(before)}: leave it out, or start another run"
            )
    return saved


def check_resumable(
    saved: SavedCheckpoint,
    weights: Mapping[str, Tensor],
    optimizer: Optimizer,
    class_names: Sequence[str],
    epochs: int | None,
    patience: int | None,
) -> None:
    """Raise `VitError` unless training can be resumed from `saved`.

    Args:
        weights: the new weights, whose names and shapes are compared.
        optimizer: the new optimiser, whose groups are compared.
        class_names: classes of the data.
        epochs: total number of epochs; None: no limit.
        patience: validations without improvement that end the run; None: no limit.
    """
    from vit.training.folder import is_finished

    prefix, values = f"resume={saved.path}", saved.values
    if saved.description.class_names != list(class_names):
        raise VitError(
            f"{prefix}: that run learns {quote_names(saved.description.class_names, 5)}, and the data has "
            f"{quote_names(class_names, 5)}: leave data.* as that run has it"
        )
    before, after = (
        {key: tuple(tensor.shape) for key, tensor in state.items()} for state in (values["state_dict"], weights)
    )
    differ = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if differ:
        raise VitError(
            f"{prefix}: that run trains other weights ({quote_names(differ)}): leave model.*, lora.*, ema.* and data.* "
            "as it has them"
        )
    if _optimizer_layout(values["optimizer_states"][0]["param_groups"]) != _optimizer_layout(optimizer.param_groups):
        raise VitError(
            f"{prefix}: that run steps its weights otherwise: leave optim.name, optim.layer_decay, optim.head_lr and "
            "finetune.freeze as it has them"
        )
    if epochs is not None and values["epoch"] >= epochs:
        raise VitError(f"{prefix}: that run is in epoch {values['epoch'] + 1}: raise trainer.max_epochs={epochs}")
    since = max(state.get("since", 0) for state in values["callbacks"].values())
    folder = find_run_folder(saved.path)
    if patience is not None and since >= patience and folder is not None and is_finished(folder):
        raise VitError(
            f"{prefix}: that run ended after {since} validations without a better one: raise trainer.patience"
        )


def _optimizer_layout(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what must not change in a resumed optimiser: its kind and its groups."""
    return [(len(g["params"]), g.get("name"), *(key in g for key in ("muon", "betas", "nesterov"))) for g in groups]


def _fill_defaults(saved: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Add the defaults of keys that are missing in the configuration of an older run."""
    for key, value in values.items():
        if key not in saved:
            saved[key] = copy.deepcopy(value)
        elif isinstance(saved[key], dict) and isinstance(value, Mapping):
            _fill_defaults(saved[key], value)


def _get_value(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(part)  # type: ignore[assignment]
    return values


def _copy_key(source: Mapping[str, Any], target: dict[str, Any], keys: list[str]) -> None:
    """Copy the value at the path `keys` from `source` to `target`."""
    *parents, last = keys
    for key in parents:
        if key not in source or not isinstance(target.get(key), dict):
            return
        source, target = source[key], target[key]
    if last in source:
        target[last] = copy.deepcopy(source[last])
