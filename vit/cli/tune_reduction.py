"""`vit tune-reduction`: find which tokens a model can do without, under a budget, and write the model that does so."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from vit.data.decode import printable
from vit.errors import VitError
from vit.files import check_folder_name
from vit.inference.loading import load_torch

if TYPE_CHECKING:
    from vit.evaluation.reduction import Candidate, SearchResult
    from vit.inference.description import Description
    from vit.inference.sample import Sample
    from vit.model import VisionTransformer

_BYTES = 1 << 30  # of images held at once


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns 0.

    Raises `VitError` when the model or the data cannot be used, no reduction keeps to the budget, or the output cannot
    be written.
    """
    from vit.evaluation.reduction import search

    if arguments.output is not None:
        check_folder_name(arguments.output, "--output")
    model, description = load_torch(arguments.model, device=arguments.device, reduction="none")
    shown, held_out = images(arguments, description)
    assert shown.labels is not None
    print(f"judged by {len(shown)} images ({shown.origin})", file=sys.stderr)
    found = search(
        model,
        shown.images,
        shown.labels,
        arguments.budget,
        measure=arguments.measure,
        trials=arguments.trials,
        seed=arguments.seed,
        told=_progress(),
    )
    print(table(found, arguments.measure))
    model.reduce(**found.best.options)
    description = described(model, description, found, shown, held_out, arguments)
    if "test" in description.metrics:
        print(_verdict(model, description, found, held_out))
    if arguments.output is None:
        print(f"to have it: --reduction {found.best.line}, or --output DIR writes a model that does so by itself")
        return 0
    from vit.inference.bundle import write_bundle
    from vit.inference.export import fits_onnx

    write_bundle(arguments.output, model, description, onnx=fits_onnx(model), images=shown.images[:8])
    print(f"wrote {printable(arguments.output)}; try: vit classify {printable(arguments.output)} photo.jpg")
    return 0


def images(arguments: argparse.Namespace, description: Description) -> tuple[Sample, Sample | None]:
    """Validation images to judge by, and others that decide nothing: of the test split, None where there is none.

    Raises `VitError` when there are no validation images.
    """
    from vit.data.catalogue import open_data
    from vit.evaluation.report import data_config, trained_splits
    from vit.inference.sample import from_split

    given = _overrides(arguments.data)
    config = data_config(description, given)
    data = open_data(config, description.class_names, trained_splits(arguments.model, description, config, given))
    if not len(data.splits["val"]):
        raise VitError(
            f"{data.name} has no validation images to judge by: set --data val_fraction=0.1, or name other data, such "
            "as --data name=folder root=photos"
        )
    height, width = description.preprocessing.image_size
    most = max(16, min(arguments.images, _BYTES // 2 // (4 * height * width * description.preprocessing.channels)))
    shown = from_split(data, "val", description.preprocessing, most)
    test = from_split(data, "test", description.preprocessing, most) if len(data.splits["test"]) else None
    return shown, test


def _overrides(pairs: list[str]) -> dict[str, Any] | None:
    """KEY=VALUE pairs, numbers and true, false, null read as such; None for none.  Raises `VitError`."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, mark, text = pair.partition("=")
        if not mark:
            raise VitError(f"--data {pair}: expected KEY=VALUE, such as name=folder root=photos")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found or None


def table(found: SearchResult, measure: str) -> str:
    """Accuracy against cost: the model without reduction, then each candidate, the best of its cost first."""
    heads = ["reduction", "cost" if measure == "flops" else "seconds", "images/s", "top-1", "loss"]
    rows = [heads, _row(found.whole, found)]
    rows += [_row(each, found) for each in sorted(found.candidates, key=lambda each: (-each.top1, each.loss))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                 enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(each: Candidate, found: SearchResult) -> list[str]:
    mark = " *" if each is found.best else ""
    return [
        each.line + mark,
        f"{each.cost:.3f}",
        f"{each.images_per_second:.0f}",
        f"{each.top1:.2%}",
        f"{each.loss:.4f}",
    ]


def described(
    model: VisionTransformer,
    description: Description,
    found: SearchResult,
    shown: Sample,
    held_out: Sample | None,
    arguments: argparse.Namespace,
) -> Description:
    """The description of the model with the best reduction: its own temperature and figures, and how it was found."""
    from vit.evaluation.calibration import fit_temperature
    from vit.evaluation.metrics import evaluate_logits, scalars
    from vit.evaluation.reduction import scores

    metrics, temperature = {}, 1.0
    for split, sample in (("val", shown), ("test", held_out)):
        if sample is None:
            continue
        logits = scores(model, sample.images)
        if split == "val":
            temperature = fit_temperature(logits, sample.labels)
        metrics[split] = scalars(evaluate_logits(logits, sample.labels, description.class_names, temperature))
    how = {
        "budget": arguments.budget,
        "measure": arguments.measure,
        "cost": found.best.cost,
        "images": len(shown),
        "judged_on": shown.origin,
        "candidates": len(found.candidates),
        "top1": found.best.top1,
        "top1_without": found.whole.top1,
    }
    return dataclasses.replace(
        description,
        architecture=dict(model.architecture),
        temperature=temperature,
        metrics=metrics,
        training={**description.training, "reduction_search": how},
    )


def _verdict(model: VisionTransformer, description: Description, found: SearchResult, held_out: Sample | None) -> str:
    """Accuracy with and without on the images that decided nothing."""
    from vit.evaluation.reduction import figures, scores

    assert held_out is not None
    assert held_out.labels is not None
    with_it = description.metrics["test"]["top1"]
    model.reduce("none")
    without = figures(scores(model, held_out.images), held_out.labels)[0]
    model.reduce(**found.best.options)
    return (
        f"on {len(held_out)} images that decided nothing ({held_out.origin}): {with_it:.2%}, without reduction "
        f"{without:.2%}"
    )


def _progress() -> Any:
    """A line on standard error for each candidate, where a person watches."""
    if not sys.stderr.isatty():
        return lambda candidate: None

    def told(candidate: Candidate) -> None:
        print(f"{candidate.top1:8.2%}  cost {candidate.cost:.3f}  {candidate.line}", file=sys.stderr)

    return told
