"""Whether the tests notice faults: plants one at a time in a copy of the project, and runs the tests of that module.

    python -m benchmarks mutate vit/training/optim.py                        ten faults, drawn at random
    python -m benchmarks mutate vit/training/optim.py --only orthogonalise --count 0       all faults of a function
    python -m benchmarks mutate vit/data/augment.py --fault "< config.erasing" "< config.erasing + 0.05"
    python -m benchmarks mutate vit/*/*.py --count 1                         one fault in every file

A fault is an exchanged operator, comparison, constant or pair of arguments.  The tests of a module are the test files
that are called after it or name it.  Prints a line a fault; exit status 1 when one survived.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAIRS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE)]
PAIRS += [(ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot), (ast.Mod, ast.FloorDiv)]
OPERATORS = {ast.Pow: ast.Mult, **dict(PAIRS), **{after: before for before, after in PAIRS}}
SYMMETRIC = re.compile(r"\b(max|min|maximum|minimum|gcd|isclose|allclose|equal|logical_\w+)$")
FOR_PEOPLE = ("Error", "log.", "print", "warn")
"""Parts of the names of calls whose arguments are messages."""


class Fault(NamedTuple):
    line: int
    before: str
    after: str
    source: str  # of the whole file with the fault


def main(arguments: Sequence[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks mutate", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("files", nargs="+", type=Path, help="modules of vit/")
    options.add_argument("--only", metavar="NAME", help="faults in this function or class")
    options.add_argument("--fault", nargs=2, metavar=("OLD", "NEW"), help="plant this one; OLD occurs once in the file")
    options.add_argument("--tests", nargs="+", metavar="FILE", help="the tests to run")
    options.add_argument("--count", type=int, default=10, help="faults a file; 0: all (%(default)s)")
    options.add_argument("--minutes", type=float, default=30, help="no fault is planted later (%(default)s)")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args(arguments)
    end, killed = time.monotonic() + 60 * given.minutes, []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "project"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*_cache", "__pycache__", "runs", "measured"))
        for file in (path.resolve().relative_to(ROOT) for path in given.files):
            source = (ROOT / file).read_text("utf-8")
            found = [planted(source, *given.fault)] if given.fault else list(faults(source, given.only))
            random.Random(f"{given.seed} {file}").shuffle(found)
            killed += judge(place, file, found[: given.count or None], given.tests or tests_of(ROOT, file), end)
    print(f"{sum(killed)} of {len(killed)} killed")
    return int(not all(killed))


def judge(place: Path, file: Path, chosen: Sequence[Fault], tests: Sequence[str], end: float) -> list[bool]:
    """Plant each fault in the copy of the project at `place`; returns for each whether the tests failed."""
    began, killed, original = time.monotonic(), [], (place / file).read_text("utf-8")
    if chosen and (not tests or not passes(place, tests, max(60.0, end - began))):
        sys.exit(f"{file}: {'its tests fail without a fault' if tests else 'no tests name it; --tests FILE'}")
    limit = 3 * (time.monotonic() - began) + 30
    for fault in chosen:
        if time.monotonic() > end:
            print(f"{file}: out of time, {len(chosen) - len(killed)} faults left out")
            break
        (place / file).write_text(fault.source, "utf-8")
        killed.append(not passes(place, tests, limit))
        state = "killed" if killed[-1] else "SURVIVED"
        print(f"{state:8}  {file}:{fault.line}: {fault.before}  ->  {fault.after}", flush=True)
    (place / file).write_text(original, "utf-8")
    return killed


def passes(place: Path, tests: Sequence[str], seconds: float) -> bool:
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", *tests]
    settings = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(command, cwd=place, env=settings, capture_output=True, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:  # a fault that hangs is noticed
        return False


def tests_of(root: Path, file: Path) -> list[str]:
    """Test files that are called after a module, and then those that name it."""
    module, tests = ".".join(file.with_suffix("").parts), sorted((root / "tests").rglob("test_*.py"))
    parent, _, name = module.rpartition(".")
    words = re.compile(rf"{re.escape(module)}\b|from {re.escape(parent)} import .*\b{name}\b")
    first = [path for path in tests if path.stem == f"test_{name}" and path.parent.name in file.parts]
    found = [*first, *(path for path in tests if path not in first and words.search(path.read_text("utf-8")))]
    return [str(path.relative_to(root)) for path in found]


def planted(source: str, old: str, new: str) -> Fault:
    if source.count(old) != 1:
        sys.exit(f"{old!r} occurs {source.count(old)} times; expected once")
    return Fault(source[: source.index(old)].count("\n") + 1, old, new, source.replace(old, new))


def faults(source: str, only: str | None = None) -> Iterator[Fault]:
    """Every fault that can be planted in a module, or in its functions and classes of one name."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    for start in [node for node in ast.walk(tree) if getattr(node, "name", None) == only] if only else [tree]:
        for node in computing(start):
            text = lines[node.lineno - 1].encode()
            before = text[node.col_offset : node.end_col_offset].decode()
            for changed in changes(node) if node.lineno == node.end_lineno else ():
                after = f"({ast.unparse(changed)})"
                line = text[: node.col_offset].decode() + after + text[node.end_col_offset :].decode()
                whole = "".join([*lines[: node.lineno - 1], line, *lines[node.lineno :]])
                yield Fault(node.lineno, before, after, whole)


def computing(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that compute something: no annotations, no messages, no parts of formatted strings."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            message = isinstance(child, ast.Call) and any(word in ast.unparse(child.func) for word in FOR_PEOPLE)
            aside = isinstance(child, ast.Raise | ast.JoinedStr) or name in ("annotation", "returns", "decorator_list")
            if isinstance(child, ast.AST) and not message and not aside:
                if isinstance(child, ast.expr):
                    yield child
                yield from computing(child)


def changes(node: ast.expr) -> Iterator[ast.expr]:
    """The node with one thing exchanged."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.BinOp | ast.BoolOp) and type(new.op) in OPERATORS:
        new.op = OPERATORS[type(new.op)]()
        yield new
    elif isinstance(new, ast.Compare) and len(new.ops) == 1:
        new.ops = [OPERATORS[type(new.ops[0])]()]
        yield new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        yield new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        other = {bool: not new.value, int: new.value + 1, float: 1.2 * new.value or 0.1}
        yield ast.Constant(other[type(new.value)])
    elif isinstance(new, ast.Call) and len(new.args) > 1 and not SYMMETRIC.search(ast.unparse(new.func)):
        new.args[:2] = new.args[1::-1]
        yield new
