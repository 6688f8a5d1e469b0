"""Contestants measured in turn, so that what else the machine does falls on all of them.

Two kinds: whole processes (`run`), which is what a person at a prompt waits for, and `Contestant`, a process that stays
alive between its turns (`benchmarks/programs/served.py`), for what is measured without start-up.

Notable: the peak of memory is the kernel's figure for the largest single process.  It starts at that of the process
that starts it, so what calls this imports neither NumPy nor torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.results import parser

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).parent / "programs"
TOLERANCE = 1e-3
"""By how much logits and probabilities may differ between contestants, relative to their size where that is over 1."""


@dataclass
class Ran:
    """A process that ran: seconds of the clock and of the processor, the peak of memory in MB, what it wrote."""

    seconds: float
    cpu: float
    megabytes: float
    output: str

    def figures(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu": self.cpu, "megabytes": self.megabytes}


def environment(ours: bool) -> dict[str, str]:
    """Of a contestant: this checkout is what is measured, the peers do not see it, and threads are as each chooses."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_ALBUMENTATIONS_UPDATE": "1"}
    return kept | ({"PYTHONPATH": str(ROOT)} if ours else {})


def run(command: Sequence[str | os.PathLike[str]], *, ours: bool, folder: Path | None = None) -> Ran:
    """Run a command and measure it from outside.  Leaves with what it wrote when it fails."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            [os.fspath(each) for each in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=environment(ours),
            cwd=folder,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))}\n{errors.read().decode(errors='replace')}")
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ran(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)


@dataclass
class Contestant:
    """One that takes turns: `builder` of a program in `benchmarks/programs`, run by our interpreter or the peers'.

    Attributes
        answer: what it gave, to be compared; None where there is nothing to compare.
        first: seconds of its first call.
        turns: what it took, by round.
        megabytes: the peak of its memory, when it has ended.
    """

    name: str
    program: str
    builder: str
    given: dict[str, Any]
    python: Path
    ours: bool
    answer: Any = None
    first: float = 0.0
    turns: list[dict[str, float]] = field(default_factory=list)
    megabytes: float = 0.0
    _process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [str(self.python), str(PROGRAMS / self.program), self.builder, json.dumps(self.given)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(self.ours)
        )
        reply = self._read()
        self.answer, self.first = reply["answer"], reply["first"]

    def turn(self, least: float) -> None:
        self.turns.append(self._ask(str(least)))

    def end(self) -> None:
        self.megabytes = self._ask("end")["megabytes"]
        assert self._process is not None
        self._process.wait()

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def seconds(self) -> list[float]:
        return [turn["seconds"] for turn in self.turns]

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ({self.program} {self.builder}) ended with status {self._process.wait()}")
        return json.loads(line)

    def figures(self) -> dict[str, Any]:
        return {"turns": self.turns, "megabytes": self.megabytes, "first": self.first}


def contest(contestants: Sequence[Contestant], rounds: int, least: float) -> None:
    """Start all, one after another; then `rounds` rounds of turns of at least `least` seconds; then end all.

    Every other round runs in the opposite order, so that none always follows the same neighbour.
    """
    try:
        for each in contestants:
            each.start()
        for round_ in range(rounds):
            for each in reversed(contestants) if round_ % 2 else contestants:
                each.turn(least)
        for each in contestants:
            each.end()
    finally:
        for each in contestants:
            each.kill()


def measured(
    commands: Mapping[str, Callable[[], Ran]], rounds: int, warm: int = 1, tell: bool = True
) -> dict[str, list[Ran]]:
    """Run each command `rounds` times, in turn, after `warm` rounds that do not count (files come into memory)."""
    found: dict[str, list[Ran]] = {name: [] for name in commands}
    for round_ in range(-warm, rounds):
        for name in reversed(list(commands)) if round_ % 2 else commands:
            ran = commands[name]()
            if tell:
                print(f"{name}: {ran.seconds:.2f} s, {ran.cpu:.2f} s of the processor", file=sys.stderr, flush=True)
            if round_ >= 0:
                found[name].append(ran)
    return found


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """How many times longer than `base` each took, round by round."""
    return [value / other for value, other in zip(values, base, strict=True)]


def difference(answer: Any, expected: Any) -> float:
    """The largest difference between two lists of lists of numbers, relative to `expected`'s size where over 1."""
    pairs = [
        (one, other)
        for row, other_row in zip(answer, expected, strict=True)
        for one, other in zip(row, other_row, strict=True)
    ]
    scale = max(1.0, *(abs(other) for _, other in pairs))
    return max(abs(one - other) for one, other in pairs) / scale


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def options(
    name: str, about: str, contestants: Iterable[str], *, rounds: int, least: float | None = None
) -> argparse.ArgumentParser:
    """The options of a measurement in turns; with `least`, of one whose contestants stay alive between them."""
    made = parser(name, about, peers=True)
    made.add_argument("--contestants", default=",".join(contestants), help="of %(default)s")
    made.add_argument("--rounds", type=int, default=rounds, help="(%(default)s)")
    if least is not None:
        made.add_argument("--least", type=float, default=least, help="seconds of a turn, at least (%(default)s)")
    made.add_argument("--image-size", type=int, default=224)
    return made


def entered(
    names: Iterable[str], program: str, given: dict[str, Any], ours: Container[str], folder: Path
) -> list[Contestant]:
    """Those of `names`, builders of `program`, that can run here; `ours` are run by our interpreter."""
    found = ((name, interpreter(name in ours, folder)) for name in names)
    return [
        Contestant(name, program, name, given, python, name in ours) for name, python in found if python is not None
    ]


def limit(processors: int | None) -> None:
    """Let this process, and all that it starts, use that many processors; None for all that there are."""
    if processors is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])


def interpreter(ours: bool, folder: Path) -> Path | None:
    """Which Python runs a contestant; None for a peer's where there is no environment of the peers."""
    return Path(sys.executable) if ours else peers.python(folder)
