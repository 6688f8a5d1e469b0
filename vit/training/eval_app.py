"""The command line of `eval.py`: from overrides to one evaluation.

torch is imported only once the arguments are known to be good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit.errors import VitError, command_name
from vit.files import check_folder_name
from vit.training.app import launch
from vit.training.config import EvalConfig, load_eval
from vit.training.first_argument import model_overrides

if TYPE_CHECKING:
    from vit.data.memory import Gathered


def eval_main(argv: Sequence[str] | None = None) -> int:
    """Run `python eval.py`, or `vit eval` where `argv` is given; returns the exit status."""
    return launch(_evaluate, "eval", EvalConfig, argv, first=model_overrides)


def _evaluate(values: dict[str, Any], overrides: list[str]) -> None:
    metrics = start_evaluation(values)
    from vit.evaluation.table import print_summary

    print_summary(metrics)


def start_evaluation(values: dict[str, Any], given: Gathered | None = None) -> dict[str, Any]:
    """Check the composed `values` and evaluate, on images that were `given` from Python or those that `values` name.

    Returns the metrics.  Raises `VitError`.
    """
    if not values.get("checkpoint"):
        from vit.inference.loading import EXPECTED, suggest

        raise VitError(f"checkpoint is missing: {command_name('eval')} checkpoint=MODEL, {EXPECTED}; {suggest()}")
    config = load_eval(values)
    if config.output is not None:
        check_folder_name(config.output, "output")
    from vit.evaluation.report import evaluate

    return evaluate(
        config.checkpoint,
        config.data,
        split=config.split,
        output=config.output,
        batch_size=config.batch_size,
        device=config.device,
        reduction=config.reduction,
        faithfulness=config.faithfulness_images if config.faithfulness else 0,
        given=given,
    )
