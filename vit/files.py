"""Files that are written whole or not at all.

A reader of a run folder, another process, or a person after a crash sees the old file or the new one, never half of
either: the bytes go to a hidden neighbour first, are flushed to the disk, and take the name in one step.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit.errors import VitError, printable


class CannotWrite(VitError):
    """A file cannot be written: the disk is full, or the folder is another's."""

    @classmethod
    def of(cls, path: str | os.PathLike[str], error: OSError) -> CannotWrite:
        """Name the file and the system's reason."""
        return cls(f"cannot write {os.fspath(path)}: {error.strerror or error}")


def failed_write(part: Path, path: str | os.PathLike[str], reason: str) -> CannotWrite:
    """Say why a library could not write `path`, of which it names no cause: ask the system by writing on to `part`.

    `reason` is the library's own, for when the system has none.
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
    """Give a temporary path beside `path`; on a clean exit it takes that name, on an exception it is removed.

    Raises `CannotWrite` when the disk is full or the folder cannot be written; `path` is then what it was before.
    """
    path = Path(path)
    start = os.fsdecode(os.fsencode(path.name)[:80])  # a name may have 255 bytes, and this one is longer
    part = path.parent / f".{start}.{secrets.token_hex(4)}.part"  # known before it is there: a signal may come any time
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.open("xb").close()
        except (FileExistsError, NotADirectoryError) as error:
            raise CannotWrite(f"cannot write {path}: {error.filename or path.parent} is not a folder") from error
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        # some libraries make files private; a result should have the permissions of any other new file
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
def held(lock: Path) -> Iterator[None]:
    """Hold a lock among processes, and say so while another one has it; it goes with the process that holds it.

    Nothing where the folder may only be read, or has no such locks: what needs one fails there when it writes.
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
    """Raise `VitError` where a folder is asked for by the name of a file, such as `maps.html`.

    With a slash at its end, or a folder there, any name will do; `.v2` is no ending.

    Args:
        option: what names it, for the message.
        files: the endings of files that may be asked for instead, for the message.
    """
    import re

    text = os.fspath(path)
    ending = os.path.splitext(text)[1]
    if re.fullmatch(r"\.(?!v\d+$)[a-z][a-z0-9]{1,11}", ending.lower()) and not os.path.isdir(text):
        wanted = f"a name that ends in {files}, or that of a folder" if files else "the name of a folder"
        raise VitError(f"{option} {text}: no {ending} file is written here: expected {wanted}, such as {text}/")


def home() -> str:
    """The user's home folder; where there is none, a temporary one for this process, which libraries then use too.

    Under a bare user number, as in containers, there is neither HOME nor an entry in the list of users, and matplotlib,
    torch and the hub's client fail on it or write into a folder called "~".  Where it may only be read, matplotlib
    would say so at length.
    """
    folder = os.path.expanduser("~")
    if folder == "~":
        folder = os.environ["HOME"] = _temporary()
        os.environ.setdefault("USER", str(os.getuid()) if hasattr(os, "getuid") else "user")
    parts = {"XDG_CONFIG_HOME": ".config", "XDG_CACHE_HOME": ".cache"}
    places = [os.environ.get(key) or os.path.join(folder, part) for key, part in parts.items()]
    if "MPLCONFIGDIR" not in os.environ and not all(map(_can_be_made, places)):
        os.environ["MPLCONFIGDIR"] = _temporary()
    return folder


def _temporary() -> str:
    folder = tempfile.mkdtemp(prefix="vit-home-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _can_be_made(folder: str) -> bool:
    """Whether a folder may be written to, or made."""
    while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder) or os.curdir
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_write(path) as part:
        part.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
