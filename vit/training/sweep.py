"""Run `--multirun`: each job in a process of its own, and one table at the end.

Notable:
- A job's process has no -m in its arguments, so Lightning can start the other processes of a distributed job with them.
  No job inherits memory, threads or errors of another.
- A job that fails reports it in one line and the others still run; the sweep then ends with that job's status.
- Each result is appended at once as a line of `results.jsonl` in the sweep's folder.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit.files import CannotWrite, atomic_write

_RESULT_VARIABLE = "VIT_JOB_RESULT"  # path of the file for the job's result


def write_job_result(result: Any, error: str | None = None) -> None:
    """Write a job's result, or the message of its error, for the sweep; do nothing outside a sweep."""
    path = os.environ.get(_RESULT_VARIABLE)
    if path is None or "VIT_RUN_FOLDER" in os.environ:  # a process that the job has started
        return
    metrics, folder = getattr(result, "metrics", None), getattr(result, "folder", None)
    record = {"metrics": metrics or {}, "folder": folder and str(folder), "error": error}
    Path(path).write_text(json.dumps(record, default=str), encoding="utf-8")


def is_multirun(args: argparse.Namespace) -> bool:
    """Return whether the command line asks for several jobs."""
    return bool(args.multirun) or any(text.replace(" ", "") == "hydra.mode=MULTIRUN" for text in args.overrides)


class Sweep:
    """Run the jobs of one `--multirun`.

    Args:
        args: Hydra's parsed arguments.
        folder: folder of the results; a number is appended if it holds another sweep.
        program: the program of a job for Python, such as a script or ("-m", "vit", "train").

    Raises:
        CannotWrite: the folder cannot be made.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, program: Sequence[str]) -> None:
        self.flags = _job_flags(args)
        self.folder = _make_sweep_folder(folder)
        self.program = program

    def run(self, overrides: Sequence[str], number: int, monitor: str | None = None) -> float | None:
        """Run the job of these overrides in its own process; return its `monitor` metric for a search.

        A job that fails raises nothing: its process has printed the reason, and the table shows it.
        """
        print(f"job {number}: {' '.join(overrides)}", file=sys.stderr, flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="vit-sweep-") as scratch:
            result_file = Path(scratch) / "result.json"
            command = [sys.executable, *self.program, *self.flags, *overrides]
            status = _run_process(command, {**os.environ, _RESULT_VARIABLE: str(result_file)})
            result: dict[str, Any] = {"metrics": {}, "folder": None, "error": None}
            if result_file.is_file():
                result = json.loads(result_file.read_text(encoding="utf-8"))
        row = {"job": number, "overrides": list(overrides), "status": status,
               "seconds": round(time.monotonic() - start, 1), **result}  # fmt: skip
        with open(self.folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        if status in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        return read_metric(result["metrics"], monitor) if monitor else None

    def rows(self) -> list[dict[str, Any]]:
        """Return the results of all jobs so far, in order."""
        file = self.folder / "results.jsonl"
        if not file.is_file():  # removed
            return []
        lines = file.read_text(encoding="utf-8").splitlines()
        return sorted((json.loads(line) for line in lines), key=lambda row: row["job"])

    def finish(self) -> int:
        """Print the table, write it as `results.csv`, and return the exit status of the sweep.

        That is 0; 2 if jobs failed only by mistakes of the user, or there were no jobs; 1 if one failed otherwise.
        """
        rows = self.rows()
        if not rows:
            remove_empty_folder(self.folder)
            return 2
        table = build_table(rows)
        with atomic_write(self.folder / "results.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
        print("\n" + format_columns(table))
        failed = [row["status"] for row in rows if row["status"]]
        print(f"\n{len(rows) - len(failed)} of {len(rows)} jobs done; {self.folder / 'results.csv'}")
        return 0 if not failed else 2 if set(failed) == {2} else 1


def _make_sweep_folder(folder: Path) -> Path:
    """Make `folder`, or the first of `folder_2`, `folder_3`, ... that has no table of another sweep."""
    for attempt in itertools.count(1):
        candidate = folder if attempt == 1 else folder.with_name(f"{folder.name}_{attempt}")
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            (candidate / "results.jsonl").touch(exist_ok=False)
            return candidate
        except FileExistsError:
            if not candidate.is_dir():
                raise CannotWrite(f"cannot write the results of the sweep: {candidate} is not a folder") from None
        except OSError as error:
            raise CannotWrite.of(candidate, error) from error
    raise AssertionError("unreachable")


def read_metric(metrics: Mapping[str, Any], name: str) -> float | None:
    """Return an entry of nested metrics, such as "val/top1", or None."""
    value: Any = metrics
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


COLUMNS = ("test/top1", "test/loss", "val/top1", "train_seconds")


def build_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Build a table with a header and a row per job: number, swept settings, metrics, run folder or failure.

    Jobs that differ only in the seed get another row with their mean and standard deviation.
    """
    settings = [dict(text.lstrip("+~").partition("=")[::2] for text in row["overrides"]) for row in rows]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    swept = [name for name in names if len({setting.get(name) for setting in settings}) > 1]
    columns = [name for name in COLUMNS if any(read_metric(row["metrics"], name) is not None for row in rows)]
    table = [["job", *swept, *columns, "run"]]
    for row, setting in zip(rows, settings, strict=True):
        cells = [_format_cell(read_metric(row["metrics"], name), name) for name in columns]
        failure = f"failed: {row['error'] or 'status ' + str(row['status'])}" if row["status"] else ""
        outcome = " ".join(text for text in (row["folder"], failure) if text)
        table.append([str(row["job"]), *(setting.get(name, "") for name in swept), *cells, outcome])
    if "seed" in swept:
        table += _seed_means(rows, settings, swept, columns)
    return table


def _seed_means(
    rows: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, str]], swept: list[str], columns: list[str]
) -> list[list[str]]:
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row, setting in zip(rows, settings, strict=True):
        groups.setdefault(tuple(setting.get(name, "") for name in swept if name != "seed"), []).append(row)
    lines = []
    for values, members in groups.items():
        cells = []
        for name in columns:
            numbers = [value for row in members if (value := read_metric(row["metrics"], name)) is not None]
            spread = f" ± {statistics.stdev(numbers):.4f}" if len(numbers) > 1 and name != "train_seconds" else ""
            cells.append(_format_cell(statistics.fmean(numbers), name) + spread if numbers else "")
        remaining = iter(values)
        labels = [f"all {len(members)}" if name == "seed" else next(remaining) for name in swept]
        if len(members) > 1 and any(cells):
            lines.append(["mean", *labels, *cells, ""])
    return lines


def _format_cell(value: float | None, name: str) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if name == "train_seconds" else f"{value:.4f}"


def format_columns(table: Sequence[Sequence[str]]) -> str:
    """Format the rows as text in aligned columns."""
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def remove_empty_folder(folder: Path) -> None:
    """Remove the folder of a sweep without jobs, and parents that are empty then."""
    for name in ("multirun.yaml", "results.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for directory in (folder, folder.parent, folder.parent.parent):
        try:
            directory.rmdir()
        except OSError:
            return


def _job_flags(args: argparse.Namespace) -> list[str]:
    """Return the arguments of a job's process beside its overrides: where the configuration is."""
    flags = []
    for name in ("config_path", "config_name", "config_dir"):
        value = getattr(args, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", value]
    return flags


def _run_process(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command to its end and return its status.

    Ctrl-C reaches both processes; this one waits until the command has ended cleanly.
    """
    process = subprocess.Popen(command, env=dict(env))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
