"""Write the messages of a run to standard error and to its `train.log`.

Notable:
- `train.log` also has the messages from before the run folder existed, such as images that cannot be read;
- after the run, also after an exception, the "vit" logger is as before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

from vit.files import CannotWrite

log = logging.getLogger("vit")

_ABOVE_CRITICAL = logging.CRITICAL + 1


@contextlib.contextmanager
def show_messages(command: str | None = None) -> Iterator[MemoryHandler]:
    """Show messages on standard error.

    `command` is the call, for the log; None: the command line.  A record with `file_only` is not shown.  If the caller
    shows the messages already, nothing is added.  Yields a handler that buffers messages for `write_messages`.
    """
    level, propagate, handlers = log.level, log.propagate, list(log.handlers)
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, logging.StreamHandler) for handler in handlers):
        stream = logging.StreamHandler()
        stream.setFormatter(logging.Formatter("%(message)s"))
        stream.addFilter(lambda record: not getattr(record, "file_only", False))
        log.addHandler(stream)
        log.propagate = False
    buffered = MemoryHandler(10_000, flushLevel=_ABOVE_CRITICAL, flushOnClose=False)
    log.addHandler(buffered)
    try:
        command = command or shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
        log.info("command: %s", command, extra={"file_only": True})
        yield buffered
    finally:
        buffered.close()
        for handler in set(log.handlers) - set(handlers):
            log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@contextlib.contextmanager
def write_messages(path: Path, buffered: MemoryHandler) -> Iterator[None]:
    """Write the messages to `path` with their times, after those in `buffered`.

    Raises:
        CannotWrite: the file cannot be written; also raised by later messages.
    """
    try:
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CannotWrite.of(path, error) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.removeHandler(buffered)
    buffered.setTarget(file)
    buffered.flush()
    log.addHandler(file)
    try:
        yield
    finally:
        log.removeHandler(file)
        with contextlib.suppress(OSError):  # a failed write has been reported already
            file.close()


class _LogFile(logging.FileHandler):
    """A log file that raises `CannotWrite` on a full disk, where logging would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        log.removeHandler(self)
        raise CannotWrite.of(self.baseFilename, error) from error
