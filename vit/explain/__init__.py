"""What a model's attention says: recording it, maps from it, and measures of how far to believe a map.

    from vit.explain import explain, record_attention
    maps = explain(model, images, method="relevance", target=3)  # (B, rows, columns) of patches

Names are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit.explain.methods import METHODS, explain, trace
    from vit.explain.record import Record, record_attention

_HOMES = {
    "METHODS": "methods",
    "Record": "record",
    "explain": "methods",
    "record_attention": "record",
    "trace": "methods",
}

__all__ = ["METHODS", "Record", "explain", "record_attention", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
