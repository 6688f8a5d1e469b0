"""What a run leaves behind beside its model: the folder, the recipe, the last lines."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch

from vit.errors import VitError, command_name
from vit.training.config import Config
from vit.training.resume import folder_of

log = logging.getLogger("vit")


def rank() -> int:
    """Of this process among those of a distributed run, 0 where there is only one."""
    for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(key, "").isdigit():
            return int(os.environ[key])
    return 0


def run_folder(config: Config, resume: Path | None) -> Path:
    """Make `root/name/<date>_<time>`, or go on in the folder of the run that is resumed."""
    if resume is not None and (folder := folder_of(resume)) is not None:
        return folder
    parent = Path(config.run.root) / config.run.name
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = parent / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise VitError(f"run.root={config.run.root}: cannot make {folder}: {error.strerror}") from error
    raise VitError(f"run.root={config.run.root}: a thousand runs began this second under {parent}")


def finished(folder: Path) -> bool:
    """Whether a run got as far as its figures on the test split."""
    try:
        return "test" in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def recipe(config: Config, overrides: list[str]) -> dict[str, Any]:
    """How a run trains, for the description of its model."""
    t, m = config.trainer, config.model
    kept: dict[str, Any] = {"overrides": list(overrides), "seed": config.seed}
    if m.name is not None:
        kept["pretrained"] = {"name": m.name, "weights": m.weights, "revision": m.revision}
    if config.method == "linear_probe":
        return {**kept, "method": config.method, "versions": versions()}
    budget = {"max_epochs": t.max_epochs, "max_steps": t.max_steps, "max_time": t.max_time}
    used = {
        "finetune": config.finetune.freeze or config.finetune.unfreeze,
        "lora": config.lora.rank,
        "distill": config.distill.teacher,
    }
    parts = ["augment", "optim", "schedule", "ema", *(name for name, value in used.items() if value)]
    return {
        **kept,
        "batch_size": config.data.batch_size,
        "budget": {key: value for key, value in budget.items() if value is not None},
        **{part: asdict(getattr(config, part)) for part in parts},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what a run's figures may depend on."""
    import vit

    return {
        "vit": vit.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": str(lightning.__version__),
    }


def figures(block: dict[str, Any], classes: int) -> str:
    """A block of `metrics.json` in one line, of a model with that many classes."""
    parts = []
    for key, label in (("top1", "top-1"), ("top5", "top-5"), ("loss", "loss"), ("ece", "ECE")):
        value = block.get(key)
        if value is not None and (key != "top5" or classes > 5):  # of five classes it is 100% whatever happens
            parts.append(f"{label} {value:.1%}" if key.startswith("top") else f"{label} {value:.4f}")
    return "  ".join(parts)


def closing_lines(
    config: Config, folder: Path, metrics: dict[str, Any], classes: int, *, commands: bool = True
) -> None:
    """Print the last lines: the figures and, with `commands`, what to type next."""
    lines = []
    if metrics.get("interrupted"):
        lines.append(
            f"stopped early after {metrics['steps']} steps; validation so far: {figures(metrics['val'], classes)}"
        )
    else:
        for name in ("val", "test"):
            if metrics.get(name):
                lines.append(f"{name:<5} {figures(metrics[name], classes)}")
        if metrics.get("knn"):
            k = metrics["knn"]["k"]
            lines.append(f"knn   {figures(metrics['knn'], classes)}  ({k} nearest neighbour{'s' * (k != 1)})")
    # none where a probe found all features kept
    pace = f" at {metrics['images_per_second']:,.0f} images/s" if metrics["images_per_second"] else ""
    lines.append(f"trained in {metrics['train_seconds']:.0f} s{pace}; everything is in {folder}")
    if metrics.get("interrupted") and commands:
        lines.append(f"go on      {command_name('train')} resume={folder}")
    if commands:
        lines += [
            f"evaluate   {command_name('eval')} checkpoint={folder}",
            f"classify   vit classify {folder} IMAGE...",
            f"look       tensorboard --logdir {config.run.root}",
        ]
    log.info("%s", "\n".join(lines), extra={"file_only": True})
    print("\n" + "\n".join(lines), flush=True)
