"""Declare the sections of a training run's configuration: the help text and the allowed values of each key.

`vit.training.config.Config` contains them; their defaults are in `conf/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vit.errors import VitError
from vit.options import setting

SOURCE_KEYS = ("name", "weights", "revision", "head", "compile")
"""Keys of `model` that are not arguments of the architecture."""

SIZES = ("nano", "tiny", "small", "base", "large", "huge")


@dataclass(frozen=True)
class ModelConfig:
    """The Vision Transformer: every keyword of `vit.model.VisionTransformer` but the number of classes."""

    name: str | None = setting(
        "model=pretrained: whose weights: a name of timm's, perhaps with a tag, hf-hub:, local-dir:, a run, a bundle",
        path=True,
    )
    weights: str | None = setting(
        "model=pretrained: a file of weights for it; null: those that go with the name", path=True
    )
    revision: str | None = setting("model=pretrained: of a name on the hub; null: the newest")
    head: str = setting(
        "model=pretrained: keep its head (its classes have to be the data's) or replace it; auto: keep it if it fits",
        choices=("auto", "keep", "replace"),
    )
    size: str | None = setting("sets width, depth and heads together; null: these say", choices=SIZES)
    width: int | None = setting("numbers a token has; null: the size's", ge=1)
    depth: int | None = setting("blocks; null: the size's", ge=1)
    heads: int | None = setting("attention heads, a divisor of the width; null: the size's", ge=1)
    image_size: int | tuple[int, int] = setting("pixels, or [height, width]; follows data.image_size", ge=1)
    patch_size: int | tuple[int, int] = setting("pixels, or [height, width]; follows data.patch_size", ge=1)
    in_channels: int = setting("of the images; follows data.channels", ge=1)
    mlp: str = setting(
        "the block's MLP: plain, or gated (packed: both halves in one matrix)",
        choices=("plain", "swiglu", "swiglu_packed"),
    )
    mlp_ratio: float = setting("width of the MLP's hidden layer, in widths", gt=0)
    activation: str = setting("of a plain MLP", choices=("gelu", "gelu_tanh", "quick_gelu"))
    attention: str = setting(
        "scaled_dot_product has one head, dot_product no parameters, differential two maps in each head",
        choices=("multi_head", "scaled_dot_product", "dot_product", "differential"),
    )
    norm: str = setting("norm before each branch, or after each sum (Vaswani et al.)", choices=("pre", "post"))
    norm_layer: str = setting("LayerNorm, or RMSNorm without mean and offset", choices=("layer", "rms"))
    norm_eps: float = setting("added under the root of every norm", gt=0)
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
    pool_prefix: bool = setting("mean and attention pooling read the tokens in front of the patches, too")
    class_token: bool | None = setting("whether there is one; null: only where pool reads it")
    distillation_token: bool = setting("a second class token with a head of its own, for a teacher's answers")
    registers: int = setting("extra learned tokens that no head reads", ge=0)
    layer_scale: float | None = setting("start of each branch's learned scale; null: none")
    qk_norm: bool | None = setting("normalise queries and keys; null: where there are any")
    qkv_bias: bool = setting("biases in the maps to queries, keys and values")
    proj_bias: bool = setting("biases in the map out of attention and in the MLP")
    patch_bias: bool = setting("bias in the map from pixels to tokens")
    crop_to_patches: bool = setting("leave out pixels at the right and bottom that fill no patch")
    dropout: float = setting("share of activations dropped", ge=0, lt=1)
    attention_dropout: float = setting("share of attention weights dropped", ge=0, lt=1)
    drop_path: float = setting("stochastic depth: share of branches skipped in the last block", ge=0, lt=1)
    patch_dropout: float = setting("share of patches left out in training", ge=0, lt=1)
    reduction: str = setting(
        "fewer tokens from layer to layer: keep the patches that the head attends to, or merge those that are alike",
        choices=("none", "keep", "merge"),
    )
    reduction_rate: float = setting("share of the patches that are gone in the end", ge=0, lt=1)
    reduction_schedule: str | tuple[int, ...] | None = setting(
        "where they go, or how many in each layer; null: what suits the method",
        choices=("constant", "decreasing", "stages"),
        ge=0,
    )
    reduction_proportional: bool | None = setting(
        "attend to a token by the number of patches it stands for; null: where they merge"
    )
    init: str = setting("how weights start", choices=("trunc_normal", "xavier", "mimetic"))
    compile: bool = setting("torch.compile: slow to start, faster after")

    def arguments(self, num_classes: int) -> dict[str, Any]:
        """Return the keyword arguments of `VisionTransformer`."""
        keywords = {key: value for key, value in vars(self).items() if key not in SOURCE_KEYS}
        if self.size is None:
            del keywords["size"]
        return keywords | {"num_classes": num_classes}


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser."""

    name: str = setting("muon steps block matrices, AdamW the rest", choices=("muon", "adamw", "sgd"))
    lr: float = setting("peak learning rate (muon: of what is no block matrix)", gt=0)
    matrix_lr: float = setting("muon: peak learning rate of the block matrices", gt=0)
    weight_decay: float = setting("decay of matrices, times the learning rate a step", ge=0)
    momentum: float = setting("of muon and sgd", ge=0, lt=1)
    betas: tuple[float, float] = setting("of AdamW, also beside muon", ge=0, lt=1)
    layer_decay: float = setting("learning rate of each layer relative to the one above it", gt=0, le=1)
    head_lr: float = setting("learning rate of the head, in those of the layer under it", gt=0)
    clip: float | None = setting("largest norm of the gradient; null: off", gt=0)
    accumulate: int = setting("batches to a step", ge=1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate schedule, as a fraction of the peak."""

    name: str = setting("the shape", choices=("cosine", "linear", "wsd", "constant"))
    warmup: float = setting("share of training in which it rises", ge=0, le=1)
    cooldown: float = setting("wsd: share of training in which it falls", ge=0, le=1)
    final: float = setting("share of the peak at the end", ge=0, le=1)


@dataclass(frozen=True)
class TrainerConfig:
    """The length of training, the hardware and the precision."""

    name: str = setting("of the file in conf/trainer")
    accelerator: str = setting("the hardware", choices=("auto", "cpu", "gpu", "mps"))
    devices: int | str = setting("on each machine; auto: every GPU, or one CPU process", choices=("auto",), ge=1)
    num_nodes: int = setting("machines", ge=1)
    strategy: str = setting("how several devices share the work", choices=("auto", "ddp", "fsdp"))
    precision: str = setting("auto: bf16 on GPUs that have it, else 32", choices=("auto", "32", "bf16", "16"))
    max_epochs: int | str | None = setting(
        "passes over the training images; auto: by their number, to fine-tune; null: no limit",
        choices=("auto",),
        ge=1,
    )
    max_steps: int | None = setting("steps of the optimiser; null: no limit", ge=1)
    max_time: float | str | None = setting("seconds or HH:MM:SS; the schedule ends where the time ends", gt=0)
    validate_every: int = setting("epochs between validations", ge=1)
    deterministic: bool = setting("refuse operations that differ from run to run")
    threads: int | None = setting(
        "of torch on the CPU; null: OMP_NUM_THREADS, or as many as the model gains from", ge=1
    )
    limit_train_batches: int | float | None = setting("batches an epoch, or a share below 1; null: all", gt=0)
    limit_val_batches: int | float | None = setting("batches a validation, or a share below 1; null: all", gt=0)
    patience: int | None = setting("stop after this many validations without a better one; null: never", ge=1)
    patch_dropout_off: float = setting("last share of training that sees all patches", ge=0, le=1)

    @property
    def epochs(self) -> int | None:
        """`max_epochs` as a number; `vit.training.auto` has resolved "auto" before."""
        assert not isinstance(self.max_epochs, str)
        return self.max_epochs

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return parse_seconds(self.max_time, "trainer.max_time")


@dataclass(frozen=True)
class ProbeConfig:
    """The linear probe: a head on features of a frozen model, and their nearest neighbours."""

    cache: str | None = setting("folder where features are kept; null: .cache under run.root", path=True)
    temperature: float = setting("of the neighbours' votes, exp(similarity / temperature)", gt=0)


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights."""

    decay: float | None = setting("of the average, such as 0.999; null: off", gt=0, lt=1)


@dataclass(frozen=True)
class LoggingConfig:
    """What is displayed and logged during training."""

    tensorboard: bool = setting("write TensorBoard event files")
    every: int = setting("steps between scalars", ge=1)
    images: int = setting("images in a grid; 0: none", ge=0)
    attention: int = setting("images whose attention is shown as it forms; 0: none", ge=0)
    progress: bool = setting("a progress bar in the terminal")


@dataclass(frozen=True)
class ExportConfig:
    """The files written at the end of training."""

    onnx: bool = setting("model.onnx in the bundle: classification without torch")


@dataclass(frozen=True)
class RunConfig:
    """The run folder: `<root>/<name>/<date>_<time>/`."""

    root: str = setting("folder of all runs", path=True)
    name: str = setting("of the folder under root; follows data.name")


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning: the start of the new head, and which layers are trained from when."""

    head: str = setting(
        "how a new head starts: at zero, or as the linear probe fitted to the model's features (LP-FT, Kumar et al. "
        "2022); then the run never ends below that probe on validation images",
        choices=("zero", "probe"),
    )
    freeze: int | str = setting(
        "lowest blocks that never learn, nor the embedding under them; all: only the head learns; 0: everything learns",
        choices=("all",),
        ge=0,
    )
    unfreeze: float = setting(
        "the others come free one by one from the top over this share of training; 0: at once", ge=0, le=1
    )


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: low-rank updates of a pretrained model's matrices (Hu et al. 2022); needs peft."""

    rank: int | None = setting("of the changes, such as 8; null: the matrices themselves learn", ge=1)
    alpha: float | None = setting("changes are scaled by alpha / rank; null: twice the rank", gt=0)
    dropout: float = setting("share of a change's inputs dropped", ge=0, lt=1)
    targets: tuple[str, ...] = setting(
        "matrices of every block that get one: of qkv, proj (attention), fc1, fc2 (MLP)",
        choices=("qkv", "proj", "fc1", "fc2"),
    )

    @property
    def scale(self) -> float:
        """The factor of an update B A."""
        return 2.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


@dataclass(frozen=True)
class DistillConfig:
    """Distillation: learn from a trained model, beside the labels."""

    teacher: str | None = setting("any MODEL that knows the data's classes; null: no teacher", path=True)
    kind: str = setting(
        "its probabilities (Hinton et al. 2015), or the class it finds likeliest (Touvron et al. 2021)",
        choices=("soft", "hard"),
    )
    alpha: float = setting("its share of the loss; the labels have the rest", ge=0, le=1)
    temperature: float = setting("softens its probabilities and the student's, for soft", gt=0)


def parse_seconds(value: float | str | None, key: str) -> float | None:
    """Convert a number or "[[HH:]MM:]SS" to seconds; the `VitError` for other values names `key`."""
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
