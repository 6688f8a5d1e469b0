"""Batched augmentation: what each key does, that a result depends on its own sample only, and on nothing waited for."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vit.data import augment as augment_module
from vit.data import geometry, regions
from vit.data.augment import AugmentConfig, BatchAugment, normalise
from vit.data.random import Stream, uniform
from vit.errors import VitError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

EVERYTHING = AugmentConfig(
    crop_padding=2,
    flip=0.5,
    rotate=15,
    translate=0.1,
    scale=(0.8, 1.2),
    shear=10,
    rand_augment=2,
    color_jitter=0.4,
    erasing=0.5,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
)
CONFIGS = {
    "copies": AugmentConfig(crop_padding=2, flip=0.5, border="reflect"),
    "crops": AugmentConfig(random_resized_crop=True, flip=0.5, border="mean"),
    "affine": AugmentConfig(rotate=20, scale=(0.7, 1.3), border="mean"),
    "colours": AugmentConfig(rand_augment=3, color_jitter=0.3),
    "erasing": AugmentConfig(erasing=0.7),
    "mixing": AugmentConfig(mixup=0.4, cutmix=1.0, mix_prob=0.8),
    "everything": EVERYTHING,
}


def make(config: AugmentConfig, channels: int = 3, seed: int = 5, **options) -> BatchAugment:
    return BatchAugment(config, num_classes=10, mean=MEAN[:channels], std=STD[:channels], seed=seed, **options)


def batch(size: int, channels: int = 3, height: int = 12, width: int = 10):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, channels, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (size,), generator=generator)
    return images, labels, torch.randperm(1000, generator=generator)[:size]


def test_off_is_normalising_only() -> None:
    images, labels, index = batch(5)
    got, targets = make(AugmentConfig())(images, labels, index, 0)
    expected = (images.double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    assert got.dtype == torch.float32
    assert targets is labels


def test_normalise_is_the_preprocessing_of_numpy() -> None:
    from vit.data.preprocess import Preprocessing

    images, _, _ = batch(3)
    expected = Preprocessing((12, 10), 3, MEAN, STD).normalise(images.permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(normalise(images, MEAN, STD), torch.from_numpy(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_input_is_left_alone_and_output_is_finite(name: str, channels: int) -> None:
    images, labels, index = batch(9, channels)
    before = images.clone(), labels.clone(), index.clone()
    got, targets = make(CONFIGS[name], channels)(images, labels, index, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, (images, labels, index), strict=True))
    assert got.shape == images.shape
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    assert targets.shape in ((9,), (9, 10))
    if targets.ndim == 2:
        torch.testing.assert_close(targets.sum(1), torch.ones(9))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 16), start=st.integers(0, 7), epoch=st.integers(0, 500), channels=st.sampled_from([1, 3]))
def test_a_result_depends_on_its_own_pair_only(name, size, start, epoch, channels) -> None:
    images, labels, index = batch(32, channels)
    augment = make(CONFIGS[name], channels)
    whole, all_targets = augment(images, labels, index, epoch)
    part = slice(2 * start, min(2 * start + 2 * size, 32))
    # another object, another batch, other places: as another process would
    got, targets = make(CONFIGS[name], channels)(images[part], labels[part], index[part], epoch)
    torch.testing.assert_close(got, whole[part], atol=1e-5, rtol=0)
    torch.testing.assert_close(targets, all_targets[part], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if not config.mixes])
def test_without_mixing_a_result_depends_on_its_own_sample_only(name: str) -> None:
    images, labels, index = batch(24)
    augment = make(CONFIGS[name])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:15]
    whole, _ = augment(images, labels, index, 3)
    got, _ = augment(images[order], labels[order], index[order], 3)
    torch.testing.assert_close(got, whole[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_seed_epoch_and_index_change_it_and_nothing_else_does(name: str) -> None:
    images, labels, index = batch(16)
    first, _ = make(CONFIGS[name])(images, labels, index, 0)
    torch.manual_seed(123)
    again, _ = make(CONFIGS[name])(images, labels, index, 0)
    assert torch.equal(first, again)
    for other in (
        make(CONFIGS[name], seed=6)(images, labels, index, 0),
        make(CONFIGS[name])(images, labels, index, 1),
        make(CONFIGS[name])(images, labels, index + 1, 0),
    ):
        assert not torch.equal(first, other[0])


def test_flips_are_as_frequent_as_asked() -> None:
    images = torch.zeros(4000, 1, 4, 4, dtype=torch.uint8)
    images[:, :, :, 0] = 255
    got, _ = make(AugmentConfig(flip=0.3), 1)(images, torch.zeros(4000, dtype=torch.int64), torch.arange(4000), 0)
    flipped = got[:, 0, 0, 3] > got[:, 0, 0, 0]
    assert float(flipped.double().mean()) == pytest.approx(0.3, abs=0.03)


def test_padded_crops_use_every_offset_evenly() -> None:
    images = torch.zeros(5000, 1, 7, 7, dtype=torch.uint8)
    images[:, :, 3, 3] = 255
    augment = make(AugmentConfig(crop_padding=2), 1)
    got, _ = augment(images, torch.zeros(5000, dtype=torch.int64), torch.arange(5000), 0)
    places = torch.bincount(got[:, 0].flatten(1).argmax(1), minlength=49).view(7, 7)
    assert (places[1:6, 1:6] > 130).all()  # 200 each are expected
    assert places[1:6, 1:6].sum() == 5000


@pytest.mark.parametrize("border", geometry.BORDERS)
def test_a_crop_amid_other_geometry_is_the_same_crop(border: str) -> None:
    images, labels, index = batch(12)
    copied, _ = make(AugmentConfig(crop_padding=2, flip=0.5, border=border))(images, labels, index, 4)
    # an enlargement of exactly 1 sends everything through the sampling
    sampled, _ = make(AugmentConfig(crop_padding=2, flip=0.5, border=border, scale=(1.0, 1.0)))(
        images, labels, index, 4
    )
    # borders differ where "reflect" repeats the edge, and by the rounding of the mean
    inner = slice(None) if border != "reflect" else (slice(None), slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(sampled[inner], copied[inner], atol=0.012, rtol=0)


def test_reflecting_more_than_there_is_says_so() -> None:
    images, labels, index = batch(2)
    with pytest.raises(VitError, match=r"augment\.crop_padding: 10 "):
        make(AugmentConfig(crop_padding=10, border="reflect"))(images, labels, index, 0)


def test_random_resized_crops_are_those_of_the_stream_and_left_out_when_taken_already() -> None:
    config = AugmentConfig(random_resized_crop=True, crop_scale=(0.3, 0.6))
    images, labels, index = batch(6)
    got, _ = make(config)(images, labels, index, 2)
    boxes = regions.crop_boxes(uniform(5, 2, index, Stream.CROP, regions.NUMBERS), 12, 10, (0.3, 0.6), (3 / 4, 4 / 3))
    for row in range(6):
        left, top, w, h = (int(v) for v in boxes[row])
        cut = images[row : row + 1, :, top : top + h, left : left + w].float()
        expected = F.interpolate(cut, (12, 10), mode="bilinear", align_corners=False)
        # at its own edge the crop sees its neighbours, which the cut does not have
        inner = normalise(expected, MEAN, STD)[0, :, 2:-2, 2:-2]
        torch.testing.assert_close(got[row, :, 2:-2, 2:-2], inner, atol=1e-3, rtol=0)
    plain = normalise(images, MEAN, STD)
    assert torch.equal(make(config, cropped=True)(images, labels, index, 2)[0], plain)


def test_erasing_is_a_rectangle_of_zeros() -> None:
    images, labels, index = batch(400, 1)
    images = images.clamp(min=200)  # nothing else is zero after normalising
    got, _ = make(AugmentConfig(erasing=0.25), 1)(images, labels, index, 0)
    plain = normalise(images, MEAN[:1], STD[:1])
    erased = 0
    for row in range(400):
        hole = got[row, 0] == 0
        assert torch.equal(got[row, 0][~hole], plain[row, 0][~hole])
        if hole.any():
            erased += 1
            rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
            assert hole.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert 0 < hole.double().mean() < 0.45
    assert erased == pytest.approx(100, abs=30)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.95])
def test_an_image_is_erased_with_the_probability_that_is_set(probability: float) -> None:
    count = 20_000  # a standard deviation of at most 0.0036
    images = torch.full((count, 1, 8, 8), 255, dtype=torch.uint8)
    index = torch.arange(count)
    got, _ = make(AugmentConfig(erasing=probability), 1)(images, torch.zeros_like(index), index, 0)
    assert float((got == 0).any(dim=(1, 2, 3)).double().mean()) == pytest.approx(probability, abs=0.015)


def test_mixing_stops_for_the_last_part_of_training() -> None:
    images, labels, index = batch(8)
    augment = make(AugmentConfig(mixup=0.8, mix_off_epochs=0.25))
    plain = normalise(images, MEAN, STD)
    mixed, targets = augment(images, labels, index, 0, progress=0.74)
    assert not torch.equal(mixed, plain)
    assert targets.shape == (8, 10)
    got, targets = augment(images, labels, index, 0, progress=0.75)
    assert torch.equal(got, plain)
    assert torch.equal(targets, labels)


def test_mixing_off_keeps_smoothed_targets() -> None:
    images, labels, index = batch(8)
    augment = make(AugmentConfig(cutmix=1.0, mix_off_epochs=1.0, label_smoothing=0.1))
    _, targets = augment(images, labels, index, 0)
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.amax(1), torch.full((8,), 0.91))


def test_one_image_alone_is_not_mixed() -> None:
    images, labels, index = batch(1)
    got, targets = make(AugmentConfig(mixup=0.8))(images, labels, index, 0)
    assert torch.equal(got, normalise(images, MEAN, STD))
    assert torch.equal(targets, labels)


def test_targets_follow_the_pixels() -> None:
    # every image is flat, of its class's grey: the target's expectation is the mixture's level
    labels = torch.arange(8) % 10
    images = (labels * 20).to(torch.uint8)[:, None, None, None].expand(8, 1, 6, 6).contiguous()
    for config in (AugmentConfig(mixup=1.0), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=1.0, cutmix=1.0)):
        got, targets = make(config, 1)(images, labels, torch.arange(8), 0)
        levels = (got * STD[0] + MEAN[0]) * 255
        expected = targets @ (torch.arange(10).float() * 20)
        torch.testing.assert_close(levels.mean(dim=(1, 2, 3)), expected, atol=1e-2, rtol=0)


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result's shape or value the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_waits_for_a_gpu(name: str) -> None:
    augment = make(CONFIGS[name])
    # fake tensors claim to be on a GPU; anything whose value or shape only a GPU would know raises
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(8, 3, 12, 10, dtype=torch.uint8, device="cuda")
        labels = torch.empty(8, dtype=torch.int64, device="cuda")
        with NoWaiting():
            got, targets = augment(images, labels, labels, 3)
    augment_module._affine_of_channel.cache_clear()  # it has seen fake tensors
    assert got.device.type == "cuda"
    assert got.shape == (8, 3, 12, 10)
    assert targets.device.type == "cuda"


def test_configuration_lists_become_tuples() -> None:
    assert AugmentConfig(crop_scale=[0.5, 1.0], scale=[1, 2]) == AugmentConfig(crop_scale=(0.5, 1.0), scale=(1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.4}, r"augment\.flip: .*1\.4"),
        ({"flip": "often"}, r"augment\.flip: .*often"),
        ({"erasing": -0.1}, r"augment\.erasing"),
        ({"label_smoothing": 1.0}, r"augment\.label_smoothing"),
        ({"rand_magnitude": 11}, r"augment\.rand_magnitude"),
        ({"rand_augment": 1.5}, r"augment\.rand_augment"),
        ({"crop_padding": -1}, r"augment\.crop_padding"),
        ({"crop_scale": (0.9, 0.1)}, r"augment\.crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, r"augment\.crop_scale"),
        ({"scale": (1.0,)}, r"augment\.scale"),
        ({"border": "wrap"}, r"augment\.border: .*wrap"),
        ({"random_resized_crop": True, "crop_padding": 4}, r"augment\.crop_padding and augment\.random_resized_crop"),
        ({"mixup": float("nan")}, r"augment\.mixup"),
        ({"mix_off_epochs": 2}, r"augment\.mix_off_epochs"),
    ],
)
def test_nonsense_is_named(changes, message) -> None:
    with pytest.raises(VitError, match=message):
        dataclasses.replace(AugmentConfig(), **changes).check(10)


def test_mixing_needs_two_classes() -> None:
    with pytest.raises(VitError, match=r"augment\.mixup: .*at least 2 classes"):
        AugmentConfig(mixup=0.2).check(1)
    with pytest.raises(VitError, match=r"augment\.cutmix: .*at least 2 classes"):
        AugmentConfig(cutmix=0.2).check(1)
    AugmentConfig(mixup=0.2, mix_prob=0.0).check(1)
    EVERYTHING.check(2)
