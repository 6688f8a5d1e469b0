"""What the tests of the data room share: real image files, a cache folder of their own, permissions that hold."""

import contextlib
import ctypes
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache folder, empty, for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "vit"


@pytest.fixture(scope="session")
def shared_data():
    """The folder of data sets for development, which lies beside the checkout where there is one."""
    root = Path(__file__).resolve().parents[2]
    named = os.environ.get("VIT_SHARED_DATA")
    for place in [Path(named)] if named else [root / "shared" / "data", root.parent / "shared" / "data"]:
        if place.is_dir():
            return place
    pytest.skip("no shared/data beside the checkout, and VIT_SHARED_DATA is not set")


@pytest.fixture(scope="session")
def photos(shared_data):
    """Paths of real photographs."""
    found = sorted((shared_data / "imagenet_sample").glob("*.JPEG"))
    if not found:
        pytest.skip(f"no photographs in {shared_data}")
    return found


def _picture(height=24, width=32, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture():
    """`picture(height, width, seed)`: a smooth RGB image."""
    return _picture


@pytest.fixture(scope="session")
def encoded():
    """`encoded(image, kind, **options)`: the bytes of its file."""
    return _encoded


@pytest.fixture
def make_folder(tmp_path):
    """`make_folder({"cats/1.jpg": None, "dogs/x.png": b"..."})`: real files; None is filled with an image."""

    def make(files, root=None):
        root = tmp_path / "photos" if root is None else root
        for number, (name, data) in enumerate(files.items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if data is None:
                data = _encoded(_picture(20 + number % 5, 24, number), "PNG" if path.suffix == ".png" else "JPEG")
            path.write_bytes(data)
        return root

    return make


@pytest.fixture
def unprivileged():
    """A context in which file permissions hold, also where the tests run as root; gives a folder to write to."""

    @contextlib.contextmanager
    def enter():
        with tempfile.TemporaryDirectory(prefix="vit-test-") as name:
            if os.geteuid() != 0:
                yield Path(name)
                return
            # not another user: that one may not be let into where Python's own modules lie
            before = _effective_capabilities()
            _effective_capabilities(before & ~_PAST_PERMISSIONS)
            try:
                yield Path(name)
            finally:
                _effective_capabilities(before)

    return enter


_PAST_PERMISSIONS = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root reads and writes what permissions deny (capability.h)."""


def _effective_capabilities(wanted: int | None = None) -> int:
    """Those of this thread, of the first 32, and of threads it will start; with `wanted`, set to that (capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, of the first 32 and of the others
    if libc.capget(header, sets) == 0:
        if wanted is None:
            return sets[0]
        sets[0] = wanted
        if libc.capset(header, sets) == 0:
            return wanted
    raise OSError(ctypes.get_errno(), "capabilities cannot be read or set")
