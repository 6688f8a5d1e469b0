"""Define the error for mistakes of the user, and format messages.

Every mistake in what was asked for (a key, a file, a value) is a `VitError`.  Its message is one line that names the
thing, says what was expected and suggests something similar that works.  Commands print that line and exit with
status 2.  A traceback means a bug in the program.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable

_MAX_CHARACTERS = 1000  # of a message; an argument or a file may hold millions


class VitError(Exception):
    """An error that the user can correct, explained in one line."""

    status = 2
    """Exit status of a command that ends with this error."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """Remove line breaks and control characters from `text`, and cut its middle where it is very long."""
    text = " ".join(text.split())
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[: _MAX_CHARACTERS * 2 // 3]} ... {text[-_MAX_CHARACTERS // 3 :]}"
    return printable(text)


def command_name(name: str) -> str:
    """Return the shell command for "train" or "eval", in the form in which this process was called.

    That is `python train.py` for a script of the checkout, `python -m vit train` for the package, else `vit train`.
    """
    import shlex

    folder, script = os.path.split(sys.argv[0])
    if script in ("train.py", "eval.py"):
        return f"python {shlex.quote(os.path.join(folder, f'{name}.py'))}"
    return f"python -m vit {name}" if (os.path.basename(folder), script) == ("vit", "__main__.py") else f"vit {name}"


def did_you_mean(word: str, choices: Iterable[str], count: int = 3) -> str:
    """Name the choices that are most similar to `word`, as the end of a message.

    Returns:
        `"did you mean 'a' or 'b'?"`; if no choice is similar, `"choose from a, b, c"`, or the first few of a long list.
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
    """Format `path` for a message: one line of valid Unicode, with invalid bytes and control characters escaped."""
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
    if text.isascii() and text.isprintable():  # fast path for nearly every name
        return text
    with contextlib.suppress(UnicodeEncodeError):  # half of a surrogate pair stands for no byte
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
