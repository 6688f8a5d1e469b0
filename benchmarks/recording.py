"""What recording attention costs, and rollout, beside a forward pass.

The same model and images in turn, round by round; seconds of the processor, which a busy machine stretches less than
those of the clock; medians over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.results import parser, report, spread
from vit.explain.methods import trace
from vit.explain.record import record_attention
from vit.explain.rollout import rollout
from vit.model import VisionTransformer


def main(arguments: list[str]) -> int:
    options = parser("recording", "What recording attention and rollout cost, as shares of a forward pass.")
    options.add_argument("--sizes", default="tiny,small", help="of models")
    options.add_argument("--image-size", type=int, default=224)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rows = [["model", "forward, ms", "recorded", "rollout", "rollout of a forward"]]
    figures = {}
    for size in given.sizes.split(","):
        found = measure(size, given.image_size, given.batch_size, given.rounds)
        forward = statistics.median(found["forward"])
        shares = {name: [100 * each / forward for each in values] for name, values in found.items()}
        added = [each - 100 for each in shares["recorded"]]
        rows.append(
            [
                f"{size}/16 at {given.image_size}, batch {given.batch_size}",
                spread([1000 * each for each in found["forward"]], 0),
                spread(added, 1, "%", "+"),
                spread([1000 * each for each in found["rollout"]], 2, " ms"),
                spread(shares["rollout"], 2, "%"),
            ]
        )
        figures[size] = found
    report("recording", "Recording attention, and rollout", rows, figures, given)
    return 0


def measure(size: str, image_size: int, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor for each thing, by round."""
    torch.manual_seed(0)
    model = VisionTransformer(image_size=image_size, patch_size=16, num_classes=1000, size=size).eval()
    images = torch.randn(batch_size, 3, image_size, image_size)
    traced = trace(model, images, methods=["rollout"])

    def recorded() -> None:
        with record_attention(model):
            model(images)

    timed: dict[str, Callable[[], object]] = {
        "forward": lambda: model(images),
        "recorded": recorded,
        "rollout": lambda: rollout(traced.weights, traced.prefix_tokens, traced.grid, traced.readout),
    }
    found: dict[str, list[float]] = {name: [] for name in timed}
    with torch.no_grad():
        for round_ in range(rounds + 1):
            for name, run in timed.items():
                began = time.process_time()
                run()
                if round_:  # the first warms up
                    found[name].append(time.process_time() - began)
    return found
