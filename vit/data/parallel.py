"""Processes many images in threads, under a progress bar.

Threads, not processes: Pillow releases Python's lock while it decodes and resizes, nothing has to be pickled, and
results land in shared memory.  The bar goes to standard error, and only where that is a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from vit.processors import count_cpus

_CHUNK = 64  # images a task: long enough to hide the cost of handing it out


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; call the function that is yielded with the number done since the last call."""
    if not sys.stderr.isatty() or total == 0:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


def for_each(work: Callable[[int], object], indices: Iterable[int], total: int, label: str) -> None:
    """Call `work(i)` for every index, in threads, under a progress bar.

    The first exception ends it and is raised here, with nothing left running.
    """
    items = iter(indices)

    def chunk() -> list[int]:
        return [item for _, item in zip(range(_CHUNK), items, strict=False)]

    def run(part: list[int]) -> int:
        for index in part:
            work(index)
        return len(part)

    workers = min(32, count_cpus() + 1)
    with progress(label, total) as advance:
        if total <= _CHUNK or workers == 1:
            while part := chunk():
                advance(run(part))
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: set[Future[int]] = set()
            try:
                while True:
                    # a short queue, so that a million images do not become a million futures
                    while len(waiting) < 4 * workers and (part := chunk()):
                        waiting.add(pool.submit(run, part))
                    if not waiting:
                        return
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        advance(future.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
