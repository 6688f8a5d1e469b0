"""Checksums of a model's files: a byte that changed on the way is found before it changes an answer.

Each file carries its own, under the name `vit_checksum`: a `config.json` as a key, a safetensors file in its header, an
ONNX file as the last entry of its metadata, a `.pt2` file as the comment of its zip archive.  It is the CRC-32 of
everything else in the file, as eight hexadecimal digits, which finds every change within 32 bits in a row.  It guards
against accidents, not against people.  Files without one, which others or older versions wrote, are taken as they are.

Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vit.errors import VitError

KEY = "vit_checksum"
ZEROS = "00000000"
"""The digits' stand-in while a checksum is computed."""

_LONGEST_CONFIG = 64 << 20  # bytes; a hundred times ImageNet-21k's names
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_CHUNK = 1 << 20
_IN_HEADER = re.compile(rb'"' + KEY.encode() + rb'":"([^"]{8})"')
_METADATA = re.compile(rb'"__metadata__":\{[^{}]*\}')
# an entry of `metadata_props` (field 14 of ModelProto), which may follow anything in a message
_ENTRY = bytes([14 << 3 | 2, len(KEY) + 12, 1 << 3 | 2, len(KEY), *KEY.encode(), 2 << 3 | 2, 8])
_COMMENT = KEY.encode() + b"="


def with_checksum(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, plain JSON, with its checksum as the last key."""
    rest = {key: value for key, value in config.items() if key != KEY}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, KEY: f"{zlib.crc32(text.encode('ascii')):08x}"}


def read_config(path: Path) -> dict[str, Any]:
    """A model's `config.json`, this project's or timm's.

    Raises `VitError` when it cannot be read, is no table, or is not what its checksum was made of.
    """
    try:
        if path.stat().st_size > _LONGEST_CONFIG:
            raise VitError(f"{path} is too long for the configuration of a model")
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        raise VitError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        config = json.loads(text)
        changed = isinstance(config, dict) and KEY in config and config != with_checksum(config)
    except (ValueError, RecursionError) as error:
        raise VitError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise VitError(f"{path} is not the configuration of a model: expected a table of names and values")
    if changed:
        raise VitError(
            f"{path} was changed after it was written, by accident or by hand: copy the model again, or delete the "
            f"line {KEY!r} to accept what it says now"
        )
    return config


def seal_safetensors(path: str | os.PathLike[str]) -> None:
    """Write the checksum into a safetensors file that has `KEY: ZEROS` in its metadata."""
    with open(path, "r+b") as file:
        header = _header(file)
        found = _METADATA.search(header)
        if found is None:
            raise ValueError(f"{path} has no metadata to put a checksum in")
        metadata = json.loads(b"{" + found[0] + b"}")["__metadata__"]
        # the library writes its entries in any order; files of one model shall be equal
        text = json.dumps({"__metadata__": metadata}, sort_keys=True, separators=(",", ":")).encode()[1:-1]
        header = header.replace(found[0], text)
        file.seek(8)
        file.write(header)
        digits = _IN_HEADER.search(header)
        assert digits is not None
        checksum = _checksum(file, 8 + digits.start(1))
        file.seek(8 + digits.start(1))
        file.write(checksum)


def check_safetensors(path: str | os.PathLike[str]) -> None:
    """Raise `VitError` unless the file is as it was written, where it has a checksum; OSError when it is not there."""
    with open(path, "rb") as file:
        found = _IN_HEADER.search(_header(file))
        if found is not None and _checksum(file, 8 + found.start(1)) != found[1]:
            raise _damaged(path)


def sealed_onnx(message: bytes) -> bytes:
    """An ONNX file's bytes, without a checksum, with it."""
    return message + _ENTRY + b"%08x" % zlib.crc32(_ENTRY + ZEROS.encode(), zlib.crc32(message))


def check_onnx(path: str | os.PathLike[str]) -> None:
    """Raise `VitError` unless the file is as it was written, where it has a checksum; OSError when it is not there."""
    _check_end(path, _ENTRY)


def seal_archive(path: str | os.PathLike[str]) -> None:
    """Write the checksum into a zip archive without a comment, such as a `.pt2` file, as its comment."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 22)
        end = file.read()
        if not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
            raise ValueError(f"{path} is no zip archive without a comment")
        file.seek(size - 2)
        file.write((len(_COMMENT) + 8).to_bytes(2, "little") + _COMMENT + ZEROS.encode())
        checksum = _checksum(file, size + len(_COMMENT))
        file.seek(size + len(_COMMENT))
        file.write(checksum)


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise `VitError` unless the file is as it was written, where it has a checksum; OSError when it is not there."""
    _check_end(path, _COMMENT)


def _check_end(path: str | os.PathLike[str], front: bytes) -> None:
    """Check a file whose last bytes are `front` and its checksum."""
    with open(path, "rb") as file:
        length = len(front) + 8
        start = os.fstat(file.fileno()).st_size - length
        if start < 0:
            return
        file.seek(start)
        end = file.read(length)
        # an entry with a damaged byte is still this entry
        if sum(one == other for one, other in zip(end, front, strict=False)) < len(front) - 2:
            return
        if end != front + _checksum(file, start + len(front)):
            raise _damaged(path)


def _header(file: BinaryIO) -> bytes:
    """The header of a safetensors file; what there is of it."""
    length = int.from_bytes(file.read(8), "little")
    return file.read(min(length, _LONGEST_HEADER))


def _checksum(file: BinaryIO, digits: int) -> bytes:
    """The checksum of a file that has its own digits at this offset, where zeros are counted."""
    file.seek(0)
    checksum = zlib.crc32(ZEROS.encode(), _crc(file, 0, digits))
    file.seek(digits + len(ZEROS))
    return b"%08x" % _crc(file, checksum, os.fstat(file.fileno()).st_size)


def _crc(file: BinaryIO, checksum: int, count: int) -> int:
    """The CRC-32 of the next `count` bytes, or of all that are left, after that of others."""
    while count > 0 and (chunk := file.read(min(count, _CHUNK))):
        checksum = zlib.crc32(chunk, checksum)
        count -= len(chunk)
    return checksum


def _damaged(path: str | os.PathLike[str]) -> VitError:
    return VitError(
        f"{os.fspath(path)} is damaged: its checksum is of other bytes; copy or export the model again, or "
        f"drop the entry {KEY} from its metadata where it was changed on purpose"
    )
