"""Which tokens a trained model can do without: a small search over schedules of token reduction under a budget.

What is found changes no weight.  The order of things:

1. each method with each named schedule, at the smallest rate whose cost keeps to the budget;
2. from the best of them on, tokens that go are moved from one layer to another, a few dozen times, keeping what is
   better at no more cost;
3. the winner is measured once on images that decided nothing.

Notable:
- a candidate is better with more images right, or as many and a lower loss;
- cost is a share of the same model's without reduction: of its FLOPs, counted exactly, or of its seconds, measured in
  turn with it on this machine, so that what else the machine does falls on both.

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
_ROUNDS = 5  # of seconds measured in turn


@dataclass(frozen=True)
class Candidate:
    """A reduction and what it gives.

    Attributes
        options: arguments of `VisionTransformer.reduce`.
        counts: patch tokens fewer after each layer.
        cost: a share of the model's without reduction.
        top1: share of the images that are classified rightly.
        loss: mean negative log-likelihood, in nats.
        images_per_second: in batches of 16, on this machine, while it was measured.
    """

    options: dict[str, Any]
    counts: tuple[int, ...]
    cost: float
    top1: float
    loss: float
    images_per_second: float

    @property
    def line(self) -> str:
        """As a command line has it."""
        from vit.model.reduction import spell

        return spell(self.options)

    def better_than(self, other: Candidate) -> bool:
        """More images right, or as many and a lower loss."""
        return (self.top1, -self.loss) > (other.top1, -other.loss)


@dataclass(frozen=True)
class SearchResult:
    """What a search found: the model without reduction, all candidates within the budget, and the best of them."""

    whole: Candidate
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
    told: Callable[[Candidate], None] = lambda candidate: None,
) -> SearchResult:
    """Find the reduction that keeps the most images right at a cost of at most `budget`.

    Args:
        model: in evaluation mode; is left with the reduction that it has.
        images: normalised, float32 (N, C, H, W); labels: (N,).
        budget: a share, over 0 and under 1, of the cost without reduction.
        measure: "flops" or "latency".
        trials: candidates beyond the named ones.
        seed: of the search.
        told: is called with each candidate as it is measured, the model without reduction first.

    Raises:
        VitError: a budget out of range, or one that no reduction keeps to.
    """
    if not 0 < budget < 1:
        raise VitError(f"--budget {budget:g}: expected a share over 0 and under 1 of the cost without reduction")
    if measure not in MEASURES:
        raise VitError(f"no measure {measure!r}: expected {' or '.join(MEASURES)}")
    before = {key: model.architecture[key] for key in model.architecture if key.startswith("reduction")}
    try:
        return _Search(model, images, labels, budget, measure, seed, told).run(trials)
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
        told: Callable[[Candidate], None],
    ) -> None:
        self.model, self.images, self.labels, self.budget, self.measure = model, images, labels, budget, measure
        self.told, self.random = told, np.random.default_rng(seed)
        self.patches, self.depth = model.grid[0] * model.grid[1], model.architecture["depth"]

    def run(self, trials: int) -> SearchResult:
        whole = self.judge({"reduction": "none"}, 1.0)
        named = [self.judge(*each) for each in self.named()]
        if not named:
            raise VitError(
                f"--budget {self.budget:g}: no reduction of this model costs so little, with {self.patches} patches in "
                f"{self.depth} layers; try a higher one"
            )
        best = max(named, key=lambda each: (each.top1, -each.loss))
        found = {(each.options["reduction"], each.counts): each for each in named}
        for _ in range(trials):
            moved = self.moved(best)
            if moved is None or (key := (moved["reduction"], tuple(moved["reduction_schedule"]))) in found:
                continue
            cost = self.cost(moved)
            if cost > self.budget:  # only what is measured can be more than was counted on
                continue
            found[key] = self.judge(moved, cost)
            best = max(best, found[key], key=lambda each: (each.top1, -each.loss))
        return SearchResult(whole, list(found.values()), best)

    def named(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Each method with each schedule at the smallest rate that keeps to the budget, and its cost."""
        from vit.model.reduction import SCHEDULES

        for method in ("keep", "merge"):
            for schedule in SCHEDULES:
                low, high, kept = 0, self.patches, None
                # the last tokens make no difference that a clock could see
                fine = 1 if self.measure == "flops" else max(1, self.patches // 32)
                while high - low > fine:
                    middle = (low + high) // 2
                    rate = round(middle / self.patches, 4)
                    options = {"reduction": method, "reduction_rate": rate, "reduction_schedule": schedule}
                    cost = self.cost(options)
                    if cost <= self.budget:
                        high, kept = middle, (options, cost)
                    else:
                        low = middle
                if kept is not None:
                    yield kept

    def moved(self, best: Candidate) -> dict[str, Any] | None:
        """`best` with some of the tokens that go in one layer going in another, and no more than have to."""
        from vit.model.reduction import possible

        if self.depth == 1:
            return None
        method, counts = best.options["reduction"], list(best.counts)
        from_layer = int(self.random.choice(np.flatnonzero(counts)))
        to_layer = int(self.random.integers(self.depth - 1))
        to_layer += to_layer >= from_layer
        some = int(self.random.integers(1, counts[from_layer] + 1))
        counts[from_layer] -= some
        counts[to_layer] += some
        allowed = self.budget if self.measure == "flops" else self.counted(method, best.counts)
        while self.counted(method, possible(method, counts, self.patches)) > allowed:
            if possible(method, counts, self.patches) != tuple(counts):
                return None
            counts[to_layer] += 1
        while counts[to_layer] and possible(method, counts, self.patches) == tuple(counts):
            counts[to_layer] -= 1
            if self.counted(method, counts) > allowed:
                counts[to_layer] += 1
                break
        if possible(method, counts, self.patches) != tuple(counts):
            return None
        return {"reduction": method, "reduction_schedule": counts}

    def counted(self, method: str, counts: Sequence[int]) -> float:
        from vit.model.cost import relative

        plan = {"reduction": method, "reduction_schedule": list(counts)}
        return relative({**self.model.architecture, **plan})

    def cost(self, options: dict[str, Any]) -> float:
        from vit.model.cost import relative

        self.model.reduce(**options)
        if self.measure == "flops":
            return relative(self.model.architecture)
        return self.seconds(options)

    def seconds(self, options: dict[str, Any]) -> float:
        """Seconds of a batch as a share of those without reduction, measured in turn: the median of ratios."""
        import torch

        batch = torch.from_numpy(self.images[:_BATCH]).to(next(self.model.parameters()).device)
        ratios = []
        with torch.inference_mode():
            for round_ in range(_ROUNDS + 1):
                took = []
                for each in ({"reduction": "none"}, options):
                    self.model.reduce(**each)
                    began = time.perf_counter()
                    self.model(batch).cpu()
                    took.append(time.perf_counter() - began)
                if round_:  # the first warms up
                    ratios.append(took[1] / took[0])
        return statistics.median(ratios)

    def judge(self, options: dict[str, Any], cost: float) -> Candidate:
        self.model.reduce(**options)
        began = time.perf_counter()
        logits = scores(self.model, self.images)
        took = time.perf_counter() - began
        top1, loss = figures(logits, self.labels)
        reduction = self.model.reduction
        counts = (0,) * self.depth if reduction is None else reduction.counts
        candidate = Candidate(dict(options), counts, cost, top1, loss, len(self.images) / took)
        self.told(candidate)
        return candidate


def scores(model: VisionTransformer, images: np.ndarray, batch_size: int = _BATCH) -> np.ndarray:
    """Logits float32 (N, K) of normalised images (N, C, H, W), a batch at a time, on the model's device."""
    import torch

    device = next(model.parameters()).device
    parts = []
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).to(device)
            parts.append(model(batch).float().cpu().numpy())
    return np.concatenate(parts)


def figures(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 accuracy and mean negative log-likelihood."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]
    return float((logits.argmax(axis=1) == labels).mean()), float(losses.mean())
