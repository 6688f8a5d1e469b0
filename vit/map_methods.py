"""The table of map methods, which the command line, the maps, evaluation and the Attention tab read.  Imports nothing.

`vit.explain.methods` has the function of each.  `python -m vit.map_methods` writes what the tab needs of the table to
`vit/dashboard/static/methods.js`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).parent / "dashboard/static/methods.js"


class MapMethod(NamedTuple):
    """What is said of one method.

    Attributes:
        by_class: whether its maps depend on the class that is asked about; such a method needs gradients.
        tab: its place in the Attention tab's menu, from 0; None where the tab does not have it.
        title, hint: its name in the tab, and what it is, in a few words.
        sentence: how "brighter patches did more for the class", of a method by class; "{all}" are its layers.
    """

    by_class: bool
    tab: int | None
    title: str
    hint: str
    sentence: str = ""


MAP_METHODS = {
    "rollout": MapMethod(False, 1, "Rollout", "attention followed through the layers, whatever the class"),
    "raw": MapMethod(False, 2, "Raw attention", "attention of one layer"),
    "relevance": MapMethod(
        True, 0, "Relevance", "attention and its gradients through all layers, for one class", "through {all}"
    ),
    "gradient_rollout": MapMethod(
        True,
        3,
        "Gradient rollout",
        "rollout weighted by gradients, for one class",
        "along the attention paths through {all} that raise its score",
    ),
    "legrad": MapMethod(
        True,
        4,
        "LeGrad",
        "gradients of the attention, layer by layer, for one class",
        "judged by how its score reacts to the attention in {all}",
    ),
    "random": MapMethod(False, None, "Random", "uniform noise: the baseline"),
}
BY_CLASS = tuple(name for name, method in MAP_METHODS.items() if method.by_class)
IN_TAB = tuple(name for name, method in MAP_METHODS.items() if method.tab is not None)


def script() -> str:
    """Return the table as the tab's module: its methods in the order of the menu."""
    menu = sorted(IN_TAB, key=lambda name: MAP_METHODS[name].tab or 0)
    found = {
        name: {"title": m.title, "hint": m.hint, "byClass": m.by_class, "sentence": m.sentence}
        for name, m in ((name, MAP_METHODS[name]) for name in menu)
    }
    return f"// Written by `python -m vit.map_methods`.\n\nexport const MAP_METHODS = {json.dumps(found, indent=2)};\n"


if __name__ == "__main__":
    SCRIPT.write_text(script(), encoding="utf-8")
