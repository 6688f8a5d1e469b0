"""The index of a store of decoded images (`vit.data.store`): where each image is, and of which state of its file.

Notable:
- A file of fixed records that is only appended to. After an interruption, or on a full or damaged disk, each record is
  judged by itself: it has a checksum, and one whose pixels are not there does not count.
- Of several records of one name the last counts.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vit.data.counter_rng import mix_bits
from vit.data.decode import printable
from vit.errors import VitError

RECORD = np.dtype(
    [
        ("name", "<u8"),  # fingerprint of the image's name
        ("state", "<u8"),  # and of its file as it was when it was decoded
        ("start", "<u8"),  # of its pixels, in bytes
        ("height", "<u4"),
        ("width", "<u4"),
        ("crc", "<u4"),  # CRC-32 of its pixels
        ("check", "<u4"),  # checksum of this record
    ]
)


class Index:
    """Reads the valid records of a store.

    Attributes:
        valid: `RECORD` (N,), in the order they were written.
        lengths: uint64 (N,), bytes of each one's pixels.
        damaged: how many other records there are.
        clean: whether the file holds valid records only.
        end: where the next image's pixels may be written.
    """

    def __init__(self, folder: Path, channels: int) -> None:
        """Read the index in a store's folder; an empty one where there is none. Raises `VitError` for no permission."""
        try:
            raw = (folder / "index").read_bytes()
            length = os.stat(folder / "pixels").st_size
        except FileNotFoundError:
            raw, length = b"", 0
        except OSError as error:
            raise VitError(f"cannot read {printable(folder)}: {error.strerror or error}") from error
        records = np.frombuffer(raw, dtype=RECORD, count=len(raw) // RECORD.itemsize)
        lengths = records["height"].astype(np.uint64) * records["width"] * np.uint64(channels)
        good = (records["check"] == _check(records)) & (lengths > 0)
        # only the numbers of a valid record are added up
        good[good] = records["start"][good] + lengths[good] <= length
        self.valid, self.lengths = records[good], lengths[good]
        self.damaged = len(records) - len(self.valid)
        self.clean = self.damaged == 0 and len(raw) % RECORD.itemsize == 0
        end = int((self.valid["start"] + self.lengths).max()) if len(self.valid) else 0
        # a record that is damaged now may have been valid when another process read it
        self.end = max(end, length) if self.damaged else end

    def find(self, names: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Find the last record of each name, if it is of that state: indices into `valid`, int64 (N,); -1 for none.

        A state of 0 is that of a file that cannot be read, and is never found.
        """
        if not len(self.valid):
            return np.full(len(names), -1)
        known = self.valid["name"]
        order = np.argsort(known, kind="stable")
        position = order[np.searchsorted(known, names, side="right", sorter=order) - 1]
        found = (known[position] == names) & (self.valid["state"][position] == states) & (states != 0)
        return np.where(found, position, -1)

    def superseded_bytes(self, names: np.ndarray) -> int:
        """Count the bytes of pixels that a later record of the same name replaces, `names` being added next."""
        last = np.zeros(len(self.valid), dtype=bool)
        _, first = np.unique(self.valid["name"][::-1], return_index=True)
        last[len(last) - 1 - first] = True
        return int(self.lengths[~last | np.isin(self.valid["name"], names)].sum())


def record(name: int, state: int, start: int, size: tuple[int, int], crc: int) -> np.ndarray:
    """Make the record of an image of `size` (H, W), with its checksum: `RECORD` (1,)."""
    made = np.array([(name, state, start, *size, crc, 0)], dtype=RECORD)
    made["check"] = _check(made)
    return made


def _check(records: np.ndarray) -> np.ndarray:
    """Compute the checksum of all other fields of each record: uint32 (N,)."""
    words = np.zeros(len(records), dtype=np.uint64)
    for key in ("name", "state", "start", "height", "width", "crc"):
        words = mix_bits(words + records[key].astype(np.uint64) + np.uint64(1))
    return words.astype(np.uint32)
