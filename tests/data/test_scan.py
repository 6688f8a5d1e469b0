"""The scan: everything once, remembered while nothing changes, and never trusted when damaged."""

import os
import threading

import numpy as np
import pytest

from vit.data import scan as scanning
from vit.data.catalogue import DataConfig, open_data
from vit.data.decode import ImageError, measure
from vit.data.scan import cache_root, check_unreadable, file_fingerprint, fingerprint, scan
from vit.errors import VitError


@pytest.fixture
def looked(monkeypatch):
    """The files that were really decoded."""
    seen = []

    def look(path, *, channels):
        seen.append(os.path.basename(path))
        return measure(path, channels=channels)

    monkeypatch.setattr(scanning, "measure", look)
    return seen


@pytest.fixture
def photos_of(make_folder):
    return make_folder({f"{name}/{k}.jpg": None for name in "ab" for k in range(10)})


def opened(root, **keys):
    return open_data(DataConfig(name="folder", root=str(root), **keys))


def test_a_second_time_nothing_is_decoded(photos_of, looked):
    first = opened(photos_of)
    assert sorted(set(looked)) == sorted(f"{k}.jpg" for k in range(10))
    assert len(looked) == 20
    looked.clear()
    second = opened(photos_of)
    assert looked == []
    assert [split.name(0) for split in first.splits.values()] == [split.name(0) for split in second.splits.values()]


def test_what_changed_is_looked_at_again(photos_of, looked, encoded, picture):
    opened(photos_of)
    looked.clear()
    path = photos_of / "a" / "3.jpg"
    path.write_bytes(encoded(picture(50, 50, 9)))
    (photos_of / "b" / "new.jpg").write_bytes(encoded(picture(20, 20, 1)))
    os.utime(photos_of / "b" / "5.jpg", (1_000_000_000, 1_000_000_000))
    opened(photos_of)
    assert sorted(looked) == ["3.jpg", "5.jpg", "new.jpg"]


def test_bad_files_are_looked_at_every_time(photos_of, looked, encoded, picture):
    path = photos_of / "a" / "3.jpg"
    status = path.stat()
    good = path.read_bytes()
    path.write_bytes(good[:-100] + bytes(0))
    assert len(opened(photos_of, max_bad_fraction=0.5).bad_files) == 1
    looked.clear()
    assert len(opened(photos_of, max_bad_fraction=0.5).bad_files) == 1
    assert looked == ["3.jpg"]
    path.write_bytes(good)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert opened(photos_of).bad_files == []


def test_the_memory_is_in_the_cache_folder_and_not_in_the_data(photos_of, cache):
    before = sorted(str(path) for path in photos_of.rglob("*"))
    opened(photos_of)
    assert sorted(str(path) for path in photos_of.rglob("*")) == before
    assert cache_root() == cache
    assert len(list((cache / "scans").iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"nonsense",
        lambda data: bytes(len(data)),
        lambda data: data[:100] + bytes(50) + data[150:],
    ],
)
def test_a_damaged_memory_is_ignored(photos_of, looked, cache, damage):
    opened(photos_of)
    (memory,) = (cache / "scans").iterdir()
    memory.write_bytes(damage(memory.read_bytes()))
    looked.clear()
    opened(photos_of)
    assert len(looked) == 20
    looked.clear()
    opened(photos_of)
    assert looked == []


@pytest.mark.parametrize(
    "arrays",
    [
        {"prints": np.array([1.5]), "sizes": np.ones((1, 2), np.int32)},
        {"prints": np.array([2, 1], np.uint64), "sizes": np.ones((2, 2), np.int32)},
        {"prints": np.array([1, 2], np.uint64), "sizes": np.ones((3, 2), np.int32)},
        {"prints": np.array([1, 2], np.uint64), "sizes": np.zeros((2, 2), np.int32)},
        {"prints": np.array([1, 2], np.uint64)},
        {"prints": np.array(["a"], dtype=object), "sizes": np.ones((1, 2), np.int32)},
    ],
)
def test_a_foreign_memory_is_ignored(photos_of, looked, cache, arrays):
    opened(photos_of)
    (memory,) = (cache / "scans").iterdir()
    with open(memory, "wb") as file:
        np.savez(file, **arrays)
    looked.clear()
    opened(photos_of)
    assert len(looked) == 20


def test_a_cache_folder_that_cannot_be_written(photos_of, cache):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    assert opened(photos_of).bad_files == []


def test_a_cache_folder_must_be_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: such a value is to be ignored
    assert cache_root() == tmp_path / ".cache" / "vit"


def test_grey_and_colour_are_different_questions(photos_of, looked):
    opened(photos_of)
    looked.clear()
    opened(photos_of, channels=1)
    assert len(looked) == 20


def test_fingerprints(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    first = file_fingerprint(str(path), 3)
    assert first == file_fingerprint(str(path), 3) != 0
    assert first != file_fingerprint(str(path), 1)
    path.write_bytes(b"12")
    assert first != file_fingerprint(str(path), 3)
    assert file_fingerprint(str(tmp_path / "nothing"), 3) == 0
    assert file_fingerprint("nul\0byte", 3) == 0
    assert fingerprint("a", "b") != fingerprint("ab")
    assert fingerprint(os.fsdecode(b"\xff")) != fingerprint("x")


def test_all_of_it_in_parallel(cache):
    threads = set()
    barrier = threading.Barrier(2, timeout=20)

    def look(i):
        if i in (0, 64):  # the first of two tasks: they can only meet if two threads are at work
            barrier.wait(20)
        threads.add(threading.get_ident())
        if i % 100 == 7:
            raise ImageError("number seven")
        return i + 1, 2

    prints = np.arange(1, 1001, dtype=np.uint64)
    sizes, bad = scan(prints, look, "a data set", "Checking")
    assert len(threads) > 1
    assert list(bad) == list(range(7, 1000, 100))
    assert set(bad.values()) == {"number seven"}
    good = np.array([i for i in range(1000) if i % 100 != 7])
    assert np.array_equal(sizes[good, 0], good + 1)
    assert (sizes[list(bad)] == 0).all()

    def again(i):
        assert i % 100 == 7
        return 5, 5

    sizes, bad = scan(prints, again, "a data set", "Checking")
    assert bad == {}
    assert (sizes[7] == 5).all()


def test_nothing_is_remembered_without_a_fingerprint(cache):
    calls = []

    def look(i):
        calls.append(i)
        return 1, 1

    for _ in range(2):
        scan(np.zeros(3, dtype=np.uint64), look, "x", "Checking")
    assert calls == [0, 1, 2] * 2


def test_a_full_list_at_the_limit():
    check_unreadable([("a.jpg", "empty file")], 100, 0.01, "photos")
    with pytest.raises(VitError, match=r"photos: 2 of 100 .* a.jpg: empty file; b.jpg: cut"):
        check_unreadable([("a.jpg", "empty file"), ("b.jpg", "cut")], 100, 0.01, "photos")
    with pytest.raises(VitError):
        check_unreadable([("a.jpg", "empty file")], 100, 0.0, "photos")
    check_unreadable([], 0, 0.0, "photos")
