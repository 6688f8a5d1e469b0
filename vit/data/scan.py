"""Finds out which images can be read, once, before training: in parallel, under a progress bar; the result is saved.

Notable:
- Every image is decoded to its end, so a truncated file is found here and not in the third hour of training.
- Only readable images are remembered (a fingerprint of path, size and modification time): an unreadable file is read
  again every time, so mending it, or its permissions, is enough.
- They are remembered in a file in the user's cache folder, never in the data; if it is damaged or cannot be written,
  the scan is done again.
- Unreadable images are left out and reported. No other image takes their place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL

from vit.data.decode import ImageError, measure, printable
from vit.data.parallel import for_each
from vit.errors import VitError
from vit.files import atomic_write, ensure_home

log = logging.getLogger("vit")

_FORMAT = "1"
_BLOCK = 4096  # bytes


def cache_root() -> Path:
    """Return the user's cache folder for this program: `$XDG_CACHE_HOME/vit`, or `~/.cache/vit`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.join(ensure_home(), ".cache")) / "vit"


def fingerprint(*parts: object) -> int:
    """Hash the parts to 64 bits; never 0."""
    # another Pillow may read what this one cannot, and the other way round
    return name_fingerprint("\0".join([_FORMAT, PIL.__version__, *(str(part) for part in parts)])) or 1


def name_fingerprint(name: str) -> int:
    """Hash a name to 64 bits, whatever it names."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def file_fingerprint(path: str, channels: int) -> int:
    """Hash the path, size and time of change of a file; 0 if it cannot be opened (and so has to be read)."""
    try:
        status = os.stat(path)
        if not os.access(path, os.R_OK):
            return 0
        return fingerprint(os.path.abspath(path), status.st_size, status.st_mtime_ns, channels)
    except (OSError, ValueError):
        return 0


def file_content(path: str) -> str:
    """Return size and CRC-32 of a file's start, middle and end (of all of a short one); "" for an unreadable one."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= 3 * _BLOCK:
                return f"{size}-{zlib.crc32(file.readall()):08x}"
            crc = 0
            for start in (0, size // 2, size - _BLOCK):
                file.seek(start)
                crc = zlib.crc32(file.read(_BLOCK), crc)
        return f"{size}-{crc:08x}"
    except OSError:
        return ""


def scan(
    fingerprints: np.ndarray,
    read_size: Callable[[int], tuple[int, int]],
    memory: str,
    label: str,
    limit: int | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode every image that was not already known to be good.

    Args:
        fingerprints: uint64 (N,), the fingerprint of each image; 0 for one that has none.
        read_size: decodes image i, and returns its (H, W) or raises `ImageError`. Called from several threads.
        memory: names the cache file: the same text for the same data set.
        label: the progress bar's.
        limit: decode at most so many images; None for any number.

    Returns:
        int32 (N, 2) of (H, W), 0 for unreadable images; and the reason for each of those, by index.

    Raises:
        VitError: more than `limit` images would have to be decoded; none of them is.
    """
    path = cache_root() / "scans" / f"{fingerprint(memory):016x}.npz"
    sizes = np.zeros((len(fingerprints), 2), dtype=np.int32)
    known, known_sizes = _load(path)
    if len(known):
        position = np.searchsorted(known, fingerprints).clip(max=len(known) - 1)
        hit = (known[position] == fingerprints) & (fingerprints != 0)
        sizes[hit] = known_sizes[position[hit]]
    todo = np.flatnonzero(sizes[:, 0] == 0)
    if limit is not None and len(todo) > limit:
        raise VitError(f"{len(todo):,} of its images would have to be looked at first")
    bad: dict[int, str] = {}

    def read_one(i: int) -> None:
        try:
            sizes[i] = read_size(i)
        except ImageError as error:
            bad[i] = error.reason

    if len(todo):
        for_each(read_one, (int(i) for i in todo), len(todo), label)
        if len(todo) > len(bad):
            _save(path, fingerprints, sizes)
    return sizes, dict(sorted(bad.items()))


def scan_files(
    paths: Sequence[str], channels: int, memory: str, limit: int | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """Run `scan` on image files."""
    fingerprints = np.fromiter((file_fingerprint(path, channels) for path in paths), dtype=np.uint64, count=len(paths))
    return scan(fingerprints, lambda i: measure(paths[i], channels=channels), memory, "Checking images", limit)


def check_unreadable(bad: Sequence[tuple[str, str]], total: int, max_fraction: float, where: str) -> None:
    """Report unreadable images, and refuse the data set if they are more than `max_fraction` of it."""
    if not bad:
        return
    lines = [f"{printable(path)}: {reason}" for path, reason in bad]
    if len(bad) > max_fraction * total:
        listed = "; ".join(lines[:20]) + (f"; and {len(bad) - 20} more" if len(bad) > 20 else "")
        raise VitError(
            f"{where}: {len(bad)} of {total} images cannot be read, more than "
            f"data.max_bad_fraction={max_fraction:g} allows: {listed}"
        )
    log.warning("%s: %d of %d images cannot be read and are left out", where, len(bad), total)
    for line in lines:
        log.warning("left out: %s", line)


def _load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    nothing = np.empty(0, dtype=np.uint64), np.empty((0, 2), dtype=np.int32)
    try:
        with np.load(path, allow_pickle=False) as file:
            fingerprints, sizes = file["prints"], file["sizes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return nothing
    valid = fingerprints.dtype == np.uint64 and fingerprints.ndim == 1 and sizes.dtype == np.int32
    valid = valid and sizes.shape == (len(fingerprints), 2) and bool((sizes > 0).all())
    if not valid or (fingerprints[1:] < fingerprints[:-1]).any():
        return nothing
    return fingerprints, sizes


def _save(path: Path, fingerprints: np.ndarray, sizes: np.ndarray) -> None:
    good = np.flatnonzero((fingerprints != 0) & (sizes[:, 0] > 0))
    order = good[np.argsort(fingerprints[good])]
    try:
        with atomic_write(path) as part, open(part, "wb") as file:
            np.savez(file, prints=fingerprints[order], sizes=sizes[order])
    except VitError as error:
        log.debug("the scan is not remembered: %s", error)
