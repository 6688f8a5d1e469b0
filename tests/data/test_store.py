"""The store of decoded images: what is in it, what is decoded again, and what interruptions and damage leave of it."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vit.data import journal, store
from vit.data.dataset import ArrayImages, FileImages, Split
from vit.data.preprocess import Preprocessing
from vit.data.store import StorageSpec, open_store
from vit.errors import VitError

SIZE = Preprocessing(image_size=(16, 20), interpolation="bilinear")
WHOLE, INPUT = StorageSpec(SIZE, 24), StorageSpec(SIZE, None)
COUNT = 23

BUILD = """
import sys
import numpy as np
from pathlib import Path
from vit.data import store
from vit.data.dataset import FileImages, Split
from vit.data.preprocess import Preprocessing
store._COMMIT = 6000  # three images
paths = sorted(Path(sys.argv[1]).iterdir())
split = Split(np.zeros(len(paths)), FileImages(paths), 3)
spec = store.StorageSpec(Preprocessing(image_size=(16, 20), interpolation="bilinear"), 24)
made = spec.decode
def slowly(self, split, i):
    import time
    time.sleep(float(sys.argv[3]))
    return made(split, i)
store.StorageSpec.decode = slowly
store.open_store(split, spec, Path(sys.argv[2]), "data")
"""


@pytest.fixture
def root(tmp_path):
    return tmp_path / "images"


@pytest.fixture
def files(tmp_path, picture):
    """Files of many sizes, some smaller than what is stored; PNG so that decoding is exact."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{number:02}.png" for number in range(COUNT)]
    for number, path in enumerate(paths):
        picture(15 + number, 60 - number, number).save(path)
    return paths


def split_of(paths):
    return Split(np.zeros(len(paths)), FileImages(paths), 3)


@pytest.fixture
def decoded(monkeypatch):
    """Collect the indices of images as they are decoded for a store."""
    made, seen = StorageSpec.decode, []
    monkeypatch.setattr(StorageSpec, "decode", lambda self, split, i: (seen.append(i), made(self, split, i))[1])
    return seen


def right(opened, spec=WHOLE):
    """Whether every image is what decoding it now makes of it."""
    return all(
        np.array_equal(opened.read(i).numpy(), StorageSpec(spec.preprocessing, spec.side).decode(opened.split, i))
        for i in range(len(opened))
    )


def folder_of(root):
    (folder,) = root.iterdir()
    return folder


def test_what_is_stored(files, root):
    whole = open_store(split_of(files), WHOLE, root, "data")
    as_input = open_store(split_of(files), INPUT, root, "data")
    assert len(list(root.iterdir())) == 2
    for i, path in enumerate(files):
        image = Image.open(path)
        short = min(image.size)
        expected = image
        if short > 24:
            sides = [round(side * 24 / short) for side in image.size]
            expected = image.resize(sides, Image.Resampling.BILINEAR)
        assert np.array_equal(whole.read(i).numpy(), np.asarray(expected))
        assert whole.stored_sizes([i]) == [(expected.height, expected.width)]
        assert np.array_equal(as_input.read(i).numpy(), SIZE.resize(image))


def test_each_image_is_decoded_once(files, root, decoded):
    open_store(split_of(files), WHOLE, root, "data")
    assert sorted(decoded) == list(range(COUNT))
    again = open_store(split_of(files), WHOLE, root, "data")
    assert len(decoded) == COUNT
    assert right(again)
    # part of them, in another order: another split of the same data
    part = open_store(split_of(files).subset([7, 3, 20]), WHOLE, root, "data")
    assert len(decoded) == COUNT + COUNT  # by `right`
    assert np.array_equal(part.read(1).numpy(), again.read(3).numpy())


def test_what_changed_is_noticed(files, root, decoded, picture):
    open_store(split_of(files), WHOLE, root, "data")
    decoded.clear()
    picture(40, 40, 99).save(files[5])
    later = os.stat(files[6]).st_mtime_ns + 1
    os.utime(files[6], ns=(later, later))
    added = files[0].with_name("new.png")
    picture(30, 50, 77).save(added)
    opened = open_store(split_of([*files, added]), WHOLE, root, "data")
    assert sorted(decoded) == [5, 6, COUNT]
    assert right(opened)


def test_other_pixels_are_another_store(files, root, decoded):
    open_store(split_of(files), WHOLE, root, "data")
    for other in (
        StorageSpec(SIZE, 25),
        StorageSpec(Preprocessing(image_size=(16, 20), interpolation="bicubic"), 24),
        StorageSpec(Preprocessing(image_size=(16, 20), channels=1, interpolation="bilinear"), 24),
    ):
        decoded.clear()
        split = Split(np.zeros(COUNT), FileImages(files), other.preprocessing.channels)
        assert right(open_store(split, other, root, "data"), other)
        assert len(decoded) == 2 * COUNT
    decoded.clear()
    # the size of crops and the colours that are taken off do not touch what is stored
    like = StorageSpec(Preprocessing(image_size=(8, 8), interpolation="bilinear", mean=(0.1, 0.2, 0.3)), 24)
    open_store(split_of(files), like, root, "data")
    assert not decoded


def test_a_store_of_which_little_is_of_use_is_begun_anew(files, root, decoded):
    reader = open_store(split_of(files), WHOLE, root, "data")
    before = (folder_of(root) / "pixels").stat().st_size
    for path in files[:18]:
        later = os.stat(path).st_mtime_ns + 1
        os.utime(path, ns=(later, later))
    decoded.clear()
    assert right(open_store(split_of(files), WHOLE, root, "data"))
    assert sorted(decoded[:COUNT]) == list(range(COUNT))
    assert (folder_of(root) / "pixels").stat().st_size == before
    assert right(reader)  # what it has open is still there


def build(files, root, pause=0.0):
    command = [sys.executable, "-c", BUILD, str(files[0].parent), str(root), str(pause)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_killed_while_decoding_it_goes_on(files, root, decoded):
    process = build(files, root, 0.05)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        written = list(root.glob("*/index"))
        if written and written[0].stat().st_size >= 2 * journal.RECORD.itemsize:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process.stderr.close()
    opened = open_store(split_of(files), WHOLE, root, "data")
    assert 0 < len(decoded) < COUNT
    assert right(opened)
    fresh = open_store(split_of(files), WHOLE, root.with_name("fresh"), "data")
    for i in range(COUNT):
        assert np.array_equal(opened.read(i).numpy(), fresh.read(i).numpy())


def test_an_interruption_keeps_what_is_decoded(files, root, decoded, monkeypatch):
    made = StorageSpec.decode

    def stopped(self, split, i):
        if len(decoded) == 10:
            raise KeyboardInterrupt
        return made(self, split, i)

    with monkeypatch.context() as patch:
        patch.setattr(StorageSpec, "decode", stopped)
        with pytest.raises(KeyboardInterrupt):
            open_store(split_of(files), WHOLE, root, "data")
    done = len(decoded)
    assert right(open_store(split_of(files), WHOLE, root, "data"))
    assert done == 10
    assert sorted(decoded[:COUNT]) == list(range(COUNT))


def test_several_processes_decode_each_image_once(files, root):
    processes = [build(files, root, 0.01) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert (folder_of(root) / "index").stat().st_size == COUNT * journal.RECORD.itemsize
    assert right(open_store(split_of(files), WHOLE, root, "data"))


@pytest.mark.parametrize("left", [0, 1, 39, 40, 41, 500, 23 * 40 - 1])
def test_an_index_cut_short(left, files, root, decoded):
    open_store(split_of(files), WHOLE, root, "data")
    os.truncate(folder_of(root) / "index", left)
    decoded.clear()
    assert right(open_store(split_of(files), WHOLE, root, "data"))
    assert len(decoded) == COUNT - left // 40 + COUNT
    decoded.clear()
    open_store(split_of(files), WHOLE, root, "data")
    assert not decoded


@pytest.mark.parametrize("place", range(0, 40, 3))
def test_a_damaged_index(place, files, root, decoded, caplog):
    open_store(split_of(files), WHOLE, root, "data")
    path = folder_of(root) / "index"
    data = bytearray(path.read_bytes())
    data[5 * 40 + place] ^= 0x10
    path.write_bytes(data)
    decoded.clear()
    with caplog.at_level(logging.WARNING, "vit"):
        opened = open_store(split_of(files), WHOLE, root, "data")
    assert len(decoded) == 1
    assert "1 stored images are damaged" in caplog.text
    assert right(opened)
    caplog.clear()
    open_store(split_of(files), WHOLE, root, "data")
    assert not caplog.text


def test_damaged_pixels_are_noticed_when_they_are_read(files, root, decoded, caplog):
    open_store(split_of(files), WHOLE, root, "data")
    path = folder_of(root) / "pixels"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    decoded.clear()
    opened = open_store(split_of(files), WHOLE, root, "data")
    assert not decoded
    with caplog.at_level(logging.WARNING, "vit"):
        found = [opened.read(i).numpy() for i in range(COUNT)]
    (mended,) = decoded
    assert [record.message for record in caplog.records] == [
        f"{folder_of(root)}: the stored image of {files[mended]} is damaged; it is decoded again"
    ]
    for i in range(COUNT):
        assert np.array_equal(found[i], WHOLE.decode(opened.split, i))
    decoded.clear()
    again = open_store(split_of(files), WHOLE, root, "data")
    assert np.array_equal(again.read(mended).numpy(), found[mended])
    assert not decoded


def test_damaged_pixels_whose_file_is_gone_name_it(files, root):
    opened = open_store(split_of(files[:1]), WHOLE, root, "data")
    path = folder_of(root) / "pixels"
    path.write_bytes(bytes(path.stat().st_size))
    files[0].unlink()
    with pytest.raises(VitError, match=r"00\.png: no such file \(it could be read when the data was scanned\)"):
        opened.read(0)


def test_pixels_cut_short(files, root, decoded, caplog):
    open_store(split_of(files), WHOLE, root, "data")
    path = folder_of(root) / "pixels"
    os.truncate(path, path.stat().st_size * 3 // 4)
    decoded.clear()
    assert right(open_store(split_of(files), WHOLE, root, "data"))
    assert COUNT < len(decoded) < 2 * COUNT
    path.unlink()
    decoded.clear()
    assert right(open_store(split_of(files), WHOLE, root, "data"))
    assert len(decoded) == 2 * COUNT


def test_a_file_that_went_bad_is_named_and_the_rest_kept(files, root, decoded):
    good = files[4].read_bytes()
    files[4].write_bytes(good[:60])
    with pytest.raises(
        VitError, match=r"04\.png: truncated PNG.*\(it could be read when the data was scanned\)"
    ) as bad:
        open_store(split_of(files), WHOLE, root, "data")
    assert "\n" not in str(bad.value)
    done = len(decoded) - 1
    files[4].write_bytes(good)
    assert right(open_store(split_of(files), WHOLE, root, "data"))
    assert done > 0
    assert len(decoded) == 1 + COUNT + COUNT


def test_a_disk_without_the_room_is_told_before_anything_is_decoded(files, root, decoded, monkeypatch):
    split = split_of(files)
    split.sizes = np.array([Image.open(path).size[::-1] for path in files], np.int32)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    monkeypatch.setattr(store, "_SPARE", 0)
    opened = open_store(split, WHOLE, root, "data")
    used = (folder_of(root) / "pixels").stat().st_size
    assert WHOLE.estimate_bytes(split, np.arange(COUNT)) == used  # what is told is what it takes
    assert right(opened)
    decoded.clear()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=used - 1))
    with pytest.raises(VitError, match=r"23 decoded images need 0 MiB in .* 0 MiB are free; data\.cache_folder=FOLDER"):
        open_store(split, WHOLE, root.with_name("other"), "data")
    assert not decoded
    assert [path.name for path in root.with_name("other").glob("*/*")] in (
        ["lock", "about.json"],
        ["about.json", "lock"],
    )


def test_a_disk_that_is_full_half_way(files, root, decoded, monkeypatch):
    write, written = store._write, []

    def full(file, data, start=None):
        written.append(start)
        if len(written) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data, start)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", full)
        patch.setattr(store, "_COMMIT", 6000)
        with pytest.raises(VitError, match=r"No space left on device; what is stored is kept: make room"):
            open_store(split_of(files), WHOLE, root, "data")
    decoded.clear()
    assert right(open_store(split_of(files), WHOLE, root, "data"))
    assert COUNT < len(decoded) < 2 * COUNT


def test_a_store_that_may_only_be_read(picture, unprivileged, decoded):
    with unprivileged() as folder:
        files = [folder / f"{number}.png" for number in range(5)]
        for number, path in enumerate(files):
            picture(30, 40, number).save(path)
        root = folder / "images"
        open_store(split_of(files[:4]), WHOLE, root, "data")
        (inside,) = root.iterdir()
        for path in inside.iterdir():
            path.chmod(0o444)
        inside.chmod(0o555)
        try:
            decoded.clear()
            opened = open_store(split_of(files[:4]), WHOLE, root, "data")
            assert not decoded
            assert right(opened)
            with pytest.raises(VitError, match=r"cannot write .*: Permission denied"):
                open_store(split_of(files), WHOLE, root, "data")
        finally:
            inside.chmod(0o755)


def test_a_folder_that_cannot_be_made(files, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VitError, match=r"data\.cache_folder: cannot make .*: Not a directory"):
        open_store(split_of(files), WHOLE, tmp_path / "file", "data")


def test_images_in_memory_are_not_stored(root):
    split = Split(np.zeros(3), ArrayImages(np.zeros((3, 8, 8, 3), np.uint8), "d"), 3)
    assert open_store(split, WHOLE, root, "data") is None
    assert not root.exists()


def test_rows_of_parquet_files(tmp_path, root, decoded, picture, encoded):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    from vit.data.catalogue import DataConfig, open_data

    def write(seed, name="image"):
        images = [encoded(picture(30, 40, seed + k), "PNG") for k in range(12)]
        table = pa.table({name: images, "other": images[::-1], "label": ["a", "b"] * 6})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=5)

    write(0)
    config = DataConfig(name="parquet", root=str(tmp_path / "x.parquet"), image_column="image")
    data = open_data(config)
    opened = open_store(data.splits["train"], WHOLE, root, "data")
    assert right(opened)
    decoded.clear()
    open_store(open_data(config).splits["train"], WHOLE, root, "data")
    assert not decoded
    other = DataConfig(name="parquet", root=str(tmp_path / "x.parquet"), image_column="other")
    assert right(open_store(open_data(other).splits["train"], WHOLE, root, "data"))
    assert decoded
    decoded.clear()
    write(50)
    assert right(open_store(open_data(config).splits["train"], WHOLE, root, "data"))
    assert decoded
