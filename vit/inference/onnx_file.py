"""Read an ONNX file without its weights: its metadata, and a message with which ONNX Runtime finds the weights in it.

Notes:
- A session of a file parses the whole file and copies each weight twice before the runtime packs it a third time.  The
  runtime maps weights that are in another file.  So it gets a copy of the message in which each large tensor is
  replaced by its offset in the same file: a ViT-Ti/16 of 23 MB becomes 160 kB, its session is built in about half the
  time, and every number is the same.
- Only the outer structure is read, by protobuf's encoding (https://protobuf.dev/programming-guides/encoding) and the
  field numbers of onnx.proto: a few thousand bytes, in milliseconds, without the `onnx` package.

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
MAX_NUMBERS = 1 << 26
"""Largest number of values in a tensor whose size a constant gives, as for an image."""
REFUSED_OPERATORS = {
    *("EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
    *("Tile", "Resize", "Upsample", "Loop", "Scan", "If", "SequenceMap", "ImageDecoder", "StringNormalizer"),
}
"""Operators that make large tensors of small ones, or run subgraphs."""

NOT_LARGER = {
    *("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Slice", "Split", "Squeeze", "Transpose"),
    *("Unsqueeze", "Sqrt", "Reciprocal", "Neg", "Shape"),
}
"""Operators whose results have at most as many values as their first input."""

SMALLEST = 1024
"""Smallest size in bytes of a tensor that stays in the file; the runtime needs smaller ones, such as shapes, to
optimise the graph."""


def read_outline(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, str]]:
    """Read the model's message without its weights, and its metadata (`metadata_props`).

    The message names the file without its folder; the reader of the message has to know the folder.
    Raises OSError when the file cannot be read, and ValueError when it does not have the structure of an ONNX model.
    """
    name = os.path.basename(os.fspath(path)).encode()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        message: list[bytes] = []
        metadata: dict[str, str] = {}
        graphs = 0
        for number, start, content, end in _fields(data, 0, len(data)):
            if number == _GRAPH:
                message.append(_bytes_field(_GRAPH, _external_graph(data, content, end, name)))
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
    """Check that the graph needs no more memory than its weights and an image; raise ValueError with the reason.

    Unknown outputs are refused, as are operators that make large tensors of small ones and that no exported Vision
    Transformer has, and constants that ask for tensors of more than `MAX_NUMBERS` values.

    Returns True if all results that depend only on weights are certainly small too.
    Raises OSError when the file cannot be read, and ValueError when it does not have the structure of an ONNX model.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        sizes: dict[bytes, int] = {}
        counts: dict[bytes, int] = {b"": 1}
        requests: list[tuple[str, bytes]] = []
        for field, _, content, end in _fields(data, 0, len(data)):
            if field in (_TRAINING, _FUNCTIONS):
                raise ValueError("it has functions of its own")
            parts = list(_fields(data, content, end)) if field == _GRAPH else []  # nodes are written first
            for number, _, start, stop in sorted(parts, key=lambda part: part[0] == _NODE):
                if number == _SPARSE:
                    raise ValueError("it has sparse weights")
                if number == _INITIALIZER:
                    name, count = _read_count(data, start, stop)
                    counts[name] = count
                    if stop - start < SMALLEST:
                        sizes[name] = _shape_product(data, start, stop)
                elif number == _OUTPUT:
                    name = next((data[a:b] for each, _, a, b in _fields(data, start, stop) if each == 1), b"")
                    if name not in OUTPUTS:
                        raise ValueError(f"it has an output {name[:60].decode(errors='replace')!r}")
                elif number == _NODE:
                    requests += _read_node(data, start, stop, sizes, counts)
        for kind, name in requests:
            if sizes.get(name, 0) > MAX_NUMBERS:
                raise ValueError(f"a node {kind} makes a tensor of {sizes[name]:,} numbers")
        return max(counts.values()) <= MAX_NUMBERS


def _read_node(
    data: mmap.mmap, start: int, end: int, sizes: dict[bytes, int], counts: dict[bytes, int]
) -> list[tuple[str, bytes]]:
    """Read the operator of a NodeProto and its input that gives the size of the result, if it has one.

    Adds the largest possible number of values of its results to `counts`, if all its inputs are there.
    """
    parts: dict[int, list[bytes]] = {}
    for number, _, content, stop in _fields(data, start, end):
        if number != _ATTRIBUTE or stop - content < SMALLEST:
            parts.setdefault(number, []).append(data[content:stop])
    kind = b"".join(parts.get(_OPERATOR, [])).decode(errors="replace")
    if kind in REFUSED_OPERATORS:
        raise ValueError(f"it has a node {kind[:60]}, which no Vision Transformer has")
    inputs, outputs = parts.get(1, []), parts.get(2, [])
    if kind == "Constant" and outputs:
        for attribute in parts.get(_ATTRIBUTE, []):
            for number, _, content, stop in _fields(attribute, 0, len(attribute)):
                if number == 22:
                    raise ValueError("it has sparse weights")
                if number == 5:
                    sizes[outputs[0]] = _shape_product(attribute, content, stop)
                    counts[outputs[0]] = _read_count(attribute, content, stop)[1]
    elif inputs and all(name in counts for name in inputs):
        input_counts = [counts[name] for name in inputs]
        total = sum(input_counts) if kind == "Concat" else math.prod(input_counts)
        largest = input_counts[0] if kind in NOT_LARGER else total
        counts |= dict.fromkeys(outputs, min(largest, 1 << 64))
    index = {"ConstantOfShape": 0, "Expand": 1, "Range": 1, "Reshape": 1}.get(kind, len(inputs))
    return [(kind, name) for name in inputs[index : index + 1]]


def _read_count(data: mmap.mmap | bytes, start: int, end: int) -> tuple[bytes, int]:
    """Read the name of a TensorProto and the number of its values, from its shape."""
    name, product = b"", 1
    for number, _, content, stop in _fields(data, start, end):
        if number == 8:
            name = data[content:stop]
        while number == 1 and content < stop:  # one after the other, or packed
            side, content = _read_varint(data, content, stop)
            product = min(product * side, 1 << 64)
    return name, product


def _shape_product(data: mmap.mmap | bytes, start: int, end: int) -> int:
    """Compute the product of the values of a small TensorProto; 1 unless they are int64."""
    product, is_int64, raw, values = 1, False, b"", list[int]()
    for number, _, content, stop in _fields(data, start, end):
        if number == 2:
            is_int64 = _read_varint(data, content, stop)[0] == _INT64
        elif number == _RAW_DATA:
            raw = data[content:stop]
        elif number == 7:  # packed int64_data
            while content < stop:
                value, content = _read_varint(data, content, stop)
                values.append(value)
    values += [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8)]
    for value in values if is_int64 else ():
        product = min(product * max(value, 1), 1 << 64)
    return product


def _external_graph(data: mmap.mmap, start: int, end: int, name: bytes) -> bytes:
    """Copy a GraphProto, with large initializers replaced by their offsets in the file called `name`."""
    parts: list[bytes] = []
    copied = start  # up to here everything is in `parts`
    for number, begin, content, stop in _fields(data, start, end):
        if number == _INITIALIZER and stop - content >= SMALLEST:
            tensor = _external_tensor(data, content, stop, name)
            if tensor is not None:
                parts += [data[copied:begin], _bytes_field(_INITIALIZER, tensor)]
                copied = stop
    return b"".join([*parts, data[copied:end]])


def _external_tensor(data: mmap.mmap, start: int, end: int, name: bytes) -> bytes | None:
    """Copy a TensorProto without its values, which stay in the file; None if they are not raw bytes in this file."""
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
        parts.append(_bytes_field(_EXTERNAL_DATA, _bytes_field(_KEY, key) + _bytes_field(_VALUE, value)))
    return b"".join([*parts, _write_varint(_DATA_LOCATION << 3 | _VARINT), _write_varint(_EXTERNAL)])


def _entry(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    fields = {number: data[content:stop] for number, _, content, stop in _fields(data, start, end)}
    return fields.get(_KEY, b"").decode(), fields.get(_VALUE, b"").decode()


def _fields(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field of the message in `data[start:end]`: its number, its start, the start and end of its content."""
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
    """Read a number with 7 bits in each byte, lowest first; return it and its end."""
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("a number that does not end")


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _bytes_field(number: int, content: bytes) -> bytes:
    """Encode a field of bytes, with its tag and length."""
    return _write_varint(number << 3 | _BYTES) + _write_varint(len(content)) + content
