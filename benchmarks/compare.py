"""Whether a change left what the project gives as it was: losses, weights, logits, maps, files, what commands print.

    python -m benchmarks compare --against main          this working tree beside a commit, in one go
    python -m benchmarks compare --record before.json    write down what there is now
    python -m benchmarks compare before.json             what has changed since
    python -m benchmarks compare --record before.json --against COMMIT      write down what a commit gives

Equal means equal bit by bit.  Bits depend on processor and versions, so a record is compared where it was made.  What
is recorded, and how, is in `benchmarks/programs/record_state.py`.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "programs/record_state.py"
PARTS = ("digits", "folder", "logits", "maps", "exported", "config", "commands")
SHOWN = 12
"""Lines of a difference, at most."""


def main(arguments: Sequence[str]) -> int:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("file", nargs="?", type=Path, help="a record, or a folder with record.json")
    options.add_argument("--record", action="store_true", help="write the record, of the working tree or of COMMIT")
    options.add_argument("--against", metavar="COMMIT", help="compare with this commit of the repository")
    options.add_argument("--whole", action="store_true", help="the whole default run instead of five epochs of it")
    options.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="of %(default)s")
    given = options.parse_args(arguments)
    parts = given.only.split(",")
    if given.file is None and (given.record or not given.against):
        options.error("expected a file, or --against COMMIT")
    if given.file and given.against and not given.record:
        options.error("expected a file or --against COMMIT, not both")
    if unknown := [part for part in parts if part not in PARTS]:
        options.error(f"--only: no {unknown[0]!r}; there are {', '.join(PARTS)}")
    path = given.file / "record.json" if given.file and given.file.is_dir() else given.file
    with tempfile.TemporaryDirectory() as folder:
        if given.against:
            checkout = Path(folder) / "checkout"
            extract(given.against, checkout)
            before = record(checkout, parts, given.whole)
        elif given.record:
            before = record(ROOT, parts, given.whole)
        elif path.is_file():
            before = json.loads(path.read_text("utf-8"))
        else:
            options.error(f"{path}: no such file; --record writes it")
    if given.record:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(before, indent=1) + "\n", "utf-8")
        print(f"wrote {path}: {sum(map(len, before['parts'].values()))} items")
        return 0
    before["parts"] = {part: before["parts"][part] for part in parts if part in before["parts"]}
    now = record(ROOT, list(before["parts"]), before["whole"])
    if before["machine"] != now["machine"]:
        print(f"recorded on another machine, bits may differ: {before['machine']}, now {now['machine']}")
    return report(before["parts"], now["parts"])


def extract(commit: str, folder: Path) -> None:
    """The files of a commit."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        sys.exit(f"{commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def record(checkout: Path, parts: Sequence[str], whole: bool = False) -> dict[str, Any]:
    """What a checkout gives, from a process of its own with one thread and no network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIT_", "HF_"))}
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    settings |= {"PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore", "TZ": "UTC"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, "-P", str(PROGRAM), str(checkout), str(out), "--only", ",".join(parts)]
        done = subprocess.run(command + ["--whole"] * whole, cwd=folder, env={**kept, **settings})
        if done.returncode:
            sys.exit(f"recording {checkout} failed")
        return {"machine": _machine(), "whole": whole, "parts": json.loads(out.read_text("utf-8"))}


def _machine() -> dict[str, str]:
    from benchmarks.results import machine

    return {key: str(value) for key, value in machine().items() if key in ("cpu", "python", "torch", "onnxruntime")}


def report(before: dict[str, Any], now: dict[str, Any]) -> int:
    """Print a line an item, with what differs under it; 1 when anything does."""
    same = different = 0
    for part in before:
        for item in sorted(before[part].keys() | now[part].keys()):
            found = list(differences(before[part].get(item), now[part].get(item)))
            print(f"{'differs' if found else 'same':8} {part}: {item}")
            print("".join(f"           {line}\n" for line in found[:SHOWN]), end="")
            if len(found) > SHOWN:
                print(f"           ... and {len(found) - SHOWN} more")
            different, same = different + bool(found), same + (not found)
    print(f"{same} the same, {different} different")
    return int(different > 0)


def differences(before: Any, now: Any, place: str = "", tolerance: float = 0.0) -> Iterator[str]:
    """Lines that say where two entries differ, and by how much.  A "tolerance" in a dictionary is for what is in it."""
    front = f"{place}: " if place else ""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        if "sha256" in before and "sha256" in now:
            yield front + _arrays(before, now)
            return
        tolerance = before.get("tolerance", tolerance)
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{place}.{key}" if place else str(key)
            if key not in now or key not in before:
                yield f"{inner}: {'is gone' if key in before else 'is new'}"
            else:
                yield from differences(before[key], now[key], inner, tolerance)
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            yield f"{front}{len(before)} entries, now {len(now)}"
        for number, (old, new) in enumerate(zip(before, now, strict=False)):
            yield from differences(old, new, f"{place}[{number}]", tolerance)
    elif isinstance(before, str) and isinstance(now, str):
        for line in list(difflib.unified_diff(before.splitlines(), now.splitlines(), lineterm="", n=0))[2:]:
            if not line.startswith("@@"):
                yield front + line
    elif _numbers(before, now):
        if not abs(now - before) <= tolerance * abs(before):
            yield f"{front}{before!r}, now {now!r} ({now - before:+.1e})"
    else:
        yield f"{front}{_short(before)}, now {_short(now)}"


def _arrays(before: dict[str, Any], now: dict[str, Any]) -> str:
    if before["array"] != now["array"]:
        return f"{before['array']}, now {now['array']}"
    pairs = list(zip(before["values"], now["values"], strict=True))
    apart, scale = max(abs(a - b) for a, b in pairs), max(abs(a) for a, _ in pairs)
    return f"{apart:.1e} apart where values are up to {scale:.1e}, at {len(pairs)} places looked at"


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) < 80 else f"{text[:80]}..."
