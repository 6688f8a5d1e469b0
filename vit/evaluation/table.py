"""Print an evaluation in the terminal: the metrics, the worst classes and the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vit.evaluation.names import readable

NUM_WORST = 5
"""Number of worst classes in the table."""
LOWER_IS_BETTER = frozenset({"deletion", "positive", "agreement", "random_head", "random_model"})
"""Measures of attention maps for which a lower value is better."""


def print_summary(metrics: dict[str, Any]) -> None:
    """Print the result of `vit.evaluation.report.evaluate` to standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    split = metrics["split"]
    block = metrics[split]
    source = metrics["data"]
    origin = source["name"] + (f" ({source['root']})" if source.get("root") else "")
    rate = f"{metrics['images_per_second']:,.0f} images/s"
    title = f"{block['images']:,} {split} images of {origin} in {metrics['seconds']:.1f} s ({rate})"
    console.print(Text(readable(title, 400)), soft_wrap=True)

    figures = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for heading in ("", "calibrated", "T = 1"):
        figures.add_column(heading, justify="left" if not heading else "right")
    figures.add_row("top-1", f"{block['top1']:.2%}", "")
    if len(block["per_class"]) > 5:
        figures.add_row("top-5", f"{block['top5']:.2%}", "")
    figures.add_row("loss", f"{block['loss']:.4f}", f"{block['loss_uncalibrated']:.4f}")
    figures.add_row("ECE", f"{block['ece']:.4f}", f"{block['ece_uncalibrated']:.4f}")
    figures.add_row("temperature", f"{block['temperature']:.3f}", "1")
    console.print(figures)

    worst = worst_classes(block["per_class"])
    if worst:
        classes = Table(box=None, pad_edge=False, header_style="dim")
        classes.add_column("worst classes", no_wrap=True)
        for heading in ("precision", "recall", "F1", "images"):
            classes.add_column(heading, justify="right")
        for row in worst:
            cells = (f"{row[key]:.1%}" if row[key] is not None else "-" for key in ("precision", "recall", "f1"))
            classes.add_row(Text(readable(row["class"], 32)), *cells, f"{row['support']:,}")
        console.print()
        console.print(classes)
    if metrics.get("faithfulness"):
        print_faithfulness(metrics["faithfulness"])
    if metrics["bad_files"]:
        console.print(f"\n{metrics['bad_files']:,} files could not be read and were left out")
    changed = changed_since(metrics)
    if changed:
        console.print(Text(f"\n{changed}", style="yellow"), soft_wrap=True)
    console.print()
    console.print(Text(f"written to {readable(metrics['folder'], 400)}"), soft_wrap=True)
    for name, content in (
        ("metrics.json", "these figures, and those of every class"),
        ("confusion.png", "which classes are taken for which; counts in confusion.csv"),
        ("reliability.png", "whether probabilities mean what they say"),
        ("mistakes.png", "the most confident mistakes; all of them in mistakes.csv"),
    ):
        console.print(Text.assemble(f"  {name:<17}", (content, "dim")), soft_wrap=True)


def changed_since(metrics: dict[str, Any]) -> str | None:
    """Format a warning when training measured another accuracy on the same split; None within rounding."""
    before, block = metrics["at_training"], metrics[metrics["split"]]
    if before is None:
        return None
    # half a per cent, or one image: a GPU and a CPU may differ on an image between two classes
    rounding = max(0.005, 1.5 / block["images"])
    if before["images"] == block["images"] and abs(before["top1"] - block["top1"]) <= rounding:
        return None
    return (
        f"training measured top-1 {before['top1']:.2%} on {before['images']:,} {metrics['split']} images: the data has "
        "changed since, and its split may have too, so that images trained on may be among these"
    )


def worst_classes(rows: list[dict[str, Any]], count: int = NUM_WORST) -> list[dict[str, Any]]:
    """Select the `count` classes with the lowest F1 below 1; of equal ones the larger class comes first."""
    imperfect = [row for row in rows if row["support"] and row["f1"] < 1]
    return sorted(imperfect, key=lambda row: (row["f1"], -row["support"], row["index"]))[:count]


def print_faithfulness(measured: Mapping[str, Any]) -> None:
    """Print the result of `vit.evaluation.faithful.measure_faithfulness`: a row for each measure."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    methods, chance = measured["methods"], measured["chance"]
    names = list(dict.fromkeys(name for values in methods.values() for name in values))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for method in methods:
        table.add_column(method.replace("_", "\n"), justify="right", no_wrap=True)
    for name in names:
        title = f"{name.replace('_', ' ')} {'↓' if name in LOWER_IS_BETTER else '↑'}"
        table.add_row(title, *(_format_cell(values.get(name)) for values in methods.values()))
    console.print(f"\nattention maps on {measured['images']:,} images, with 95% intervals; ↓ lower is better")
    console.print(table)
    console.print(Text("* better than random maps beyond the interval of the difference", style="dim"))
    if chance:
        console.print(Text("by chance: " + ", ".join(f"{k} {v:.3f}" for k, v in chance.items()), style="dim"))
    untrusted = _not_better_than_random(methods)
    if untrusted:
        console.print(Text(f"not to be trusted here, no better than random: {', '.join(untrusted)}", style="yellow"))


def _format_cell(row: Mapping[str, Any] | None) -> Any:
    """Format the mean, with * where it beats random maps, above its interval."""
    from rich.text import Text

    if row is None:
        return Text("")
    mark = "*" if row["better"] else " "
    ends = [f"{row[key]:.2f}".replace("0.", ".") for key in ("low", "high")]
    return Text.assemble(f"{row['mean']:.3f}{mark}\n", (f"{ends[0]}-{ends[1]}", "dim"))


def _not_better_than_random(methods: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """List the methods that are better than random maps in neither deletion nor insertion."""
    tests = ("deletion", "insertion")
    return [
        method.replace("_", " ")
        for method, values in methods.items()
        if method != "random" and not any(values[name]["better"] for name in tests)
    ]
