"""Search the best schedule of token reduction for a trained model under a budget.

The search changes no weights.  Its steps:

1. try each method with each named schedule, at the smallest rate within the budget;
2. starting with the best of them, move removed tokens from one layer to another, a few dozen times, and keep what is
   better at no more cost;
3. measure the best one once on test images.

Notes:
- a candidate is better with a higher accuracy, or with the same accuracy and a lower loss;
- cost is a fraction of the cost without reduction: of the FLOPs, counted exactly, or of the seconds, measured in turn
  with the model without reduction, so that other load on the machine affects both.

Imports torch in functions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.errors import VitError

if TYPE_CHECKING:
    from vit.model import VisionTransformer

MEASURES = ("flops", "latency")
TRIALS = 32
_BATCH = 16
_ROUNDS = 5  # of time measurements in turn


@dataclass(frozen=True)
class Candidate:
    """Describes a reduction, its cost and its accuracy.

    Attributes:
        options: arguments of `VisionTransformer.reduce`.
        counts: number of patch tokens removed after each layer.
        cost: fraction of the cost without reduction.
        top1: fraction of the images that are classified correctly.
        loss: mean negative log-likelihood, in nats.
        images_per_second: measured in batches of 16 on this machine.
    """

    options: dict[str, Any]
    counts: tuple[int, ...]
    cost: float
    top1: float
    loss: float
    images_per_second: float

    @property
    def line(self) -> str:
        """Format the reduction as in the option `--reduction`."""
        from vit.model.reduction import format_reduction

        return format_reduction(self.options)

    def better_than(self, other: Candidate) -> bool:
        """Compare the accuracy, then the loss."""
        return (self.top1, -self.loss) > (other.top1, -other.loss)


@dataclass(frozen=True)
class SearchResult:
    """Holds the results of a search: the model without reduction, all candidates within the budget, and the best."""

    baseline: Candidate
    candidates: list[Candidate]
    best: Candidate


def search(
    model: VisionTransformer,
    images: np.ndarray,
    labels: np.ndarray,
    budget: float,
    *,
    measure: str = "flops",
    trials: int = TRIALS,
    seed: int = 0,
    report: Callable[[Candidate], None] = lambda candidate: None,
) -> SearchResult:
    """Find the reduction with the highest accuracy at a cost of at most `budget`.

    Args:
        model: a model in evaluation mode; it keeps its own reduction after the search.
        images: normalised images, float32 (N, C, H, W).
        labels: (N,).
        budget: fraction, over 0 and under 1, of the cost without reduction.
        measure: "flops" or "latency".
        trials: number of candidates beyond the named schedules.
        seed: seed of the search.
        report: called with each measured candidate, the model without reduction first.

    Raises:
        VitError: if the budget is out of range, or no reduction is within it.
    """
    if not 0 < budget < 1:
        raise VitError(f"--budget {budget:g}: expected a share over 0 and under 1 of the cost without reduction")
    if measure not in MEASURES:
        raise VitError(f"no measure {measure!r}: expected {' or '.join(MEASURES)}")
    before = {key: model.architecture[key] for key in model.architecture if key.startswith("reduction")}
    try:
        return _Search(model, images, labels, budget, measure, seed, report).run(trials)
    finally:
        model.reduce(**before)


class _Search:
    def __init__(
        self,
        model: VisionTransformer,
        images: np.ndarray,
        labels: np.ndarray,
        budget: float,
        measure: str,
        seed: int,
        report: Callable[[Candidate], None],
    ) -> None:
        self.model, self.images, self.labels, self.budget, self.measure = model, images, labels, budget, measure
        self.report, self.rng = report, np.random.default_rng(seed)
        self.patches, self.depth = model.grid[0] * model.grid[1], model.architecture["depth"]

    def run(self, trials: int) -> SearchResult:
        baseline = self.measure_candidate({"reduction": "none"}, 1.0)
        named = [self.measure_candidate(options, cost) for options, cost in self.named_schedules()]
        if not named:
            raise VitError(
                f"--budget {self.budget:g}: no reduction of this model costs so little, with {self.patches} patches in "
                f"{self.depth} layers; try a higher one"
            )
        best = max(named, key=lambda candidate: (candidate.top1, -candidate.loss))
        candidates = {(candidate.options["reduction"], candidate.counts): candidate for candidate in named}
        for _ in range(trials):
            options = self.move_tokens(best)
            if options is None or (key := (options["reduction"], tuple(options["reduction_schedule"]))) in candidates:
                continue
            cost = self.cost(options)
            if cost > self.budget:  # a measured time may exceed the estimate
                continue
            candidates[key] = self.measure_candidate(options, cost)
            best = max(best, candidates[key], key=lambda candidate: (candidate.top1, -candidate.loss))
        return SearchResult(baseline, list(candidates.values()), best)

    def named_schedules(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Yield each method with each schedule at the smallest rate within the budget, and its cost."""
        from vit.model.reduction import SCHEDULES

        for method in ("keep", "merge"):
            for schedule in SCHEDULES:
                low, high, best = 0, self.patches, None
                # a few tokens make no measurable difference in time
                precision = 1 if self.measure == "flops" else max(1, self.patches // 32)
                while high - low > precision:
                    middle = (low + high) // 2
                    rate = round(middle / self.patches, 4)
                    options = {"reduction": method, "reduction_rate": rate, "reduction_schedule": schedule}
                    cost = self.cost(options)
                    if cost <= self.budget:
                        high, best = middle, (options, cost)
                    else:
                        low = middle
                if best is not None:
                    yield best

    def move_tokens(self, best: Candidate) -> dict[str, Any] | None:
        """Remove some tokens of `best` in another layer, as few as the budget allows; None if impossible."""
        from vit.model.reduction import clamp_removed

        if self.depth == 1:
            return None
        method, counts = best.options["reduction"], list(best.counts)
        from_layer = int(self.rng.choice(np.flatnonzero(counts)))
        to_layer = int(self.rng.integers(self.depth - 1))
        to_layer += to_layer >= from_layer
        moved = int(self.rng.integers(1, counts[from_layer] + 1))
        counts[from_layer] -= moved
        counts[to_layer] += moved
        max_cost = self.budget if self.measure == "flops" else self.relative_flops(method, best.counts)
        while self.relative_flops(method, clamp_removed(method, counts, self.patches)) > max_cost:
            if clamp_removed(method, counts, self.patches) != tuple(counts):
                return None
            counts[to_layer] += 1
        while counts[to_layer] and clamp_removed(method, counts, self.patches) == tuple(counts):
            counts[to_layer] -= 1
            if self.relative_flops(method, counts) > max_cost:
                counts[to_layer] += 1
                break
        if clamp_removed(method, counts, self.patches) != tuple(counts):
            return None
        return {"reduction": method, "reduction_schedule": counts}

    def relative_flops(self, method: str, counts: Sequence[int]) -> float:
        from vit.model.cost import relative

        plan = {"reduction": method, "reduction_schedule": list(counts)}
        return relative({**self.model.architecture, **plan})

    def cost(self, options: dict[str, Any]) -> float:
        from vit.model.cost import relative

        self.model.reduce(**options)
        if self.measure == "flops":
            return relative(self.model.architecture)
        return self.relative_seconds(options)

    def relative_seconds(self, options: dict[str, Any]) -> float:
        """Measure the seconds of a batch as a fraction of those without reduction: the median over rounds."""
        import torch

        batch = torch.from_numpy(self.images[:_BATCH]).to(next(self.model.parameters()).device)
        ratios = []
        with torch.inference_mode():
            for round_ in range(_ROUNDS + 1):
                seconds = []
                for reduction in ({"reduction": "none"}, options):
                    self.model.reduce(**reduction)
                    start = time.perf_counter()
                    self.model(batch).cpu()
                    seconds.append(time.perf_counter() - start)
                if round_:  # the first round warms up
                    ratios.append(seconds[1] / seconds[0])
        return statistics.median(ratios)

    def measure_candidate(self, options: dict[str, Any], cost: float) -> Candidate:
        self.model.reduce(**options)
        start = time.perf_counter()
        logits = compute_logits(self.model, self.images)
        seconds = time.perf_counter() - start
        top1, loss = compute_metrics(logits, self.labels)
        reduction = self.model.reduction
        counts = (0,) * self.depth if reduction is None else reduction.removed_per_layer
        candidate = Candidate(dict(options), counts, cost, top1, loss, len(self.images) / seconds)
        self.report(candidate)
        return candidate


def compute_logits(model: VisionTransformer, images: np.ndarray, batch_size: int = _BATCH) -> np.ndarray:
    """Compute logits float32 (N, K) of normalised images (N, C, H, W) in batches, on the model's device."""
    import torch

    device = next(model.parameters()).device
    parts = []
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).to(device)
            parts.append(model(batch).float().cpu().numpy())
    return np.concatenate(parts)


def compute_metrics(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Compute top-1 accuracy and mean negative log-likelihood."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]
    return float((logits.argmax(axis=1) == labels).mean()), float(losses.mean())
