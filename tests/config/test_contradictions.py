"""Keys that cannot go together are refused before any data is touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit.errors import VitError
from vit.training.config import check_model, load_config
from vit.training.sections import parse_seconds


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("trainer.max_epochs=null", "trainer.max_epochs, trainer.max_steps and trainer.max_time are all null"),
        ("trainer.max_time=7m", "trainer.max_time: expected seconds or HH:MM:SS"),
        ("trainer.max_time=0:00", "trainer.max_time: expected a time above 0"),
        ("schedule=wsd schedule.warmup=0.9", "schedule.warmup=0.9 and schedule.cooldown=0.2 .* sum to at most 1"),
        ("optim.layer_decay=1.5", "optim.layer_decay: expected a number above 0 and up to 1, got 1.5"),
        ("optim.layer_decay=0", "optim.layer_decay: expected a number above 0"),
        ("trainer=ddp_cpu augment=none data.batch_size=7", "data.batch_size=7 .* equal parts over the 2 .* 6 or 8$"),
        ("trainer.devices=3 augment=none data.batch_size=2", "data.batch_size=2 .* over the 3 .*; try 3$"),
        ("trainer=ddp_cpu trainer.num_nodes=3 augment=none data.batch_size=128", "over the 6 .* 126 or 132$"),
        ("trainer=ddp_cpu augment.mixup=0.2 data.batch_size=6", "data.batch_size=6 .* even parts .*; try 4 or 8$"),
        ("trainer=fsdp optim=muon", "optim=muon .* trainer=fsdp .* use optim=adamw"),
        ("trainer=fsdp trainer.accelerator=cpu optim=adamw", "trainer.strategy=fsdp .* on CPUs use trainer=ddp_cpu"),
        ("trainer=cpu trainer.precision=16", "trainer.precision=16 needs a GPU"),
        ("trainer=ddp_cpu tune=true", "tune=true measures one process"),
        ("model.image_size=32", r"model.image_size=32: .* data.image_size=16, .* set data.image_size=32"),
        ("data.image_size=[8,16] model.image_size=8", r"model.image_size=8: .* data.image_size=\[8, 16\]"),
        ("model.in_channels=3", "model.in_channels=3: .* data.channels=1, .* set data.channels=3"),
        ("data.cache=true data.resident=true", "data.cache=true and data.resident=true"),
        ("trainer.limit_val_batches=1.5", "trainer.limit_val_batches: expected a whole number of batches or a share"),
    ],
)
def test_refused_without_torch(overrides, told, compose):
    with pytest.raises(VitError, match=told):
        load_config(compose(*overrides.split()))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("model.width=128 model.heads=5", "model.heads: width 128 does not divide into 5 heads; .* 4"),
        ("data.image_size=9 model.patch_size=2", "model.patch_size: an image height of 9 pixels .* 3"),
        ("data.image_size=[8,9] model.patch_size=2", "model.patch_size: an image width of 9 pixels"),
        ("model.pool=token model.class_token=false", "model.pool=token reads the class token"),
        ("model.attention=dot_product model.qk_norm=true", "model.attention=dot_product"),
        ("augment.crop_scale=[0.9,0.1]", r"augment.crop_scale: \[0.9, 0.1\]"),
        ("augment=crop augment.crop_padding=4", "augment.crop_padding and augment.random_resized_crop both crop"),
    ],
)
def test_refused_by_what_is_to_be_built(overrides, told, compose):
    config = load_config(compose(*overrides.split()))
    with pytest.raises(VitError, match=told):
        check_model(config)


def test_a_size_may_be_said_in_two_ways(compose):
    assert load_config(compose("model.image_size=[16,16]")).model.image_size == (16, 16)


def test_mixing_needs_two_classes(compose):
    config = load_config(compose("augment=none", "augment.mixup=0.2"))
    check_model(config)  # how many classes there are is not known yet
    with pytest.raises(VitError, match=r"^augment\.mixup: mixing needs at least 2 classes, the data has 1"):
        check_model(config, num_classes=1)


def test_the_largest_model_is_checked_without_its_memory(compose):
    before = torch.get_default_device()
    check_model(
        load_config(compose("data=imagenet", "data.root=x", "model=huge", "model.depth=400")), num_classes=10**6
    )
    assert torch.get_default_device() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(compose):
    with pytest.raises(VitError, match=r"trainer\.accelerator=gpu: torch finds no GPU here; use trainer=cpu"):
        check_model(load_config(compose("trainer=gpu")))


def test_gpus_share_the_batch(compose, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(VitError, match=r"data\.batch_size=128 .* over the 3 .*; try 126 or 129"):
        check_model(load_config(compose("augment=none", "data.batch_size=128")))
    check_model(load_config(compose("augment=none", "data.batch_size=129")))
    check_model(load_config(compose("trainer=cpu", "data.batch_size=128")))


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_times(hours, minutes, rest):
    expected = hours * 3600 + minutes * 60 + rest
    text = f"{hours:02}:{minutes:02}:{rest:02}"
    if expected:
        assert parse_seconds(text, "key") == expected
        assert parse_seconds(f"{expected}", "key") == expected
        assert parse_seconds(expected, "key") == expected
    else:
        with pytest.raises(VitError, match="key"):
            parse_seconds(text, "key")


def test_times_of_two_parts_are_minutes_and_seconds():
    assert parse_seconds("7:30.5", "key") == 450.5
    assert parse_seconds(None, "key") is None
