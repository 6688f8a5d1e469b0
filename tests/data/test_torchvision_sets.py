"""Downloaded data sets, by torchvision's real downloader from a server on this machine, and without any network.

The archives are small stand-ins in the true layouts; only addresses and checksums are replaced.
"""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from vit.data import torchvision_sets
from vit.data.catalogue import DataConfig, open_data
from vit.data.dataset import SPLITS
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.files import hold_lock

datasets = pytest.importorskip("torchvision.datasets")

NAMES = {
    "fashion_mnist": "FashionMNIST/raw/t10k-images-idx3-ubyte.gz",
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "stl10": "stl10_binary.tar.gz",
    "flowers102": "flowers-102/102flowers.tgz, flowers-102/imagelabels.mat, flowers-102/setid.mat",
    "oxford_pets": "oxford-iiit-pet/images.tar.gz, oxford-iiit-pet/annotations.tar.gz",
    "food101": "food-101.tar.gz",
}


def md5(data):
    return hashlib.md5(data).hexdigest()


def jpeg(seed, size=(12, 16)):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def packed(files, kind="gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def fashion_mnist(patch, url):
    rng = np.random.default_rng(0)
    files = {}
    for stem, count in (("train", 40), ("t10k", 20)):
        files[f"{stem}-images-idx3-ubyte.gz"] = gzip.compress(
            idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)), mtime=0
        )
        files[f"{stem}-labels-idx1-ubyte.gz"] = gzip.compress(idx(np.arange(count, dtype=np.uint8) % 10), mtime=0)
    patch.setattr(datasets.FashionMNIST, "mirrors", [url])
    patch.setattr(datasets.FashionMNIST, "resources", [(name, md5(data)) for name, data in files.items()])
    return files


def cifar(kind, key, folder, archive, classes, patch, url):
    rng = np.random.default_rng(1)

    def batch(count):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return pickle.dumps({"data": pixels, key: [k % classes for k in range(count)]}, protocol=2)

    train, test = ("data_batch_1", "data_batch_2"), ("test_batch",)
    if kind == "CIFAR100":
        train, test = ("train",), ("test",)
    files = {name: batch(2 * classes if name in test else 3 * classes) for name in (*train, *test)}
    names, meta = [f"class {k}" for k in range(classes)], "meta" if kind == "CIFAR100" else "batches.meta"
    label_key = "fine_label_names" if kind == "CIFAR100" else "label_names"
    files[meta] = pickle.dumps({label_key: names}, protocol=2)
    data = packed({f"{folder}/{name}": content for name, content in files.items()})
    owner = getattr(datasets, kind)
    patch.setattr(owner, "url", url + archive)
    patch.setattr(owner, "tgz_md5", md5(data))
    patch.setattr(owner, "train_list", [[name, md5(files[name])] for name in train])
    patch.setattr(owner, "test_list", [[name, md5(files[name])] for name in test])
    patch.setattr(owner, "meta", {"filename": meta, "key": label_key, "md5": md5(files[meta])})
    return {archive: data}


def stl10(patch, url):
    rng = np.random.default_rng(2)
    files = {"class_names.txt": b"airplane\nbird\n"}
    for name, count in (("train", 20), ("test", 6)):
        files[f"{name}_X.bin"] = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes()
        files[f"{name}_y.bin"] = (np.arange(count) % 2 + 1).astype(np.uint8).tobytes()
    files["unlabeled_X.bin"] = bytes(3 * 96 * 96)
    data = packed({f"stl10_binary/{name}": content for name, content in files.items()})
    owner = datasets.STL10
    patch.setattr(owner, "url", url + "stl10_binary.tar.gz")
    patch.setattr(owner, "tgz_md5", md5(data))
    for attribute in ("train_list", "test_list"):
        patch.setattr(owner, attribute, [[name, md5(files[name])] for name, _ in getattr(owner, attribute)])
    return {"stl10_binary.tar.gz": data}


def flowers102(patch, url):
    from scipy.io import savemat

    count = 30
    mats = {}
    labels, ids = io.BytesIO(), io.BytesIO()
    savemat(labels, {"labels": np.arange(count)[None] % 3 + 1})
    savemat(ids, {"trnid": np.arange(1, 16)[None], "valid": np.arange(16, 22)[None], "tstid": np.arange(22, 31)[None]})
    mats = {"imagelabels.mat": labels.getvalue(), "setid.mat": ids.getvalue()}
    data = packed({f"jpg/image_{k:05d}.jpg": jpeg(k) for k in range(1, count + 1)})
    files = {"102flowers.tgz": data, **mats}
    patch.setattr(datasets.Flowers102, "_download_url_prefix", url)
    table = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    patch.setattr(datasets.Flowers102, "_file_dict", {key: (name, md5(files[name])) for key, name in table.items()})
    return files


def oxford_pets(patch, url):
    stems = [f"{breed}_{k}" for breed in ("Abyssinian", "american_bulldog", "pug") for k in range(8)]
    rows = [f"{stem} {number // 8 + 1} 1 {number}" for number, stem in enumerate(stems)]
    images = packed({f"images/{stem}.jpg": jpeg(k) for k, stem in enumerate(stems)})
    trainval = [row for k, row in enumerate(rows) if k % 8 < 5]
    test = [row for k, row in enumerate(rows) if k % 8 >= 5]
    annotations = packed(
        {
            "annotations/trainval.txt": "\n".join(trainval).encode() + b"\n",
            "annotations/test.txt": "\n".join(test).encode() + b"\n",
        }
    )
    files = {"images.tar.gz": images, "annotations.tar.gz": annotations}
    patch.setattr(datasets.OxfordIIITPet, "_RESOURCES", tuple((url + name, md5(data)) for name, data in files.items()))
    return files


def food101(patch, url):
    by_class = {name: [f"{name}/{k}" for k in range(9)] for name in ("waffles", "apple_pie")}
    files = {f"food-101/images/{stem}.jpg": jpeg(k) for stems in by_class.values() for k, stem in enumerate(stems)}
    files["food-101/meta/train.json"] = json.dumps({n: s[:6] for n, s in by_class.items()}).encode()
    files["food-101/meta/test.json"] = json.dumps({n: s[6:] for n, s in by_class.items()}).encode()
    data = packed(files)
    patch.setattr(datasets.Food101, "_URL", url + "food-101.tar.gz")
    patch.setattr(datasets.Food101, "_MD5", md5(data))
    return {"food-101.tar.gz": data}


STAND_INS = {
    "fashion_mnist": fashion_mnist,
    "cifar10": functools.partial(cifar, "CIFAR10", "labels", "cifar-10-batches-py", "cifar-10-python.tar.gz", 10),
    "cifar100": functools.partial(cifar, "CIFAR100", "fine_labels", "cifar-100-python", "cifar-100-python.tar.gz", 100),
    "stl10": stl10,
    "flowers102": flowers102,
    "oxford_pets": oxford_pets,
    "food101": food101,
}
SIZES = {  # train, val and test of the stand-ins
    "fashion_mnist": (36, 4, 20),
    "cifar10": (54, 6, 20),
    "cifar100": (270, 30, 200),
    "stl10": (18, 2, 6),
    "flowers102": (15, 6, 9),
    "oxford_pets": (13, 2, 9),
    "food101": (11, 1, 6),
}


class Server:
    """Serves `files` by name, and counts what was asked for."""

    def __init__(self):
        self.files, self.asked = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                outer.asked.append(name)
                data = outer.files.get(name)
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def serve(server, monkeypatch):
    """`serve(name)`: make the stand-in of a data set, on the server."""
    from vit.data import small_sets

    monkeypatch.setattr(small_sets, "DEBIAN_FASHION", small_sets.Path("/nowhere"))

    def make(name):
        server.files = STAND_INS[name](monkeypatch, server.url)
        return server

    return make


def sizes(data):
    return tuple(len(data.splits[name]) for name in SPLITS)


@pytest.mark.parametrize("name", NAMES)
def test_downloaded_once_then_used_as_it_is(name, serve, tmp_path):
    server = serve(name)
    config = DataConfig(name=name, root=str(tmp_path))
    data = open_data(config)
    assert sizes(data) == SIZES[name]
    assert server.asked
    assert len(data.class_names) == len(set(data.class_names))
    rows = {split: {part.name(i) for i in range(len(part))} for split, part in data.splits.items()}
    assert not rows["train"] & rows["val"]
    assert not (rows["train"] | rows["val"]) & rows["test"]
    for part in data.splits.values():
        image = part.image(len(part) - 1)
        assert image.mode == ("L" if config.channels == 1 else "RGB")
        assert part.array(Preprocessing((8, 8), config.channels)).shape == (len(part), 8, 8, config.channels)
    server.close()
    again = open_data(DataConfig(name=name, root=str(tmp_path), download=False))
    assert sizes(again) == SIZES[name]
    assert {part.name(0) for part in again.splits.values()} == {part.name(0) for part in data.splits.values()}


@pytest.mark.parametrize("name", NAMES)
def test_without_a_network_the_files_are_named(name, serve, server, tmp_path):
    serve(name)
    server.close()
    with pytest.raises(VitError) as caught:
        open_data(DataConfig(name=name, root=str(tmp_path)))
    message = str(caught.value)
    assert NAMES[name] in message
    assert str(tmp_path) in message
    assert "could not be downloaded" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", NAMES)
def test_what_is_put_there_by_hand_is_enough(name, serve, tmp_path):
    """The message of the test above, followed to the letter."""
    server = serve(name)
    wanted = NAMES[name].split(", ")
    if name == "fashion_mnist":
        wanted = [f"FashionMNIST/raw/{file}" for file in server.files]
    for place in wanted:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(server.files[path.name])
    server.close()
    data = open_data(DataConfig(name=name, root=str(tmp_path), download=False))
    assert sizes(data) == SIZES[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_download_unless_wanted(name, serve, tmp_path):
    server = serve(name)
    with pytest.raises(VitError, match=r"data\.download=false"):
        open_data(DataConfig(name=name, root=str(tmp_path), download=False))
    assert server.asked == []


@pytest.mark.parametrize("name", ["cifar10", "food101", "fashion_mnist"])
def test_a_damaged_download_is_refused(name, serve, tmp_path):
    server = serve(name)
    server.files = {file: data[:-20] for file, data in server.files.items()}
    with pytest.raises(VitError, match="could not be downloaded"):
        open_data(DataConfig(name=name, root=str(tmp_path)))


def test_a_download_that_is_not_found(serve, tmp_path):
    server = serve("cifar10")
    server.files = {}
    with pytest.raises(VitError, match="Not Found"):
        open_data(DataConfig(name="cifar10", root=str(tmp_path)))


def test_downloads_go_to_the_cache_folder(serve, cache):
    serve("cifar10")
    data = open_data(DataConfig(name="cifar10"))
    assert (cache / "datasets" / "cifar-10-batches-py" / "test_batch").is_file()
    assert data.source["root"] is None  # another machine's cache folder is elsewhere


def test_class_names(serve, tmp_path):
    serve("oxford_pets")
    data = open_data(DataConfig(name="oxford_pets", root=str(tmp_path / "pets")))
    assert data.class_names == ["Abyssinian", "American Bulldog", "Pug"]
    serve("food101")
    assert open_data(DataConfig(name="food101", root=str(tmp_path / "food"))).class_names == ["apple_pie", "waffles"]
    serve("flowers102")
    data = open_data(DataConfig(name="flowers102", root=str(tmp_path / "flowers")))
    assert data.class_names[:3] == ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]
    assert len(data.class_names) == 102


def test_pixels_are_torchvisions(serve, tmp_path):
    serve("stl10")
    data = open_data(DataConfig(name="stl10", root=str(tmp_path)))
    theirs = datasets.STL10(str(tmp_path), split="test")
    for i in range(6):
        image, label = theirs[i]
        assert np.array_equal(np.asarray(data.splits["test"].image(i)), np.asarray(image))
        assert data.splits["test"].labels[i] == label
    serve("cifar10")
    data = open_data(DataConfig(name="cifar10", root=str(tmp_path)))
    theirs = datasets.CIFAR10(str(tmp_path), train=False)
    for i in range(20):
        image, label = theirs[i]
        assert np.array_equal(np.asarray(data.splits["test"].image(i)), np.asarray(image))
        assert data.splits["test"].labels[i] == label


def test_half_unpacked_archives(serve, tmp_path):
    serve("food101")
    open_data(DataConfig(name="food101", root=str(tmp_path)))
    (tmp_path / "food-101" / "images" / "waffles" / "3.jpg").unlink()
    with pytest.raises(VitError, match=r"1 of 18 images are missing.*remove"):
        open_data(DataConfig(name="food101", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "path", "content"),
    [
        ("food101", "food-101/meta/train.json", b"{"),
        ("food101", "food-101/meta/train.json", b"[1, 2]"),
        ("oxford_pets", "oxford-iiit-pet/annotations/test.txt", b"one two three\n"),
        ("oxford_pets", "oxford-iiit-pet/annotations/test.txt", b"\xff\xfe\n"),
        ("flowers102", "flowers-102/setid.mat", b"nothing"),
        ("stl10", "stl10_binary/train_X.bin", b"\0" * 1000),
        ("stl10", "stl10_binary/train_y.bin", b"\1"),
    ],
)
def test_damaged_lists_are_named(name, path, content, serve, tmp_path):
    serve(name)
    open_data(DataConfig(name=name, root=str(tmp_path)))
    (tmp_path / path).write_bytes(content)
    with pytest.raises(VitError) as caught:
        open_data(DataConfig(name=name, root=str(tmp_path)))
    assert path.split("/")[0] in str(caught.value)


def test_a_folder_that_cannot_be_written(serve, unprivileged):
    serve("cifar10")
    with unprivileged() as place:
        locked = place / "locked"
        locked.mkdir(mode=0o555)
        with pytest.raises(VitError, match="Permission denied"):
            open_data(DataConfig(name="cifar10", root=str(locked / "below")))


def test_complete_data_in_a_folder_that_is_only_for_reading(serve, unprivileged):
    serve("cifar10")
    with unprivileged() as place:
        open_data(DataConfig(name="cifar10", root=str(place / "data")))
        for folder, _, _ in os.walk(place / "data"):
            os.chmod(folder, 0o555)
        try:
            assert sizes(open_data(DataConfig(name="cifar10", root=str(place / "data")))) == SIZES["cifar10"]
        finally:
            for folder, _, _ in os.walk(place / "data"):
                os.chmod(folder, 0o755)


def test_a_process_that_waits_for_another_says_so(tmp_path, caplog):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "lock", "w") as other, caplog.at_level("INFO", "vit"):
        fcntl.flock(other, fcntl.LOCK_EX)
        release = threading.Timer(0.3, fcntl.flock, (other, fcntl.LOCK_UN))
        release.start()
        with hold_lock(tmp_path / "lock"), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        release.join(60)
        with hold_lock(tmp_path / "absent" / "lock"):
            pass
    assert [record.message for record in caplog.records] == [f"another process is at {tmp_path}: waiting for it"]


def test_a_server_that_stops_answering_is_given_up(monkeypatch, tmp_path):
    """torchvision sets no limit; a socket has one while it downloads, and none afterwards."""
    before, seen = socket.getdefaulttimeout(), []

    def build(root, *, download):
        seen.append(socket.getdefaulttimeout())
        raise RuntimeError("not there")

    monkeypatch.setattr(datasets, "CIFAR10", build)
    with pytest.raises(VitError, match="could not be downloaded"):
        torchvision_sets.fetch("CIFAR10", tmp_path, DataConfig(name="cifar10"), [])
    assert seen == [before, before or 60]
    assert socket.getdefaulttimeout() == before


@pytest.mark.slow
def test_of_several_processes_one_downloads(serve, tmp_path):
    server = serve("food101")
    code = (
        "import sys, torchvision.datasets as d\n"
        f"d.Food101._URL, d.Food101._MD5 = {datasets.Food101._URL!r}, {datasets.Food101._MD5!r}\n"
        "from vit.data.catalogue import DataConfig, open_data\n"
        f"print(len(open_data(DataConfig(name='food101', root={str(tmp_path)!r})).splits['test']))\n"
    )
    several = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=240)[0].strip() for process in several] == ["6"] * 2
    assert len([name for name in server.asked if name == "food-101.tar.gz"]) <= 2  # one look at redirects, one download
