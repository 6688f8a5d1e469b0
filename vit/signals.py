"""End a program cleanly on Ctrl-C and SIGTERM, also while a library is running."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any, NoReturn


class Interruption:
    """Remember whether the process was asked to end.

    A signal's exception may be raised in any line of a library, and some libraries swallow it or replace it by an error
    of their own.  So code that turns errors into messages calls `check` first.
    """

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if the process was asked to end."""
        if self.requested:
            raise KeyboardInterrupt

    def handle_signal(self, number: int, frame: Any) -> NoReturn:
        """Remember the request and raise `KeyboardInterrupt`."""
        self.requested = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Raise `KeyboardInterrupt` on SIGINT and SIGTERM in the body, so that cleanup runs.

    After a signal, any error that leaves the body becomes `KeyboardInterrupt`.  A signal that the caller handles or
    ignores keeps its handler.  Outside the main thread nothing changes.  Nested bodies share one `Interruption`.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    current = {number: signal.getsignal(number) for number in defaults}
    owners = [handler.__self__ for handler in current.values() if isinstance(handler, MethodType)]
    interruption = next((owner for owner in owners if isinstance(owner, Interruption)), None) or Interruption()
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: handler for number, handler in defaults.items() if current[number] is handler}
    try:
        for number in handlers:
            signal.signal(number, interruption.handle_signal)
        yield interruption
        interruption.check()
    except Exception:
        interruption.check()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
