"""Expand the sources of `vit classify` to a stream of paths: files, folders, globs, lists, standard input.

Notes:
- Only the folder that is being read is listed, so a million paths on standard input take no more memory than ten.
- `vit.data.walk` walks folders in the order of full paths, each folder once.  Files that are not images are passed over
  and counted; an image that cannot be read is included, so that its row shows the reason.  A named file is always
  tried.
- Names are bytes on Linux; names that are not UTF-8 are kept (as Python's surrogate escapes).
"""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from vit.data.walk import FoundFile, Walk, describe, system_name
from vit.errors import VitError, printable
from vit.inference.classifier import Flush, InvalidInput

Item = str | InvalidInput | Flush

_MAX_LINE = 1 << 16  # far longer than any path; keeps input without line ends from filling the memory
_FLUSH_AFTER = 0.05  # seconds without new paths before a `Flush`


def expand_sources(
    sources: Sequence[str],
    *,
    recursive: bool = True,
    channels: int = 3,
    stdin: int = 0,
    passed_over: Counter[str] | None = None,
) -> Iterator[Item]:
    """Yield the inputs of `sources`, in order.

    A source is a file; a folder (all levels, or only the first with `recursive=False`); a glob, if no file has that
    name (`**` for any depth); a `.txt` list with one path on each line, relative to the current directory; or `-` for
    such lines on the file descriptor `stdin`.  With `channels` other than 1 or 3, `.npy` files in folders are images
    too.  `passed_over` counts the files in folders that are not images, by kind.

    A missing file is yielded as `InvalidInput`; if no source names anything that exists, `VitError` is raised before
    anything is yielded.
    """
    found, missing = False, list[InvalidInput]()
    reader = _Sources(recursive, channels, stdin, Counter() if passed_over is None else passed_over)
    for source in sources:
        for item in reader.expand(source):
            if found:
                yield item
            elif isinstance(item, InvalidInput):
                missing.append(item)
            else:
                found = True
                yield from missing
                yield item
    if not found:
        raise VitError(_format_nothing(missing))


def _format_nothing(missing: list[InvalidInput]) -> str:
    if not missing:
        return "no input: name files, folders, globs, a .txt list, or - for paths on standard input"
    first = f"{printable(missing[0].path)}: {missing[0].reason}"
    return f"no input: {first}" + (f" (and {len(missing) - 1} more like it)" if len(missing) > 1 else "")


class _Sources:
    """Expands the sources of one call; see `expand_sources`."""

    def __init__(self, recursive: bool, channels: int, stdin: int, passed_over: Counter[str]) -> None:
        self._recursive, self._channels, self._stdin, self._passed_over = recursive, channels, stdin, passed_over

    def expand(self, source: str) -> Iterator[Item]:
        """Expand one source."""
        if source == "-":
            return _or_invalid(_read_lines(self._stdin), source="standard input", reason=lambda: "no paths came")
        try:
            mode = os.stat(source).st_mode
        except (OSError, ValueError):
            if glob.has_magic(source) and not os.path.lexists(source):
                return _or_invalid(self._matches(source), source, lambda: "no file matches")
            return iter([InvalidInput(source, "no such file" if not os.path.lexists(source) else "cannot be read")])
        if stat.S_ISDIR(mode):
            walk = Walk(self._channels, say=_warn)
            return _or_invalid(self._images(walk, source), source, lambda: self._no_images(walk))
        if source.lower().endswith(".txt"):
            return _or_invalid(_read_list(source), source, lambda: "no paths in this list")
        return iter([source])

    def _images(self, walk: Walk, folder: str) -> Iterator[Item]:
        from vit.data.filetype import UNDECODED

        for found in walk.files(folder, self._recursive):
            if isinstance(found, OSError):
                yield InvalidInput(str(found.filename), f"cannot read this folder: {found.strerror or found}")
            elif found.kind is None or found.kind in UNDECODED:
                yield found.path
            else:
                walk.passed_over[found.kind] += 1
        self._passed_over.update(walk.passed_over)

    def _no_images(self, walk: Walk) -> str:
        left_out = [] if self._recursive else ["subfolders were left out"]
        left_out += [f"passed over: {describe(walk.passed_over)}"] if walk.passed_over else []
        return "no images in this folder" + (f" ({'; '.join(left_out)})" if left_out else "")

    def _matches(self, pattern: str) -> Iterator[str]:
        """Yield the files of a glob; below `**` each real folder is visited once."""
        parts = pattern.split(os.sep)
        depth = parts.index("**") if self._recursive and "**" in parts else len(parts)
        if depth < len(parts) and not _system_names(parts[depth:]):
            above = os.sep.join(parts[:depth])
            tops = [f"{top}{os.sep}" for top in glob.glob(above)] if above else [os.sep if depth else ""]
            walk = Walk(say=_warn, by_name=True)
            for top in sorted(tops):
                start = os.path.join(top or os.curdir, "")
                for found in walk.files(start) if os.path.isdir(start) else ():
                    if isinstance(found, FoundFile):
                        path = found.path.removeprefix(start)
                        if _matches_glob(path.split(os.sep), parts[depth:]):
                            yield top + path
            self._passed_over.update(walk.passed_over)
            return
        for path in sorted(glob.glob(pattern, recursive=self._recursive)):
            if passed := _system_names(path.split(os.sep)) - _system_names(parts):
                self._passed_over.update(passed)
            elif not os.path.isdir(path):
                yield path


def _system_names(parts: Sequence[str]) -> set[str]:
    """Select the system names in a path, which walks pass over."""
    return {name for part in parts if part.strip(".") and (name := system_name(part))}


def _matches_glob(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Check whether the parts of a path match those of a glob."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return len(pattern) == 1 or any(_matches_glob(parts[i:], pattern[1:]) for i in range(len(parts)))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _matches_glob(parts[1:], pattern[1:])


def _warn(text: str) -> None:
    print(f"vit: {text}", file=sys.stderr, flush=True)


def _or_invalid(items: Iterable[Item], source: str, reason: Callable[[], str]) -> Iterator[Item]:
    """Yield `items`, or an `InvalidInput` if there are none."""
    found = False
    for item in items:
        found = found or not isinstance(item, Flush)
        if found:
            yield item
    if not found:
        yield InvalidInput(source, reason())


def _read_list(file: str) -> Iterator[Item]:
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        yield InvalidInput(file, f"cannot be read: {error.strerror or error}")
        return
    try:
        yield from _read_lines(descriptor)
    finally:
        os.close(descriptor)


def _read_lines(descriptor: int) -> Iterator[Item]:
    """Read paths from lines, skip blank lines, and yield a `Flush` when no more come for a moment.

    Reads from the descriptor itself: a buffered reader would wait until its buffer is full.
    """
    rest, first = b"", True
    while True:
        if not _has_input(descriptor):
            yield Flush()
        try:
            chunk = os.read(descriptor, _MAX_LINE)
        except OSError as error:
            raise VitError(f"cannot read the list of paths: {error.strerror or error}") from None
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk:
            lines, rest = [rest], b""
        for line in lines:
            line = line.removesuffix(b"\r")
            if first:
                line, first = line.removeprefix(b"\xef\xbb\xbf"), False
            if line.strip():
                yield os.fsdecode(line)
        if not chunk:
            return
        if len(rest) > _MAX_LINE:
            raise VitError("the list of paths has a line of over 64 kB: expected one path a line")


def _has_input(descriptor: int) -> bool:
    import select

    try:
        return bool(select.select([descriptor], [], [], _FLUSH_AFTER)[0])
    except (OSError, ValueError):  # select does not support it, as pipes on Windows
        return True
