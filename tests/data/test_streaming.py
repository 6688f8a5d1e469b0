"""Streaming loaders: real files, real worker processes, one result however many."""

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vit.data.augment import AugmentConfig
from vit.data.batches import EvalLoader, TrainLoader
from vit.data.dataset import ArrayImages, FileImages, Split
from vit.data.preprocess import Preprocessing
from vit.data.random import Stream, uniform
from vit.data.regions import NUMBERS, crop_boxes
from vit.data.streaming import (
    DecodedImages,
    RandomCrop,
    StreamedImages,
    _received,
    worker_count,
    workers_watched,
)
from vit.errors import VitError

SIZE = Preprocessing(image_size=(16, 20), channels=3, interpolation="bilinear")
PLAIN = AugmentConfig()
CROPS = AugmentConfig(random_resized_crop=True, crop_scale=(0.2, 0.8), flip=0.5)


@pytest.fixture
def split(make_folder, picture):
    """23 files of many sizes, PNG so that decoding is exact."""
    root = make_folder({})
    root.mkdir()
    paths = []
    for number in range(23):
        paths.append(root / f"{number}.png")
        picture(20 + number, 60 - number, number).save(paths[-1])
    return Split(labels=np.arange(23) % 4, images=FileImages(paths), channels=3)


def training(split, batch_size, augment, *, seed, rank=0, world_size=1, **options) -> TrainLoader:
    source = StreamedImages(split, SIZE, RandomCrop.of(augment, seed), **options)
    return TrainLoader(source, batch_size, seed=seed, rank=rank, world_size=world_size)


def evaluation(split, batch_size, *, rank=0, world_size=1, **options) -> EvalLoader:
    return EvalLoader(StreamedImages(split, SIZE, **options), batch_size, rank=rank, world_size=world_size)


def collect(loader) -> list[tuple]:
    try:
        return [tuple(part.clone() for part in batch) for batch in loader]
    finally:
        loader.close()


def same(left: list[tuple], right: list[tuple]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("augment", [PLAIN, CROPS])
def test_the_number_of_workers_changes_nothing(split, augment) -> None:
    def epochs(workers: int) -> list[tuple]:
        loader = training(split, 6, augment, seed=1, workers=workers)
        batches = []
        for epoch in range(2):  # the second with the workers of the first
            loader.set_epoch(epoch)
            batches += [tuple(batch) for batch in loader]
        loader.close()
        return batches

    expected = epochs(0)
    assert len(expected) == 6
    assert same(epochs(1), expected)
    assert same(epochs(2), expected)


def test_the_number_of_processes_changes_nothing(split) -> None:
    whole = collect(training(split, 6, CROPS, seed=1, workers=0))
    parts = [collect(training(split, 6, CROPS, seed=1, workers=0, rank=r, world_size=2)) for r in (0, 1)]
    joined = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(*parts, strict=True)]
    assert same(joined, whole)


def test_images_are_what_preprocessing_makes_of_them(split) -> None:
    for loader in (
        training(split, 6, PLAIN, seed=1, workers=0),
        evaluation(split, 6, workers=0),
    ):
        for batch in loader:
            for image, label, i in zip(batch.images, batch.labels, batch.index.tolist(), strict=True):
                expected = SIZE.resize(split.image(i))
                assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
                assert label == split.labels[i]


def test_resident_and_streamed_batches_are_equal(split) -> None:
    from vit.data.resident import ResidentImages

    resident = ResidentImages.load(split, SIZE, "cpu")
    assert same(
        collect(TrainLoader(resident, 6, seed=1)),
        collect(training(split, 6, PLAIN, seed=1, workers=0)),
    )
    assert same(collect(EvalLoader(resident, 6)), collect(evaluation(split, 6, workers=0)))


def test_crops_are_torchvisions_of_the_original(split) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    loader = training(split, 23, CROPS, seed=9, workers=0)
    loader.set_epoch(4)
    (batch,) = loader
    for image, i in zip(batch.images, batch.index.tolist(), strict=True):
        original = split.image(i)
        numbers = uniform(9, 4, torch.tensor([i]), Stream.CROP, NUMBERS)
        left, top, w, h = map(int, crop_boxes(numbers, original.height, original.width, (0.2, 0.8), (3 / 4, 4 / 3))[0])
        expected = functional.resized_crop(original, top, left, h, w, [16, 20], antialias=True)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_crops_of_images_with_other_than_three_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 30, 40, 4), dtype=np.uint8)
    split = Split(labels=np.zeros(5), images=ArrayImages(pixels, "bands"), channels=4, native_size=(30, 40))
    size = Preprocessing(image_size=(8, 8), channels=4, interpolation="bilinear")
    crop = RandomCrop(0, (0.5, 0.9), (3 / 4, 4 / 3))
    images, failure = DecodedImages(split, size, crop)[(1, [3, 0])]
    assert failure == ""
    assert images.shape == (2, 4, 8, 8)
    left, top, right, bottom = crop.boxes(1, [3], [(30, 40)])[0]
    for band in range(4):
        expected = Image.fromarray(pixels[3, top:bottom, left:right, band]).resize((8, 8), Image.Resampling.BILINEAR)
        assert np.array_equal(images[0, band].numpy(), np.asarray(expected))


def test_resuming_decodes_only_what_is_to_come(split) -> None:
    loader = training(split, 5, CROPS, seed=2, workers=1)
    loader.set_epoch(3)
    whole = [tuple(batch) for batch in loader]
    running = iter(loader)
    next(running)
    state = loader.state_dict()
    running.close()
    loader.close()
    resumed = training(split, 5, CROPS, seed=2, workers=2)
    resumed.load_state_dict(state)
    assert same(collect(resumed), whole[1:])


def test_a_pass_given_up_for_another(split) -> None:
    loader = training(split, 4, PLAIN, seed=2, workers=2)
    next(iter(loader))
    loader.set_epoch(1)
    again = collect(loader)
    fresh = training(split, 4, PLAIN, seed=2, workers=0)
    fresh.set_epoch(1)
    assert same(again, collect(fresh))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_file_that_went_bad_stops_with_its_name(split, workers, kind) -> None:
    path = split.name(11)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\nno more")
    if kind == "train":
        loader = training(split, 5, CROPS, seed=2, workers=workers)
    else:
        loader = evaluation(split, 5, workers=workers)
    with pytest.raises(VitError) as caught:
        list(loader)
    loader.close()
    assert path in str(caught.value)
    assert "when the data was scanned" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_went_away_stops_with_its_name(split) -> None:
    os.unlink(split.name(0))
    with pytest.raises(VitError, match=r"0\.png"):
        list(evaluation(split, 50, workers=0))


def test_workers_can_be_spawned(split) -> None:
    if "spawn" not in multiprocessing.get_all_start_methods():
        pytest.skip("no spawn here")
    expected = collect(training(split, 10, CROPS, seed=1, workers=0))
    loader = training(split, 10, CROPS, seed=1, workers=1, context="spawn")
    assert same(collect(loader), expected)


def test_what_workers_get_is_small_and_keeps_its_meaning(split) -> None:
    images = DecodedImages(split, SIZE, RandomCrop(1, (0.2, 0.8), (0.75, 1.33)))
    split.array(SIZE)  # decoded for somebody else
    sent = pickle.dumps(images)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent)[(2, [5, 7])][0], images[(2, [5, 7])][0])


def test_processes_get_equal_parts_of_an_evaluation(split) -> None:
    parts = [collect(evaluation(split, 10, workers=0, rank=r, world_size=2)) for r in (0, 1)]
    assert [len(batch[0]) for batch in parts[0]] == [len(batch[0]) for batch in parts[1]] == [5, 5, 2]
    assert [bool(v) for v in parts[1][2][3]] == [True, False]
    seen = [batch[2][batch[3]].tolist() for pair in zip(*parts, strict=True) for batch in pair]
    assert list(itertools.chain.from_iterable(seen)) == list(range(23))


def test_closing_ends_the_workers(split) -> None:
    before = set(multiprocessing.active_children())
    loader = evaluation(split, 5, workers=2)
    iterator = iter(loader)
    next(iterator)
    assert len(set(multiprocessing.active_children()) - before) == 2
    iterator.close()
    loader.close()
    assert set(multiprocessing.active_children()) <= before


def test_workers_outlive_ctrl_c(split) -> None:
    before = set(multiprocessing.active_children())
    loader = evaluation(split, 2, workers=2)
    iterator = iter(loader)
    seen = len(next(iterator).index)
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGINT)
    assert seen + sum(len(batch.index) for batch in iterator) == 23
    loader.close()


FRESH = """
import glob, multiprocessing, os, signal, sys, time
from multiprocessing import resource_tracker
import numpy as np
from vit.data.dataset import FileImages, Split
from vit.data.preprocess import Preprocessing
from vit.data.batches import EvalLoader
from vit.data.streaming import StreamedImages

folder, context, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
kind = multiprocessing.get_context(context).Process
start = kind.start

def start_and_interrupt(process):
    start(process)
    for _ in range(50):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.001)

kind.start = start_and_interrupt
paths = sorted(glob.glob(folder + "/*.png"))
split = Split(labels=np.zeros(len(paths)), images=FileImages(paths), channels=3)
size = Preprocessing(image_size=(16, 20), channels=3, interpolation="bilinear")
loader = EvalLoader(StreamedImages(split, size, workers=workers, context=context), 2)
seen = sum(len(batch.index) for batch in loader)
loader.close()
print(seen, resource_tracker._resource_tracker._pid is not None, flush=True)
os._exit(0)
"""


def in_a_new_process(split, context: str, workers: int) -> list[str]:
    """How many images came, and whether multiprocessing's resource tracker was started for them.

    Here it may run already, started by another test, and it ends only after every process that holds its pipe.
    """
    command = [sys.executable, "-c", FRESH, os.path.dirname(split.name(0)), context, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("context", multiprocessing.get_all_start_methods())
def test_workers_outlive_ctrl_c_while_they_start(split, context) -> None:
    assert in_a_new_process(split, context, workers=2) == ["23", str(context != "fork")]


def test_without_workers_no_process_starts(split) -> None:
    assert in_a_new_process(split, "spawn", workers=0) == ["23", "False"]


def test_an_interrupt_while_workers_start_still_comes(split, monkeypatch) -> None:
    kind = multiprocessing.get_context("fork").Process
    start = kind.start

    def start_and_interrupt(process) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start(process)

    monkeypatch.setattr(kind, "start", start_and_interrupt)
    loader = evaluation(split, 2, workers=2, context="fork")
    with pytest.raises(KeyboardInterrupt):
        list(loader)
    monkeypatch.undo()
    assert sum(len(batch.index) for batch in loader) == 23  # nothing is left of the attempt
    loader.close()


def test_without_shared_memory_batches_come_through_pipes(split, monkeypatch, caplog) -> None:
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    whole = collect(training(split, 5, CROPS, seed=2, workers=0))
    with caplog.at_level("WARNING", "vit"):
        batches = collect(training(split, 5, CROPS, seed=2, workers=2, context="fork"))
    assert same(batches, whole)
    assert [record.message for record in caplog.records if "--shm-size" in record.message] == [
        caplog.records[0].message
    ]


SMALL_MEMORY = """
import sys
import numpy as np, torch
from vit.data.dataset import ArrayImages, Split
from vit.data.preprocess import Preprocessing
from vit.data.batches import EvalLoader
from vit.data.streaming import StreamedImages

pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
split = Split(labels=np.zeros(48), images=ArrayImages(pixels, "noise"), channels=3)
size = Preprocessing(image_size=(224, 224), channels=3)
one, two = (EvalLoader(StreamedImages(split, size, workers=workers), 8) for workers in (0, 2))
for a, b in zip(one, two, strict=True):
    assert torch.equal(a.images, b.images)
two.close()
print("equal")
"""


def test_a_small_shared_memory_is_enough(tmp_path) -> None:
    """As a container has it, real: eight images are 1.2 MB, there is 1 MB or room for two such batches."""
    for size in ("1m", "3m"):
        mounted = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
        try:
            can = (
                subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True, timeout=60).returncode == 0
            )
        except FileNotFoundError:
            can = False
        if not can:
            pytest.skip("no file system may be mounted here")
        command = ["unshare", "-rm", "sh", "-c", f'{mounted} && exec "$@"', "sh", sys.executable, "-c", SMALL_MEMORY]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.stdout == "equal\n", done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "no socket")])
def test_a_worker_that_dies_while_it_sends_ends_it_with_a_line(error, monkeypatch) -> None:
    def batches():
        yield 1
        raise error

    monkeypatch.setattr("vit.data.streaming.time.sleep", lambda seconds: None)
    with pytest.raises(VitError, match=r"ended while it sent a batch.*data\.workers=0"), workers_watched():
        list(_received(batches()))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGBUS"])
def test_a_worker_that_is_killed_ends_it_with_a_line(split, number) -> None:
    before = set(multiprocessing.active_children())
    loader = evaluation(split, 1, workers=2)

    @workers_watched()
    def go_on() -> None:
        for _ in loader:
            worker = (set(multiprocessing.active_children()) - before).pop()
            os.kill(worker.pid, getattr(signal, number))

    with pytest.raises(VitError, match=r"data\.workers=0.*--shm-size") as caught:
        go_on()
    loader.close()
    assert "\n" not in str(caught.value)


def test_workers_that_send_nothing_are_not_waited_for_without_end(split, monkeypatch) -> None:
    monkeypatch.setattr("vit.data.streaming._TIMEOUT", 1)
    monkeypatch.setattr(DecodedImages, "__getitem__", lambda *_: time.sleep(60))
    loader = evaluation(split, 5, workers=1, context="fork")
    with pytest.raises(VitError, match="timed out after 1 seconds"), workers_watched():
        list(loader)
    loader.close()


def test_how_many_workers(monkeypatch) -> None:
    monkeypatch.setattr("vit.data.streaming.count_cpus", lambda: 12)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert worker_count("auto", 100_000, 1) == 8
    assert worker_count("auto", 100_000, 3) == 4
    assert worker_count("auto", 100_000, 100) == 1
    assert worker_count("auto", 50, 1) == 0
    assert worker_count(5, 50, 1) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert worker_count("auto", 100_000, 16) == 6
    for nonsense in (-1, "many", True, 1.5):
        with pytest.raises(VitError, match=r"data\.workers"):
            worker_count(nonsense, 50, 1)
