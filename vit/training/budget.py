"""How often something may be done that costs time, so that all of it stays a given share of a whole training."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator


class CostEstimate:
    """What something takes, in seconds: the middle of the last five times, since now and then a machine is busy."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=5)

    def note(self, seconds: float) -> None:
        """It took so long this time."""
        self._last.append(seconds)

    @property
    def seconds(self) -> float:
        """0 where it was never done."""
        return statistics.median(self._last) if self._last else 0.0


class Budget:
    """Seconds spent on one kind of thing, against a share of the seconds that training takes.

    What it takes as a whole is told from how far it is.  What is spent at the start, and what is kept for the end,
    comes off the top; of the rest more is given out at first, when most happens: the square root of what is done, so
    that a tenth of the way allows a third.

    Args:
        share: of the time of a training that runs to its end, at most.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.spent = self.last = 0.0
        self._began = self._from = self._start = 0.0

    def start(self, progress: float = 0.0) -> None:
        """Training goes on from `progress`, of which 1 is the end."""
        self._began, self._from = time.monotonic(), progress

    def started(self) -> None:
        """What was spent up to here belongs to the start."""
        self._start = self.spent

    def left(self, progress: float, reserve: float = 0.0) -> float:
        """Seconds that may still be spent by now, with `reserve` kept for the end; below 0 where there was more."""
        done = max(1e-6, min(1.0, (progress - self._from) / max(1e-6, 1 - self._from)))
        whole = self.share * (time.monotonic() - self._began) / done
        return (whole - self._start - reserve) * math.sqrt(done) - (self.spent - self._start)

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """Do something, and put down as `last` what it took."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.last = time.monotonic() - began
            self.spent += self.last
