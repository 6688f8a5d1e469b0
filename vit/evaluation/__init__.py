"""Metrics, calibration and figures of a trained model.  Imports neither lightning nor hydra.

A name is imported when it is first used: metrics and calibration need only NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit.evaluation.calibration import fit_temperature
    from vit.evaluation.collect import collect_logits
    from vit.evaluation.figures import confusion_figure, reliability_figure
    from vit.evaluation.metrics import evaluate_logits, scalars
    from vit.evaluation.report import evaluate

_MODULES = {
    "collect_logits": "collect",
    "confusion_figure": "figures",
    "evaluate": "report",
    "evaluate_logits": "metrics",
    "fit_temperature": "calibration",
    "reliability_figure": "figures",
    "scalars": "metrics",
}

__all__ = [
    "collect_logits",
    "confusion_figure",
    "evaluate",
    "evaluate_logits",
    "fit_temperature",
    "reliability_figure",
    "scalars",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
