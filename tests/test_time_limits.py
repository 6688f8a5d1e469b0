"""Every test ends by itself: none waits without a limit, and one that hangs is ended with its stack printed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def unbounded(tree: ast.AST) -> list[int]:
    """The lines of calls that may wait for ever."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(word.arg in (None, "timeout") for word in node.keywords):
            continue
        match node.func:
            case ast.Attribute(ast.Name("subprocess"), "run" | "call" | "check_call" | "check_output"):
                lines.append(node.lineno)
            case ast.Attribute(_, "communicate" | "urlopen"):
                lines.append(node.lineno)
            case ast.Attribute(_, "wait" | "join" | "get") if not node.args:
                lines.append(node.lineno)
    return lines


def test_a_wait_without_a_limit_is_found() -> None:
    for call in ("subprocess.run(command, check=True)", "p.wait()", "p.communicate(b'')", "queue.get()", "t.join()"):
        assert unbounded(ast.parse(call)) == [1]
    for call in ("subprocess.run(command, timeout=9)", "p.wait(9)", "p.communicate(timeout=9)", "''.join(words)"):
        assert unbounded(ast.parse(call)) == []


def test_no_test_waits_without_a_limit() -> None:
    files = sorted(TESTS.rglob("*.py"))
    found = [f"{file}:{line}" for file in files for line in unbounded(ast.parse(file.read_bytes()))]
    assert not found, "give these calls a timeout: " + ", ".join(found)


HANGS = """
import signal, threading, time

def test_that_hears_the_limit():
    wait_for_a_lock = threading.Lock()
    wait_for_a_lock.acquire()
    wait_for_a_lock.acquire()

def test_that_does_not():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(1000)

def test_that_follows():
    pass
"""


def test_a_test_that_hangs_is_ended_and_shown(tmp_path: Path) -> None:
    """Also one that is deaf to signals, as compiled code can be; what follows runs."""
    (tmp_path / "test_hangs.py").write_text(HANGS)
    conftest = (TESTS / "conftest.py").read_text().replace("limit + 60", "limit + 2")
    (tmp_path / "conftest.py").write_text(conftest)
    command = [sys.executable, "-m", "pytest", "-c", TESTS.parent / "pyproject.toml", "--rootdir", tmp_path]
    options = ["-n1", "--timeout=3", "-p", "no:cacheprovider", "--no-cov", tmp_path]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "2 failed, 1 passed" in done.stdout
    assert "Failed: Timeout (>3.0s)" in done.stdout
    assert "wait_for_a_lock.acquire()" in done.stdout
    assert "crashed while running" in done.stdout
    assert "in test_that_does_not" in done.stderr
