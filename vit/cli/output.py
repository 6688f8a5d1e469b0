"""Results as lines: JSON, CSV, or a table to read; to standard output as they come, or to a file whole.

Notable
- Always UTF-8, whatever the locale.  A path that is not valid UTF-8 is written in JSON with escapes of its odd bytes
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

# JSON leaves these as they are, but terminals or readers of lines may act on them
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


class Formatter(Protocol):
    """Turns results into text; each text is whole lines."""

    def head(self) -> str: ...

    def row(self, result: Result) -> str: ...


class JsonLines:
    """One JSON object a line."""

    def head(self) -> str:
        return ""

    def row(self, result: Result) -> str:
        text = json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False).translate(_ESCAPED)
        if not _is_unicode(text):
            text = json.dumps(result.to_dict(), allow_nan=False)
        return text + "\n"


class Csv:
    """Columns path, label, index, probability, error."""

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
    """Aligned text: likeliest class, its probability, the path, and the runners-up."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._width = min(30, max([5, *(len(printable(name)) for name in class_names)]))

    def head(self) -> str:
        return f"{'LABEL':<{self._width}}  {'PROB':>7}  PATH\n"

    def row(self, result: Result) -> str:
        path = printable(result.path)
        if result.error is not None:
            return f"{'-':<{self._width}}  {'-':>7}  {path}  ERROR: {printable(result.error)}\n"
        others = ", ".join(f"{printable(one['label'])} {one['probability']:.2%}" for one in result.top[1:])
        line = f"{printable(result.label):<{self._width}}  {result.probability:>7.2%}  {path}"
        return line + (f"  ({others})\n" if others else "\n")


def format_of(path: str | None, wanted: str | None) -> str:
    """The format of the results: `wanted`, else what the ending of `path` says, else a table.

    Raises `VitError` for an ending that says something else than what would be written.
    """
    ending = os.path.splitext(path or "")[1].lower()
    name = wanted or FORMATS.get(ending, "table")
    endings = [each for each, form in FORMATS.items() if form == name]
    if ending not in (*endings, *_TEXT):
        asked = f"--format {wanted}" if wanted else "what --format table writes"
        fits = f"{asked} goes into {', '.join([*endings, '.txt'])}; {', '.join(FORMATS)} say their format themselves"
        raise VitError(f"--output {printable(path)}: {ending} is no format of the results: {fits}")
    return name


def formatter(name: str, class_names: Sequence[str]) -> Formatter:
    """The formatter called `name`: "jsonl", "csv" or "table"."""
    return JsonLines() if name == "jsonl" else Csv() if name == "csv" else Table(class_names)


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[BinaryIO]:
    """Where results go: standard output for None or "-"; else the file, which appears when all is written.

    Only a regular file can be replaced in one step; a device or pipe is written to as results come.
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
    # not a bare carriage return: readers take it for the end of a row, and the csv module does not quote it
    return "".join(char if char in "\n\t" else printable(char) for char in text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
