"""Which loader a split gets, and that Lightning saves, restores and iterates it as one of its own."""

import contextlib
import logging

import numpy as np
import pytest
import torch

from vit.data.augment import AugmentConfig, BatchAugment
from vit.data.catalogue import DataConfig
from vit.data.dataset import ArrayImages, FileImages, Split
from vit.data.loaders import Batch, crops_in_loader, eval_loader, train_loader
from vit.data.preprocess import Preprocessing
from vit.data.resident import ResidentImages
from vit.data.streaming import StreamedImages
from vit.errors import VitError

SIZE = Preprocessing(image_size=(8, 8), channels=1)
PLAIN = AugmentConfig()


def digits(samples: int = 40) -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (samples, 8, 8, 1), dtype=np.uint8)
    return Split(labels=np.arange(samples) % 3, images=ArrayImages(pixels, "d"), channels=1, native_size=(8, 8))


def config(**changes) -> DataConfig:
    return DataConfig(**{"name": "digits", "batch_size": 8, "eval_batch_size": 16, "workers": 0, **changes})


def test_arrays_of_one_size_are_resident_and_files_stream(make_folder, caplog) -> None:
    with caplog.at_level(logging.INFO, "vit"):
        assert isinstance(train_loader(digits(), SIZE, config(), PLAIN, seed=0).source, ResidentImages)
        assert isinstance(eval_loader(digits(), SIZE, config()).source, ResidentImages)
    assert "40 images held on the device" in caplog.text
    caplog.clear()
    root = make_folder({"a.png": None, "b.png": None})
    split = Split(labels=np.array([0, 1]), images=FileImages([root / "a.png", root / "b.png"]), channels=1)
    with caplog.at_level(logging.INFO, "vit"):
        assert isinstance(train_loader(split, SIZE, config(), PLAIN, seed=0).source, StreamedImages)
        assert isinstance(eval_loader(split, SIZE, config()).source, StreamedImages)
    assert "2 images streamed" in caplog.text
    assert isinstance(train_loader(split, SIZE, config(resident=True), PLAIN, seed=0).source, ResidentImages)


def test_the_key_decides_where_it_says_so() -> None:
    assert isinstance(train_loader(digits(), SIZE, config(resident=False), PLAIN, seed=0).source, StreamedImages)
    assert isinstance(train_loader(digits(), SIZE, config(resident=True), PLAIN, seed=0).source, ResidentImages)


def test_who_cuts_random_crops() -> None:
    crops = AugmentConfig(random_resized_crop=True)
    assert not crops_in_loader(digits(), SIZE, config(), crops)  # resident: BatchAugment does
    assert crops_in_loader(digits(), SIZE, config(resident=False), crops)
    assert not crops_in_loader(digits(), SIZE, config(resident=False), PLAIN)


def test_more_than_two_gibibytes_stream(monkeypatch) -> None:
    monkeypatch.setattr("vit.data.loaders.RESIDENT_LIMIT", 40 * 64 - 1)
    assert isinstance(eval_loader(digits(), SIZE, config()).source, StreamedImages)
    assert isinstance(eval_loader(digits(39), SIZE, config()).source, ResidentImages)


def test_more_than_there_is_memory_for(monkeypatch) -> None:
    monkeypatch.setattr("vit.data.resident.free_memory", lambda device: 1000)
    with pytest.raises(VitError, match=r"data\.resident=true: .*data\.resident=false streams"):
        train_loader(digits(), SIZE, config(resident=True), PLAIN, seed=0)


def test_both_kinds_give_the_same_batches() -> None:
    batches = [
        list(train_loader(digits(), SIZE, config(resident=resident), PLAIN, seed=4)) for resident in (True, False)
    ]
    for one, two in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_resident_images_do_not_lie_on_read_only_memory() -> None:
    split = digits()
    split.images.pixels.setflags(write=False)
    loader = train_loader(split, SIZE, config(), PLAIN, seed=0)
    assert isinstance(loader.source, ResidentImages)
    assert loader.source.images.shape == (40, 1, 8, 8)
    assert np.array_equal(loader.source.images.permute(0, 2, 3, 1).numpy(), split.images.pixels)


def test_mixing_over_processes_needs_even_parts() -> None:
    mixup = AugmentConfig(mixup=0.2)
    with pytest.raises(VitError, match=r"data\.batch_size: 6 "):
        train_loader(digits(), SIZE, config(batch_size=6), mixup, seed=0, rank=0, world_size=2)
    assert len(train_loader(digits(), SIZE, config(batch_size=6), PLAIN, seed=0, rank=0, world_size=2)) == 6
    assert len(train_loader(digits(), SIZE, config(batch_size=6), mixup, seed=0)) == 6


@pytest.mark.parametrize("resident", [True, False])
def test_an_empty_split_evaluates_to_nothing(resident) -> None:
    empty = digits().subset([])
    assert list(eval_loader(empty, SIZE, config(resident=resident))) == []
    assert len(eval_loader(empty, SIZE, config(resident=resident))) == 0
    with pytest.raises(VitError, match="no images"):
        train_loader(empty, SIZE, config(resident=resident), PLAIN, seed=0)


def test_the_number_of_processes_changes_no_augmented_image() -> None:
    augment = AugmentConfig(crop_padding=1, flip=0.5, rand_augment=1, mixup=0.8, cutmix=1.0)
    make = BatchAugment(augment, num_classes=3, mean=SIZE.mean, std=SIZE.std, seed=1)

    def epoch(rank: int, world_size: int) -> list[tuple]:
        loader = train_loader(digits(), SIZE, config(), augment, seed=1, rank=rank, world_size=world_size)
        return [make(batch.images, batch.labels, batch.index, 0) for batch in loader]

    whole, parts = epoch(0, 1), [epoch(rank, 2) for rank in range(2)]
    for expected, *halves in zip(whole, *parts, strict=True):
        for one, two in zip(expected, map(torch.cat, zip(*halves, strict=True)), strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what Lightning thinks of so small a run
class TestLightning:
    """A real `Trainer`, for what its own source promises to loaders like these."""

    @pytest.fixture
    def lightning(self):
        return pytest.importorskip("lightning.pytorch")

    def fit(self, lightning, folder, loader, epochs, *, resume=None, stop_at=-1, crash_at=None, **options):
        """Train a model that only notes which images it saw: (epoch, index of the batch) in order."""
        seen: list[tuple[int, list[int]]] = []

        class Notes(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(()))

            def training_step(self, batch: Batch, batch_idx: int):
                assert isinstance(batch, Batch)
                if len(seen) == crash_at:
                    raise OSError("power cut")
                seen.append((self.current_epoch, batch.index.tolist()))
                return self.weight * batch.images.float().mean()

            def validation_step(self, batch: Batch, batch_idx: int) -> None:
                pass

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        trainer = lightning.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_epochs=epochs,
            max_steps=stop_at,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        with contextlib.suppress(OSError):
            trainer.fit(Notes(), loader, eval_loader(digits(10), SIZE, config()), ckpt_path=resume, weights_only=True)
        return seen

    def loader(self, resident: bool):
        return train_loader(digits(), SIZE, config(resident=resident), AugmentConfig(mixup=0.1), seed=2)

    def expected(self, epochs: int) -> list[tuple[int, list[int]]]:
        loader = self.loader(True)
        batches = []
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            batches += [(epoch, batch.index.tolist()) for batch in loader]
        return batches

    @pytest.mark.parametrize("resident", [True, False])
    def test_epochs_are_set(self, lightning, tmp_path, resident) -> None:
        seen = self.fit(lightning, tmp_path, self.loader(resident), 3, enable_checkpointing=False)
        assert seen == self.expected(3)

    @pytest.mark.parametrize("validate", [0, 1.0])
    @pytest.mark.parametrize("resident", [True, False])
    @pytest.mark.parametrize("stop", [2, 5, 7, 10])  # 5 steps an epoch: within, and at the ends
    def test_a_resumed_run_sees_what_an_uninterrupted_one_does(
        self, lightning, tmp_path, resident, stop, validate
    ) -> None:
        save = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=stop)
        first = self.fit(
            lightning,
            tmp_path,
            self.loader(resident),
            4,
            stop_at=stop,
            callbacks=[save],
            limit_val_batches=validate,
        )
        assert len(first) == stop
        second = self.fit(
            lightning,
            tmp_path,
            self.loader(resident),
            4,
            resume=tmp_path / "last.ckpt",
            enable_checkpointing=False,
            limit_val_batches=validate,
        )
        assert first + second == self.expected(4)

    @pytest.mark.parametrize("every", [{}, {"val_check_interval": 2}])  # validation at the end, and within
    @pytest.mark.parametrize("late", [False, True])
    def test_after_a_crash_a_run_goes_on_from_its_last_checkpoint(self, lightning, tmp_path, every, late) -> None:
        save = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=late)
        first = self.fit(lightning, tmp_path, self.loader(True), 4, crash_at=13, callbacks=[save], **every)
        assert first == self.expected(4)[:13]
        last = tmp_path / "last.ckpt"
        done = torch.load(last, weights_only=True)["global_step"]
        assert done == (10 if late or not every else 12)
        second = self.fit(lightning, tmp_path, self.loader(True), 4, resume=last, enable_checkpointing=False, **every)
        assert second == self.expected(4)[done:]
