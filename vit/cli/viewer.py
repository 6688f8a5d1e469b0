"""`index.html`: the viewer of TensorBoard's Attention tab with some images' attention, in one file.

Notable: the file stays one that a browser opens.  It takes up to a number of images and up to `_LARGEST` bytes of
them, and `_PAIRS` bytes of attention from patch to patch: of every head where all images' fit, else of the heads'
mean, for the first images that fit.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.dashboard.format import pack_arrays
from vit.data.decode import printable
from vit.files import write_text

if TYPE_CHECKING:
    import numpy as np

    from vit.explain.maps import Mapper
    from vit.explain.records import Observed

NAME = "index.html"
_LARGEST, _PAIRS = 48 << 20, 24 << 20
_TITLE = "vit explain: "
_MOST_PROBLEMS = 20


class Viewer:
    """Collects what the page shows; `write` makes the page.

    Arguments
        mapper: of the model.
        class_names, title: as they are shown.
        most: images at most.
    """

    def __init__(self, mapper: Mapper, class_names: Sequence[str], title: str, most: int) -> None:
        self._mapper, self._class_names = mapper, [printable(name) for name in class_names]
        self._title, self._most = printable(title), most
        self._images: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._probes: list[dict[str, Any]] = []
        self._heads: list[dict[str, Any]] | None = []  # pairs of every head, while they fit
        self._means: list[dict[str, Any]] = []
        self._problems: list[str] = []
        self._bytes = self._left_out = self._unusable = 0

    def __len__(self) -> int:
        return len(self._images)

    @property
    def left_out(self) -> int:
        """How many images came when the page was full."""
        return self._left_out

    def add(self, named: Sequence[tuple[str, np.ndarray]]) -> None:
        """Images by their path, as the model sees them, uint8 (H, W, C); those that are too many are only counted."""
        room = self._most - len(self) if self._bytes < _LARGEST else 0
        taken, rest = named[:room], named[room:]
        self._left_out += len(rest)
        faithful = (self._mapper.method,)
        for (path, pixels), (observed, i) in zip(
            taken, self._mapper.observations([pixels for _, pixels in taken], faithful=faithful), strict=True
        ):
            png = _png(self._mapper.seen(pixels))
            probe = pack_arrays({"v": 1, "step": 0, **observed.probes[i]})
            self._images.append({"name": printable(path), "label": None, "png": png})
            self._steps.append(observed.steps[i])
            self._probes.append(probe)
            self._bytes += len(png) + _size(probe)
            self._add_pairs(observed, i)

    def add_problem(self, path: str, reason: str) -> None:
        """An input that cannot be used."""
        self._unusable += 1
        if len(self._problems) < _MOST_PROBLEMS:
            self._problems.append(f"{printable(path)}: {reason}")

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all.  Raises `VitError`."""
        from vit.dashboard.page import render_page
        from vit.explain.records import run_info

        run, mapper = self._title, self._mapper
        info = {"v": 1, **run_info(mapper.model, self._class_names, run), "probes": self._images}
        if mapper.target is not None:
            info["asked"] = mapper.target
        pairs = self._means if self._heads is None else self._heads
        shown = {
            "run": run,
            "info": info,
            "steps": [{"v": 1, "step": 0, "probes": self._steps}],
            "pairs": [0] if pairs else [],
            "problems": self._remarks(),
        }
        data = {
            "start": _start(mapper, info),
            "runs": {"version": 1, "runs": [shown]},
            "probe": {f"{run}\n{i}": {"steps": [probe], "problems": []} for i, probe in enumerate(self._probes)},
            "pairs": {f"{run}\n{i}\n0": record for i, record in enumerate(pairs)},
        }
        write_text(path, render_page(_TITLE + run, data))

    def _remarks(self) -> list[str]:
        remarks = list(self._problems)
        if self._unusable > len(remarks):
            remarks.append(f"and {self._unusable - len(remarks)} more inputs that could not be used")
        if self._left_out:
            count = f"{self._left_out} more image{'s' if self._left_out > 1 else ''}"
            remarks.append(f"{count} did not fit this page: the overlays are beside it")
        return remarks

    def _add_pairs(self, observed: Observed, i: int) -> None:
        layers, (_, heads, tokens, _) = len(observed.weights), observed.weights[0].shape
        all_means = len(self) * layers * tokens**2 * 4 // 3  # bytes in base64
        if heads * all_means > _PAIRS:
            self._heads = None
        if self._heads is not None:
            self._heads.append(pack_arrays({"v": 1, "step": 0, **observed.pairs(i, per_head=True)}))
        if all_means <= _PAIRS:
            self._means.append(pack_arrays({"v": 1, "step": 0, **observed.pairs(i, per_head=False)}))


def is_page(path: Path) -> bool:
    """Whether the file is a page that `Viewer` wrote."""
    try:
        with open(path, "rb") as file:
            return f"<title>{_TITLE}".encode() in file.read(4096)
    except OSError:
        return False


def _start(mapper: Mapper, info: dict[str, Any]) -> str:
    """What the page opens with, as its URL has it: what was asked for.  Layers count from 1 there."""
    parts = [f"method={mapper.method}"] if mapper.method in info["methods"] else []
    if mapper.target is not None:
        parts.append("target=true")
    if mapper.layer is not None:
        parts.append(f"layer={mapper.layer % info['layers'] + 1}")
    return "&".join(parts)


def _png(pixels: np.ndarray) -> str:
    from vit.explain.render import picture

    buffer = io.BytesIO()
    picture(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _size(value: Any) -> int:
    return sum(map(_size, value.values())) if isinstance(value, dict) else len(value) if isinstance(value, str) else 8
