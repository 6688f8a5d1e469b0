"""Mistakes a person can mend.

Everything that goes wrong because of what was asked for (a key, a file, a value) is a `VitError`: one line that
names the thing, says what was expected and, where there is one, the nearest thing that would work.  Commands print
that line and leave with status 2; a traceback is for faults of the program itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable

_LONGEST = 1000  # characters of a line; what a person typed or a file holds may have millions


class VitError(Exception):
    """A request that cannot be met, explained in one line for the person who made it."""

    status = 2
    """The exit status of a command that ends with this error."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """`text` without line breaks and other control characters, its middle left out where it is very long."""
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST * 2 // 3]} ... {text[-_LONGEST // 3 :]}"
    return printable(text)


def command_name(name: str) -> str:
    """Return how to call the command "train" or "eval", for a shell: in the way this process was called.

    That is `python train.py` where a script of the checkout runs, `python -m vit train` where the package does, and
    `vit train` otherwise.
    """
    import shlex

    folder, script = os.path.split(sys.argv[0])
    if script in ("train.py", "eval.py"):
        return f"python {shlex.quote(os.path.join(folder, f'{name}.py'))}"
    return f"python -m vit {name}" if (os.path.basename(folder), script) == ("vit", "__main__.py") else f"vit {name}"


def did_you_mean(word: str, choices: Iterable[str], count: int = 3) -> str:
    """Name the choices closest to `word`, as a phrase to end a message with.

    Returns `"did you mean 'a' or 'b'?"`, or `"choose from a, b, c"` when nothing is close and the list is short,
    or the first few with a count when it is long.
    """
    import difflib

    names = list(dict.fromkeys(str(choice) for choice in choices))
    folded = {name.lower(): name for name in names}
    close = [folded[name] for name in difflib.get_close_matches(word.lower(), list(folded), count, 0.6)]
    if not close and len(word) > 2:
        close = [name for name in names if word.lower() in name.lower()][:count]  # mnist: fashion_mnist
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    if len(names) <= 16:
        return "choose from " + ", ".join(names)
    return f"choose from {', '.join(names[:8])}, ... ({len(names)} in all)"


def printable(path: object) -> str:
    """`path` as one line of valid Unicode, for messages: odd bytes and control characters are escaped."""
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
    if text.isascii() and text.isprintable():  # nearly every name, and there may be thousands
        return text
    with contextlib.suppress(UnicodeEncodeError):  # half of a surrogate pair, which stands for no byte
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
