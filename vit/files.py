"""Write files atomically: completely or not at all.

The bytes go to a hidden temporary file in the same folder, are flushed to the disk, and get the final name in one
step.  Other processes, also after a crash, see the old file or the new one, never a part of either.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit.errors import VitError, printable


class CannotWrite(VitError):
    """A file cannot be written: the disk is full, or permissions forbid it."""

    @classmethod
    def of(cls, path: str | os.PathLike[str], error: OSError) -> CannotWrite:
        """Make the error from the file and the system's reason."""
        return cls(f"cannot write {os.fspath(path)}: {error.strerror or error}")


def explain_failed_write(part: Path, path: str | os.PathLike[str], reason: str) -> CannotWrite:
    """Find out why a library could not write `path`, by appending to the temporary file `part`.

    `reason` is the library's message, used where the system gives none.
    """
    try:
        with open(part, "ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return CannotWrite.of(path, error)
    return CannotWrite(f"cannot write {os.fspath(path)}: {reason}")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on a clean exit, remove it on an exception.

    Raises:
        CannotWrite: the disk is full or the folder cannot be written; `path` is unchanged.
    """
    path = Path(path)
    start = os.fsdecode(os.fsencode(path.name)[:80])  # a name may have 255 bytes
    part = path.parent / f".{start}.{os.urandom(4).hex()}.part"  # named before it exists: a signal may come
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.open("xb").close()
        except (FileExistsError, NotADirectoryError) as error:
            raise CannotWrite(f"cannot write {path}: {error.filename or path.parent} is not a folder") from error
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        # some libraries make private files; give the usual permissions of a new file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)
        os.replace(part, path)
    except OSError as error:
        raise CannotWrite.of(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """Hold a file lock between processes; log a message while another process has it.

    The lock ends with its process.  In a read-only folder, or where the file system has no locks, do nothing.
    """
    with contextlib.ExitStack() as files:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            files.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.getLogger("vit").info("another process is at %s: waiting for it", printable(lock.parent))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_folder_name(path: str | os.PathLike[str], option: str, files: str = "") -> None:
    """Raise `VitError` if the name of an output folder looks like a file, such as `maps.html`.

    A name that ends in a slash, and an existing folder, are always accepted; `.v2` is not an ending.

    Args:
        option: name of the option, for the message.
        files: endings of the files that the option also accepts, for the message.
    """
    import re

    text = os.fspath(path)
    ending = os.path.splitext(text)[1]
    if re.fullmatch(r"\.(?!v\d+$)[a-z][a-z0-9]{1,11}", ending.lower()) and not os.path.isdir(text):
        wanted = f"a name that ends in {files}, or that of a folder" if files else "the name of a folder"
        raise VitError(f"{option} {text}: no {ending} file is written here: expected {wanted}, such as {text}/")


def ensure_home() -> str:
    """Return the user's home folder; where there is none, make a temporary one for this process and its libraries.

    In containers there is often neither HOME nor an entry in the list of users; matplotlib, torch and the hub's client
    then fail or write into a folder called "~".  In a read-only home, matplotlib would print a long warning.
    """
    folder = os.path.expanduser("~")
    if folder == "~":
        folder = os.environ["HOME"] = _make_temporary_home()
        os.environ.setdefault("USER", str(os.getuid()) if hasattr(os, "getuid") else "user")
    parts = {"XDG_CONFIG_HOME": ".config", "XDG_CACHE_HOME": ".cache"}
    folders = [os.environ.get(key) or os.path.join(folder, part) for key, part in parts.items()]
    if "MPLCONFIGDIR" not in os.environ and not all(map(_is_writable, folders)):
        os.environ["MPLCONFIGDIR"] = _make_temporary_home()
    return folder


def _make_temporary_home() -> str:
    folder = tempfile.mkdtemp(prefix="vit-home-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_writable(folder: str) -> bool:
    """Return whether a folder can be written to or created."""
    while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder) or os.curdir
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_write(path) as part:
        part.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
