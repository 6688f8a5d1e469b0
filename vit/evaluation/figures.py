"""Draw the confusion matrix and the reliability diagram as images.

Notes:
- Figures are arrays uint8 (H, W, 3), for a PNG file and for TensorBoard.
- matplotlib is imported with the first figure, without pyplot: no global state, no window, any thread.
- Names are drawn unchanged: a `$` in a class name starts no formula.
- The colour map is perceptually uniform with light low values, so that a sparse matrix of 1,000 classes is readable.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit.evaluation.metrics import Reliability
from vit.evaluation.names import readable
from vit.files import atomic_write

MAX_LABELLED = 40
"""Largest number of classes with names along the axes of a confusion matrix."""
MAX_COUNTED = 20
"""Largest number of classes with counts in the cells."""
MAX_CELLS = 1500
"""Largest number of cells along a side; more classes are drawn in groups."""

_DPI = 100
_BLUE, _RED, _LIGHT, _GREY = "#31688e", "#e8909c", "#8fc0d8", "#8a8a8a"
_ABOVE_ZERO = 1e-9  # smaller than any fraction, so that only empty cells are white


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str], title: str = "") -> np.ndarray:
    """Draw a confusion matrix: a row for each true class, a column for each predicted one.

    The colour of a cell is its fraction of the row's images, so that rare classes are as visible as common ones.  The
    number in a cell, where there is room, is the count.  The colour scale follows the square root of the fraction: one
    image in a hundred is visible.  White cells are empty, grey rows are classes without images.  With more than
    `MAX_CELLS` classes, neighbours form groups with the colour of their largest cell, so that a single confused pair
    stays visible.

    Args:
        confusion: (K, K) counts: `confusion[i][j]` images of class i were predicted as class j.
        class_names: K names, drawn for up to `MAX_LABELLED` classes.
        title: the title; by default the number of images and the accuracy.

    Returns:
        uint8 (H, W, 3).
    """
    confusion = np.asarray(confusion)
    classes, total = len(confusion), int(confusion.sum())
    support = confusion.sum(axis=1, keepdims=True)
    fractions = np.where(support > 0, confusion / np.maximum(support, 1), np.nan)
    group = -(-classes // MAX_CELLS)
    if group > 1:
        fractions = _group_max(fractions, group)
    if not title:
        accuracy = f", {np.trace(confusion) / total:.2%} right" if total else ""
        title = f"{total:,} images{accuracy}"
    if group > 1:
        title += f" (a dot is {group} x {group} classes)"

    from matplotlib import colors

    cells = len(fractions)
    names = [readable(name, 18) for name in class_names] if classes <= MAX_LABELLED else []
    # inches: large enough for names and counts, and at least one pixel for each cell
    side = max(4.0, 0.32 * cells if names else 7.0, cells / _DPI)
    margin = 0.7 + 0.075 * max((len(name) for name in names), default=4)
    width, height = side + margin + 1.3, side + margin + 0.6
    figure = new_figure(width, height)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    image = axes.imshow(
        fractions,
        cmap=_light_colormap(),
        norm=colors.PowerNorm(0.5, vmin=_ABOVE_ZERO, vmax=1),
        interpolation="nearest" if cells <= side * _DPI else "antialiased",
        extent=(-0.5, classes - 0.5, classes - 0.5, -0.5),
    )
    _draw_ticks(axes, names, classes)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11, parse_math=False)
    if classes <= MAX_COUNTED:
        _write_counts(axes, confusion, fractions)
    bar = figure.colorbar(
        image, cax=figure.add_axes(((margin + side + 0.15) / width, margin / height, 0.18 / width, side / height))
    )
    ticks = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
    bar.set_ticks(ticks, labels=[f"{tick:.0%}" for tick in ticks])
    bar.set_label("share of the true class's images")
    return render(figure)


def reliability_figure(before: Reliability, after: Reliability, temperature: float) -> np.ndarray:
    """Draw confidence against accuracy, before and after temperature scaling, and the number of images in each bin.

    A bar is the accuracy of the images whose confidence is in the bin.  The black line is their mean confidence, the
    right height of the bar.  The part between is pink where the model was overconfident, light blue where it was
    underconfident.  Below is the number of images in each bin, on a logarithmic scale.

    Returns:
        uint8 (H, W, 3).
    """
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(9.6, 5.6)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1), hspace=0.12, wspace=0.22)
    grid.update(left=0.08, right=0.97, top=0.87, bottom=0.1)
    max_count = max(int(before.counts.max(initial=0)), int(after.counts.max(initial=0)), 1)
    for column, (table, heading) in enumerate(((before, "before (T = 1)"), (after, f"after (T = {temperature:.3g})"))):
        top = figure.add_subplot(grid[0, column])
        below = figure.add_subplot(grid[1, column], sharex=top)
        filled = table.counts > 0
        left, width = table.edges[:-1][filled], np.diff(table.edges)[filled]
        accuracy, confidence = table.accuracy[filled], table.confidence[filled]
        common = np.minimum(accuracy, confidence)
        style: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
        top.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        top.bar(left, common, width, color=_BLUE, label="accuracy", **style)
        top.bar(left, confidence - common, width, common, color=_RED, label="overconfident by", **style)
        top.bar(left, accuracy - common, width, common, color=_LIGHT, label="underconfident by", **style)
        top.hlines(confidence, left, left + width, color="black", linewidth=1.5, label="mean confidence")
        ece = table.ece
        top.set_title(heading + (f":  ECE {ece:.4f}" if ece is not None else ""), fontsize=11)
        top.set_ylim(0, 1.02)
        top.set_xlim(0, 1)
        top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        top.tick_params(labelbottom=False)
        below.bar(table.edges[:-1], table.counts, np.diff(table.edges), align="edge", color=_GREY, edgecolor="white")
        below.set_yscale("symlog", linthresh=1)
        below.set_ylim(0, max_count * 1.5)
        below.set_yticks(_log_ticks(max_count))
        below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        below.minorticks_off()
        below.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        below.set_xlabel("confidence")
        if column == 0:
            top.set_ylabel("accuracy")
            below.set_ylabel("images")
            figure.legend(*top.get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False, fontsize=9)
        for axes in (top, below):
            axes.spines[["top", "right"]].set_visible(False)
    return render(figure)


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write an array uint8 (H, W, 3) as PNG, atomically.  Raises `VitError`."""
    from PIL import Image

    with atomic_write(path) as part:
        Image.fromarray(image).save(part, format="PNG")


def new_figure(width: float, height: float) -> Any:
    """Create an empty figure of this size in inches, on a canvas in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Any) -> np.ndarray:
    """Draw the figure to uint8 (H, W, 3) without white margins."""
    from matplotlib.text import Text

    if len(_fonts()) > 1:
        for text in figure.findobj(Text):
            text.set_fontfamily(_fonts())
    with warnings.catch_warnings():
        # characters that no installed font has are drawn as boxes; the CSV beside the figure has the names
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.canvas.draw()
    return _trim_margins(np.asarray(figure.canvas.buffer_rgba())[..., :3])


def _trim_margins(image: np.ndarray, border: int = 12) -> np.ndarray:
    """Cut white margins of `image` down to `border` pixels."""
    drawn = (image != 255).any(axis=2)
    if not drawn.any():
        return image.copy()
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    top, left = max(rows[0] - border, 0), max(columns[0] - border, 0)
    return image[top : rows[-1] + 1 + border, left : columns[-1] + 1 + border].copy()


@functools.cache
def _fonts() -> list[str]:
    """List matplotlib's own font, then the installed fonts for other scripts."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    wanted = (
        *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei"),
        *("Arial Unicode MS", "Noto Sans", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai"),
    )
    return ["DejaVu Sans", *[name for name in wanted if name in installed]]


@functools.cache
def _light_colormap() -> Any:
    """Make a colour map: magma from light to dark without its palest part, white for empty, grey for undefined."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(colormaps["magma_r"](np.linspace(0.06, 1, 256)), "light magma")
    return colours.with_extremes(under="white", bad="#e0e0e0")


def _draw_ticks(axes: Any, names: list[str], classes: int) -> None:
    if names:
        axes.set_xticks(range(classes), labels=names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(classes), labels=names, fontsize=8, parse_math=False)
        axes.tick_params(length=0)
        # thin lines between the cells
        axes.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="#d9d9d9", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    else:
        axes.tick_params(labelsize=8)
    for spine in axes.spines.values():
        spine.set_color("#b0b0b0")


def _write_counts(axes: Any, confusion: np.ndarray, fractions: np.ndarray) -> None:
    for i, j in zip(*np.nonzero(confusion), strict=True):
        count = int(confusion[i, j])
        text = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
        # magma is dark from about its middle, which the square root puts at a fraction of a quarter
        colour = "white" if fractions[i, j] > 0.25 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=8 if len(text) < 4 else 7, color=colour)


def _group_max(fractions: np.ndarray, group: int) -> np.ndarray:
    """Take the largest cell of each `group` x `group` cells; NaN only where all of them are NaN."""
    pad = -len(fractions) % group
    padded = np.pad(np.where(np.isnan(fractions), -1.0, fractions), (0, pad), constant_values=-1.0)
    side = len(padded) // group
    largest = padded.reshape(side, group, side, group).max(axis=(1, 3))
    return np.where(largest < 0, np.nan, largest)


def _log_ticks(maximum: int) -> list[int]:
    """List 0 and powers of ten up to `maximum`, at most five of them."""
    powers = [10**n for n in range(len(str(maximum)))]
    return [0, *powers[:: max(1, -(-len(powers) // 4))]]
