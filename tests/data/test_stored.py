"""Loaders of stored images: streaming's batches without crops, torchvision's crops with them, however they are made."""

import logging
import os
import threading

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from vit.data.augment import AugmentConfig
from vit.data.batches import EvalLoader, TrainLoader
from vit.data.catalogue import DataConfig
from vit.data.dataset import ArrayImages, FileImages, Split
from vit.data.loaders import crops_in_loader, eval_loader, store_images, train_loader
from vit.data.preprocess import Preprocessing
from vit.data.random import Stream, uniform
from vit.data.regions import NUMBERS, crop_boxes
from vit.data.store import StorageSpec, open_store
from vit.data.stored import StoredImages
from vit.data.streaming import RandomCrop, StreamedImages
from vit.errors import VitError

SIZE = Preprocessing(image_size=(16, 20), interpolation="bicubic")
PLAIN = AugmentConfig()
CROPS = AugmentConfig(random_resized_crop=True, crop_scale=(0.2, 0.8), flip=0.5)
COUNT = 83


@pytest.fixture
def split(make_folder, picture):
    """Files of many sizes; PNG so that decoding is exact."""
    root = make_folder({})
    root.mkdir()
    paths = [root / f"{number:02}.png" for number in range(COUNT)]
    for number, path in enumerate(paths):
        picture(20 + number % 31, 60 - number % 37, number).save(path)
    return Split(np.arange(COUNT) % 4, FileImages(paths), 3)


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        given = {"name": "folder", "root": "photos", "batch_size": 12, "eval_batch_size": 12, "workers": 2}
        return DataConfig(**{**given, "cache": True, "cache_folder": str(tmp_path / "images"), **changes})

    return make


@pytest.fixture
def opened(split, tmp_path):
    return open_store(split, StorageSpec(SIZE, 24), tmp_path / "images", "data")


def stored(opened, batch_size, *, seed, threads=2, rank=0, world_size=1, **options):
    source = StoredImages(opened, RandomCrop.of(CROPS, seed), threads=threads, **options)
    return TrainLoader(source, batch_size, seed=seed, rank=rank, world_size=world_size)


def streamed(split, augment, seed):
    return TrainLoader(StreamedImages(split, SIZE, RandomCrop.of(augment, seed), workers=0), 12, seed=seed)


def epochs(loader, count=2):
    batches = []
    for epoch in range(count):
        loader.set_epoch(epoch)
        batches += list(loader)
    loader.close()
    return batches


def same(left, right, most=0):
    return len(left) == len(right) and all(
        torch.equal(one.labels, other.labels)
        and torch.equal(one.index, other.index)
        and torch.equal(one.valid, other.valid)
        and one.images.shape == other.images.shape
        and (one.images.int() - other.images.int()).abs().max() <= most
        for one, other in zip(left, right, strict=True)
    )


def test_without_crops_training_sees_what_streaming_gives(split, config):
    loader = train_loader(split, SIZE, config(), PLAIN, seed=3)
    assert isinstance(loader.source, StoredImages)
    assert not crops_in_loader(split, SIZE, config(), PLAIN)
    found = epochs(loader)
    assert found[0].images.is_contiguous()
    assert same(found, epochs(streamed(split, PLAIN, 3)))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_validation_sees_what_streaming_gives(split, config, mode):
    size = Preprocessing(image_size=(16, 20), crop_mode=mode, crop_pct=0.8, mean=(0.2, 0.5, 0.7))
    loader = eval_loader(split, size, config(), reused=True)
    assert isinstance(loader.source, StoredImages)
    for world in (1, 2):
        for rank in range(world):
            of = {"rank": rank, "world_size": world}
            found = list(eval_loader(split, size, config(), reused=True, **of))
            assert same(found, list(EvalLoader(StreamedImages(split, size, workers=0), 12, **of)))


def test_crops_are_torchvisions_of_the_stored_image(opened):
    loader = stored(opened, COUNT, seed=9, threads=2)
    loader.set_epoch(4)
    (batch,) = loader
    for image, label, i in zip(batch.images, batch.labels, batch.index.tolist(), strict=True):
        whole = opened.read(i).permute(2, 0, 1)
        numbers = uniform(9, 4, torch.tensor([i]), Stream.CROP, NUMBERS)
        left, top, w, h = map(int, crop_boxes(numbers, *whole.shape[1:], (0.2, 0.8), (3 / 4, 4 / 3))[0])
        wanted = functional.resized_crop(whole, top, left, h, w, [16, 20], InterpolationMode.BICUBIC, antialias=True)
        assert (image.int() - wanted.int()).abs().max() <= 1  # it may be, where torchvision takes its other kernel
        assert label == opened.split.labels[i]


def test_images_that_are_small_already_give_streamings_crops(split, config):
    assert crops_in_loader(split, SIZE, config(cache_side=100), CROPS)
    found = epochs(train_loader(split, SIZE, config(cache_side=100), CROPS, seed=5))
    assert same(found, epochs(streamed(split, CROPS, 5)), most=2)


@pytest.mark.parametrize("packed", [False, True])
def test_neither_threads_nor_processes_change_anything(opened, packed):
    of = {"seed": 1, "resize_on_device": packed}
    expected = epochs(stored(opened, 40, threads=0, **of))
    assert len(expected) == 4
    assert same(epochs(stored(opened, 40, threads=1, **of)), expected)
    assert same(epochs(stored(opened, 40, threads=3, **of)), expected)
    parts = [epochs(stored(opened, 40, threads=2, rank=r, world_size=2, **of)) for r in (0, 1)]
    joined = [type(one)(*map(torch.cat, zip(one, two, strict=True))) for one, two in zip(*parts, strict=True)]
    assert same(joined, expected)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_cut_on_the_device_are_those_cut_on_the_host(split, tmp_path, channels, interpolation):
    size = Preprocessing(image_size=(16, 20), channels=channels, interpolation=interpolation)
    split.channels = channels
    opened = open_store(split, StorageSpec(size, 24), tmp_path / "images", "data")
    on_host = epochs(stored(opened, 12, seed=2, resize_on_device=False), 1)
    on_device = epochs(stored(opened, 12, seed=2, resize_on_device=True), 1)
    assert on_host[0].images.shape == (12, channels, 16, 20)
    assert same(on_host, on_device, most=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(opened):
    on_host = epochs(stored(opened, 12, seed=2))
    there = epochs(stored(opened, 12, seed=2, device="cuda"))
    assert all(part.is_cuda for part in there[0])
    assert same(on_host, [type(batch)(*(part.cpu() for part in batch)) for batch in there], most=2)


def test_resuming_reads_only_what_is_to_come(opened):
    loader = stored(opened, 12, seed=2)
    loader.set_epoch(3)
    whole = list(loader)
    running = iter(loader)
    next(running)
    state = loader.state_dict()
    running.close()
    resumed = stored(opened, 12, seed=2, threads=1)
    resumed.load_state_dict(state)
    assert same(list(resumed), whole[1:])


def test_a_pass_given_up_leaves_no_threads(opened):
    before = threading.active_count()
    loader = stored(opened, 12, seed=2)
    running = iter(loader)
    next(running)
    assert threading.active_count() > before
    running.close()
    assert threading.active_count() == before
    loader.set_epoch(1)
    fresh = stored(opened, 12, seed=2, threads=0)
    fresh.set_epoch(1)
    assert same(list(loader), list(fresh))
    assert threading.active_count() == before


def test_batches_are_not_made_far_ahead(opened, monkeypatch):
    read, places = type(opened).read, []
    monkeypatch.setattr(type(opened), "read", lambda self, i: (places.append(i), read(self, i))[1])
    running = iter(stored(opened, 10, seed=2))
    next(running)
    running.close()
    assert len(places) <= 30
    places.clear()
    next(iter(stored(opened, 10, seed=2, threads=0)))
    assert len(places) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_mended_stops_with_its_name(opened, workers):
    path = opened.folder / "pixels"
    data = bytearray(path.read_bytes())
    start = int(opened._entries[7]["start"])
    data[start : start + 100] = bytes(100)
    path.write_bytes(data)
    os.truncate(opened.split.name(7), 0)
    with pytest.raises(VitError, match=r"07\.png: empty file"):
        list(stored(opened, COUNT, seed=2, threads=workers))


def test_which_splits_are_stored(split, config, caplog):
    with caplog.at_level(logging.INFO, "vit"):
        assert isinstance(train_loader(split, SIZE, config(cache=False), CROPS, seed=0).source, StreamedImages)
        assert isinstance(eval_loader(split, SIZE, config()).source, StreamedImages)
    assert "decod" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "vit"):
        store_images({"train": split, "val": split.subset([1, 2])}, SIZE, config(), CROPS)
    assert "decoding 83 images into" in caplog.text
    assert "decoding 2 images into" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "vit"):
        assert isinstance(train_loader(split, SIZE, config(), CROPS, seed=0).source, StoredImages)
    assert "decod" not in caplog.text  # open already
    # images of one size would be resident, but were asked to be stored
    split.native_size = (30, 30)
    assert isinstance(train_loader(split, SIZE, config(), CROPS, seed=0).source, StoredImages)


def test_images_in_memory_are_resident_as_ever(config, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 20, 3), dtype=np.uint8)
    split = Split(np.arange(40) % 3, ArrayImages(pixels, "d"), 3, native_size=(16, 20))
    with caplog.at_level(logging.INFO, "vit"):
        loader = train_loader(split, SIZE, config(), CROPS, seed=0)
    assert not isinstance(loader.source, StoredImages)
    assert "40 images are in no files, there is nothing to decode" in caplog.text


def test_the_folder_of_all_stores(split, config, cache, tmp_path, monkeypatch):
    train_loader(split, SIZE, config(cache_folder=None), CROPS, seed=0)
    assert len(list((cache / "images").iterdir())) == 1
    split.stores.clear()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train_loader(split, SIZE, config(cache_folder="~/kept"), CROPS, seed=0)
    (folder,) = (tmp_path / "home" / "kept").iterdir()
    assert {path.name for path in folder.iterdir()} == {"about.json", "index", "lock", "pixels"}
    # 8/7 of the longer side
    assert '"side": 23' in (folder / "about.json").read_text()


def test_an_empty_split(split, config):
    empty = split.subset([])
    assert list(eval_loader(empty, SIZE, config(), reused=True)) == []
    with pytest.raises(VitError, match="no images"):
        train_loader(empty, SIZE, config(), CROPS, seed=0)
