"""Ctrl-C and SIGTERM end a program in the same way: cleanly, and whatever the library does that is running then."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any, NoReturn


class Interruption:
    """Whether the process was asked to end.

    An exception may come out of any line of any library, and some swallow it or raise an error of their own in its
    place; so whoever turns errors into messages asks here first.
    """

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if the process was asked to end."""
        if self.requested:
            raise KeyboardInterrupt

    def request(self, number: int, frame: Any) -> NoReturn:
        """Answer a signal."""
        self.requested = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Raise `KeyboardInterrupt` on SIGINT and SIGTERM in the body, so that what is half written is removed.

    An error that leaves the body after such a signal is `KeyboardInterrupt` too.  A signal that the caller handles or
    ignores keeps its handler; outside the main thread nothing changes.  Inside another such body it is that one's.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    now = {number: signal.getsignal(number) for number in usual}
    around = [handler.__self__ for handler in now.values() if isinstance(handler, MethodType)]
    interruption = next((each for each in around if isinstance(each, Interruption)), None) or Interruption()
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: handler for number, handler in usual.items() if now[number] is handler}
    try:
        for number in handlers:
            signal.signal(number, interruption.request)
        yield interruption
        interruption.check()
    except Exception:
        interruption.check()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
