"""Write and check the checksums of model files, so that a damaged file is noticed.

Each file carries its own checksum, named `vit_checksum`: a `config.json` as a key, a safetensors file in its header, an
ONNX file as the last entry of its metadata, a `.pt2` file as the comment of its zip archive.  It is the CRC-32 of
everything else in the file, as eight hexadecimal digits.  It finds accidental changes, not deliberate ones.  Files
without a checksum are accepted.

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
"""Placeholder of the digits while a checksum is computed."""

_MAX_CONFIG_BYTES = 64 << 20  # bytes; a hundred times ImageNet-21k's names
_MAX_HEADER_BYTES = 100_000_000  # bytes; safetensors' own limit
_CHUNK = 1 << 20
_IN_HEADER = re.compile(rb'"' + KEY.encode() + rb'":"([^"]{8})"')
_METADATA = re.compile(rb'"__metadata__":\{[^{}]*\}')
# an entry of `metadata_props` (field 14 of ModelProto), which may follow anything in a message
_ONNX_ENTRY = bytes([14 << 3 | 2, len(KEY) + 12, 1 << 3 | 2, len(KEY), *KEY.encode(), 2 << 3 | 2, 8])
_ZIP_COMMENT = KEY.encode() + b"="


def with_checksum(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config`, plain JSON, with its checksum as the last key."""
    rest = {key: value for key, value in config.items() if key != KEY}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, KEY: f"{zlib.crc32(text.encode('ascii')):08x}"}


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's `config.json`, written by this project or by timm.

    Raises:
        VitError: it cannot be read, is not a JSON object, or does not match its checksum.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
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


def add_safetensors_checksum(path: str | os.PathLike[str]) -> None:
    """Write the checksum into a safetensors file whose metadata has `KEY: ZEROS`."""
    with open(path, "r+b") as file:
        header = _read_header(file)
        match = _METADATA.search(header)
        if match is None:
            raise ValueError(f"{path} has no metadata to put a checksum in")
        metadata = json.loads(b"{" + match[0] + b"}")["__metadata__"]
        # the library writes entries in any order; sort them, so that equal models give equal files
        text = json.dumps({"__metadata__": metadata}, sort_keys=True, separators=(",", ":")).encode()[1:-1]
        header = header.replace(match[0], text)
        file.seek(8)
        file.write(header)
        digits = _IN_HEADER.search(header)
        assert digits is not None
        checksum = _compute_checksum(file, 8 + digits.start(1))
        file.seek(8 + digits.start(1))
        file.write(checksum)


def check_safetensors(path: str | os.PathLike[str]) -> None:
    """Raise `VitError` if the file has a checksum that does not match, `OSError` if the file is missing."""
    with open(path, "rb") as file:
        match = _IN_HEADER.search(_read_header(file))
        if match is not None and _compute_checksum(file, 8 + match.start(1)) != match[1]:
            raise _damaged_error(path)


def add_onnx_checksum(message: bytes) -> bytes:
    """Append the checksum to the bytes of an ONNX file that has none."""
    return message + _ONNX_ENTRY + b"%08x" % zlib.crc32(_ONNX_ENTRY + ZEROS.encode(), zlib.crc32(message))


def check_onnx(path: str | os.PathLike[str]) -> None:
    """Raise `VitError` if the file has a checksum that does not match, `OSError` if the file is missing."""
    _check_trailing_checksum(path, _ONNX_ENTRY)


def add_archive_checksum(path: str | os.PathLike[str]) -> None:
    """Write the checksum as the comment of a zip archive that has none, such as a `.pt2` file."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 22)
        end = file.read()
        if not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
            raise ValueError(f"{path} is no zip archive without a comment")
        file.seek(size - 2)
        file.write((len(_ZIP_COMMENT) + 8).to_bytes(2, "little") + _ZIP_COMMENT + ZEROS.encode())
        checksum = _compute_checksum(file, size + len(_ZIP_COMMENT))
        file.seek(size + len(_ZIP_COMMENT))
        file.write(checksum)


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise `VitError` if the file has a checksum that does not match, `OSError` if the file is missing."""
    _check_trailing_checksum(path, _ZIP_COMMENT)


def _check_trailing_checksum(path: str | os.PathLike[str], marker: bytes) -> None:
    """Check a file that ends in `marker` and its checksum."""
    with open(path, "rb") as file:
        length = len(marker) + 8
        start = os.fstat(file.fileno()).st_size - length
        if start < 0:
            return
        file.seek(start)
        end = file.read(length)
        # accept up to two damaged bytes in the marker itself
        if sum(byte == expected for byte, expected in zip(end, marker, strict=False)) < len(marker) - 2:
            return
        if end != marker + _compute_checksum(file, start + len(marker)):
            raise _damaged_error(path)


def _read_header(file: BinaryIO) -> bytes:
    """Read the header of a safetensors file, which may be cut off."""
    length = int.from_bytes(file.read(8), "little")
    return file.read(min(length, _MAX_HEADER_BYTES))


def _compute_checksum(file: BinaryIO, digits: int) -> bytes:
    """Compute the checksum of a file, counting the digits at offset `digits` as zeros."""
    file.seek(0)
    checksum = zlib.crc32(ZEROS.encode(), _update_crc(file, 0, digits))
    file.seek(digits + len(ZEROS))
    return b"%08x" % _update_crc(file, checksum, os.fstat(file.fileno()).st_size)


def _update_crc(file: BinaryIO, checksum: int, count: int) -> int:
    """Continue a CRC-32 with the next `count` bytes, or with all that remain."""
    while count > 0 and (chunk := file.read(min(count, _CHUNK))):
        checksum = zlib.crc32(chunk, checksum)
        count -= len(chunk)
    return checksum


def _damaged_error(path: str | os.PathLike[str]) -> VitError:
    return VitError(
        f"{os.fspath(path)} is damaged: its checksum is of other bytes; copy or export the model again, or "
        f"drop the entry {KEY} from its metadata where it was changed on purpose"
    )
