"""Run `vit tune-reduction`: find the best schedule of token reduction under a budget, and write the model with it."""

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

_MAX_BYTES = 1 << 30  # of images in memory


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0.

    Raises `VitError` when the model or the data cannot be used, no reduction is within the budget, or the output cannot
    be written.
    """
    from vit.evaluation.reduction import search

    if arguments.output is not None:
        check_folder_name(arguments.output, "--output")
    model, description = load_torch(arguments.model, device=arguments.device, reduction="none")
    validation, test = load_images(arguments, description)
    assert validation.labels is not None
    print(f"judged by {len(validation)} images ({validation.origin})", file=sys.stderr)
    result = search(
        model,
        validation.images,
        validation.labels,
        arguments.budget,
        measure=arguments.measure,
        trials=arguments.trials,
        seed=arguments.seed,
        report=_make_report(),
    )
    print(format_table(result, arguments.measure))
    model.reduce(**result.best.options)
    description = describe_best(model, description, result, validation, test, arguments)
    if "test" in description.metrics:
        print(_format_test_accuracy(model, description, result, test))
    if arguments.output is None:
        print(f"to have it: --reduction {result.best.line}, or --output DIR writes a model that does so by itself")
        return 0
    from vit.inference.bundle import write_bundle
    from vit.inference.export import fits_onnx

    write_bundle(arguments.output, model, description, onnx=fits_onnx(model), images=validation.images[:8])
    print(f"wrote {printable(arguments.output)}; try: vit classify {printable(arguments.output)} photo.jpg")
    return 0


def load_images(arguments: argparse.Namespace, description: Description) -> tuple[Sample, Sample | None]:
    """Load validation images for the search, and test images for the final measurement (None without a test split).

    Raises `VitError` when there are no validation images.
    """
    from vit.data.catalogue import open_data
    from vit.evaluation.report import data_config, trained_splits
    from vit.inference.sample import from_split

    overrides = _parse_overrides(arguments.data)
    config = data_config(description, overrides)
    data = open_data(config, description.class_names, trained_splits(arguments.model, description, config, overrides))
    if not len(data.splits["val"]):
        raise VitError(
            f"{data.name} has no validation images to judge by: set --data val_fraction=0.1, or name other data, such "
            "as --data name=folder root=photos"
        )
    height, width = description.preprocessing.image_size
    image_bytes = 4 * height * width * description.preprocessing.channels
    count = max(16, min(arguments.images, _MAX_BYTES // 2 // image_bytes))
    validation = from_split(data, "val", description.preprocessing, count)
    test = from_split(data, "test", description.preprocessing, count) if len(data.splits["test"]) else None
    return validation, test


def _parse_overrides(pairs: list[str]) -> dict[str, Any] | None:
    """Parse KEY=VALUE pairs, with numbers, true, false and null; None without pairs.  Raises `VitError`."""
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise VitError(f"--data {pair}: expected KEY=VALUE, such as name=folder root=photos")
        try:
            overrides[key] = json.loads(text)
        except ValueError:
            overrides[key] = text
    return overrides or None


def format_table(result: SearchResult, measure: str) -> str:
    """Format accuracy and cost of the model without reduction, then of each candidate, the most accurate first."""
    headings = ["reduction", "cost" if measure == "flops" else "seconds", "images/s", "top-1", "loss"]
    candidates = sorted(result.candidates, key=lambda candidate: (-candidate.top1, candidate.loss))
    rows = [headings, *(_row(candidate, result) for candidate in (result.baseline, *candidates))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                 enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(candidate: Candidate, result: SearchResult) -> list[str]:
    mark = " *" if candidate is result.best else ""
    return [
        candidate.line + mark,
        f"{candidate.cost:.3f}",
        f"{candidate.images_per_second:.0f}",
        f"{candidate.top1:.2%}",
        f"{candidate.loss:.4f}",
    ]


def describe_best(
    model: VisionTransformer,
    description: Description,
    result: SearchResult,
    validation: Sample,
    test: Sample | None,
    arguments: argparse.Namespace,
) -> Description:
    """Describe the model with the best reduction: its temperature, its metrics and the search."""
    from vit.evaluation.calibration import fit_temperature
    from vit.evaluation.metrics import evaluate_logits, scalars
    from vit.evaluation.reduction import compute_logits

    metrics, temperature = {}, 1.0
    for split, sample in (("val", validation), ("test", test)):
        if sample is None:
            continue
        logits = compute_logits(model, sample.images)
        if split == "val":
            temperature = fit_temperature(logits, sample.labels)
        metrics[split] = scalars(evaluate_logits(logits, sample.labels, description.class_names, temperature))
    search_info = {
        "budget": arguments.budget,
        "measure": arguments.measure,
        "cost": result.best.cost,
        "images": len(validation),
        "judged_on": validation.origin,
        "candidates": len(result.candidates),
        "top1": result.best.top1,
        "top1_without": result.baseline.top1,
    }
    return dataclasses.replace(
        description,
        architecture=dict(model.architecture),
        temperature=temperature,
        metrics=metrics,
        training={**description.training, "reduction_search": search_info},
    )


def _format_test_accuracy(
    model: VisionTransformer, description: Description, result: SearchResult, test: Sample | None
) -> str:
    """Format the accuracy on the test images, with and without reduction."""
    from vit.evaluation.reduction import compute_logits, compute_metrics

    assert test is not None
    assert test.labels is not None
    reduced = description.metrics["test"]["top1"]
    model.reduce("none")
    baseline = compute_metrics(compute_logits(model, test.images), test.labels)[0]
    model.reduce(**result.best.options)
    return (
        f"on {len(test)} images that decided nothing ({test.origin}): {reduced:.2%}, without reduction {baseline:.2%}"
    )


def _make_report() -> Any:
    """Make a function that prints a line for each candidate to standard error, if it is a terminal."""
    if not sys.stderr.isatty():
        return lambda candidate: None

    def report(candidate: Candidate) -> None:
        print(f"{candidate.top1:8.2%}  cost {candidate.cost:.3f}  {candidate.line}", file=sys.stderr)

    return report
