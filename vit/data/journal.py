"""The index of a store of decoded images (`vit.data.store`): which image, of which state of its file, stands where.

Notable:
- A file of fixed records that is only appended to. What an interruption, a full disk or a damaged one leaves of it is
  told record by record: each has a check of its own, and one that speaks of pixels that are not there does not count.
- Of several records of one name the last is meant.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vit.data.decode import printable
from vit.data.draws import mix
from vit.errors import VitError

RECORD = np.dtype(
    [
        ("name", "<u8"),  # fingerprint of the image's name
        ("state", "<u8"),  # and of its file as it was when it was decoded
        ("start", "<u8"),  # of its pixels, in bytes
        ("height", "<u4"),
        ("width", "<u4"),
        ("crc", "<u4"),  # CRC-32 of its pixels
        ("own", "<u4"),  # check of this record
    ]
)


class Index:
    """The records of a store that can be relied on.

    Attributes:
        valid: `RECORD` (N,), in the order in which they were written.
        lengths: uint64 (N,), bytes of each one's pixels.
        damaged: how many other records there are.
        whole: whether the file holds nothing else.
        end: where the next image's pixels may go.
    """

    def __init__(self, folder: Path, channels: int) -> None:
        """Read it from a store's folder; an empty one where there is none. Raises `VitError` for no permission."""
        try:
            raw = (folder / "index").read_bytes()
            there = os.stat(folder / "pixels").st_size
        except FileNotFoundError:
            raw, there = b"", 0
        except OSError as error:
            raise VitError(f"cannot read {printable(folder)}: {error.strerror or error}") from error
        records = np.frombuffer(raw, dtype=RECORD, count=len(raw) // RECORD.itemsize)
        lengths = records["height"].astype(np.uint64) * records["width"] * np.uint64(channels)
        good = (records["own"] == _check(records)) & (lengths > 0)
        # only what a sound record says is added up
        good[good] = records["start"][good] + lengths[good] <= there
        self.valid, self.lengths = records[good], lengths[good]
        self.damaged = len(records) - len(self.valid)
        self.whole = self.damaged == 0 and len(raw) % RECORD.itemsize == 0
        end = int((self.valid["start"] + self.lengths).max()) if len(self.valid) else 0
        # a record that is damaged now may have been sound when another process read it
        self.end = max(end, there) if self.damaged else end

    def find(self, names: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Places in `valid` of the last record of each name, if it is of that state: int64 (N,); -1 where none is.

        A state of 0 is that of a file that cannot be read, and is never found.
        """
        if not len(self.valid):
            return np.full(len(names), -1)
        known = self.valid["name"]
        order = np.argsort(known, kind="stable")
        place = order[np.searchsorted(known, names, side="right", sorter=order) - 1]
        found = (known[place] == names) & (self.valid["state"][place] == states) & (states != 0)
        return np.where(found, place, -1)

    def useless(self, names: np.ndarray) -> int:
        """Bytes of pixels of records that are not the last of their name, or that will not be when `names` are new."""
        last = np.zeros(len(self.valid), dtype=bool)
        _, first = np.unique(self.valid["name"][::-1], return_index=True)
        last[len(last) - 1 - first] = True
        return int(self.lengths[~last | np.isin(self.valid["name"], names)].sum())


def record(name: int, state: int, start: int, size: tuple[int, int], crc: int) -> np.ndarray:
    """A record of an image of `size` (H, W), checked: `RECORD` (1,)."""
    made = np.array([(name, state, start, *size, crc, 0)], dtype=RECORD)
    made["own"] = _check(made)
    return made


def _check(records: np.ndarray) -> np.ndarray:
    """Of all else in each record: uint32 (N,)."""
    words = np.zeros(len(records), dtype=np.uint64)
    for key in ("name", "state", "start", "height", "width", "crc"):
        words = mix(words + records[key].astype(np.uint64) + np.uint64(1))
    return words.astype(np.uint32)
