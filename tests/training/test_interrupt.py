"""SIGINT and SIGTERM at chosen moments of a run: a checkpoint of that moment, figures so far, and bit for bit the same
weights from the run that goes on."""

import json
import os
import random
import signal

import pytest
import torch

from vit.training.interrupt import Interrupt
from vit.training.module import TrainingModule

TINY = ["model.width=16", "model.depth=1", "model.heads=1", "data.max_images=200", "data.eval_batch_size=64"]
TINY += ["trainer.max_epochs=3", "ema.decay=0.9"]  # 3 steps of 64 images an epoch, 3 batches of validation


def tensors(folder, name="last"):
    saved = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return saved["global_step"], saved["state_dict"]


def same(one, other, name="last"):
    (steps, a), (others, b) = tensors(one, name), tensors(other, name)
    return steps == others and all(torch.equal(a[key], b[key]) for key in a)


def send(monkeypatch, owner, hook, number, when):
    """Send this process a signal before `owner.hook` where `when(trainer, arguments)` is true, once."""
    original, sent = getattr(owner, hook), []

    def sending(self, *arguments):
        trainer = arguments[0] if owner is Interrupt else self.trainer
        if not sent and when(trainer, arguments):
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(owner, hook, sending)


MOMENTS = {
    "the first batch": (TrainingModule, "training_step", lambda t, a: t.global_step == 0, [], 1),
    "the middle of an epoch": (TrainingModule, "training_step", lambda t, a: t.global_step == 4, [], 5),
    "the last batch of an epoch": (TrainingModule, "training_step", lambda t, a: t.global_step == 5, [], 6),
    "the start of validation": (Interrupt, "on_validation_start", lambda t, a: t.global_step == 6, [], 6),
    "the middle of validation": (TrainingModule, "validation_step", lambda t, a: t.global_step == 6 and a[1], [], 6),
    "the last validation": (TrainingModule, "validation_step", lambda t, a: t.global_step == 9, [], 9),
    "half a step": (
        TrainingModule,
        "training_step",
        lambda t, a: t.current_epoch == 1 and a[1] == 0,
        ["optim.accumulate=2"],
        3,
    ),
    "an epoch without validation": (
        TrainingModule,
        "training_step",
        lambda t, a: t.global_step == 2,
        ["trainer.validate_every=3"],
        4,
    ),
    "one batch an epoch": (
        TrainingModule,
        "training_step",
        lambda t, a: t.global_step == 1,
        ["trainer.limit_train_batches=1", "trainer.limit_val_batches=1"],
        2,
    ),
    "a budget that ends in an epoch": (
        TrainingModule,
        "validation_step",
        lambda t, a: t.global_step == 4,
        ["trainer.max_steps=4"],
        4,
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_stopped_at_any_moment_goes_on_to_the_same_weights(run, monkeypatch, capsys, moment):
    owner, hook, when, options, steps = MOMENTS[moment]
    whole = run(*TINY, *options)
    send(monkeypatch, owner, hook, signal.SIGTERM, when)
    part = run(*TINY, *options)
    monkeypatch.undo()
    assert (part.status, part.metrics["steps"]) == (130, steps)
    assert tensors(part.folder)[0] == steps
    assert "test" not in part.metrics
    assert json.loads((part.folder / "metrics.json").read_text())["interrupted"] is True
    assert f"resume={part.folder}\n" in capsys.readouterr().out
    rest = run(*TINY, *options, f"resume={part.folder}")
    assert rest.status == 0
    assert same(whole.folder, rest.folder)
    assert same(whole.folder, rest.folder, "best")
    assert (rest.metrics["test"], rest.metrics["val"]) == (whole.metrics["test"], whole.metrics["val"])
    assert not list(part.folder.rglob("*.part"))


SMALL = ["trainer=cpu", "trainer.threads=1", "data.batch_size=64", "export.onnx=false", "logging=none", *TINY]


def survive(forked, root, moments):
    """Interrupt a run at each of these moments, (signal, fraction of an unbroken run's seconds), and go on."""
    whole = forked(*SMALL, f"run.root={root}", "run.name=whole")
    assert whole["status"] == 0, whole["err"]
    (unbroken,) = (root / "whole").iterdir()
    for trial, (number, fraction) in enumerate(moments):
        name = f"trial{trial}"
        part = forked(*SMALL, f"run.root={root}", f"run.name={name}", number=number, after=fraction * whole["seconds"])
        said = f"{number!r} after {fraction:.3f}: {part['err']}"
        assert "Traceback" not in part["err"], said
        assert part["status"] in (0, -number if number == signal.SIGKILL else 130), said
        folders = list((root / name).iterdir()) if (root / name).is_dir() else []
        if number != signal.SIGKILL:
            assert not list((root / name).rglob("*.part")), said  # SIGKILL may leave one in its own run
        if part["status"] == 0 or not folders or not (folders[0] / "checkpoints" / "last.ckpt").is_file():
            continue  # over before the signal came, or stopped before anything was learned
        assert number == signal.SIGKILL or "resume=" in part["out"] + part["err"], said
        rest = forked(*SMALL, f"resume={folders[0]}")
        assert rest["status"] == 0, said + rest["err"]
        assert same(unbroken, folders[0]), said
        assert same(unbroken, folders[0], "best"), said


def test_a_run_survives_signals_from_outside(forked, tmp_path):
    survive(forked, tmp_path, [(signal.SIGTERM, 0.4), (signal.SIGKILL, 0.5), (signal.SIGINT, 0.6)])


@pytest.mark.slow
def test_a_run_survives_fifty_interruptions(forked, tmp_path):
    draw = random.Random(0)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    survive(forked, tmp_path, [(draw.choice(numbers), draw.random()) for _ in range(50)])
