"""List and draw the mistakes of a classifier, the most confident first: they show wrong labels and weak classes."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit.data.dataset import Split
from vit.data.decode import ImageError
from vit.evaluation.figures import new_figure, render
from vit.evaluation.metrics import as_arrays, compute_outcomes
from vit.evaluation.names import readable
from vit.files import write_text

MAX_PICTURED = 20
"""Number of mistakes that are drawn with their image."""

_SIDE = 256  # pixels that an image is decoded to, for the figure
_COLUMNS = 5


@dataclass(frozen=True)
class Mistake:
    """Describes an image whose class is not the predicted one.

    Attributes:
        index: index of the image in the split.
        true, predicted: class indices.
        probability: probability of the predicted class.
        true_probability: probability of the true class.
    """

    index: int
    true: int
    predicted: int
    probability: float
    true_probability: float


def find_mistakes(logits: Any, labels: Any, temperature: float = 1.0) -> list[Mistake]:
    """Find all mistakes, by falling probability of the predicted class; equal ones in the order of the split."""
    logits, labels = as_arrays(logits, labels)
    results = compute_outcomes(logits, labels, temperature)
    wrong = np.flatnonzero(~results.correct)
    wrong = wrong[np.argsort(-results.confidences[wrong], kind="stable")]
    predicted = logits[wrong].argmax(axis=1)
    return [
        Mistake(
            index=int(i),
            true=int(labels[i]),
            predicted=int(class_index),
            probability=float(results.confidences[i]),
            true_probability=float(np.exp(-results.losses[i])),
        )
        for i, class_index in zip(wrong, predicted, strict=True)
    ]


def write_mistakes(
    path: str | os.PathLike[str], mistakes: Sequence[Mistake], split: Split, class_names: Sequence[str]
) -> None:
    """Write all mistakes as CSV, in their order: rank from 1, path, index, classes, probabilities in full precision.

    Names and paths are written byte for byte.  Raises `VitError` when the file cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rank", "path", "index", "true", "predicted", "probability", "true_probability"])
    for rank, mistake in enumerate(mistakes, 1):
        table.writerow(
            [
                rank,
                split.name(mistake.index),
                mistake.index,
                class_names[mistake.true],
                class_names[mistake.predicted],
                mistake.probability,
                mistake.true_probability,
            ]
        )
    write_text(path, text.getvalue())


def mistakes_figure(mistakes: Sequence[Mistake], split: Split, class_names: Sequence[str]) -> np.ndarray:
    """Draw the first `MAX_PICTURED` mistakes: each image above its true and predicted class and their probabilities.

    For an image that can no longer be read, its file name is drawn.

    Returns:
        uint8 (H, W, 3).
    """
    pictured = list(mistakes[:MAX_PICTURED])
    columns = min(_COLUMNS, max(len(pictured), 2))
    rows = max(1, -(-len(pictured) // columns))
    width, cell, top = 2.0 * columns, 2.3, 0.45
    height = cell * rows + top
    figure = new_figure(width, height)
    if not pictured:
        heading = f"no mistakes among {len(split):,} images"
    elif len(pictured) < len(mistakes):
        heading = f"the {len(pictured)} most confident of {len(mistakes):,} mistakes among {len(split):,} images"
    else:
        heading = f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)} among {len(split):,} images"
    if pictured:
        heading += " (true class \N{RIGHTWARDS ARROW} predicted)"
    figure.text(0.1 / width, 1 - 0.25 / height, heading, fontsize=11, va="center")
    for index, mistake in enumerate(pictured):
        left = (index % columns) * 2.0 + 0.1
        bottom = height - top - (index // columns + 1) * cell
        axes = figure.add_axes((left / width, (bottom + 0.55) / height, 1.75 / width, 1.7 / height))
        axes.set_axis_off()
        _draw_image(axes, split, mistake.index)
        lines = (
            (readable(class_names[mistake.true], 27), 0.43, "#222222"),
            (f"\N{RIGHTWARDS ARROW} {readable(class_names[mistake.predicted], 25)}", 0.26, "#b3263a"),
            (
                f"{_format_percent(mistake.probability)}, true class {_format_percent(mistake.true_probability)}",
                0.1,
                "#777777",
            ),
        )
        for text, above, colour in lines:
            figure.text(left / width, (bottom + above) / height, text, fontsize=8, color=colour, parse_math=False)
    return render(figure)


def _draw_image(axes: Any, split: Split, index: int) -> None:
    try:
        pixels = to_rgb(split.image(index, (_SIDE, _SIDE)))
    except ImageError as error:
        text = f"cannot be read:\n{readable(os.path.basename(split.name(index)), 24)}\n{readable(error.reason, 24)}"
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=7, color="#777777", parse_math=False)
        return
    # small images are drawn pixel by pixel: the model saw them so
    interpolation = "nearest" if max(pixels.shape[:2]) < 100 else "antialiased"
    axes.imshow(pixels, interpolation=interpolation, vmin=0, vmax=255, cmap="gray")
    axes.set_anchor("SW")


def to_rgb(image: Any) -> np.ndarray:
    """Convert an image to uint8 (H, W, 3) of at most `_SIDE` pixels; of many channels, the first three or the first."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        channels = image if image.ndim == 3 else image[..., None]
        channels = channels[..., :3] if channels.shape[-1] >= 3 else channels[..., [0, 0, 0]]
        image = Image.fromarray(np.ascontiguousarray(channels))
    image = image.convert("RGB")
    if max(image.size) > _SIDE:
        image.thumbnail((_SIDE, _SIDE))
    return np.asarray(image)


def _format_percent(probability: float) -> str:
    """Format a probability in per cent; only 0 and 1 themselves become 0% and 100%."""
    for digits in (0, 1, 2):
        if f"{probability:.{digits}%}" not in (f"{0:.{digits}%}", f"{1:.{digits}%}"):
            return f"{probability:.{max(digits, 1)}%}"
    return "> 99.99%" if probability > 0.5 else "< 0.01%"
