"""Run one training from a checked configuration to a run folder, as `python train.py` does.

Notable:

- nothing is written before the data is open and the model is built, so a mistake leaves no folder behind;
- validation chooses the checkpoint and the temperature; the chosen model is tested once on the test split;
- the checkpoints and the bundle contain everything that later commands need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any
from unicodedata import normalize

import lightning.pytorch as L
import torch
from torch import Tensor

from vit.data.catalogue import match_classes, open_data, preprocessing_for
from vit.data.dataset import ImageData
from vit.data.loaders import store_images
from vit.data.memory import Gathered
from vit.data.run_splits import FILE
from vit.data.streaming import workers_watched
from vit.errors import VitError
from vit.evaluation import collect_logits, evaluate_logits, fit_temperature, scalars
from vit.files import CannotWrite, write_json
from vit.inference.bundle import write_bundle
from vit.inference.description import Description
from vit.inference.sample import of_data
from vit.inference.weights import build, load_checkpoint
from vit.model import VisionTransformer
from vit.model.threads import same_threads, use_threads
from vit.training import checkpoints, logs, ranks
from vit.training.attention import AttentionLog
from vit.training.auto import resolve_auto
from vit.training.build import build_model, build_module, tune_config
from vit.training.config import Config
from vit.training.devices import build_trainer
from vit.training.distill import check_teacher
from vit.training.events import EventFile
from vit.training.folder import (
    RunResult,
    describe_training,
    format_resume_hint,
    is_finished,
    library_versions,
    list_validation_choices,
    make_run_folder,
    print_closing_lines,
    write_run_description,
)
from vit.training.interrupt import Interrupt, Stopped
from vit.training.linear_probe import Probe, write_checkpoint
from vit.training.lora import count_parameters
from vit.training.metrics import Throughput, TrainMetrics
from vit.training.module import TrainingModule
from vit.training.monitor import Monitor, write_hyperparameters
from vit.training.optim import HEAD_PREFIXES
from vit.training.pretrained import fetch_weights
from vit.training.progress import Progress
from vit.training.resume import SavedCheckpoint, check_resumable, read_checkpoint
from vit.training.schedule import Schedule
from vit.training.start import Start

log = logging.getLogger("vit")


@dataclass(frozen=True)
class Call:
    """A call of `vit.train`.

    Attributes:
        text: the call, for the log.
        images: the images, if they come from Python.
    """

    text: str
    images: Gathered | None = None


def train(config: Config, overrides: list[str], call: Call | None = None) -> RunResult | None:
    """Train as `config` says and return the result; None in the other processes of a distributed run.

    Raises:
        VitError: a mistake of the user, reported before training starts if possible.
    """
    command = call.text if call else None
    with (
        logs.show_messages(command) as buffered,
        ranks.join_run(config.trainer) as rank,
        same_threads(),
        workers_watched(),
    ):
        if rank:
            log.setLevel(logging.ERROR)  # only the first process logs
        return _train(config, overrides, rank == 0, buffered, call)


def _train(
    config: Config, overrides: list[str], is_leader: bool, buffered: MemoryHandler, call: Call | None
) -> RunResult | None:
    saved = read_checkpoint(config.resume) if config.resume else None
    # before the data is scanned, which may take a while
    if config.model.name is not None and saved is None:
        fetch_weights(config)
    if config.distill.teacher is not None:
        check_teacher(config.distill.teacher)
    given = call.images if call else None
    if saved is None:
        data = open_data(config.data, given=given)
        preprocessing = preprocessing_for(config.data, data)
    else:
        config, data = _reopen_data(config, overrides, saved, given)
        preprocessing = saved.description.preprocessing
    config = resolve_auto(config, data, overrides)
    config.augment.check(len(data.class_names))
    if not len(data.splits["val"]):
        log.warning("there is no validation data: the last checkpoint counts as the best, temperature stays 1")
    L.seed_everything(config.seed, workers=False, verbose=False)
    model = build_model(config, data)
    start = Start()
    if config.finetune.head == "probe" and saved is None and is_leader:
        start.fit_head(config, model, data, preprocessing)
    if config.tune and saved is None:
        config = tune_config(config, data, model, preprocessing)
    threads = use_threads(model.architecture, config.data.batch_size, config.trainer.threads)
    log.info("torch computes with %s (trainer.threads)", "one thread" if threads == 1 else f"{threads} threads")
    description = Description(
        architecture=model.architecture,
        class_names=data.class_names,
        preprocessing=preprocessing,
        data=data.source,
        training=describe_training(config, overrides),
    )
    if config.method == "linear_probe":
        return _fit_probe(config, data, model, description, buffered, call) if is_leader else None
    store_images(data.splits, preprocessing, config.data, config.augment)
    module = build_module(config, data, model, description)
    if saved is not None:
        optimizer, t = module.configure_optimizers(), config.trainer
        check_resumable(saved, module.state_dict(), optimizer, data.class_names, t.epochs, t.patience)

    resume = None if saved is None else saved.path
    saved = None  # frees the weights and the optimiser state
    folder = make_run_folder(config, resume) if is_leader else Path(os.environ.get(ranks.FOLDER_VARIABLE, "."))
    last = folder / "checkpoints" / "last.ckpt"
    interrupt = Interrupt(last, validates=len(data.splits["val"]) > 0, is_leader=is_leader)
    if not is_leader:
        with interrupt, ranks.log_errors_to(folder / "train.log"):
            return _fit_and_finish(config, data, module, start, folder, resume, interrupt, call)
    os.environ[ranks.FOLDER_VARIABLE] = str(folder)
    with logs.write_messages(folder / "train.log", buffered), interrupt:
        try:
            write_run_description(folder, config, data)
            return _fit_and_finish(config, data, module, start, folder, resume, interrupt, call)
        except CannotWrite as error:
            raise CannotWrite(f"{error}; once that is possible, {format_resume_hint(folder)}") from error
        except KeyboardInterrupt:
            log.warning("stopped at once: %s", format_resume_hint(folder))
            raise


def _reopen_data(
    config: Config, overrides: list[str], saved: SavedCheckpoint, given: Gathered | None
) -> tuple[Config, ImageData]:
    """Open the data of the resumed run with its splits, in the same folder unless `data.root` is overridden."""
    source = saved.description.data
    if (
        not any(text.lstrip("+").startswith("data.root=") for text in overrides)
        and source.get("name") == config.data.name
    ):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=source.get("root")))
    if saved.splits is None:
        log.warning("resume=%s: no %s beside it: its splits are cut anew", config.resume, FILE)
        data = open_data(config.data, given=given)
        names = saved.description.class_names
        # older runs did not normalise class names, so these may be spelled and sorted differently
        same = sorted(normalize("NFC", name) for name in names) == sorted(data.class_names)
        return config, match_classes(data, names) if same else data
    return config, open_data(config.data, saved.description.class_names, saved.splits, given)


def _fit_probe(
    config: Config,
    data: ImageData,
    model: VisionTransformer,
    description: Description,
    buffered: MemoryHandler,
    call: Call | None,
) -> RunResult:
    """Fit a linear head to the features of `model`, and write the files of a run."""
    folder = make_run_folder(config, None)
    with logs.write_messages(folder / "train.log", buffered):
        write_run_description(folder, config, data)
        events = EventFile(folder) if config.logging.tensorboard else None
        began = time.monotonic()
        probe = Probe(config, model, data, description.preprocessing)
        penalty = probe.fit_head(events)
        seconds = time.monotonic() - began
        knn_metrics = probe.knn_metrics(events)
        for name in ("best", "last"):
            write_checkpoint(folder / "checkpoints" / f"{name}.ckpt", model, description)
        best, validates = folder / "checkpoints" / "best.ckpt", len(data.splits["val"]) > 0
        metrics = {
            **evaluate_and_export(config, data, best, folder / "model", probe.device, probe.logits),
            "knn": knn_metrics,
            "penalty": penalty,
            "chosen_on_validation": ["the penalty", "the number of neighbours", "the temperature"] * validates,
            "train_seconds": round(seconds, 3),
            "images_per_second": round(probe.images_per_second, 1),
            "parameters": count_parameters(model),
            "trained_parameters": sum(
                p.numel() for name, p in model.named_parameters() if name.startswith(HEAD_PREFIXES)
            ),
            "bad_files": len(data.bad_files),
            "passed_over": data.passed_over,
            "seed": config.seed,
            "versions": library_versions(),
        }
        write_json(folder / "metrics.json", metrics)
        if events is not None:
            write_hyperparameters(events, config, metrics, 0)
            events.close()
        print_closing_lines(config, folder, metrics, len(data.class_names), commands=call is None)
    return RunResult(folder, metrics)


def _fit_and_finish(
    config: Config,
    data: ImageData,
    module: TrainingModule,
    start: Start,
    folder: Path,
    resume: Path | None,
    interrupt: Interrupt,
    call: Call | None,
) -> RunResult | None:
    t, throughput = config.trainer, Throughput()
    train_metrics = TrainMetrics(config.logging.every, throughput)
    schedule = Schedule(
        schedule={key: value for key, value in asdict(config.schedule).items()},
        max_epochs=t.epochs,
        max_steps=t.max_steps,
        max_time=t.max_seconds,
        spent=start.seconds,
    )
    monitor = config.monitor if len(data.splits["val"]) else None
    callbacks: list[L.Callback] = [schedule, throughput, train_metrics]
    if config.logging.progress:
        callbacks.append(Progress(schedule, train_metrics))
    monitor_callback = None
    if config.logging.tensorboard:
        monitor_callback = Monitor(config, folder, data.class_names, train_metrics)
        preprocessing = module.description.preprocessing
        callbacks += [
            monitor_callback,
            AttentionLog(config.logging.attention, data, preprocessing, monitor_callback.events),
        ]
    if config.finetune.head == "probe":
        callbacks.append(start)
    callbacks += [interrupt, checkpoints.Checkpoints(folder / "checkpoints", monitor, t.patience)]
    trainer = build_trainer(config, folder, callbacks)
    with ranks.watch_processes(trainer, functools.partial(format_resume_hint, folder)):
        try:
            trainer.fit(module, ckpt_path=resume, weights_only=True)
        except Stopped:
            log.info("stopped at step %d by %s", trainer.global_step, signal.Signals(interrupt.signal or 0).name)
        except SystemExit:  # raised by Lightning when it is interrupted
            raise KeyboardInterrupt from None
    if not trainer.is_global_zero:
        return None

    if resume and throughput.images == throughput.resumed_images and interrupt.signal is None and is_finished(folder):
        raise VitError(f"resume={config.resume}: that run was at its end; raise trainer.max_epochs or another limit")
    saved = [path for name in ("best", "last") if (path := folder / "checkpoints" / f"{name}.ckpt").is_file()]
    if not saved:
        raise VitError("training ended before a checkpoint was written: nothing to evaluate")
    metrics: dict[str, Any] = {
        "train_seconds": round(schedule.spent(), 3),
        "images_per_second": round(throughput.images_per_second, 1),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "chosen_on_validation": list_validation_choices(config, trainer.current_epoch, start.penalty)
        if monitor
        else [],
        "parameters": count_parameters(module.model),
        "trained_parameters": module.num_trainable,
        **start.metrics(),
        "bad_files": len(data.bad_files),
        "passed_over": data.passed_over,
        "seed": config.seed,
        "versions": library_versions(),
    }
    figures: dict[str, Any] | None = None
    with contextlib.suppress(KeyboardInterrupt), interrupt.raise_on_signal():
        figures = evaluate_and_export(config, data, saved[0], folder / "model", trainer.strategy.root_device)
    if figures is None:
        description = load_checkpoint(saved[0])[1]
        figures = {"interrupted": True, "val": description.metrics.get("val", {})}
    metrics = {**figures, **metrics}
    write_json(folder / "metrics.json", metrics)
    if monitor_callback is not None:
        monitor_callback.finish(metrics)
    print_closing_lines(config, folder, metrics, len(data.class_names), commands=call is None)
    return RunResult(folder, metrics, 130 if metrics.get("interrupted") else 0)


def evaluate_and_export(
    config: Config,
    data: ImageData,
    checkpoint: Path,
    bundle: Path,
    device: torch.device,
    compute_logits: Callable[[str], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Any]:
    """Calibrate the chosen checkpoint on validation data, test it once, and write the bundle.

    The temperature and the metrics are also written into the checkpoint's description.

    Args:
        compute_logits: returns the logits and the labels of a split; None: the model computes them.

    Returns:
        The "test" and "val" blocks of `metrics.json`, and the classes with images that were never predicted in the last
        evaluated split.
    """
    weights, description = load_checkpoint(checkpoint)
    model = build(description, weights, checkpoint).to(device)
    blocks: dict[str, dict[str, Any]] = {}
    never_predicted: list[str] = []
    for name in ("val", "test"):
        split = data.splits[name]
        if not len(split):
            continue
        if compute_logits is not None:
            logits, labels = compute_logits(name)
        else:
            logits, labels = collect_logits(model, split, description.preprocessing, config.data, device=device)
        if name == "val":
            description.temperature = fit_temperature(logits, labels)
        metrics = evaluate_logits(logits, labels, data.class_names, description.temperature)
        never_predicted = [row["class"] for row in metrics["per_class"] if row["support"] and not row["predicted"]]
        blocks[name] = scalars(metrics)
    raw = description.metrics.get("val_raw")
    if raw:
        blocks["val"]["raw"] = raw
    description.metrics = blocks
    images = of_data(data, description.preprocessing).images
    write_bundle(bundle, model.cpu(), description, onnx=config.export.onnx, images=images)
    checkpoints.update_description(checkpoint, description)
    return {"test": blocks.get("test", {}), **blocks, "never_predicted": never_predicted}
