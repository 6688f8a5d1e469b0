"""Define the records of the Attention tab: compressed JSON with small arrays in it; version 1.

The writer and the reader of records both use this file.  Notes:

- An array is stored as uint8, `value = (code / 255)^2 * peak` with one peak for each row (the last axis): attention is
  mostly small, and the square root gives small values more codes.  A row's largest value is exact; the error of any
  other is at most `peak / 255`, and near zero much less.
- A record has its version.  A record of another version, or a damaged one, is refused with the reason, and the others
  can still be shown.
- Records may come from anyone's files: sizes are bounded before anything is unpacked.

Standard library and NumPy only.

Records, by tag (`NN` is the number of the probe image, two digits or more):

`attention/run`       once: classes, grid, image, patch, prefix, layers, heads, readout, and the probes, each with
                      its image (PNG, base64), label and name; `asked`, a class, where `vit explain --target` replaces
                      the true class by it
`attention/steps`     every step: prediction, faithfulness and sinks of each probe
`attention/probe/NN`  every step: class rows, rollout, relevance and so on: `probe_record`; with token reduction also
                      the assignment of each patch, "reduced" (`vit.explain.attention_tab.token_assignments`)
`attention/pairs/NN`  some steps: every patch's attention to every other: `pairs_record`; a blob sequence of one
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

PLUGIN = "vit_attention"
VERSION = 1
RUN, STEPS, PROBE, PAIRS = "attention/run", "attention/steps", "attention/probe/", "attention/pairs/"

MAX_BYTES = 64 * 2**20
"""Largest size of an unpacked record."""

_MAX_VALUES = 1_000_000  # in a record's JSON: arrays are text, and 64 MiB of "[],[]," would take gigabytes as lists


class RecordError(ValueError):
    """Reports why a record cannot be shown."""


class VersionError(RecordError):
    """Reports a record of another version of this format."""


def pack(array: np.ndarray) -> dict[str, Any]:
    """Pack numbers of at least 0, (..., N), into {"shape", "peaks", "codes"}, both arrays in base64.

    Raises ValueError for a negative number or one that is not finite.
    """
    array = np.asarray(array, dtype=np.float32)
    if not array.ndim or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("expected an array of finite numbers of at least 0")
    peaks = array.max(axis=-1, keepdims=True, initial=0)
    codes = np.rint(255 * np.sqrt(array / np.where(peaks > 0, peaks, 1))).astype(np.uint8)
    return {
        "shape": list(array.shape),
        "peaks": base64.b64encode(peaks.astype("<f4").tobytes()).decode(),
        "codes": base64.b64encode(codes.tobytes()).decode(),
    }


def pack_arrays(record: Any) -> Any:
    """Pack every array in a record, at any depth."""
    if isinstance(record, Mapping):
        return {key: pack_arrays(value) for key, value in record.items()}
    return pack(record) if isinstance(record, np.ndarray) else record


def unpack(packed: Any) -> np.ndarray:
    """Unpack an array of `pack` to float32.  Raises `RecordError`."""
    try:
        shape = [int(n) for n in packed["shape"]]
        codes = np.frombuffer(base64.b64decode(packed["codes"], validate=True), np.uint8)
        peaks = np.frombuffer(base64.b64decode(packed["peaks"], validate=True), "<f4")
        if not shape or min(shape) < 0 or codes.size != math.prod(shape) or peaks.size != math.prod(shape[:-1]):
            raise RecordError("an array does not have the size it says")
        return (codes.reshape(shape) / np.float32(255)) ** 2 * peaks.reshape(*shape[:-1], 1)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"an array cannot be read: {error}") from None


def encode(record: Mapping[str, Any]) -> bytes:
    """Encode a record of plain JSON types as bytes, with its version."""
    text = json.dumps({"v": VERSION, **record}, separators=(",", ":"), allow_nan=False)
    return zlib.compress(text.encode("ascii"), 6)


def decode(data: bytes) -> dict[str, Any]:
    """Decode a record of `encode`.  Raises `RecordError` for another version or a damaged record."""
    try:
        unzip = zlib.decompressobj()
        text = unzip.decompress(data, MAX_BYTES)
        if not unzip.eof:
            raise RecordError("the record is cut off, or too large")
        if sum(text.count(mark) for mark in b"[{,") > _MAX_VALUES:
            raise RecordError("the record holds too many values")
        record = json.loads(text, parse_float=_parse_finite, parse_constant=_parse_finite)
    except (zlib.error, ValueError, RecursionError) as error:
        raise error if isinstance(error, RecordError) else RecordError(f"the record is damaged: {error}") from None
    if not isinstance(record, dict):
        raise RecordError("the record is damaged: it is not an object")
    version = record.get("v")
    if type(version) is not int or version != VERSION:
        raise VersionError(f"written in format {version!r}, and this TensorBoard reads {VERSION}: update vit")
    return record


def _parse_finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no number")
    return value
