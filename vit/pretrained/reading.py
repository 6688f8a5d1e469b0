"""Read tensors from all usual file formats of weights without running any code in them.

Notes:
- A pickled file (`.ckpt`, `.pth`, `.bin`) is read with `weights_only=True`: tensors and plain containers.  A file that
  needs anything else would run its author's code, so it is refused, and the message names what it needs.
- Files are mapped, not read into memory: of a training checkpoint only the needed weights are read.
- The checksums of a checkpoint are compared (under a second for each GB), which torch does not do.

Imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vit.checksums import check_safetensors
from vit.errors import VitError

_MAX_IN_TUPLE = 1_000_000
"""Tuples inside a tuple, each counted wherever it is."""
_MAX_SHARING = 8
"""Tensors may share memory (tied weights), but in total they are at most this many times larger than the file."""


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """Read the contents of a `torch.save` file, with tensors on the CPU.

    Raises `VitError` when the file is missing, empty, truncated, damaged, no checkpoint, or would need code to load.
    """
    path = Path(path)
    check_readable(path)
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # torch's format since 1.6; only this one can be mapped
        if zipped and _is_compressed(path):
            raise VitError(
                f"{path} was refused: its parts are compressed, as torch's never are; they may fill the memory"
            )
        _check_tuples(path, zipped)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # many training scripts store their options as a Namespace beside the weights: values without code
            warnings.simplefilter("ignore")  # about how foreign files were pickled
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except VitError:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global:?|class|builtin)\s+`?([A-Za-z_][\w.]*\.\w+)", str(error))
        name = asked.group(1) if asked else None if zipped else _first_import(path)
        if name:
            raise VitError(
                f"{path} was refused: loading it would run code ({name}), which could do anything to this "
                "computer; only checkpoints of tensors and plain values are read"
            ) from None
        raise VitError(f"{path} is not a checkpoint, or a damaged one") from None
    except Exception as error:  # torch meets damaged bytes with many kinds
        if zipped and "TorchScript" in str(error):
            raise VitError(
                f"{path} was refused: it is a program (TorchScript), which loading would run; save its state_dict() "
                "where it is trusted"
            ) from None
        reason = str(error).partition("\n")[0].partition(". ")[0][:120]
        detail = f": {reason}" if " " in reason else ""  # some messages are only a number
        raise VitError(f"{path} is truncated or not a checkpoint{detail}") from None
    if zipped and not _checksums_match(path):
        raise VitError(f"{path} is damaged: its checksums do not fit what is in it")
    check_tensors(content, path)
    return content


def check_tensors(content: Any, path: str | os.PathLike[str]) -> None:
    """Check that all tensors are plain and have as much memory as their shapes need.  Raises `VitError`.

    One number with stride 0 can have any shape, and a thousand views of one storage become a thousand copies in a
    model.
    """
    storages: dict[int, int] = {}
    total, seen, left = 0, set[int](), [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized or value.is_nested:
                kind = "quantised" if value.is_quantized else "on no device" if value.is_meta else str(value.layout)
                raise VitError(f"{path} was refused: it holds a tensor that is {kind}; only plain ones are read")
            memory = value.untyped_storage()
            if value.numel() * value.element_size() > memory.nbytes():
                shape = tuple(value.shape)
                raise VitError(f"{path} was refused: a tensor of shape {shape} has {memory.nbytes()} bytes in the file")
            storages[memory.data_ptr()] = memory.nbytes()
            total += value.numel() * value.element_size()
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))  # a list may hold itself, or be shared at every level
            left += [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    if total > _MAX_SHARING * sum(storages.values()) + (64 << 20):
        raise VitError(f"{path} was refused: its tensors share memory, and would take {total / 1e9:.1f} GB without")


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load all tensors of a `.safetensors` file, on the CPU.

    Raises `VitError` when it cannot be read as one, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    check_readable(path)
    try:
        weights = load_file(path)
        check_safetensors(path)
        return weights
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise VitError(f"{path} is truncated or not a safetensors file: {error}") from None
    except OSError as error:
        raise VitError(f"cannot read {path}: {error.strerror or error}") from None


def check_readable(path: Path) -> None:
    """Check that the file exists, can be read and is not empty.  Raises `VitError`."""
    try:
        if path.is_dir():
            raise VitError(f"{path} is a folder, not a file of weights")
        if path.exists() and not path.is_file():  # a pipe, a device: reading it might never end
            raise VitError(f"{path} is not a file")
        with open(path, "rb") as file:
            empty = not file.read(1)
    except (OSError, ValueError) as error:
        raise VitError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if empty:
        raise VitError(f"{path} is empty")


def is_state_dict(value: Any) -> bool:
    """Check whether `value` is a dictionary of tensors only."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _is_compressed(path: Path) -> bool:
    """Check whether a zip archive has compressed parts; programs may have them, and torch refuses these unread."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if any(part.filename.endswith("/constants.pkl") for part in parts):
            return False
        return any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False  # torch reports it


_NO_PICKLE = (ValueError, LookupError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile)


def _check_tuples(path: Path, zipped: bool) -> None:
    """Refuse a pickle with a tuple of tuples that are shared at many levels.  Raises `VitError`.

    Forty tuples that each hold the previous one twice are a key of 2^40 parts, and hashing the key never ends.
    """
    with contextlib.ExitStack() as files:
        file: IO[bytes] = files.enter_context(open(path, "rb"))
        parts = [file] * 5  # torch's format before 1.6: three numbers, the content, the names of storages
        # torch refuses pickles that cannot be read here
        files.enter_context(contextlib.suppress(*_NO_PICKLE))
        if zipped:
            archive = files.enter_context(zipfile.ZipFile(file))
            pickles = [part for part in archive.infolist() if part.filename.endswith("data.pkl")]
            parts = [files.enter_context(archive.open(part)) for part in pickles]
        for part in parts:
            if _largest_tuple(part) > _MAX_IN_TUPLE:
                raise VitError(f"{path} was refused: it holds a tuple of over {_MAX_IN_TUPLE} tuples, level by level")


def _largest_tuple(file: IO[bytes]) -> int:
    """Count the tuples in the largest tuple of the next pickle, by reading its instructions without running them."""
    memory: dict[Any, int] = {}
    stack: list[int | None] = []  # tuples in each value; None is a mark
    largest = 0
    for code, argument, _ in pickletools.genops(file):
        if "GET" in code.name:
            stack.append(memory[argument])
        elif "PUT" in code.name or code.name == "MEMOIZE":
            memory[len(memory) if argument is None else argument] = stack[-1] or 0
        elif code.name == "MARK":
            stack.append(None)
        elif code.name == "DUP":
            stack.append(stack[-1])
        else:
            tuples, single = 0, len(code.stack_before)
            if pickletools.stackslice in code.stack_before:
                single -= 2
                while (value := stack.pop()) is not None:
                    tuples += value
            for _ in range(single):
                tuples += stack.pop() or 0
            result = 1 + tuples if "TUPLE" in code.name else 0
            largest = max(largest, result)
            if largest > _MAX_IN_TUPLE:
                return largest
            stack += [result] * len(code.stack_after)
    return largest


def _checksums_match(path: Path) -> bool:
    """Check the checksum of every part of a file in torch's format, a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile):
        return False


def _first_import(path: Path) -> str | None:
    """Find the first name that a bare pickle would import, by reading its instructions without running them."""
    words: list[str] = []
    try:
        with open(path, "rb") as file:
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL" and isinstance(argument, str):
                    return argument.replace(" ", ".")
                if code.name == "STACK_GLOBAL" and len(words) == 2:
                    return ".".join(words)
                if isinstance(argument, str):
                    words = [*words[-1:], argument]
    except Exception:  # not a pickle at all
        return None
    return None
