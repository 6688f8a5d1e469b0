"""Every decision of a training run, as one typed object.

Notable:
- `conf/*.yaml` compose to exactly these keys and hold their defaults; a field's type, help, choices and limits are said
  once, here (for data and augmentation, in `vit.data`), and serve checks, messages and `docs/configuration.md`.
- `load` checks names, types and values in a few milliseconds, without torch, so that a slip is reported at once.
- `check` finds what contradicts itself between keys, before any data is touched; the model's own checks are used by
  building it on the meta device, where it takes no memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vit import options
from vit.data.augment_config import AugmentConfig
from vit.data.catalogue import DataConfig
from vit.errors import VitError
from vit.options import option, setting

SIZES = ("nano", "tiny", "small", "base", "large", "huge")


@dataclass(frozen=True)
class ModelConfig:
    """The Vision Transformer: every keyword of `vit.model.VisionTransformer` but the number of classes."""

    size: str = setting("sets width, depth and heads together", choices=SIZES)
    width: int | None = setting("numbers a token has; null: the size's", least=1)
    depth: int | None = setting("blocks; null: the size's", least=1)
    heads: int | None = setting("attention heads, a divisor of the width; null: the size's", least=1)
    image_size: int | tuple[int, int] = setting("pixels, or [height, width]; follows data.image_size", least=1)
    patch_size: int | tuple[int, int] = setting("pixels, or [height, width]; follows data.patch_size", least=1)
    in_channels: int = setting("of the images; follows data.channels", least=1)
    mlp: str = setting(
        "the block's MLP: plain, or gated (packed: both halves in one matrix)",
        choices=("plain", "swiglu", "swiglu_packed"),
    )
    mlp_ratio: float = setting("width of the MLP's hidden layer, in widths", over=0)
    activation: str = setting("of a plain MLP", choices=("gelu", "gelu_tanh", "quick_gelu"))
    attention: str = setting(
        "scaled_dot_product has one head, dot_product no parameters",
        choices=("multi_head", "scaled_dot_product", "dot_product"),
    )
    norm: str = setting("norm before each branch, or after each sum (Vaswani et al.)", choices=("pre", "post"))
    norm_layer: str = setting("LayerNorm, or RMSNorm without mean and offset", choices=("layer", "rms"))
    norm_eps: float = setting("added under the root of every norm", over=0)
    embed_norm: str = setting(
        "one more norm, of the patches' tokens or of all tokens before the first block",
        choices=("none", "patches", "tokens"),
    )
    attention_norm: bool = setting("norm of the heads' outputs before they are mixed")
    mlp_norm: bool = setting("norm of the MLP's hidden layer")
    final_norm: str | None = setting(
        "the last norm: of the tokens, or of what was pooled; null: what pool suggests",
        choices=("tokens", "pooled", "none"),
    )
    position: str = setting(
        "how a token knows its place (rotary_box: in shares of the image)",
        choices=("learned", "sincos", "rotary", "rotary_box", "none"),
    )
    position_prefix: bool = setting("positions for the class token and registers too, as timm has them")
    pool: str = setting(
        "what the head reads: the class token, the mean, or a learned query's attention to the patches",
        choices=("token", "mean", "attention"),
    )
    class_token: bool | None = setting("whether there is one; null: only where pool reads it")
    distillation_token: bool = setting("a second class token with a head of its own, for a teacher's answers")
    registers: int = setting("extra learned tokens that no head reads", least=0)
    layer_scale: float | None = setting("start of each branch's learned scale; null: none")
    qk_norm: bool | None = setting("normalise queries and keys; null: where there are any")
    qkv_bias: bool = setting("biases in the maps to queries, keys and values")
    proj_bias: bool = setting("biases in the map out of attention and in the MLP")
    patch_bias: bool = setting("bias in the map from pixels to tokens")
    crop_to_patches: bool = setting(
        "leave out pixels at the right and bottom that fill no patch"
    )
    dropout: float = setting("share of activations dropped", least=0, under=1)
    attention_dropout: float = setting("share of attention weights dropped", least=0, under=1)
    drop_path: float = setting("stochastic depth: share of branches skipped in the last block", least=0, under=1)
    patch_dropout: float = setting("share of patches left out in training", least=0, under=1)
    init: str = setting("how weights start", choices=("trunc_normal", "xavier", "mimetic"))
    compile: bool = setting("torch.compile: slow to start, faster after")

    def arguments(self, num_classes: int) -> dict[str, Any]:
        """Keyword arguments of `VisionTransformer`."""
        given = {key: value for key, value in vars(self).items() if key != "compile"}
        return given | {"num_classes": num_classes}


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become steps."""

    name: str = setting("muon steps block matrices, AdamW the rest", choices=("muon", "adamw", "sgd"))
    lr: float = setting("peak learning rate (muon: of what is no block matrix)", over=0)
    matrix_lr: float = setting("muon: peak learning rate of the block matrices", over=0)
    weight_decay: float = setting("decay of matrices, times the learning rate a step", least=0)
    momentum: float = setting("of muon and sgd", least=0, under=1)
    betas: tuple[float, float] = setting("of AdamW, also beside muon", least=0, under=1)
    layer_decay: float = setting("learning rate of each layer relative to the one above it", over=0, most=1)
    clip: float | None = setting("largest norm of the gradient; null: off", over=0)
    accumulate: int = setting("batches to a step", least=1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over training, as a share of its peak."""

    name: str = setting("the shape", choices=("cosine", "linear", "wsd", "constant"))
    warmup: float = setting("share of training in which it rises", least=0, most=1)
    cooldown: float = setting("wsd: share of training in which it falls", least=0, most=1)
    final: float = setting("share of the peak at the end", least=0, most=1)


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what, and how exactly."""

    name: str = setting("of the file in conf/trainer")
    accelerator: str = setting("the hardware", choices=("auto", "cpu", "gpu"))
    devices: int | str = setting("on each machine; auto: every GPU, or one CPU process", choices=("auto",), least=1)
    num_nodes: int = setting("machines", least=1)
    strategy: str = setting("how several devices share the work", choices=("auto", "ddp", "fsdp"))
    precision: str = setting("auto: bf16 on GPUs that have it, else 32", choices=("auto", "32", "bf16", "16"))
    max_epochs: int | None = setting("passes over the training images; null: no limit", least=1)
    max_steps: int | None = setting("steps of the optimiser; null: no limit", least=1)
    max_time: float | str | None = setting("seconds or HH:MM:SS; the schedule ends where the time ends", over=0)
    validate_every: int = setting("epochs between validations", least=1)
    deterministic: bool = setting("refuse operations that differ from run to run")
    threads: int | None = setting("of torch on the CPU; null: torch's choice", least=1)
    limit_train_batches: int | float | None = setting("batches an epoch, or a share below 1; null: all", over=0)
    limit_val_batches: int | float | None = setting("batches a validation, or a share below 1; null: all", over=0)
    patience: int | None = setting("stop after this many validations without a better one; null: never", least=1)
    patch_dropout_off: float = setting("last share of training that sees all patches", least=0, most=1)

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return seconds(self.max_time, "trainer.max_time")


@dataclass(frozen=True)
class EmaConfig:
    """A moving average of the weights, kept beside them."""

    decay: float | None = setting("of the average, such as 0.999; null: off", over=0, under=1)


@dataclass(frozen=True)
class LoggingConfig:
    """What is shown and written while training runs."""

    tensorboard: bool = setting("write TensorBoard event files")
    every: int = setting("steps between scalars", least=1)
    images: int = setting("images in a grid; 0: none", least=0)
    attention: int = setting("images whose attention is shown as it forms; 0: none", least=0)
    progress: bool = setting("a progress bar in the terminal")


@dataclass(frozen=True)
class ExportConfig:
    """What is written when training is over."""

    onnx: bool = setting("model.onnx in the bundle: classification without torch")


@dataclass(frozen=True)
class RunConfig:
    """Where results go: `<root>/<name>/<date>_<time>/`."""

    root: str = setting("folder of all runs")
    name: str = setting("of the folder under root; follows data.name")


@dataclass(frozen=True)
class Config:
    """One training run."""

    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    trainer: TrainerConfig
    ema: EmaConfig
    logging: LoggingConfig
    export: ExportConfig
    run: RunConfig
    seed: int = setting("of everything random but the split of the data", least=0)
    resume: str | None = setting("a run folder or last.ckpt to go on from")
    tune: bool = setting("find the batch size and the learning rate first")
    monitor: str = setting("what decides which checkpoint is best", choices=("val/top1", "val/loss"))

    def to_dict(self) -> dict[str, Any]:
        """The nested fields as plain JSON types."""
        return _plain(asdict(self))


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    `data` holds only the keys that were given: with a `name` among them it is another data set, else the one that the
    model was trained on, perhaps in another place.
    """

    checkpoint: str
    data: Mapping[str, Any] = option(None, "any keys of the data; null: the model's", part_of=DataConfig)
    split: str = option("test", "which part of the data", choices=("train", "val", "test"))
    output: str | None = option(None, "folder for the results; null: evaluation/ in the run folder")
    batch_size: int | None = option(None, "images at a time; null: data.eval_batch_size", least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    faithfulness: bool = option(False, "measure how far to believe attention maps, too")
    faithfulness_images: int = option(256, "on how many images", least=2)


def load(values: Mapping[str, Any]) -> Config:
    """A checked `Config` of nested plain values.  Raises `VitError` naming the key; imports no torch."""
    for group in ("experiment", "debug"):
        if group in values:
            raise VitError(f"{group}: a file of conf/{group} has to begin with the line '# @package _global_'")
    config = options.build(Config, values)
    check(config)
    return config


def load_eval(values: Mapping[str, Any]) -> EvalConfig:
    """A checked `EvalConfig` of nested plain values.  Raises `VitError` naming the key; imports no torch."""
    return options.build(EvalConfig, values)


def check(config: Config) -> None:
    """Raise `VitError` on the first contradiction between keys that is known without data or torch."""
    trainer, schedule = config.trainer, config.schedule
    _follow_data(config)
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
    _share_batch(config, processes)
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


def _follow_data(config: Config) -> None:
    model, data = config.model, config.data
    size = model.image_size if isinstance(model.image_size, tuple) else (model.image_size, model.image_size)
    pairs = (
        ("image_size", "image_size", size != data.size),
        ("in_channels", "channels", model.in_channels != data.channels),
    )
    for name, key, differs in pairs:
        if differs:
            own, theirs = options.show(getattr(model, name)), options.show(getattr(data, key))
            raise VitError(
                f"model.{name}={own}: the images come with data.{key}={theirs}, and the model follows them; "
                f"set data.{key}={own} instead"
            )


def _share_batch(config: Config, processes: int) -> None:
    paired = config.augment.mixes and processes > 1  # neighbours in a batch mix, so a process needs both of a pair
    unit, size = processes * (2 if paired else 1), config.data.batch_size
    if size % unit:
        parts = "even parts (mixup and cutmix mix neighbours)" if paired else "equal parts"
        fits = sorted({max(unit, size // unit * unit), (size // unit + 1) * unit})
        raise VitError(
            f"data.batch_size={size} is for all processes together and does not split into {parts} over the "
            f"{processes} of trainer.devices and trainer.num_nodes; try {' or '.join(map(str, fits))}"
        )


def check_model(config: Config, num_classes: int | None = None) -> None:
    """Raise `VitError` where the model, its augmentation or the hardware cannot be.

    The model is built on the meta device, where it takes no memory.  Without `num_classes`, which only the data knows,
    what depends on them is left for later.  Imports torch.
    """
    import torch

    from vit.model import VisionTransformer

    with torch.device("meta"):
        VisionTransformer(**config.model.arguments(num_classes or 2))
    config.augment.check(num_classes or 2)
    trainer = config.trainer
    gpus = torch.cuda.device_count() if trainer.accelerator != "cpu" else 0
    if trainer.accelerator == "gpu" and not gpus:
        raise VitError("trainer.accelerator=gpu: torch finds no GPU here; use trainer=cpu, or trainer=auto")
    if trainer.devices == "auto" and gpus > 1:
        _share_batch(config, gpus * trainer.num_nodes)


def seconds(value: float | str | None, key: str) -> float | None:
    """Seconds of a number or of "[[HH:]MM:]SS"; `key` is named in the `VitError` for anything else."""
    if value is None or isinstance(value, int | float):
        return value
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", value):
        raise VitError(f"{key}: expected seconds or HH:MM:SS, such as 420 or 00:07:00, got {value!r}")
    total = 0.0
    for part in value.split(":"):
        total = total * 60 + float(part)
    if total <= 0:
        raise VitError(f"{key}: expected a time above 0, got {value!r}")
    return total


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
