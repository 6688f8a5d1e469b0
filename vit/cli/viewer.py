"""Write `index.html`: the viewer of TensorBoard's Attention tab with the attention of some images, in one file.

The size of the file is limited so that a browser can open it: a number of images, `_MAX_BYTES` of data, and
`_MAX_PAIR_BYTES` of attention between patches.  That attention is of every head if all images fit, else the mean of
the heads, for the first images that fit.
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
    from vit.explain.methods import Trace

NAME = "index.html"
_MAX_BYTES, _MAX_PAIR_BYTES = 48 << 20, 24 << 20
_TITLE = "vit explain: "
_MAX_PROBLEMS = 20


class Viewer:
    """Collects images for the page; `write` writes it.

    Args:
        mapper: computes the maps of the model.
        class_names: names of the classes on the page.
        title: title of the page.
        max_images: largest number of images.
    """

    def __init__(self, mapper: Mapper, class_names: Sequence[str], title: str, max_images: int) -> None:
        self._mapper, self._class_names = mapper, [printable(name) for name in class_names]
        self._title, self._max_images = printable(title), max_images
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
        """Get the number of images that did not fit."""
        return self._left_out

    def add(self, named: Sequence[tuple[str, np.ndarray]]) -> None:
        """Add images with their path, uint8 (H, W, C) after resizing; only count those that do not fit."""
        room = self._max_images - len(self) if self._bytes < _MAX_BYTES else 0
        added = named[:room]
        self._left_out += len(named[room:])
        faithful = (self._mapper.method,)
        for (path, pixels), (step, probe, traced, i) in zip(
            added, self._mapper.summaries([pixels for _, pixels in added], faithful=faithful), strict=True
        ):
            png = _png(self._mapper.seen(pixels))
            probe = pack_arrays({"v": 1, "step": 0, **probe})
            self._images.append({"name": printable(path), "label": None, "png": png})
            self._steps.append(step)
            self._probes.append(probe)
            self._bytes += len(png) + _size(probe)
            self._add_pairs(traced, i)

    def add_problem(self, path: str, reason: str) -> None:
        """Add an input that cannot be used."""
        self._unusable += 1
        if len(self._problems) < _MAX_PROBLEMS:
            self._problems.append(f"{printable(path)}: {reason}")

    def write(self, path: Path) -> None:
        """Write the page atomically.  Raises `VitError`."""
        from vit.dashboard.page import render_page
        from vit.explain.attention_tab import run_info

        run, mapper = self._title, self._mapper
        info = {"v": 1, **run_info(mapper.model, self._class_names, run), "probes": self._images}
        if mapper.target is not None:
            info["asked"] = mapper.target
        pairs = self._means if self._heads is None else self._heads
        record = {
            "run": run,
            "info": info,
            "steps": [{"v": 1, "step": 0, "probes": self._steps}],
            "pairs": [0] if pairs else [],
            "problems": self._remarks(),
        }
        data = {
            "start": _start(mapper, info),
            "runs": {"version": 1, "runs": [record]},
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

    def _add_pairs(self, traced: Trace, i: int) -> None:
        from vit.explain.attention_tab import token_pairs

        layers, (_, heads, tokens, _) = len(traced.weights), traced.weights[0].shape
        all_means = len(self) * layers * tokens**2 * 4 // 3  # bytes in base64
        if heads * all_means > _MAX_PAIR_BYTES:
            self._heads = None
        if self._heads is not None:
            self._heads.append(pack_arrays({"v": 1, "step": 0, **token_pairs(traced, i, per_head=True)}))
        if all_means <= _MAX_PAIR_BYTES:
            self._means.append(pack_arrays({"v": 1, "step": 0, **token_pairs(traced, i, per_head=False)}))


def is_page(path: Path) -> bool:
    """Check whether `Viewer` wrote the file."""
    try:
        with open(path, "rb") as file:
            return f"<title>{_TITLE}".encode() in file.read(4096)
    except OSError:
        return False


def _start(mapper: Mapper, info: dict[str, Any]) -> str:
    """Format the start view of the page as in its URL, with the requested options; layers count from 1 there."""
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
