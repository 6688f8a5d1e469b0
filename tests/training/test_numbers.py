"""What a step does to the weights, against the same written out in float64: accumulated gradients, moving averages."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional as F

PLAIN = ("optim=sgd", "optim.clip=null", "optim.momentum=0", "optim.weight_decay=0", "schedule=constant")
PLAIN += ("schedule.warmup=0",)


class Steps(L.Callback):
    """Keeps the batches of every step, and the weights and their average as it leaves them."""

    def __init__(self, stop_after=None):
        self.groups, self.weights, self.average, self.stop_after = [], [], [], stop_after

    def on_train_start(self, trainer, module):
        self.start, self.step, self.open = copy.deepcopy(module.model).double(), trainer.global_step, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        images, labels = module.augment(batch.images, batch.labels, batch.index, trainer.current_epoch, 0.0)
        self.open.append((images.double(), labels))
        if trainer.global_step != self.step:
            self.groups.append(self.open)
            self.weights.append(flat(module.model))
            self.average.append(None if module.ema is None else flat(module.ema))
            self.step, self.open = trainer.global_step, []
        if batch_idx + 1 == self.stop_after:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            raise KeyboardInterrupt


def flat(model):
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def stepped(model, group, lr):
    """`model` in float64 after a plain step along the mean over all images of the batches in `group`."""
    images, labels = (torch.cat(parts) for parts in zip(*group, strict=True))
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= lr * gradient
    return flat(model)


@pytest.mark.parametrize(
    ("accumulate", "train", "limit", "resumed_at", "sizes"),
    [
        (4, 8, None, None, [1]),
        (4, 72, None, None, [4, 4, 1]),
        (3, 64, None, None, [3, 3, 2]),
        (2, 64, None, None, [2, 2, 2, 2]),
        (4, 64, 6, None, [4, 2]),
        (4, 72, None, 6, [2, 1]),  # the gradients of two batches before are gone
        (4, 48, None, 5, [1]),
        (5, 64, 7, 6, [1]),
    ],
)
def test_a_step_is_the_mean_over_the_batches_that_are_there(
    small, tmp_path, accumulate, train, limit, resumed_at, sizes
):
    def start(steps, checkpoint=None):
        options = (*PLAIN, "optim.lr=0.5", f"optim.accumulate={accumulate}")
        fit = small.prepare(
            tmp_path, *options, extra=[steps], checkpoint=checkpoint, train=train, board=False, epochs=1
        )
        fit.trainer.limit_train_batches = limit or 1.0
        fit.run()

    steps = Steps(resumed_at)
    if resumed_at:
        with pytest.raises(SystemExit):
            start(steps)
        steps = Steps()
        start(steps, tmp_path / "stopped.ckpt")
    else:
        start(steps)
    assert [len(group) for group in steps.groups] == sizes
    model = steps.start
    for group, after in zip(steps.groups, steps.weights, strict=True):
        before = flat(model)
        expected = stepped(model, group, 0.5) - before
        assert float((after - before - expected).norm() / expected.norm()) < 1e-4


def test_two_processes_step_by_the_mean_over_all_their_images(tmp_path):
    """In processes of their own; the last window of an epoch has one batch of two."""
    program = Path(__file__).with_name("small_fit.py")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import small_fit\n"
        "devices = int(sys.argv[3]); torch.manual_seed(0)\n"
        f"options = {PLAIN!r}\n"
        "fit = small_fit.fit(sys.argv[2], *options, 'optim.lr=0.5', 'optim.accumulate=2', "
        "train=24, epochs=1, board=False, devices=devices)\n"
        "if fit.trainer.is_global_zero: torch.save(fit.module.model.state_dict(), f'{sys.argv[2]}/{devices}.pt')\n"
    )
    (tmp_path / "go.py").write_text(code)
    for devices in (1, 2):
        command = [sys.executable, str(tmp_path / "go.py"), str(program.parent), str(tmp_path), str(devices)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{devices}.pt", weights_only=True) for devices in (1, 2))
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=2e-6) for key in one)


@pytest.mark.parametrize("decay", [0.5, 0.97])
def test_the_average_is_tensorflows_with_its_warm_up_also_after_a_resume(small, tmp_path, decay):
    options = (*PLAIN, "optim.lr=0.5", f"ema.decay={decay}")
    size = {"train": 160, "board": False, "epochs": 1}  # 20 steps: short averages first, then `decay` for 0.5
    whole, part, rest = Steps(), Steps(7), Steps()
    torch.manual_seed(0)
    start = small.prepare(tmp_path, *options, extra=[whole], **size)
    expected = flat(start.module.ema)
    assert torch.equal(expected, flat(start.module.model))
    start.run()
    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        small.fit(tmp_path, *options, extra=[part], **size)
    small.fit(tmp_path, *options, extra=[rest], checkpoint=tmp_path / "stopped.ckpt", **size)
    assert len(whole.weights) == 20
    for step, weights in enumerate(whole.weights):  # counted from 0: the steps before this one
        beta = min(decay, (1 + step) / (10 + step))
        expected = beta * expected + (1 - beta) * weights
        assert torch.allclose(whole.average[step], expected, rtol=0, atol=1e-6)
    for before, after in zip(whole.average, [*part.average, *rest.average], strict=True):
        assert torch.equal(before, after)
