"""Progress: what a person reads, on a terminal and in a file."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as L
import pytest

from vit.training import progress as progresses

SCRIPT = Path(__file__).with_name("small_fit.py")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FINAL = re.compile(
    r"epoch 2/2  loss \d\.\d{3}  acc \d+\.\d%  val \d+\.\d%  [\d.]+[kM]? img/s"
    r"  best val \d+\.\d% in epoch [12]  0:\d\d in all"
)


@pytest.fixture(scope="module")
def small() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_fit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("vit")
    propagate, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.INFO, "vit"):
        yield caplog
    logger.propagate = propagate


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith(("epoch", "step"))]


class Terminal:
    """A terminal of a given width that remembers everything shown."""

    def __init__(self, columns: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._shown = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a terminal that nobody holds any more
            while data := os.read(self.master, 65536):
                self._shown += data

    def close(self) -> str:
        os.close(self.slave)
        self._thread.join(60)
        os.close(self.master)
        return self._shown.decode()


def on_terminal(monkeypatch: pytest.MonkeyPatch, call: Any, columns: int = 80) -> str:
    """What `call` shows when standard error is a terminal and messages go there too."""
    terminal = Terminal(columns)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))  # rich asks this process's own standard streams otherwise
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("vit")
    with os.fdopen(os.dup(terminal.slave), "w", buffering=1) as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            try:
                call()
            finally:
                assert handler.stream is stream, "the handler has its stream back"
                assert sys.stderr is stream
                logger.removeHandler(handler)
    return terminal.close()


def screen_lines(shown: str) -> list[str]:
    """The lines as they stay: what was erased or written over is gone."""
    rows, row = [""], 0
    for piece in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", shown):
        if piece == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif piece == "\x1b[2K":
            rows[row] = ""
        elif match := re.fullmatch(r"\x1b\[(\d*)A", piece):
            row = max(0, row - int(match[1] or 1))
        elif piece != "\r" and not piece.startswith("\x1b"):
            rows[row] += piece
    return [line.rstrip() for line in rows if line.strip()]


def test_in_a_pipe_there_are_plain_lines(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "bar=True", "board=False"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FORCE_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("epoch")]
    assert FINAL.fullmatch(lines[-1]), lines
    assert len(lines) <= 3


def test_on_a_terminal_one_line_lives_and_messages_stay_whole(tmp_path: Path) -> None:
    terminal = Terminal()
    command = [sys.executable, str(SCRIPT), str(tmp_path), "bar=True", "board=False"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    for name in ("COLUMNS", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal.slave, env=environment)
    out, _ = process.communicate(timeout=200)
    shown = terminal.close()
    assert process.returncode == 0, shown
    assert out == b""
    lines = screen_lines(shown)
    assert "a message from the middle" in lines
    assert "printed from the middle" in lines
    assert FINAL.fullmatch(lines[-1]), lines
    assert not any("left" in line for line in lines[-1:]), "the live line is gone"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor comes back"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_live_line_fits_the_terminal(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(progresses, "_REDRAW", 0.0)
    shown = on_terminal(monkeypatch, lambda: small.fit(tmp_path, bar=True, board=False), columns)
    drawn = [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", shown)]
    live = [line for line in drawn if re.match(r"epoch [12]/2 +[━╸╺\d]", line)]
    assert len(live) >= 16
    assert max(map(len, live)) <= columns
    if columns >= 80:
        share = r" +9\d%" if columns > 100 else ""
        whole = rf"epoch 2/2  [━╸╺]+{share}  loss \d.\d+  acc \d+.\d%  val \d+.\d%  .+ img/s  0:\d\d left"
        assert any(re.fullmatch(whole, line) for line in live), live
        assert any("validating 100%" in line for line in live)
    else:
        assert any(re.fullmatch(r"epoch 2/2  [━╸╺]+  loss \d.\d+  0:\d\d left", line) for line in live), live


def test_after_an_exception_the_terminal_is_as_before(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fault(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("something else")

    def call() -> None:
        with pytest.raises(RuntimeError, match="something else"):
            small.fit(tmp_path, bar=True, board=False, extra=[Fault()])
        logging.getLogger("vit").error("what follows")

    shown = on_terminal(monkeypatch, call)
    assert screen_lines(shown)[-1] == "what follows"
    assert shown.rstrip().endswith("what follows")
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_a_dumb_terminal_gets_plain_lines(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> None:
        monkeypatch.setenv("TERM", "dumb")
        small.fit(tmp_path, bar=True, board=False)

    assert "\x1b" not in on_terminal(monkeypatch, call)


def test_early_on_not_every_better_validation_is_told(
    small: ModuleType, tmp_path: Path, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    small.fit(tmp_path, bar=True, board=False, epochs=20, train=16)
    assert len(lines_of(messages)) <= 3


def test_better_validations_are_told(
    small: ModuleType, tmp_path: Path, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progresses, "_IMPROVEMENT_EVERY", 0.0)
    figures = []

    class Record(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            figures.append(float(trainer.callback_metrics["val/top1"]))

    small.fit(tmp_path, "optim.lr=0.02", bar=True, board=False, epochs=5, extra=[Record()])
    better = [i for i in range(5) if figures[i] > max(figures[:i], default=-1)]
    lines = lines_of(messages)
    assert [int(re.match(r"epoch (\d)/5", line)[1]) for line in lines] == [i + 1 for i in better] + [5]  # type: ignore[index]
    best = figures.index(max(figures))
    assert f"best val {max(figures):.1%} in epoch {best + 1}" in lines[-1]
    assert f"val {figures[-1]:.1%}" in lines[-1]


def test_without_validations_there_is_a_sign_of_life(
    small: ModuleType, tmp_path: Path, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progresses, "_HEARTBEAT", 0.0)
    small.fit(tmp_path, bar=True, board=False, epochs=None, max_steps=10, val=0)
    lines = lines_of(messages)
    assert [line.split("  ")[0] for line in lines] == [f"step {k}/10" for k in (4, 5, 6, 7, 8, 9, 10, 10)]
    assert all(re.search(r"acc \d+.\d%  [\d.]+k? img/s  0:\d\d left$", line) for line in lines[:-1])
    assert "val" not in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3599.4, "59:59"), (3700, "1:01:40"), (-3, "0:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert progresses._format_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7.4, "7"), (999.4, "999"), (999.6, "1.0k"), (12_345, "12.3k"), (123_456, "123k"), (2.5e6, "2.5M")],
)
def test_short_numbers(number: float, text: str) -> None:
    assert progresses._format_number(number) == text
