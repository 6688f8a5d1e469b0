"""Show the progress of training: one live line on a terminal, a plain line now and then elsewhere.

Notable:
- one line for the whole training, with the time left until the first budget is spent;
- the training thread draws it at most twice a second from `TrainMetrics`, so it never waits for the device;
- messages of the "vit" logger and Python warnings appear above the line.

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
_IMPROVEMENT_EVERY = 5.0  # seconds between lines that report a better validation


class Progress(L.Callback):
    """Show the progress of training, on the first process only.

    Args:
        schedule: the budgets and the time spent.
        train_metrics: the training metrics.
    """

    def __init__(self, schedule: Schedule, train_metrics: TrainMetrics) -> None:
        self.schedule, self.train_metrics = schedule, train_metrics
        self.val: dict[str, float] = {}
        self.best = -math.inf
        self._best_epoch = 0
        self._unreported = False
        self._line: _LiveLine | _NotebookLine | None = None
        self._drawn_at = self._reported_at = -math.inf

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._reported_at = time.monotonic()
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
            if now - self._drawn_at >= _REDRAW:
                self._draw(trainer, pl_module)
        elif now - self._reported_at >= _HEARTBEAT and self.train_metrics.latest is not None:
            self._log_line(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._line is not None and time.monotonic() - self._drawn_at >= _REDRAW:
            batches = trainer.num_val_batches[dataloader_idx]
            self._draw(trainer, pl_module, f"validating {(batch_idx + 1) / batches:.0%}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        self.val = {key: float(metrics[f"val/{key}"]) for key in ("top1", "loss") if f"val/{key}" in metrics}
        if self.val.get("top1", -math.inf) > self.best:
            self.best, self._best_epoch, self._unreported = self.val["top1"], trainer.current_epoch + 1, True
        if self._unreported and time.monotonic() - self._reported_at >= _IMPROVEMENT_EVERY:
            self._log_line(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._close()
            self._log_line(trainer, pl_module, done=True)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _format_metrics(self, trainer: L.Trainer) -> list[str]:
        """Format the metrics, the most important first."""
        texts, reading = [], self.train_metrics.latest
        if reading is not None:
            texts += [f"loss {reading.loss:.3f}", f"acc {reading.top1:.1%}"]
        if "top1" in self.val:
            texts.append(f"val {self.val['top1']:.1%}")
        if reading is not None:
            texts.append(f"{_format_number(reading.images_per_second)} img/s")
        return texts

    def _format_position(self, trainer: L.Trainer, done: bool = False) -> str:
        budget = self.schedule
        if budget.max_epochs:
            return f"epoch {min(trainer.current_epoch + (not done), budget.max_epochs)}/{budget.max_epochs}"
        if budget.max_steps:
            return f"step {trainer.global_step:,}/{budget.max_steps:,}"
        return f"epoch {max(1, trainer.current_epoch + (not done))}"

    def _format_time_left(self, progress: float) -> str:
        spent = self.schedule.spent()
        return f"{_format_time(spent * (1 - progress) / progress)} left" if progress > 0 else ""

    def _draw(self, trainer: L.Trainer, module: Any, activity: str = "") -> None:
        assert self._line is not None
        progress = float(module.progress)
        self._line.show(
            self._format_position(trainer),
            progress,
            [*self._format_metrics(trainer), activity or self._format_time_left(progress)],
        )
        self._drawn_at = time.monotonic()

    def _log_line(self, trainer: L.Trainer, module: Any, done: bool = False) -> None:
        """Log one line of progress."""
        progress = float(module.progress)
        parts = [self._format_position(trainer, done), *self._format_metrics(trainer)]
        if self.best > -math.inf:
            parts.append(f"best val {self.best:.1%} in epoch {self._best_epoch}")
        parts.append(f"{_format_time(self.schedule.spent())} in all" if done else self._format_time_left(progress))
        log.info("%s", "  ".join(part for part in parts if part))
        self._reported_at, self._unreported = time.monotonic(), False


class _LiveLine:
    """One line at the bottom of a terminal, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        out, err = sys.stdout, sys.stderr
        # output to a file is left alone; output to the terminal must not break the line
        shared = out.isatty()
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=shared)
        self._live.start()
        # rich has replaced sys.stderr, but log handlers still have the original stream
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        for logger in (log, logging.getLogger()):
            for handler in logger.handlers:
                stream = getattr(handler, "stream", None)
                if isinstance(handler, logging.StreamHandler) and (stream is err or stream is out):
                    handler.setStream(sys.stderr if stream is err else sys.stdout)
                    self._redirected.append((handler, stream))

    def show(self, position: str, progress: float, metrics: list[str]) -> None:
        metrics = [text for text in metrics if text]
        room = self._console.width - 1 - sum(len(text) + 2 for text in (position, *metrics))
        while room < 4 and len(metrics) > 1:  # the last entry is the time left
            room += len(metrics.pop(-2)) + 2
        line = Table.grid(padding=(0, 2, 0, 0))
        cells: list[Any] = [f"[bold]{position}[/]"]
        if room >= 5:
            cells.append(ProgressBar(total=1.0, completed=progress, width=min(room - (6 if room >= 14 else 0), 40)))
        if room < 5 or room >= 14:  # in between, the bar is enough
            cells.append(f"{progress:4.0%}")
        cells += metrics
        for _ in cells:
            line.add_column(no_wrap=True)
        line.add_row(*cells)
        self._live.update(line, refresh=True)

    def close(self) -> None:
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._live.stop()


class _NotebookLine:
    """One output of a notebook cell, replaced while training runs."""

    def __init__(self) -> None:
        self._display: Any = None

    def show(self, position: str, progress: float, metrics: list[str]) -> None:
        from IPython.display import Pretty, display

        line = Pretty("  ".join([position, f"{progress:.0%}", *(text for text in metrics if text)]))
        if self._display is None:
            self._display = display(line, display_id=True)
        else:
            self._display.update(line)

    def close(self) -> None:
        """Do nothing: the last line stays."""


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _format_number(number: float) -> str:
    """Format a number with about three digits: 1234.5 -> "1.2k"."""
    if number < 999.5:
        return f"{number:.0f}"
    number, unit = (number / 1e3, "k") if number < 999.5e3 else (number / 1e6, "M")
    return f"{number:.{0 if number >= 99.5 else 1}f}{unit}"


def _format_time(seconds: float) -> str:
    """Format seconds: 75 -> "1:15", 3700 -> "1:01:40"."""
    total = max(0, round(seconds))
    minutes, rest = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
