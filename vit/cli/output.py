"""Write results as lines of JSON, CSV or a table: to standard output one by one, or to a file atomically.

Notes:
- The encoding is UTF-8 in any locale.  A path that is not valid UTF-8 is written in JSON with its other bytes escaped
  (`\\udcff` for the byte 0xff; Python's `json.loads` and `os.fsencode` give the bytes back); CSV and table have
  `\\xff`, for reading.
- A file name can hold line ends and terminal commands.  JSON escapes them; CSV quotes line ends and escapes other
  control characters; the table escapes all.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Protocol

from vit.errors import VitError, printable
from vit.files import atomic_write
from vit.inference.classifier import Result

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_TEXT = ("", ".txt", ".log")

# JSON does not escape these, but terminals or readers of lines may act on them
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


class Formatter(Protocol):
    """Formats results as text; each text is whole lines."""

    def head(self) -> str: ...

    def row(self, result: Result) -> str: ...


class JsonLines:
    """Formats each result as one line of JSON."""

    def head(self) -> str:
        return ""

    def row(self, result: Result) -> str:
        text = json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False).translate(_ESCAPED)
        if not _is_unicode(text):
            text = json.dumps(result.to_dict(), allow_nan=False)
        return text + "\n"


class Csv:
    """Formats results as CSV with the columns path, label, index, probability, error."""

    columns = ("path", "label", "index", "probability", "error")

    def head(self) -> str:
        return ",".join(self.columns) + "\n"

    def row(self, result: Result) -> str:
        line = io.StringIO()
        values = (getattr(result, column) for column in self.columns)
        csv.writer(line, lineterminator="\n").writerow(
            [_csv_text(value) if isinstance(value, str) else value for value in values]
        )
        return line.getvalue()


class Table:
    """Formats results as aligned text: the top class, its probability, the path, and the next classes."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._width = min(30, max([5, *(len(printable(name)) for name in class_names)]))

    def head(self) -> str:
        return f"{'LABEL':<{self._width}}  {'PROB':>7}  PATH\n"

    def row(self, result: Result) -> str:
        path = printable(result.path)
        if result.error is not None:
            return f"{'-':<{self._width}}  {'-':>7}  {path}  ERROR: {printable(result.error)}\n"
        others = ", ".join(f"{printable(entry['label'])} {entry['probability']:.2%}" for entry in result.top[1:])
        line = f"{printable(result.label):<{self._width}}  {result.probability:>7.2%}  {path}"
        return line + (f"  ({others})\n" if others else "\n")


def choose_format(path: str | None, option: str | None) -> str:
    """Choose the format of the results: `option`, else the format of the ending of `path`, else a table.

    Raises `VitError` for an ending of another format.
    """
    ending = os.path.splitext(path or "")[1].lower()
    name = option or FORMATS.get(ending, "table")
    endings = [key for key, format_name in FORMATS.items() if format_name == name]
    if ending not in (*endings, *_TEXT):
        asked = f"--format {option}" if option else "what --format table writes"
        fits = f"{asked} goes into {', '.join([*endings, '.txt'])}; {', '.join(FORMATS)} say their format themselves"
        raise VitError(f"--output {printable(path)}: {ending} is no format of the results: {fits}")
    return name


def make_formatter(name: str, class_names: Sequence[str]) -> Formatter:
    """Make the formatter of this name: "jsonl", "csv" or "table"."""
    return JsonLines() if name == "jsonl" else Csv() if name == "csv" else Table(class_names)


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[BinaryIO]:
    """Open the output: standard output for None or "-", else a file that appears when all is written.

    Only a regular file can be replaced atomically; a device or pipe gets each result at once.
    Raises `VitError` when the file cannot be written.
    """
    if path in (None, "-"):
        yield sys.stdout.buffer
        return
    assert path is not None
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise VitError(f"cannot write {path}: it is a folder")
    if not stat.S_ISREG(mode):
        with open(path, "wb") as file:
            yield file
        return
    with atomic_write(os.path.realpath(path)) as part, open(part, "wb") as file:
        yield file


def _csv_text(text: str) -> str:
    # a bare carriage return is escaped: readers take it for the end of a row, and the csv module does not quote it
    return "".join(char if char in "\n\t" else printable(char) for char in text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
