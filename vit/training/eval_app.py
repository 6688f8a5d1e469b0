"""The command line of `eval.py`: from overrides to one evaluation.

torch is imported only once the arguments are known to be good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vit.errors import VitError
from vit.training.app import launch
from vit.training.config import EvalConfig, load_eval


def eval_main(argv: Sequence[str] | None = None) -> int:
    """`python eval.py`: returns the exit status."""
    return launch(_evaluate, "eval", EvalConfig, argv)


def _evaluate(values: dict[str, Any], overrides: list[str]) -> None:
    if not values.get("checkpoint"):
        from vit.inference.loading import EXPECTED, suggest

        raise VitError(f"checkpoint is missing: python eval.py checkpoint=MODEL, {EXPECTED}; {suggest()}")
    config = load_eval(values)
    from vit.evaluation.report import evaluate
    from vit.evaluation.table import print_summary

    metrics = evaluate(
        config.checkpoint,
        config.data,
        split=config.split,
        output=config.output,
        batch_size=config.batch_size,
        device=config.device,
        reduction=config.reduction,
        faithfulness=config.faithfulness_images if config.faithfulness else 0,
    )
    print_summary(metrics)
