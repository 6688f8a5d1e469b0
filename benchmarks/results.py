"""How a measurement is written down: figures with their spread, with machine, versions and command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit.files import atomic_write

HERE = Path(__file__).parent


def parser(name: str, about: str, peers: bool = False) -> argparse.ArgumentParser:
    """The options that every benchmark has; with `peers` also those of measurements beside other tools."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    if peers:
        from benchmarks.peers import add_option

        add_option(made)
        made.add_argument("--processors", type=int, metavar="N", help="use so many only (all)")
    made.add_argument("--json", type=Path, help="where the figures go (default: benchmarks/measured/NAME.json)")
    made.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    return made


def spread(values: Sequence[float], digits: int = 2, unit: str = "", sign: str = "") -> str:
    """Median and range: `1.23 ms (1.20 to 1.31)`; `sign="+"` for differences."""
    low, middle, high = (f"{value:{sign}.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle}{unit} ({low} to {high})"


def machine(peers: Path | None = None) -> dict[str, Any]:
    """What the figures depend on; with the versions of the peers where their folder is given."""
    from importlib.metadata import version

    import torch

    import vit

    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "onnxruntime": version("onnxruntime"),
        "vit": vit.__version__,
        **_versions(peers),
        "date": time.strftime("%Y-%m-%d"),
    }


def _versions(peers: Path | None) -> dict[str, str]:
    if peers is None:
        return {}
    from benchmarks.peers import versions

    return {name: number for name, number in versions(peers).items() if name not in ("torch", "onnxruntime")}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first the heads, as a Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def report(name: str, title: str, rows: Sequence[Sequence[str]], figures: Any, options: argparse.Namespace) -> None:
    """Print the table and write the figures; with `--record` append both to RESULTS.md."""
    where = machine(getattr(options, "peers", None))
    command = " ".join(["python -m benchmarks", *_typed(sys.argv)])
    print(f"\n{table(rows)}")
    path = options.json or HERE / "measured" / f"{name}.json"
    whole = {"benchmark": name, "command": command, "machine": where, "figures": figures}
    with atomic_write(path) as part:
        part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if options.record:
        about = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
        with open(HERE / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write(f"\n## {title}\n\n`{command}`  \n{about}\n\n{table(rows)}\n")


def _typed(arguments: Sequence[str]) -> list[str]:
    """What was typed, without the folders of this machine: of an absolute path only its name."""
    shown = []
    for each in arguments[1:]:
        key, equals, value = each.rpartition("=")
        prefix, colon, path = value.rpartition(":")  # local-dir:/folder
        if os.path.isabs(path):
            each = f"{key}{equals}{prefix}{colon}{Path(path).name}"
        if each != "--record":
            shown.append(each)
    return shown
