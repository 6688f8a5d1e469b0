"""Records of the Attention tab: what comes back, how exactly, and what is refused."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vit.dashboard.format import MAX_BYTES, VERSION, RecordError, VersionError, decode, encode, pack, unpack

ARRAYS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=7),
    elements=st.floats(0, 1e6, width=32, allow_subnormal=False),
)


@given(ARRAYS)
def test_an_array_comes_back_within_its_bound(array: np.ndarray) -> None:
    back = unpack(json.loads(json.dumps(pack(array))))
    assert back.shape == array.shape
    assert back.dtype == np.float32
    peaks = array.max(axis=-1, keepdims=True)
    assert np.all(np.abs(back - array) <= peaks / 255 * (1 + 1e-5))
    # in the square root, half a code: small numbers are kept much more closely
    assert np.all(np.abs(np.sqrt(back / np.where(peaks > 0, peaks, 1)) - np.sqrt(array / np.where(peaks > 0, peaks, 1)))
                  <= 0.5 / 255 + 1e-4)  # fmt: skip
    np.testing.assert_array_equal(back.max(axis=-1, keepdims=True), peaks)  # the largest value is exact
    assert np.all(back[array == 0] == 0)


@given(ARRAYS)
def test_packing_what_was_unpacked_changes_nothing(array: np.ndarray) -> None:
    once = pack(array)
    assert pack(unpack(once)) == once


def test_an_array_without_rows_is_an_array() -> None:
    for shape in ((0,), (3, 0), (0, 4)):
        assert unpack(pack(np.zeros(shape))).shape == shape


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_what_no_attention_can_be_is_refused_when_written(bad: float) -> None:
    with pytest.raises(ValueError, match="finite numbers of at least 0"):
        pack(np.array([0.5, bad]))
    with pytest.raises(ValueError, match="finite numbers of at least 0"):
        pack(np.float32(1))


@pytest.mark.parametrize(
    "packed",
    [
        None,
        [],
        {},
        {"shape": [2, 3], "peaks": "", "codes": ""},
        {"shape": [], "peaks": "", "codes": ""},
        {"shape": [-1, -3], "peaks": base64.b64encode(bytes(4)).decode(), "codes": base64.b64encode(bytes(3)).decode()},
        {"shape": [10**30], "peaks": base64.b64encode(bytes(4)).decode(), "codes": ""},
        {"shape": "ab", "peaks": "", "codes": ""},
        {"shape": [1], "peaks": "????", "codes": "AA=="},
        {"shape": [3], "peaks": base64.b64encode(bytes(3)).decode(), "codes": base64.b64encode(bytes(3)).decode()},
    ],
)
def test_a_damaged_array_is_refused(packed: Any) -> None:
    with pytest.raises(RecordError):
        unpack(packed)


def test_a_record_comes_back_with_its_version() -> None:
    record = {"step": 3, "name": "<img src=x onerror=alert(1)> é \ud800", "values": [0.1, None, True]}
    assert decode(encode(record)) == {"v": VERSION, **record}
    with pytest.raises(ValueError, match="Out of range"):
        encode({"x": math.nan})


def test_a_cut_record_is_refused_wherever_it_is_cut() -> None:
    data = encode({"step": 3, "rows": pack(np.random.default_rng(0).random((3, 5)))})
    for length in range(len(data)):
        with pytest.raises(RecordError):
            decode(data[:length])


@given(st.binary(max_size=64))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for each in (data, zlib.compress(data)):
        with pytest.raises(RecordError):
            decode(each)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)))
def test_json_that_is_no_record_is_refused(value: Any) -> None:
    with pytest.raises(RecordError):
        decode(zlib.compress(json.dumps(value).encode()))


@pytest.mark.parametrize("version", [0, 2, 1.0, True, "1", None, [1]])
def test_another_version_is_said(version: Any) -> None:
    with pytest.raises(VersionError, match=r"written in format .*, and this TensorBoard reads 1: update vit"):
        decode(zlib.compress(json.dumps({"v": version}).encode()))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecordError, match="damaged"):
        decode(zlib.compress(b'{"v":1,"x":%s}' % text.encode()))


@pytest.mark.parametrize(
    "text",
    [
        b" " * (MAX_BYTES + 1),
        b'{"v":1,"x":[' + b"[]," * 15_000_000 + b"[]]}",
        b"[" * 900_000,
        b'{"v":1,"x":' + b"9" * 5000 + b"}",
    ],
    ids=["spaces", "lists", "depth", "digits"],
)
def test_a_bomb_takes_no_more_than_it_may(text: bytes) -> None:
    data = zlib.compress(text, 9)
    tracemalloc.start()
    try:
        with pytest.raises(RecordError):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MAX_BYTES


def test_the_format_loads_without_torch_and_tensorboard() -> None:
    code = "import sys, vit.dashboard.format; print({'torch', 'tensorboard', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300).stdout == "set()\n"
