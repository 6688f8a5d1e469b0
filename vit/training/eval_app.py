"""Run the command line of `eval.py`.

torch is imported only after the arguments are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit.errors import VitError, command_name
from vit.files import check_folder_name
from vit.training.app import launch
from vit.training.config import EvalConfig, load_eval_config
from vit.training.first_argument import expand_model_argument

if TYPE_CHECKING:
    from vit.data.memory import Gathered


def eval_main(argv: Sequence[str] | None = None) -> int:
    """Run `python eval.py`, or `vit eval` if `argv` is given; return the exit status."""
    return launch(_evaluate, "eval", EvalConfig, argv, expand_first=expand_model_argument)


def _evaluate(values: dict[str, Any], overrides: list[str]) -> None:
    metrics = start_evaluation(values)
    from vit.evaluation.table import print_summary

    print_summary(metrics)


def start_evaluation(values: dict[str, Any], given: Gathered | None = None) -> dict[str, Any]:
    """Check the composed `values`, evaluate on the `given` images or those that `values` name, and return the metrics.

    Raises:
        VitError: a mistake of the user.
    """
    if not values.get("checkpoint"):
        from vit.inference.loading import EXPECTED, suggest

        raise VitError(f"checkpoint is missing: {command_name('eval')} checkpoint=MODEL, {EXPECTED}; {suggest()}")
    config = load_eval_config(values)
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
