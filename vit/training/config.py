"""Define and check the configuration of a training run.

Notable:
- `conf/*.yaml` compose to exactly these keys and hold their defaults.  Type, help, choices and limits of a key are
  declared once, in `vit.training.sections` (for data and augmentation, in `vit.data`); checks, messages and
  `docs/configuration.md` use them.
- `load_config` checks names, types and values in a few milliseconds, without torch.  Only then does it read pretrained
  weights, to fill in what the configuration leaves open (`vit.training.pretrained`).
- `check_config` finds contradictions between keys before any data is read.  `check_model` builds the model on the meta
  device, where it takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vit import options
from vit.data.augment_config import AugmentConfig
from vit.data.catalogue import DataConfig
from vit.errors import VitError
from vit.options import option, setting
from vit.training import pretrained
from vit.training.sections import (
    DistillConfig,
    EmaConfig,
    ExportConfig,
    FinetuneConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
)

_PACKAGE = Path(__file__).resolve().parents[1]
# inside the package where it was installed from a wheel, beside it in a checkout
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


@dataclass(frozen=True)
class Config:
    """Hold all settings of a training run."""

    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    trainer: TrainerConfig
    finetune: FinetuneConfig
    lora: LoraConfig
    distill: DistillConfig
    probe: ProbeConfig
    ema: EmaConfig
    logging: LoggingConfig
    export: ExportConfig
    run: RunConfig
    method: str = setting(
        "how weights are found: by gradient steps, or as a linear head on features computed once",
        choices=("train", "linear_probe"),
    )
    seed: int = setting("of everything random but the split of the data", ge=0)
    resume: str | None = setting("a run folder or last.ckpt to go on from", path=True)
    tune: bool = setting("find the batch size and the learning rate first")
    monitor: str = setting("what decides which checkpoint is best", choices=("val/top1", "val/loss"))

    def to_dict(self) -> dict[str, Any]:
        """Convert the nested fields to plain JSON types."""
        return _to_plain(asdict(self))


@dataclass(frozen=True)
class EvalConfig:
    """Hold all settings of an evaluation.

    `data` holds only the given keys.  With a `name` it is another data set, else the one that the model was trained on,
    perhaps in another folder.
    """

    checkpoint: str = setting("the model: a run folder, a .ckpt, a bundle folder or an .onnx", path=True)
    data: Mapping[str, Any] = option(None, "any keys of the data; null: the model's", subset_of=DataConfig)
    split: str = option("test", "which part of the data", choices=("train", "val", "test"))
    output: str | None = option(None, "folder for the results; null: evaluation/ in the run folder", path=True)
    batch_size: int | None = option(None, "images at a time; null: data.eval_batch_size", ge=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    reduction: str | None = option(None, "fewer tokens, such as merge:0.5; null: as the model has it")
    faithfulness: bool = option(False, "measure how far to believe attention maps, too")
    faithfulness_images: int = option(256, "on how many images", ge=2)


def load_config(values: Mapping[str, Any]) -> Config:
    """Build and check a `Config` from nested plain values.  Raises `VitError` naming the key.

    Imports torch only to read pretrained weights, where `values` leave keys open.
    """
    for group in ("experiment", "debug"):
        if group in values:
            raise VitError(f"{group}: a file of conf/{group} has to begin with the line '# @package _global_'")
    if pretrained.has_open_keys(values):
        options.build(Config, pretrained.fill_placeholders(values))  # report mistakes before reading weights
        values = pretrained.fill_from_weights(values)
    config = options.build(Config, values)
    check_config(config)
    return config


def load_eval_config(values: Mapping[str, Any]) -> EvalConfig:
    """Build and check an `EvalConfig` from nested plain values, without torch.  Raises `VitError` naming the key."""
    return options.build(EvalConfig, values)


def check_config(config: Config) -> None:
    """Raise `VitError` for the first contradiction between keys that can be found without data and torch."""
    trainer, schedule = config.trainer, config.schedule
    _check_model_follows_data(config)
    _check_weights(config)
    if config.data.cache and str(config.data.resident).lower() == "true":
        raise VitError("data.cache=true and data.resident=true both keep decoded images: leave one of them out")
    limit = trainer.max_seconds
    if trainer.max_epochs is None and trainer.max_steps is None and limit is None:
        raise VitError(
            "trainer.max_epochs, trainer.max_steps and trainer.max_time are all null: training would never end; "
            "set one, such as trainer.max_epochs=100"
        )
    if schedule.warmup + (schedule.cooldown if schedule.name == "wsd" else 0) > 1:
        raise VitError(
            f"schedule.warmup={schedule.warmup:g} and schedule.cooldown={schedule.cooldown:g} are shares of training "
            "and take more than all of it: lower one so that they sum to at most 1"
        )
    for name in ("limit_train_batches", "limit_val_batches"):
        value = getattr(trainer, name)
        if isinstance(value, float) and value > 1:
            raise VitError(f"trainer.{name}: expected a whole number of batches or a share of at most 1, got {value:g}")
    processes = trainer.num_nodes * (trainer.devices if isinstance(trainer.devices, int) else 1)
    _check_batch_divides(config, processes)
    if trainer.strategy == "fsdp" and trainer.accelerator == "cpu":
        raise VitError("trainer.strategy=fsdp shards a model over GPUs: on CPUs use trainer=ddp_cpu or trainer=cpu")
    if trainer.strategy == "fsdp" and config.optim.name == "muon":
        raise VitError("optim=muon steps whole matrices, which trainer=fsdp cuts up: use optim=adamw or trainer=ddp")
    if config.tune and (processes > 1 or trainer.strategy != "auto"):
        raise VitError("tune=true measures one process: run it with trainer=auto first, then set what it found")
    if trainer.accelerator == "cpu" and trainer.precision == "16":
        raise VitError("trainer.precision=16 needs a GPU: on a CPU use trainer.precision=32 (or auto)")
    if schedule.name == "wsd" and schedule.cooldown == 0 and schedule.final != 0:
        raise VitError("schedule.final has no effect with schedule.cooldown=0: set schedule.cooldown, such as 0.2")


def _check_model_follows_data(config: Config) -> None:
    model, data = config.model, config.data
    size = model.image_size if isinstance(model.image_size, tuple) else (model.image_size, model.image_size)
    pairs = (
        ("image_size", "image_size", size != data.size),
        ("in_channels", "channels", model.in_channels != data.channels),
    )
    for name, key, differs in pairs:
        if differs:
            own, theirs = options.format_value(getattr(model, name)), options.format_value(getattr(data, key))
            raise VitError(
                f"model.{name}={own}: the images come with data.{key}={theirs}, and the model follows them; "
                f"set data.{key}={own} instead"
            )


def _check_weights(config: Config) -> None:
    """Check the settings that need pretrained weights, and which of them exclude each other."""
    m, lora, finetune = config.model, config.lora, config.finetune
    if m.name is not None and m.size is not None:
        raise VitError(pretrained.size_conflict_message(m.name, m.size))
    if m.name is None and m.size is None and None in (m.width, m.depth, m.heads):
        raise VitError("model.size: may only be null where model.width, model.depth and model.heads are all given")
    frozen = [f"finetune.{key}={options.format_value(getattr(finetune, key))}" for key in ("freeze", "unfreeze")
              if getattr(finetune, key)]  # fmt: skip
    probed = ["finetune.head=probe"] if finetune.head == "probe" else []
    if m.name is None and (frozen or probed or lora.rank is not None):
        reason = [*frozen, *probed, f"lora.rank={lora.rank}"][0]
        raise VitError(f"{reason}: only weights that have learned something are worth keeping: use model=pretrained")
    if frozen and lora.rank is not None:
        raise VitError(
            f"{frozen[0]}: with lora.rank={lora.rank} all matrices are frozen anyway: leave out one of the two"
        )
    if m.depth is not None and finetune.freeze != "all" and int(finetune.freeze) > m.depth:
        raise VitError(f"finetune.freeze={finetune.freeze}: the model has {m.depth} blocks; all: only the head learns")
    if probed and config.tune:
        raise VitError("tune=true measures with a head at zero: use finetune.head=zero, or set optim.lr yourself")
    if finetune.unfreeze and config.trainer.strategy == "fsdp":
        raise VitError("finetune.unfreeze changes what learns, which trainer=fsdp fixes at the start: use trainer=ddp")
    if config.method == "linear_probe":
        unsupported = {
            "resume": config.resume,
            "tune": config.tune,
            "lora.rank": lora.rank,
            "ema.decay": config.ema.decay,
        }
        unsupported |= {"distill.teacher": config.distill.teacher}
        ignored = [
            *frozen,
            *probed,
            *(f"{key}={options.format_value(value)}" for key, value in unsupported.items() if value),
        ]
        if ignored:
            raise VitError(f"{ignored[0]}: with method=linear_probe nothing but a linear head is fitted: leave it out")
        if config.trainer.num_nodes > 1 or (isinstance(config.trainer.devices, int) and config.trainer.devices > 1):
            raise VitError("method=linear_probe takes one process: set trainer.devices=1, or trainer=auto")


def _check_batch_divides(config: Config, processes: int) -> None:
    paired = config.augment.mixes and processes > 1  # neighbours in a batch are mixed, so a process needs whole pairs
    unit, size = processes * (2 if paired else 1), config.data.batch_size
    if size % unit:
        parts = "even parts (mixup and cutmix mix neighbours)" if paired else "equal parts"
        fits = sorted({max(unit, size // unit * unit), (size // unit + 1) * unit})
        raise VitError(
            f"data.batch_size={size} is for all processes together and does not split into {parts} over the "
            f"{processes} of trainer.devices and trainer.num_nodes; try {' or '.join(map(str, fits))}"
        )


def check_model(config: Config, num_classes: int | None = None) -> None:
    """Raise `VitError` if the model, the augmentation or the hardware is impossible.

    The model is built on the meta device, where it takes no memory.  Without `num_classes`, checks that need it are
    skipped.  Imports torch.
    """
    import torch

    from vit.model import VisionTransformer

    with torch.device("meta"):
        VisionTransformer(**config.model.arguments(num_classes or 2))
    config.augment.check(num_classes or 2)
    trainer, kind = config.trainer, device_kind(config.trainer.accelerator)
    if kind == "mps" and (trainer.strategy != "auto" or trainer.devices not in ("auto", 1)):
        raise VitError("trainer: a Mac's GPU trains in one process: use trainer=mps, or trainer=ddp_cpu for several")
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    if trainer.devices == "auto" and gpus > 1:
        _check_batch_divides(config, gpus * trainer.num_nodes)


def device_kind(accelerator: str) -> str:
    """Resolve `trainer.accelerator` on this machine to "cuda", "mps" (a Mac's GPU) or "cpu".  Imports torch.

    Raises:
        VitError: the machine does not have it.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}.get(accelerator, (accelerator,))
    for kind in kinds:
        if available[kind]:
            return kind
    raise VitError(f"trainer.accelerator={accelerator}: torch finds no GPU here; use trainer=cpu, or trainer=auto")


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, list | tuple) else value
