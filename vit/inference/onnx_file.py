"""An ONNX file without its weights: what describes it, and what ONNX Runtime needs to find the weights in it.

Notable
- Building a session from a file parses it whole and copies each weight twice before the runtime packs it a third time.
  The runtime also takes weights that lie in another file, which it maps instead.  So it is given a copy of the message
  in which each large tensor is replaced by its place in that very file: a ViT-Ti/16 of 23 MB becomes 160 kB, its
  session is built in about half the time, and every number is the same.
- Only the outermost structure is read, by the rules of protobuf's encoding (https://protobuf.dev/programming-guides/
  encoding) and the field numbers of onnx.proto: a few thousand bytes, in milliseconds, without the `onnx` package.

Standard library only.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator

# field numbers in onnx.proto
_GRAPH, _METADATA, _TRAINING, _FUNCTIONS = 7, 14, 20, 25  # of ModelProto
_NODE, _INITIALIZER, _OUTPUT, _SPARSE = 1, 5, 12, 15  # of GraphProto
_OPERATOR, _ATTRIBUTE = 4, 5  # of NodeProto
_INT64 = 7  # of TensorProto.DataType
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_EXTERNAL = 1  # of TensorProto.DataLocation
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types

OUTPUTS = (b"logits", b"rollout")
MOST = 1 << 26
"""Numbers in a tensor that a constant asks for, at most, as in an image."""
NEVER = {
    *("EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
    *("Tile", "Resize", "Upsample", "Loop", "Scan", "If", "SequenceMap", "ImageDecoder", "StringNormalizer"),
}
"""Operators that make much of little, or run graphs of their own."""

AS_LARGE = {
    *("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Slice", "Split", "Squeeze", "Transpose"),
    *("Unsqueeze", "Sqrt", "Reciprocal", "Neg", "Shape"),
}
"""Operators whose results have no more numbers than their first input."""

SMALLEST = 1024
"""Bytes of a tensor from which on it is left where it is; shapes and other numbers that the graph is optimised by are
smaller."""


def read_outline(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, str]]:
    """The model's message with its weights left in the file, and its metadata (`metadata_props`).

    The weights' places name the file alone, without a folder: that is for who reads the message to know.
    Raises OSError when the file cannot be read, and ValueError when it has not the structure of an ONNX model.
    """
    name = os.path.basename(os.fspath(path)).encode()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        message: list[bytes] = []
        metadata: dict[str, str] = {}
        graphs = 0
        for number, start, content, end in _fields(data, 0, len(data)):
            if number == _GRAPH:
                message.append(_lengthy(_GRAPH, _graph(data, content, end, name)))
                graphs += 1
                continue
            if number == _METADATA:
                key, value = _entry(data, content, end)
                metadata[key] = value
            message.append(data[start:end])
        if graphs != 1:
            raise ValueError("no graph, or several")
        return b"".join(message), metadata


def check_graph(path: str | os.PathLike[str]) -> bool:
    """Raise ValueError, with the reason, where the file asks for more memory than its weights and an image need.

    Refused are outputs that nobody asks for, operators that make large tensors of small ones and that no export of a
    Vision Transformer has, and constants that ask for tensors of more than `MOST` numbers.

    Returns whether what is computed of its weights alone is small too, for certain.
    Raises OSError when the file cannot be read, and ValueError when it has not the structure of an ONNX model.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        sizes: dict[bytes, int] = {}
        counts: dict[bytes, int] = {b"": 1}
        asked: list[tuple[str, bytes]] = []
        for field, _, content, end in _fields(data, 0, len(data)):
            if field in (_TRAINING, _FUNCTIONS):
                raise ValueError("it has functions of its own")
            parts = list(_fields(data, content, end)) if field == _GRAPH else []  # nodes are written first
            for number, _, start, stop in sorted(parts, key=lambda part: part[0] == _NODE):
                if number == _SPARSE:
                    raise ValueError("it has sparse weights")
                if number == _INITIALIZER:
                    name, count = _count(data, start, stop)
                    counts[name] = count
                    if stop - start < SMALLEST:
                        sizes[name] = _asked_for(data, start, stop)
                elif number == _OUTPUT:
                    name = next((data[a:b] for each, _, a, b in _fields(data, start, stop) if each == 1), b"")
                    if name not in OUTPUTS:
                        raise ValueError(f"it has an output {name[:60].decode(errors='replace')!r}")
                elif number == _NODE:
                    asked += _made(data, start, stop, sizes, counts)
        for kind, name in asked:
            if sizes.get(name, 0) > MOST:
                raise ValueError(f"a node {kind} makes a tensor of {sizes[name]:,} numbers")
        return max(counts.values()) <= MOST


def _made(
    data: mmap.mmap, start: int, end: int, sizes: dict[bytes, int], counts: dict[bytes, int]
) -> list[tuple[str, bytes]]:
    """Of a NodeProto, its operator and the input that says how large its result is, where one does.

    `counts` gets the most numbers that its results may have, where all its inputs are in there.
    """
    parts: dict[int, list[bytes]] = {}
    for number, _, content, stop in _fields(data, start, end):
        if number != _ATTRIBUTE or stop - content < SMALLEST:
            parts.setdefault(number, []).append(data[content:stop])
    kind = b"".join(parts.get(_OPERATOR, [])).decode(errors="replace")
    if kind in NEVER:
        raise ValueError(f"it has a node {kind[:60]}, which no Vision Transformer has")
    inputs, outputs = parts.get(1, []), parts.get(2, [])
    if kind == "Constant" and outputs:
        for attribute in parts.get(_ATTRIBUTE, []):
            for number, _, content, stop in _fields(attribute, 0, len(attribute)):
                if number == 22:
                    raise ValueError("it has sparse weights")
                if number == 5:
                    sizes[outputs[0]] = _asked_for(attribute, content, stop)
                    counts[outputs[0]] = _count(attribute, content, stop)[1]
    elif inputs and all(name in counts for name in inputs):
        given = [counts[name] for name in inputs]
        most = given[0] if kind in AS_LARGE else sum(given) if kind == "Concat" else math.prod(given)
        counts |= dict.fromkeys(outputs, min(most, 1 << 64))
    place = {"ConstantOfShape": 0, "Expand": 1, "Range": 1, "Reshape": 1}.get(kind, len(inputs))
    return [(kind, name) for name in inputs[place : place + 1]]


def _count(data: mmap.mmap | bytes, start: int, end: int) -> tuple[bytes, int]:
    """The name of a TensorProto, and how many numbers it has, by its shape."""
    name, product = b"", 1
    for number, _, content, stop in _fields(data, start, end):
        if number == 8:
            name = data[content:stop]
        while number == 1 and content < stop:  # one after the other, or packed
            side, content = _read_varint(data, content, stop)
            product = min(product * side, 1 << 64)
    return name, product


def _asked_for(data: mmap.mmap | bytes, start: int, end: int) -> int:
    """The product of the values of a small TensorProto, where they are whole numbers."""
    product, whole, raw, values = 1, False, b"", list[int]()
    for number, _, content, stop in _fields(data, start, end):
        if number == 2:
            whole = _read_varint(data, content, stop)[0] == _INT64
        elif number == _RAW_DATA:
            raw = data[content:stop]
        elif number == 7:  # packed int64_data
            while content < stop:
                value, content = _read_varint(data, content, stop)
                values.append(value)
    values += [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8)]
    for value in values if whole else ():
        product = min(product * max(value, 1), 1 << 64)
    return product


def _graph(data: mmap.mmap, start: int, end: int, name: bytes) -> bytes:
    """A GraphProto whose large initializers are places in the file called `name`."""
    parts: list[bytes] = []
    kept = start  # up to here everything is in `parts`
    for number, begin, content, stop in _fields(data, start, end):
        if number == _INITIALIZER and stop - content >= SMALLEST:
            place = _placed(data, content, stop, name)
            if place is not None:
                parts += [data[kept:begin], _lengthy(_INITIALIZER, place)]
                kept = stop
    return b"".join([*parts, data[kept:end]])


def _placed(data: mmap.mmap, start: int, end: int, name: bytes) -> bytes | None:
    """A TensorProto whose numbers stay in the file; None when they are not raw bytes in this one."""
    parts: list[bytes] = []
    raw = None
    for number, begin, content, stop in _fields(data, start, end):
        if number == _RAW_DATA:
            raw = content, stop - content
        elif number in (_EXTERNAL_DATA, _DATA_LOCATION):
            return None
        else:
            parts.append(data[begin:stop])
    if raw is None:
        return None
    for key, value in ((b"location", name), (b"offset", b"%d" % raw[0]), (b"length", b"%d" % raw[1])):
        parts.append(_lengthy(_EXTERNAL_DATA, _lengthy(_KEY, key) + _lengthy(_VALUE, value)))
    return b"".join([*parts, _varint(_DATA_LOCATION << 3 | _VARINT), _varint(_EXTERNAL)])


def _entry(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    found = {number: data[content:stop] for number, _, content, stop in _fields(data, start, end)}
    return found.get(_KEY, b"").decode(), found.get(_VALUE, b"").decode()


def _fields(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of the message in `data[start:end]`: its number, where it, its content, and the next one begin."""
    position = start
    while position < end:
        begin = position
        tag, position = _read_varint(data, position, end)
        kind = tag & 7
        if kind == _BYTES:
            length, position = _read_varint(data, position, end)
        elif kind == _VARINT:
            length = _read_varint(data, position, end)[1] - position
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if length > end - position:
            raise ValueError("a field that ends after its message")
        yield tag >> 3, begin, position, position + length
        position += length


def _read_varint(data: mmap.mmap | bytes, position: int, end: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("a number that does not end")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _lengthy(number: int, content: bytes) -> bytes:
    """A field of bytes, with its tag and length."""
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content
