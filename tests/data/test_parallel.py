"""Work in threads: all of it, once, and the first error ends it."""

import io
import threading

import pytest
from rich.console import Console

from vit.data import parallel


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 5000])
def test_everything_once(count):
    seen = []
    parallel.for_each(seen.append, range(count), count, "Counting")
    assert sorted(seen) == list(range(count))


def test_the_first_error_ends_it():
    done = []

    def work(i):
        if i == 500:
            raise ValueError("at 500")
        done.append(i)

    with pytest.raises(ValueError, match="at 500"):
        parallel.for_each(work, range(100_000), 100_000, "Counting")
    assert len(done) < 50_000
    count = len(done)
    assert threading.active_count() < 20
    assert len(done) == count


def test_the_queue_stays_short():
    pulled = []

    def source():
        for i in range(20_000):
            pulled.append(i)
            yield i

    gate = threading.Event()
    most = []

    def work(i):
        if i == 0:
            gate.wait(2)  # while one is stuck, the others may not run away with the whole list
        most.append(len(pulled) - len(most))

    threading.Timer(0.3, gate.set).start()
    parallel.for_each(work, source(), 20_000, "Counting")
    assert len(most) == 20_000
    assert max(most) < 20_000


def test_no_bar_without_a_terminal(capsys):
    parallel.for_each(lambda i: None, range(1000), 1000, "Counting")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert Console(stderr=True).is_terminal
    parallel.for_each(lambda i: None, range(1000), 1000, "Counting sheep")
    assert "Counting sheep" in terminal.getvalue()
    assert "1000/1000" in terminal.getvalue()
