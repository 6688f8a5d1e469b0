"""What a person sees while training runs: one live line on a terminal, a plain line now and then elsewhere.

Notable:
- one line for all of training, however many epochs, with the time left by whichever budget ends it;
- drawn by the training thread, twice a second at most, from what `TrainMetrics` has read: it never waits for the
  device;
- while the line is there, messages of the "vit" logger and of Python's warnings appear above it.

Everything goes to standard error.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

import lightning.pytorch as L
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from vit.training.metrics import TrainMetrics
from vit.training.schedule import Schedule

log = logging.getLogger("vit")

_REDRAW = 0.5  # seconds between drawings of the live line
_HEARTBEAT = 10.0  # seconds between plain lines, off a terminal
_IMPROVED = 5.0  # seconds between lines that report a better validation: early on nearly every one is better


class Progress(L.Callback):
    """Show how training goes; the first process only.

    Args:
        schedule: knows the budget and the time spent.
        train_metrics: has the training figures.
    """

    def __init__(self, schedule: Schedule, train_metrics: TrainMetrics) -> None:
        self.schedule, self.train_metrics = schedule, train_metrics
        self.val: dict[str, float] = {}
        self.best = -math.inf
        self._best_epoch = 0
        self._unsaid = False
        self._line: _LiveLine | _NotebookLine | None = None
        self._drawn = self._said = -math.inf

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._said = time.monotonic()
        console = Console(stderr=True)
        if sys.stderr.isatty() and not console.is_dumb_terminal:
            self._line = _LiveLine(console)
        elif in_notebook():
            self._line = _NotebookLine()
        if self._line is not None:
            self._draw(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        if self._line is not None:
            if now - self._drawn >= _REDRAW:
                self._draw(trainer, pl_module)
        elif now - self._said >= _HEARTBEAT and self.train_metrics.latest is not None:
            self._say(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._line is not None and time.monotonic() - self._drawn >= _REDRAW:
            batches = trainer.num_val_batches[dataloader_idx]
            self._draw(trainer, pl_module, f"validating {(batch_idx + 1) / batches:.0%}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        figures = trainer.callback_metrics
        self.val = {key: float(figures[f"val/{key}"]) for key in ("top1", "loss") if f"val/{key}" in figures}
        if self.val.get("top1", -math.inf) > self.best:
            self.best, self._best_epoch, self._unsaid = self.val["top1"], trainer.current_epoch + 1, True
        if self._unsaid and time.monotonic() - self._said >= _IMPROVED:
            self._say(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._close()
            self._say(trainer, pl_module, done=True)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _figures(self, trainer: L.Trainer) -> list[str]:
        """What there is to show, most important first."""
        figures, reading = [], self.train_metrics.latest
        if reading is not None:
            figures += [f"loss {reading.loss:.3f}", f"acc {reading.top1:.1%}"]
        if "top1" in self.val:
            figures.append(f"val {self.val['top1']:.1%}")
        if reading is not None:
            figures.append(f"{_short(reading.images_per_second)} img/s")
        return figures

    def _where(self, trainer: L.Trainer, done: bool = False) -> str:
        budget = self.schedule
        if budget.max_epochs:
            return f"epoch {min(trainer.current_epoch + (not done), budget.max_epochs)}/{budget.max_epochs}"
        if budget.max_steps:
            return f"step {trainer.global_step:,}/{budget.max_steps:,}"
        return f"epoch {max(1, trainer.current_epoch + (not done))}"

    def _left(self, progress: float) -> str:
        spent = self.schedule.spent()
        return f"{_clock(spent * (1 - progress) / progress)} left" if progress > 0 else ""

    def _draw(self, trainer: L.Trainer, module: Any, doing: str = "") -> None:
        assert self._line is not None
        progress = float(module.progress)
        self._line.show(self._where(trainer), progress, [*self._figures(trainer), doing or self._left(progress)])
        self._drawn = time.monotonic()

    def _say(self, trainer: L.Trainer, module: Any, done: bool = False) -> None:
        """One permanent line."""
        progress = float(module.progress)
        parts = [self._where(trainer, done), *self._figures(trainer)]
        if self.best > -math.inf:
            parts.append(f"best val {self.best:.1%} in epoch {self._best_epoch}")
        parts.append(f"{_clock(self.schedule.spent())} in all" if done else self._left(progress))
        log.info("%s", "  ".join(part for part in parts if part))
        self._said, self._unsaid = time.monotonic(), False


class _LiveLine:
    """One line at the bottom of a terminal, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        out, err = sys.stdout, sys.stderr
        # what is printed may be meant for a file; on the terminal it must not break the line
        shared = out.isatty()
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=shared)
        self._live.start()
        # rich stands in for sys.stderr from here on, but log handlers hold on to the stream they were given
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []
        for logger in (log, logging.getLogger()):
            for handler in logger.handlers:
                stream = getattr(handler, "stream", None)
                if isinstance(handler, logging.StreamHandler) and (stream is err or stream is out):
                    handler.setStream(sys.stderr if stream is err else sys.stdout)
                    self._moved.append((handler, stream))

    def show(self, where: str, progress: float, figures: list[str]) -> None:
        figures = [figure for figure in figures if figure]
        room = self._console.width - 1 - sum(len(text) + 2 for text in (where, *figures))
        while room < 4 and len(figures) > 1:  # what stands last is the time left
            room += len(figures.pop(-2)) + 2
        line = Table.grid(padding=(0, 2, 0, 0))
        cells: list[Any] = [f"[bold]{where}[/]"]
        if room >= 5:
            cells.append(ProgressBar(total=1.0, completed=progress, width=min(room - (6 if room >= 14 else 0), 40)))
        if room < 5 or room >= 14:  # in between, the bar says as much
            cells.append(f"{progress:4.0%}")
        cells += figures
        for _ in cells:
            line.add_column(no_wrap=True)
        line.add_row(*cells)
        self._live.update(line, refresh=True)

    def close(self) -> None:
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._live.stop()


class _NotebookLine:
    """One output of a notebook's cell, replaced while training runs; the last one stays."""

    def __init__(self) -> None:
        self._display: Any = None

    def show(self, where: str, progress: float, figures: list[str]) -> None:
        from IPython.display import Pretty, display

        line = Pretty("  ".join([where, f"{progress:.0%}", *(figure for figure in figures if figure)]))
        if self._display is None:
            self._display = display(line, display_id=True)
        else:
            self._display.update(line)

    def close(self) -> None:
        """Leave the line as it is."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _short(number: float) -> str:
    """1234.5 -> "1.2k": three figures or so."""
    if number < 999.5:
        return f"{number:.0f}"
    number, unit = (number / 1e3, "k") if number < 999.5e3 else (number / 1e6, "M")
    return f"{number:.{0 if number >= 99.5 else 1}f}{unit}"


def _clock(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
