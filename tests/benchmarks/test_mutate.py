"""`python -m benchmarks mutate` plants faults that compile, and tells those that tests notice from the others."""

from __future__ import annotations

import ast
import importlib.util
import re
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutate", ROOT / "benchmarks/mutate.py")
assert SPEC is not None
assert SPEC.loader is not None
mutate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutate)

SOURCE = '''
def clamp(x: int = 3, *, low: float = 0.5) -> "float":
    """At least 1 < 2."""
    if x < low and not x == 7:
        raise ValueError(f"{x + 1}" + "a" % 3)
    log.info("%s", x + 1)
    return max(x, clip(-low, x)) + x ** 2


def other():
    return 1
'''


def test_each_fault_changes_one_place_that_computes() -> None:
    found = {(fault.before, fault.after) for fault in mutate.faults(SOURCE, "clamp")}
    assert found == {
        ("3", "(4)"),
        ("0.5", "(0.6)"),
        ("x < low and not x == 7", "(x < low or not x == 7)"),
        ("x < low", "(x <= low)"),
        ("not x == 7", "(x == 7)"),
        ("x == 7", "(x != 7)"),
        ("7", "(8)"),
        ("max(x, clip(-low, x)) + x ** 2", "(max(x, clip(-low, x)) - x ** 2)"),
        ("clip(-low, x)", "(clip(x, -low))"),
        ("-low", "(low)"),
        ("x ** 2", "(x * 2)"),
        ("2", "(3)"),
    }
    for fault in mutate.faults(SOURCE):
        ast.parse(fault.source)
        changed = [
            pair for pair in zip(SOURCE.splitlines(), fault.source.splitlines(), strict=True) if len(set(pair)) > 1
        ]
        assert len(changed) == 1
        assert SOURCE.splitlines()[fault.line - 1] == changed[0][0]
    assert ("1", "(2)") in {(fault.before, fault.after) for fault in mutate.faults(SOURCE)}


def test_modules_of_the_project_can_be_mutated() -> None:
    for path in sorted((ROOT / "vit/model").glob("*.py")):
        for fault in list(mutate.faults(path.read_text("utf-8")))[::20]:
            ast.parse(fault.source)


def test_what_tests_notice_is_killed_and_the_rest_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "tests").mkdir()
    module = tmp_path / "vit/part.py"
    module.write_text("def add(a, b):\n    return a + b\n\n\ndef less(a, b):\n    return a < b\n", "utf-8")
    (tmp_path / "vit/__init__.py").touch()
    test = "from vit.part import add, less\n\n\ndef test():\n    assert add(1, 2) == 3\n    assert less(1, 2)\n"
    (tmp_path / "tests/test_sums.py").write_text(test, "utf-8")
    (tmp_path / "tests/test_nothing.py").write_text("def test():\n    pass\n", "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", "utf-8")
    tests = mutate.tests_of(tmp_path, Path("vit/part.py"))
    assert tests == ["tests/test_sums.py"]
    before = module.read_text("utf-8")
    chosen = list(mutate.faults(before))
    assert mutate.judge(tmp_path, Path("vit/part.py"), chosen, tests, time.monotonic() + 100) == [True, False]
    assert module.read_text("utf-8") == before
    assert capsys.readouterr().out.splitlines() == [
        "killed    vit/part.py:2: a + b  ->  (a - b)",
        "SURVIVED  vit/part.py:6: a < b  ->  (a <= b)",
    ]
    hangs = mutate.planted(before, "return a + b", "return add(a, b) if input() else 0")
    assert mutate.judge(tmp_path, Path("vit/part.py"), [hangs], tests, time.monotonic() + 100) == [True]
    assert mutate.judge(tmp_path, Path("vit/part.py"), chosen, tests, time.monotonic() - 1) == []
    with pytest.raises(SystemExit, match="no tests name it"):
        mutate.judge(tmp_path, Path("vit/__init__.py"), [hangs], [], time.monotonic() + 100)
    with pytest.raises(SystemExit, match=re.escape("'a' occurs 5 times; expected once")):
        mutate.planted(before, "a", "b")
