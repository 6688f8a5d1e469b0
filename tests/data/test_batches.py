"""Loaders of resident images, and what all loaders have in common: order, parts of processes, resuming, padding."""

import copy
import itertools
import logging
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.data.batches import EvalLoader, TrainLoader
from vit.data.random import permutation
from vit.data.resident import ResidentImages
from vit.errors import VitError


def resident(samples: int) -> ResidentImages:
    images = torch.arange(samples, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 4).contiguous()
    return ResidentImages(images, torch.arange(samples) % 7)


def train(samples: int, batch_size: int, **options) -> TrainLoader:
    return TrainLoader(resident(samples), batch_size, **{"seed": 3, **options})


def evaluation(samples: int, batch_size: int, **options) -> EvalLoader:
    return EvalLoader(resident(samples), batch_size, **options)


def flat(lists) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def indices(loader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


def test_a_batch_is_what_it_says() -> None:
    for batch in [*train(20, 6), *evaluation(20, 6)]:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[1:] == (2, 3, 4)
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.index)
        assert torch.equal(batch.labels, batch.index % 7)
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        assert batch.valid.all()
        assert batch.valid.dtype == torch.bool


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 80), batch_size=st.integers(1, 40), epoch=st.integers(0, 9))
def test_an_epoch_is_the_permutation_cut_into_full_batches(samples, batch_size, epoch) -> None:
    loader = train(samples, batch_size)
    loader.set_epoch(epoch)
    size = min(batch_size, samples)
    batches = indices(loader)
    assert len(batches) == len(loader) == samples // size
    assert all(len(batch) == size for batch in batches)
    assert flat(batches) == permutation(3, epoch, samples)[: len(loader) * size].tolist()


def test_without_set_epoch_the_order_stays() -> None:
    loader = train(10, 5)
    first = indices(loader)
    assert indices(loader) == first
    loader.set_epoch(1)
    assert indices(loader) != first


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(8, 80), half=st.integers(1, 5), world=st.integers(1, 4), paired=st.booleans())
def test_processes_share_every_global_batch(samples, half, world, paired) -> None:
    size = 2 * half * world
    if samples < size:
        samples = size
    whole = indices(train(samples, size))
    parts = [indices(train(samples, size, rank=r, world_size=world, paired=paired)) for r in range(world)]
    assert [flat(together) for together in zip(*parts, strict=True)] == whole
    assert all(len(part) == 2 * half for part in parts[0])


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 30), world=st.integers(1, 4), paired=st.booleans())
def test_a_small_data_set_is_one_batch_of_equal_parts(samples, world, paired) -> None:
    if samples < world:
        with pytest.raises(VitError, match="fewer than"):
            train(samples, 64 * world, world_size=world)
        return
    parts = [indices(train(samples, 64 * world, rank=r, world_size=world, paired=paired)) for r in range(world)]
    assert {len(part) for part in parts} == {1}
    assert len({len(part[0]) for part in parts}) == 1
    taken = flat(part[0] for part in parts)
    assert len(set(taken)) == len(taken)
    assert len(taken) > samples - 2 * world
    if world == 1:
        assert sorted(taken) == list(range(samples))


@pytest.mark.parametrize(
    ("batch_size", "world", "paired", "fits"), [(7, 2, False, "6 or 8"), (6, 2, True, "4 or 8"), (1, 2, False, "2")]
)
def test_a_batch_that_does_not_split_says_what_would(batch_size, world, paired, fits) -> None:
    with pytest.raises(VitError, match=rf"data\.batch_size: {batch_size} .*{fits} would"):
        train(50, batch_size, world_size=world, paired=paired)


def test_odd_batches_are_fine_in_one_process() -> None:
    assert [len(batch) for batch in indices(train(50, 7, paired=True))] == [7] * 7


@pytest.mark.parametrize("batch_size", [0, -4])
def test_batch_sizes_have_a_least(batch_size) -> None:
    with pytest.raises(VitError, match=r"data\.batch_size"):
        train(50, batch_size)
    with pytest.raises(VitError, match=r"data\.eval_batch_size"):
        evaluation(50, batch_size)


def test_nothing_to_train_on() -> None:
    with pytest.raises(VitError, match="no images"):
        train(0, 4)


@settings(max_examples=40, deadline=None)
@given(stop=st.integers(0, 6), epoch=st.integers(0, 3))
def test_resuming_continues_with_the_very_next_batch(stop, epoch) -> None:
    loader = train(33, 5)
    loader.set_epoch(epoch)
    whole = indices(loader)
    interrupted = train(33, 5)
    interrupted.set_epoch(epoch)
    running = iter(interrupted)
    for _ in range(stop):
        next(running)
    state = copy.deepcopy(interrupted.state_dict())
    assert all(isinstance(value, int) for value in state.values())  # loads with weights_only

    resumed = train(33, 5)
    resumed.load_state_dict(state)
    assert len(resumed) == 6
    iterator = iter(resumed)  # as Lightning does: first the iterator, then the epoch
    resumed.set_epoch(epoch)
    assert [batch.index.tolist() for batch in iterator] == whole[stop:]
    # and the next epoch is whole
    resumed.set_epoch(epoch + 1)
    loader.set_epoch(epoch + 1)
    assert indices(resumed) == indices(loader)


def test_a_state_of_a_finished_epoch_starts_the_next_afresh() -> None:
    loader = train(20, 5)
    indices(loader)
    resumed = train(20, 5)
    resumed.load_state_dict(loader.state_dict())
    iterator = iter(resumed)
    resumed.set_epoch(1)
    loader.set_epoch(1)
    assert [batch.index.tolist() for batch in iterator] == indices(loader)


def test_a_state_moves_between_processes_and_back() -> None:
    alone = train(40, 8)
    iterator = iter(alone)
    for _ in range(2):
        next(iterator)
    parts = [train(40, 8, rank=r, world_size=2) for r in range(2)]
    for part in parts:
        part.load_state_dict(alone.state_dict())
    assert [a + b for a, b in zip(*map(indices, parts), strict=True)] == [b.index.tolist() for b in iterator]


def test_another_batch_size_continues_at_the_same_image(caplog) -> None:
    loader = train(40, 8)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    resumed = train(40, 4)
    resumed.load_state_dict(loader.state_dict())
    assert flat(indices(resumed)) == flat(batch.index.tolist() for batch in iterator)
    assert not caplog.records
    other = train(40, 8, seed=4)
    with caplog.at_level(logging.WARNING, "vit"):
        other.load_state_dict(loader.state_dict())
    assert "seed was 3, is 4" in caplog.text


@pytest.mark.parametrize("state", [{}, {"epoch": "x", "position": 1, "batch_size": 2}, {"epoch": 1, "position": None}])
def test_a_state_that_is_none(state) -> None:
    with pytest.raises(VitError, match="unreadable"):
        train(10, 2).load_state_dict(state)


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(0, 50), batch_size=st.integers(1, 20), world=st.integers(1, 4))
def test_evaluation_sees_every_image_once_in_order(samples, batch_size, world) -> None:
    loaders = [evaluation(samples, batch_size, rank=r, world_size=world) for r in range(world)]
    seen = []
    for batches in zip(*loaders, strict=True):  # strict: equally many batches, or a collective would hang
        assert len({len(batch.index) for batch in batches}) == 1
        for batch in batches:
            seen += batch.index[batch.valid].tolist()
            assert (batch.index < samples).all()
            assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.index)
    assert seen == list(range(samples))
    assert {len(loader) for loader in loaders} == {-(-samples // (-(-batch_size // world) * world))}
    if world == 1:
        assert all(batch.valid.all() for batch in loaders[0])


def test_waiting_is_counted_apart_from_working() -> None:
    loader = train(64, 8)
    started = time.perf_counter()
    for _ in loader:
        time.sleep(0.02)
    took = time.perf_counter() - started
    assert 0 < loader.wait_seconds < took - 8 * 0.02 + 1e-3
    before = loader.wait_seconds
    list(evaluation(4, 2))
    assert loader.wait_seconds == before
