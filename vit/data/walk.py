"""Walks through folders: each real folder once, in the order of full paths, counting the files that it passes over.

Notable:
- Links are followed.  A folder is known by device and inode, so that folders which link to one another are walked
  once, whatever the number of ways to them.
- An image is what has an image's ending or the bytes of one (`vit.data.filetype`); only files of other endings are
  opened.  A file named as an image is one, also where it is damaged: whoever decodes it says so.
- Folders and files that systems and file servers put beside photographs are passed over by their names (`SYSTEM`), and
  so is what is hidden.  The folder that a walk begins with is taken whatever its name: somebody asked for it.
- A walk that takes long says so, after 2, 4, 8, ... seconds.

Standard library only; Pillow where a file has to be opened.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vit.errors import printable

# What github.com/github/gitignore lists under Global/ for macOS, Windows and Linux; Synology (@eaDir, #recycle,
# #snapshot, @tmp), QNAP (@Recycle, @Recently-Snapshot, @__thumb); zip files from macOS; Python and Jupyter.
# All that begins with a dot is passed over as well: AppleDouble's "._x.jpg", .thumbnails, .ipynb_checkpoints, .git.
SYSTEM = {
    name.casefold(): name
    for name in (
        "@eaDir", "#recycle", "#snapshot", "@tmp", "@Recycle", "@Recently-Snapshot", "@__thumb", "$RECYCLE.BIN",
        "RECYCLER", "System Volume Information", "Thumbs.db", "Thumbs.db:encryptable", "ehthumbs.db",
        "ehthumbs_vista.db", "desktop.ini", "Icon\r", "__MACOSX", "Network Trash Folder", "Temporary Items",
        "lost+found", "__pycache__",
    )
}  # fmt: skip
"""Names of folders and files that hold no one's photographs, by their lower-case form."""

# file systems of proc(5) that hold no files of anybody's; unlike those in memory (tmpfs) or mounted when asked (autofs)
_KERNEL = {
    "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "fusectl",
    "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tracefs",
}  # fmt: skip
_CHUNK = 1024  # files of a folder that are opened before the first of them is yielded
_REPORT_AFTER = 2.0  # seconds

FOLDER = "folder"


class FoundFile(NamedTuple):
    """Describes a file: an image where `kind` is None, else what it is (see `vit.data.filetype.file_kind`)."""

    path: str
    kind: str | None


class FolderListing(NamedTuple):
    """Lists a folder: names of folders and of other things, sorted, and counts of names passed over."""

    folders: list[str]
    files: list[str]
    passed_over: Counter[str]


def system_name(name: str) -> str | None:
    """Return the kind under which a name is counted that is always passed over; None for any other name."""
    return "hidden file or folder" if name.startswith(".") else SYSTEM.get(name.casefold())


def list_folder(folder: str) -> FolderListing:
    """List `folder`, with links to folders among the folders.  Raises `OSError`."""
    folders, files, passed = list[str](), list[str](), Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if reason := system_name(entry.name):
                passed[reason] += 1
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself, or to a folder without permission
                is_folder = False
            (folders if is_folder else files).append(entry.name)
    return FolderListing(sorted(folders), sorted(files), passed)


def describe(passed_over: Mapping[str, int], limit: int = 12) -> str:
    """Format counts of files passed over: "40 HEIC files (to read them: pip install pillow-heif), 1 @eaDir"."""
    from vit.data.filetype import UNDECODED

    ordered = sorted(passed_over.items(), key=lambda item: (item[0] not in UNDECODED, -item[1], item[0]))
    parts = []
    for kind, count in ordered[:limit]:
        help_ = UNDECODED.get(kind, "")
        if count != 1:
            kind = re.sub(r"(?<!\.)\b(file|folder|link|image)\b", r"\1s", kind)
            help_ = re.sub(r"\bit\b", "them", help_)
        parts.append(f"{count:,} {printable(kind)}" + (f" ({help_})" if help_ else ""))
    if rest := sum(count for _, count in ordered[limit:]):
        parts.append(f"{rest:,} of other kinds")
    return ", ".join(parts)


class Walk:
    """Walks over one folder or several.

    Attributes:
        channels: of the images; of other counts than 1 and 3, NumPy files are images, too.
        passed_over: how many files and folders were passed over, by reason. The caller of `files` adds their kinds.
    """

    def __init__(self, channels: int = 3, say: Callable[[str], None] | None = None, by_name: bool = False) -> None:
        """`say` gets a line from time to time while a walk takes long.  `by_name`: every file counts as an image."""
        self.passed_over: Counter[str] = Counter()
        self.channels = channels
        self._say, self._by_name = say, by_name
        self._visited: dict[tuple[int, int] | str, str] = {}
        self._images, self._seconds, self._next_report = 0, 0.0, _REPORT_AFTER

    def first_path(self, folder: str) -> str | None:
        """Return the path under which `folder` was visited before, or None. Raises `OSError`."""
        return self._visited.get(_identity(folder, os.stat(folder)))

    def enter(self, folder: str) -> bool:
        """Mark `folder` as visited; return False where it was already, or is no folder of files.

        Raises `OSError`.
        """
        status = os.stat(folder)
        if status.st_dev in _kernel_devices():
            self.passed_over["folder of the kernel"] += 1
            return False
        key = _identity(folder, status)
        if key in self._visited:
            self.passed_over["folder linked a second time"] += 1
            return False
        self._visited[key] = folder
        return True

    def files(self, folder: str, recursive: bool = True) -> Iterator[FoundFile | OSError]:
        """Yield the files under `folder` in the order of full paths; an `OSError` for a folder that cannot be read."""
        todo = [self._inside(folder)]
        began = time.monotonic()
        while todo:
            found = next(todo[-1], None)
            if (seconds := self._seconds + time.monotonic() - began) > self._next_report and self._say:
                self._say(
                    f"still looking for images in {printable(folder)}: {len(self._visited):,} folders and "
                    f"{self._images:,} images so far"
                )
                self._next_report = 2 * seconds
            if found is None:
                todo.pop()
            elif isinstance(found, FoundFile) and found.kind == FOLDER:
                if recursive:
                    todo.append(self._inside(found.path))
            else:
                self._images += isinstance(found, FoundFile) and found.kind is None
                self._seconds = seconds
                yield found
                began = time.monotonic()
        self._seconds += time.monotonic() - began

    def kinds(self, folder: str, names: Sequence[str]) -> Iterator[FoundFile]:
        """Yield the files of these names in `folder`, with their kinds."""
        from vit.data.decode import named_as_image
        from vit.data.filetype import file_kind

        odd = [name for name in names if not self._by_name and not named_as_image(name, self.channels)]
        read_kind = functools.partial(file_kind, channels=self.channels)
        paths = [os.path.join(folder, name) for name in odd]
        if len(paths) < 64:
            kinds = dict(zip(odd, map(read_kind, paths), strict=True))
        else:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(16) as pool:  # for file systems in a network, which answer late
                kinds = dict(zip(odd, pool.map(read_kind, paths), strict=True))
        return (FoundFile(os.path.join(folder, name), kinds.get(name)) for name in names)

    def _inside(self, folder: str) -> Iterator[FoundFile | OSError]:
        """Yield files and folders directly in `folder`; nothing the second time."""
        try:
            if not self.enter(folder):
                return
            folders, files, passed = list_folder(folder)
        except OSError as error:
            yield error
            return
        self.passed_over.update(passed)
        # a folder sorts as its name with the separator, which makes the walk's order that of the full paths
        ends = dict.fromkeys((name + os.sep for name in folders), FOLDER)
        names = sorted([*files, *ends])
        for start in range(0, len(names), _CHUNK):
            chunk = names[start : start + _CHUNK]
            read = self.kinds(folder, [name for name in chunk if name not in ends])
            for name in chunk:
                is_folder = name in ends
                yield FoundFile(os.path.join(folder, name[: -len(os.sep)]), FOLDER) if is_folder else next(read)


def _identity(path: str, status: os.stat_result) -> tuple[int, int] | str:
    # some file systems of Windows number no files
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


@functools.cache
def _kernel_devices() -> frozenset[int]:
    """Return the devices of the kernel's own file systems, which hold nobody's files (Linux: proc(5), mountinfo)."""
    found = set()
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            for line in file:
                fields, _, rest = line.partition(b" - ")
                if os.fsdecode(rest.split(b" ", 1)[0]) in _KERNEL:
                    major, minor = fields.split(b" ")[2].split(b":")
                    found.add(os.makedev(int(major), int(minor)))
    except (OSError, ValueError, IndexError):  # another system, or a container that shows none
        pass
    return frozenset(found)
