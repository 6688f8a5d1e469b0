"""Commands that are printed to be typed: whatever a path holds, pasting the line into a shell works."""

from __future__ import annotations

import os
import re
import shlex

_PLAIN = re.compile(r"[A-Za-z0-9_./:%@+-]*/[A-Za-z0-9_./:%@+-]*", re.ASCII)


def override(key: str, value: str | os.PathLike[str]) -> str:
    """`key=value` for Hydra, the value quoted where Hydra would take it for something else."""
    text = os.fspath(value)
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    return f"{key}={quote(text)}"


def quote(text: str) -> str:
    """A value for Hydra that means `text`, whatever is in it."""
    # before a quote or the end, and before OmegaConf's interpolation, backslashes count double
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def path(value: str | os.PathLike[str]) -> str:
    """A path as an argument of its own: one that begins with a dash is no option."""
    text = os.fspath(value)
    return os.path.join(os.curdir, text) if text.startswith("-") else text


def command(*words: str | os.PathLike[str]) -> str:
    """The words as one line for the shell of this system."""
    texts = [os.fspath(word) for word in words]
    if os.name == "nt":
        import subprocess

        return subprocess.list2cmdline(texts)
    return " ".join(_quoted(text) for text in texts)


def _quoted(text: str) -> str:
    if text.isprintable():
        return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)
    # a line end, or bytes that are no text: bash, zsh and ksh read them so
    plain = {"\\": "\\\\", "'": "\\'"}
    parts = [plain.get(c, c) if c.isprintable() else "".join(f"\\{b:03o}" for b in os.fsencode(c)) for c in text]
    return "$'" + "".join(parts) + "'"
