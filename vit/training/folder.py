"""Make the run folder, describe the run, and print its closing lines."""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import OmegaConf

from vit import shell
from vit.data.assemble import quote_names
from vit.data.dataset import ImageData
from vit.data.run_splits import FILE, write_splits
from vit.errors import VitError, command_name, printable
from vit.files import write_text
from vit.training.config import Config
from vit.training.resume import find_run_folder

log = logging.getLogger("vit")


@dataclass
class RunResult:
    """The result of a run.

    Attributes:
        folder: the run folder.
        metrics: the content of `metrics.json`.
        status: exit status for the command: 0, or 130 after Ctrl-C or SIGTERM.
    """

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    status: int = 0


def make_run_folder(config: Config, resume: Path | None) -> Path:
    """Make `root/name/<date>_<time>`, or return the folder of the resumed run."""
    if resume is not None and (folder := find_run_folder(resume)) is not None:
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


def is_finished(folder: Path) -> bool:
    """Return whether a run has its metrics on the test split."""
    try:
        return "test" in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def describe_training(config: Config, overrides: list[str]) -> dict[str, Any]:
    """Collect the training settings of a run for the description of its model."""
    t, m = config.trainer, config.model
    common: dict[str, Any] = {"overrides": list(overrides), "seed": config.seed}
    if m.name is not None:
        common["pretrained"] = {"name": m.name, "weights": m.weights, "revision": m.revision}
    if config.method == "linear_probe":
        return {**common, "method": config.method, "versions": library_versions()}
    budget = {"max_epochs": t.max_epochs, "max_steps": t.max_steps, "max_time": t.max_time}
    features = {
        "finetune": config.finetune.freeze or config.finetune.unfreeze,
        "lora": config.lora.rank,
        "distill": config.distill.teacher,
    }
    parts = ["augment", "optim", "schedule", "ema", *(name for name, value in features.items() if value)]
    return {
        **common,
        "batch_size": config.data.batch_size,
        "budget": {key: value for key, value in budget.items() if value is not None},
        **{part: asdict(getattr(config, part)) for part in parts},
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that influence the metrics."""
    import vit

    return {
        "vit": vit.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": str(lightning.__version__),
    }


def format_metrics(block: dict[str, Any], classes: int) -> str:
    """Format a block of `metrics.json` in one line, for a model with `classes` classes."""
    parts = []
    for key, label in (("top1", "top-1"), ("top5", "top-5"), ("loss", "loss"), ("ece", "ECE")):
        value = block.get(key)
        if value is not None and (key != "top5" or classes > 5):  # of five classes it is always 100%
            parts.append(f"{label} {value:.1%}" if key.startswith("top") else f"{label} {value:.4f}")
    return "  ".join(parts)


def write_run_description(folder: Path, config: Config, data: ImageData) -> None:
    """Write the configuration of a run before it begins, and its splits if they are not there yet."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.to_dict())))
    if not (folder / FILE).is_file():
        write_splits(folder / FILE, data)
    log.info("run folder: %s", folder)


def list_validation_choices(config: Config, epochs: int, penalty: float | None) -> list[str]:
    """List in words what was chosen on validation data; `penalty` belongs to the linear probe at the start."""
    t = config.trainer
    choices = [f"the best of {-(-epochs // t.validate_every)} checkpoints ({config.monitor})", "the temperature"]
    if penalty is not None:
        choices.append("the penalty of the probe it started from")
    return [*choices, f"when to stop (trainer.patience={t.patience})"] if t.patience is not None else choices


def print_closing_lines(
    config: Config, folder: Path, metrics: dict[str, Any], classes: int, *, commands: bool = True
) -> None:
    """Print the last lines: the metrics and, with `commands`, the next commands."""
    lines = []
    if metrics.get("interrupted"):
        so_far = format_metrics(metrics["val"], classes) or "none yet"
        lines.append(f"stopped early after {metrics['steps']} steps; validation so far: {so_far}")
    else:
        for name in ("val", "test"):
            if metrics.get(name):
                lines.append(f"{name:<5} {format_metrics(metrics[name], classes)}")
        if metrics.get("knn"):
            k = metrics["knn"]["k"]
            lines.append(f"knn   {format_metrics(metrics['knn'], classes)}  ({k} nearest neighbour{'s' * (k != 1)})")
        if never_predicted := metrics["never_predicted"]:
            lines.append(f"never predicted, of {classes} classes: {quote_names(never_predicted)}")
        if chosen := metrics["chosen_on_validation"]:
            lines.append(f"chosen on validation data, which flatters its figures: {', '.join(chosen)}")
    # 0 if all features of a probe came from the cache
    speed = f" at {metrics['images_per_second']:,.0f} images/s" if metrics["images_per_second"] else ""
    lines.append(f"trained in {metrics['train_seconds']:.0f} s{speed}; everything is in {printable(folder)}")
    if metrics.get("interrupted") and commands:
        lines.append(f"go on      {format_resume_command(folder)}")
    if commands:
        lines += [
            f"evaluate   {command_name('eval')} {shell.join_command(shell.format_override('checkpoint', folder))}",
            f"classify   {shell.join_command('vit', 'classify', shell.format_path(folder))} IMAGE...",
            f"look       {shell.join_command('tensorboard', '--logdir', shell.format_path(config.run.root))}",
        ]
    log.info("%s", "\n".join(lines), extra={"file_only": True})
    print("\n" + "\n".join(lines), flush=True)


def format_resume_hint(folder: Path) -> str:
    """Say how to continue a stopped run, as the end of a sentence."""
    best = folder / "checkpoints" / "best.ckpt"
    if (folder / "checkpoints" / "last.ckpt").is_file() or best.is_file():
        return f"go on with {format_resume_command(folder if best.with_name('last.ckpt').is_file() else best)}"
    return "nothing was learned yet: start it again"


def format_resume_command(run: Path) -> str:
    """Return the command that resumes a run folder or a checkpoint."""
    return f"{command_name('train')} {shell.join_command(shell.format_override('resume', run))}"
