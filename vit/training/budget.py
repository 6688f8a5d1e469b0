"""Limit the time of optional work to a fraction of the training time."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator


class CostEstimate:
    """Estimate a duration by the median of the last five measurements."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=5)

    def add(self, seconds: float) -> None:
        """Add a measurement."""
        self._last.append(seconds)

    @property
    def seconds(self) -> float:
        """The estimate; 0 without measurements."""
        return statistics.median(self._last) if self._last else 0.0


class Budget:
    """Track the seconds spent on one kind of work, against a fraction of the training time.

    The total training time is estimated from progress.  The time spent at startup and a reserve for the end are
    subtracted first.  The rest becomes available with the square root of progress, because most happens early: a tenth
    of training allows a third.

    Args:
        fraction: the limit, as a fraction of the total training time.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.spent = self.last = 0.0
        self._began = self._start_progress = self._startup_seconds = 0.0

    def start(self, progress: float = 0.0) -> None:
        """Start or resume training at `progress` in [0, 1]."""
        self._began, self._start_progress = time.monotonic(), progress

    def end_startup(self) -> None:
        """Count the time spent so far as startup."""
        self._startup_seconds = self.spent

    def remaining(self, progress: float, reserve: float = 0.0) -> float:
        """Return the seconds available at `progress`, less `reserve` for the end; negative if too much was spent."""
        done = max(1e-6, min(1.0, (progress - self._start_progress) / max(1e-6, 1 - self._start_progress)))
        total = self.fraction * (time.monotonic() - self._began) / done
        return (total - self._startup_seconds - reserve) * math.sqrt(done) - (self.spent - self._startup_seconds)

    @contextlib.contextmanager
    def spend(self) -> Iterator[None]:
        """Add the duration of the body to `spent`, and set `last` to it."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.last = time.monotonic() - start
            self.spent += self.last
