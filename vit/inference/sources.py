"""What `vit classify` is pointed at, as a stream of paths: files, folders, globs, lists, standard input.

Notable
- A stream: nothing is listed ahead but the one folder that is being read, so a million paths on standard input take
  no more memory than ten.
- Folders are walked in plain order of their full paths; hidden entries are skipped; only names with the extension of
  an image count, while a file that is named is always tried.
- Names are bytes on Linux: what is not UTF-8 passes through unharmed (as Python's surrogate escapes).
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from vit.errors import VitError, printable
from vit.inference.classifier import Pause, Unusable

Item = str | Unusable | Pause

_LONGEST_LINE = 1 << 16  # far over any path; keeps input without line ends from filling the memory
_PATIENCE = 0.05  # seconds without new paths before those that came are answered


def paths(sources: Sequence[str], *, recursive: bool = True, channels: int = 3, stdin: int = 0) -> Iterator[Item]:
    """The inputs that `sources` name, in their order.

    A source is a file; a folder (all levels of it, or only the first with `recursive=False`); a glob, where no file
    has that very name (`**` for any depth); a `.txt` list with one path a line, relative to the current directory; or
    `-` for such lines on the file descriptor `stdin`.  `channels` are the model's: one of more or less than 1 or 3
    also takes `.npy` files from folders.

    What is missing is passed on as `Unusable`, but `VitError` is raised, before anything is given, when all is:
    no source named anything that is there.
    """
    found, missing = False, list[Unusable]()
    for source in sources:
        for item in _expand(source, recursive, channels, stdin):
            if found:
                yield item
            elif isinstance(item, Unusable):
                missing.append(item)
            else:
                found = True
                yield from missing
                yield item
    if not found:
        raise VitError(_nothing(missing))


def _nothing(missing: list[Unusable]) -> str:
    if not missing:
        return "no input: name files, folders, globs, a .txt list, or - for paths on standard input"
    first = f"{printable(missing[0].path)}: {missing[0].reason}"
    return f"no input: {first}" + (f" (and {len(missing) - 1} more like it)" if len(missing) > 1 else "")


def _expand(source: str, recursive: bool, channels: int, stdin: int) -> Iterator[Item]:
    if source == "-":
        yield from _or_nothing(_read_lines(stdin), "standard input", "no paths came")
        return
    try:
        mode = os.stat(source).st_mode
    except (OSError, ValueError):
        if glob.has_magic(source) and not os.path.lexists(source):
            yield from _or_nothing(_matches(source, recursive), source, "no file matches")
        else:
            yield Unusable(source, "no such file" if not os.path.lexists(source) else "cannot be read")
        return
    if stat.S_ISDIR(mode):
        depth = "" if recursive else " (subfolders were left out)"
        yield from _or_nothing(_walk(source, recursive, channels), source, f"no images in this folder{depth}")
    elif source.lower().endswith(".txt"):
        yield from _or_nothing(_list(source), source, "no paths in this list")
    else:
        yield source


def _or_nothing(items: Iterable[Item], source: str, reason: str) -> Iterator[Item]:
    """`items`, or that there were none."""
    some = False
    for item in items:
        some = some or not isinstance(item, Pause)
        if some:
            yield item
    if not some:
        yield Unusable(source, reason)


def _matches(pattern: str, recursive: bool) -> Iterator[Item]:
    for path in sorted(glob.glob(pattern, recursive=recursive)):
        if not os.path.isdir(path):
            yield path


def _walk(folder: str, recursive: bool, channels: int, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Item]:
    """Images under `folder`; `above` are the folders on the way here, so that a link to one of them is no loop."""
    from vit.data.decode import named_as_image

    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            return
        with os.scandir(folder) as entries:
            # a folder sorts as its name with the separator, which makes the walk's order that of the full paths
            names = sorted(
                entry.name + (os.sep if entry.is_dir() else "") for entry in entries if not entry.name.startswith(".")
            )
    except OSError as error:
        yield Unusable(folder, f"cannot read this folder: {error.strerror or error}")
        return
    here = (*above, (status.st_dev, status.st_ino))
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(os.sep):
            if recursive:
                yield from _walk(path[: -len(os.sep)], recursive, channels, here)
        elif named_as_image(name, channels):
            yield path


def _list(file: str) -> Iterator[Item]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        yield Unusable(file, f"cannot be read: {error.strerror or error}")
        return
    try:
        yield from _read_lines(descriptor)
    finally:
        os.close(descriptor)


def _read_lines(descriptor: int) -> Iterator[Item]:
    """Paths, one a line, blank lines skipped, with a `Pause` wherever no more come for a moment.

    Read from the descriptor itself: a buffered reader would hold lines back until its buffer is full.
    """
    rest, first = b"", True
    while True:
        if not _ready(descriptor):
            yield Pause()
        try:
            chunk = os.read(descriptor, _LONGEST_LINE)
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
        if len(rest) > _LONGEST_LINE:
            raise VitError("the list of paths has a line of over 64 kB: expected one path a line")


def _ready(descriptor: int) -> bool:
    import select

    try:
        return bool(select.select([descriptor], [], [], _PATIENCE)[0])
    except (OSError, ValueError):  # not something that can be waited for, as pipes on Windows
        return True
