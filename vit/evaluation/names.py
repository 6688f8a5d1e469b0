"""Make class names and paths readable in a figure or a terminal.

A class has the name of its folder, so the name may be very long, hold line breaks, or not be text at all.
Files keep the exact names; only drawn or printed names pass through here.
"""

from __future__ import annotations

import unicodedata


def readable(name: str, limit: int = 24) -> str:
    """Shorten `name` to one line of at most `limit` characters that any font and terminal can show.

    Bytes that are not text become U+FFFD, control and formatting characters a space.  A long name loses its middle.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    # Cf: invisible characters; some of them reverse the writing direction of the text after them
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Cf", "Cn", "Zl", "Zp") else char for char in text)
    text = " ".join(text.split()) or "(no name)"
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 3
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[head + 1 - limit :]}"
