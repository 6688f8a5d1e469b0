"""A real training of seconds: synthetic images, a tiny model, and what `vit.training.run` hangs on the trainer.

Loaded by tests by its place, and run as a program for tests that need a process or a terminal of their own:
`python small_fit.py FOLDER [key=value of `fit`...]`.
"""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import DDPStrategy

from vit.data.catalogue import preprocessing_for
from vit.data.dataset import ArrayImages, ImageData, Split
from vit.inference.description import Description
from vit.training.app import resolve_config
from vit.training.build import build_model, build_module
from vit.training.config import Config, load_config
from vit.training.metrics import Throughput, TrainMetrics
from vit.training.module import TrainingModule
from vit.training.monitor import Monitor
from vit.training.progress import Progress
from vit.training.schedule import Schedule

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = ["dark", "grey/ish", "br\night"]


@dataclass
class Fit:
    """One training, and all that took part in it."""

    config: Config
    data: ImageData
    module: TrainingModule
    trainer: L.Trainer
    monitor: Monitor | None
    progress: Progress | None
    train_metrics: TrainMetrics
    checkpoint: Path | None = None

    def run(self) -> Fit:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer.fit(self.module, ckpt_path=self.checkpoint, weights_only=True)
        return self


def images(n: int, classes: int, channels: int, size: int, seed: int) -> Split:
    """Noise whose brightness tells the class: hard enough for mistakes, easy enough to be learned at once."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    level = 40 + 60 * labels[:, None, None, None]
    pixels = np.clip(level + rng.normal(0, 60, (n, size, size, channels)), 0, 255).astype(np.uint8)
    return Split(labels=labels, images=ArrayImages(pixels, "synthetic"), channels=channels, native_size=(size, size))


def prepare(
    folder: str | Path,
    *overrides: str,
    epochs: int | None = 2,
    max_steps: int | None = None,
    train: int = 64,
    val: int = 32,
    classes: int = 3,
    channels: int = 3,
    size: int = 8,
    board: bool = True,
    bar: bool = False,
    extra: list[L.Callback] | None = None,
    checkpoint: Path | None = None,
    devices: int = 1,
) -> Fit:
    """Everything but the call of `trainer.fit`."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fixed = [f"data.channels={channels}", f"data.image_size={size}", "data.patch_size=4", "data.batch_size=8"]
    fixed += ["trainer.accelerator=cpu", f"trainer.devices={devices}"]
    fixed += ["augment=none", "model.width=16", "model.depth=1", "model.heads=2", "optim=adamw", "logging.every=4"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_config(resolve_config(compose("train", overrides=[*fixed, *overrides])))
    names = (NAMES + [f"class {k}" for k in range(3, classes)])[:classes]
    splits = {"train": images(train, classes, channels, size, 0), "val": images(val, classes, channels, size, 1)}
    splits["test"] = images(0, classes, channels, size, 2)
    data = ImageData("synthetic", names, splits, channels=channels)
    preprocessing = preprocessing_for(config.data, data)
    model = build_model(config, data)
    description = Description(architecture=model.architecture, class_names=names, preprocessing=preprocessing)
    module = build_module(config, data, model, description)
    throughput = Throughput()
    schedule = Schedule(schedule=asdict(config.schedule), max_epochs=epochs, max_steps=max_steps, max_time=None)
    train_metrics = TrainMetrics(config.logging.every, throughput)
    progress = Progress(schedule, train_metrics) if bar else None
    monitor = Monitor(config, Path(folder), data.class_names, train_metrics) if board else None
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        max_epochs=epochs or -1,
        max_steps=max_steps or -1,
        gradient_clip_val=config.optim.clip,
        accumulate_grad_batches=config.optim.accumulate,
        check_val_every_n_epoch=config.trainer.validate_every,
        callbacks=[
            c for c in (schedule, throughput, train_metrics, progress, monitor, *(extra or [])) if c is not None
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, L.callbacks.ModelCheckpoint) for c in extra or []),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    return Fit(config, data, module, trainer, monitor, progress, train_metrics, checkpoint)


def fit(folder: str | Path, *overrides: str, **options: Any) -> Fit:
    """Train."""
    return prepare(folder, *overrides, **options).run()


class Talk(L.Callback):
    """Log a message and warn in the middle of training, as any library might."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            logging.getLogger("vit").warning("a message from the middle")
            print("printed from the middle", file=sys.stderr)


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("vit")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    options = dict(argument.split("=", 1) for argument in sys.argv[2:])
    fit(sys.argv[1], **{key: ast.literal_eval(value) for key, value in options.items()}, extra=[Talk()])
