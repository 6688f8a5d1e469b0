"""Format commands for the user to copy, so that any path survives the shell and Hydra."""

from __future__ import annotations

import os
import re
import shlex

_PLAIN = re.compile(r"[A-Za-z0-9_./:%@+-]*/[A-Za-z0-9_./:%@+-]*", re.ASCII)


def format_override(key: str, value: str | os.PathLike[str]) -> str:
    """Format `key=value` for Hydra, with quotes where Hydra would misread the value."""
    text = os.fspath(value)
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    return f"{key}={quote_for_hydra(text)}"


def quote_for_hydra(text: str) -> str:
    """Quote `text` as a value for Hydra."""
    # backslashes are doubled before a quote, at the end, and before an OmegaConf interpolation
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def format_path(value: str | os.PathLike[str]) -> str:
    """Format a path as an argument that is not read as an option, even if it begins with a dash."""
    text = os.fspath(value)
    return os.path.join(os.curdir, text) if text.startswith("-") else text


def join_command(*words: str | os.PathLike[str]) -> str:
    """Quote the words and join them to one line for the shell of this system."""
    texts = [os.fspath(word) for word in words]
    if os.name == "nt":
        import subprocess

        return subprocess.list2cmdline(texts)
    return " ".join(_quote_word(text) for text in texts)


def _quote_word(text: str) -> str:
    if text.isprintable():
        return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)
    # line ends and bytes that are not text, in the form of bash, zsh and ksh
    plain = {"\\": "\\\\", "'": "\\'"}
    parts = [plain.get(c, c) if c.isprintable() else "".join(f"\\{b:03o}" for b in os.fsencode(c)) for c in text]
    return "$'" + "".join(parts) + "'"
