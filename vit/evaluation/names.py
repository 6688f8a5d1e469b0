"""Class names and paths as people can read them: in a figure, in a terminal.

A class is named by whoever named its folder, so a name may be very long, hold line breaks, or not be text at all.
Files keep names exactly; only what is drawn or printed passes through here.
"""

from __future__ import annotations

import unicodedata


def readable(name: str, limit: int = 24) -> str:
    """`name` on one line, in at most `limit` characters, in what any font, file and terminal can take.

    Bytes that are no text become U+FFFD, control and formatting characters a space; of a long name the middle goes.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    # Cf: invisible marks, among them those that turn the writing direction of all that follows
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Cf", "Cn", "Zl", "Zp") else char for char in text)
    text = " ".join(text.split()) or "(no name)"
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 3
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[head + 1 - limit :]}"
