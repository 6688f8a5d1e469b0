"""Where the messages of a run go: to standard error and to its `train.log`, for as long as the run lasts.

Notable:
- what is said before there is a run folder (which images cannot be read, say) is in `train.log` as well;
- whoever calls `train` finds the "vit" logger as it was before, also after an exception, so that a second run in the
  same process never writes to a stream that is gone.
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

_NEVER = logging.CRITICAL + 1


@contextlib.contextmanager
def shown(command: str | None = None) -> Iterator[MemoryHandler]:
    """Show messages on standard error.

    `command` is what was called, for the log; None: the command line.
    A record with `file_only` is left out.  Where the caller shows the messages already, nothing is added.
    Gives what gathers the messages until `kept` takes them over.
    """
    level, propagate, handlers = log.level, log.propagate, list(log.handlers)
    log.setLevel(logging.INFO)
    if not any(isinstance(each, logging.StreamHandler) for each in handlers):
        stream = logging.StreamHandler()
        stream.setFormatter(logging.Formatter("%(message)s"))
        stream.addFilter(lambda record: not getattr(record, "file_only", False))
        log.addHandler(stream)
        log.propagate = False
    early = MemoryHandler(10_000, flushLevel=_NEVER, flushOnClose=False)
    log.addHandler(early)
    try:
        command = command or shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
        log.info("command: %s", command, extra={"file_only": True})
        yield early
    finally:
        early.close()
        for handler in set(log.handlers) - set(handlers):
            log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


@contextlib.contextmanager
def kept(path: Path, early: MemoryHandler) -> Iterator[None]:
    """Write the messages to `path`, with their times, those of `early` first.

    Raises `CannotWrite`, as does whatever logs a message later.
    """
    try:
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CannotWrite.of(path, error) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.removeHandler(early)
    early.setTarget(file)
    early.flush()
    log.addHandler(file)
    try:
        yield
    finally:
        log.removeHandler(file)
        with contextlib.suppress(OSError):  # what could not be written was reported when it was
            file.close()


class _LogFile(logging.FileHandler):
    """A log whose disk may fill up: that ends the run in one line, where logging would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        log.removeHandler(self)
        raise CannotWrite.of(self.baseFilename, error) from error
