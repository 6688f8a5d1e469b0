"""Find a batch size and a learning rate before training (`tune=true`).

Notable: one factor scales all learning rates of the optimiser, so the ratio between Muon's and AdamW's stays as
configured.  The trials use copies of the model; training starts from the original weights.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit.data.loaders import Batch, TrainLoader

log = logging.getLogger("vit")

MIN_FACTOR, MAX_FACTOR = 1e-3, 30.0
"""The range of factors to try, from far too small to too large for most recipes."""


def find_learning_rate_factor(
    model: nn.Module,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int = 100,
) -> float:
    """Find the factor on all learning rates at which the loss falls fastest (Smith 2017, "Cyclical Learning Rates").

    Trains a copy for `steps` steps while the factor grows exponentially from `MIN_FACTOR` to `MAX_FACTOR`, smooths the
    losses, and takes the steepest descent before the loss rises for good.  Returns 1 if the loss never falls.
    `batches` yields images and targets.
    """
    trial = copy.deepcopy(model).train()
    optim = optimizer(trial)
    peaks = [group["lr"] for group in optim.param_groups]
    factors = [MIN_FACTOR * (MAX_FACTOR / MIN_FACTOR) ** (step / (steps - 1)) for step in range(steps)]
    losses: list[float] = []
    smooth = 0.0
    for step, factor in enumerate(factors):
        for group, peak in zip(optim.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        images, targets = next(batches)
        loss = F.cross_entropy(trial(images), targets)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        optim.step()
        value = float(loss.detach())
        smooth = 0.9 * smooth + 0.1 * value
        losses.append(smooth / (1 - 0.9 ** (step + 1)))  # bias-corrected moving average
        if not math.isfinite(value) or losses[-1] > 3 * min(losses):
            losses = losses[: max(0, step - 2)]
            break
    return steepest_factor(factors[: len(losses)], losses)


def steepest_factor(factors: list[float], losses: list[float]) -> float:
    """Return the factor where the loss falls fastest per step of log(factor); 1 if it never falls."""
    if len(losses) < 5:
        return 1.0
    lowest = min(range(len(losses)), key=losses.__getitem__)
    slopes = [
        (losses[i + 2] - losses[i - 2]) / math.log(factors[i + 2] / factors[i - 2])
        for i in range(2, max(3, min(lowest + 1, len(losses) - 2)))
    ]
    best = min(range(len(slopes)), key=slopes.__getitem__)
    return factors[best + 2] if slopes[best] < 0 else 1.0


def find_batch_size(step: Callable[[int], None], start: int, max_size: int, gain: float = 1.1, repeats: int = 3) -> int:
    """Double the batch size until images per second grow by less than the factor `gain`, or memory is full.

    `step(n)` trains on a batch of n images and waits for the device.  `max_size` is the number of training images.
    """
    best, best_speed = min(start, max_size), 0.0
    for size in itertools.takewhile(lambda n: n <= max_size, (start * 2**i for i in itertools.count())):
        try:
            step(size)
            seconds = []
            for _ in range(repeats):
                start_time = time.perf_counter()
                step(size)
                seconds.append(time.perf_counter() - start_time)
        except torch.OutOfMemoryError:
            log.info("batch size %d: does not fit in memory", size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            break
        speed = size / statistics.median(seconds)
        log.info("batch size %d: %.0f images/s", size, speed)
        if speed < best_speed * gain:
            break
        best, best_speed = size, speed
    return best


def tune(
    *,
    model: nn.Module,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    make_loader: Callable[[int], TrainLoader],
    prepare: Callable[[Batch], tuple[Tensor, Tensor]],
    device: torch.device,
    batch_size: int,
    images: int,
) -> tuple[int, float]:
    """Find the batch size, then, at that size, the factor on the learning rates.

    Args:
        make_loader: makes the training loader for a batch size, on `device`.
        prepare: returns the augmented images and targets of a batch.
        images: number of training images.
    """
    trial = copy.deepcopy(model).to(device).train()
    optim = optimizer(trial)

    def step(size: int) -> None:
        inputs, targets = prepare(next(iter(make_loader(size))))
        loss = F.cross_entropy(trial(inputs), targets)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        optim.step()
        float(loss.detach())

    size = find_batch_size(step, max(2, batch_size // 4), images)
    loader = make_loader(size)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            for batch in loader:
                yield prepare(batch)

    factor = find_learning_rate_factor(copy.deepcopy(model).to(device), optimizer, endless())
    log.info("tune: data.batch_size=%d, learning rates x %.3g", size, factor)
    return size, factor
