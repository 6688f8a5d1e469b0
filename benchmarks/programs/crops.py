"""Random-resized crops of photographs, a loader's batches as a training step takes them: of `benchmarks/crops.py`.

Every loader mirrors half of its crops and normalises them.  A call is an epoch, with the workers of the one before.
What answers is crops that leave nothing to chance: with a scale and a ratio of 1 the central square.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from served import serve

Built = tuple[Callable[[], Any], Callable[[], Any] | None]

SQUARE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
TIMM_SQUARE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def means(images: Any) -> list[list[float]]:
    """Of (B, 3, H, W) over 14 x 14 parts of each: enough to see a shift of a pixel, little enough to send."""
    side = images.shape[-1] // 14
    parts = images[:, :, : 14 * side, : 14 * side].reshape(len(images), 3, 14, side, 14, side).mean((3, 5))
    return [[float(value) for value in each] for each in parts.flatten(1)]


class Loaded:
    """The photographs of a folder as `data=folder` loads them for training."""

    def __init__(self, folder: str, size: int, batch: int, workers: int, cache: str | None) -> None:
        import numpy as np

        from vit.data.catalogue import DataConfig
        from vit.data.dataset import FileImages, Split
        from vit.data.preprocess import Preprocessing
        from vit.data.scan import scan_files

        paths = sorted(str(path) for path in Path(folder).iterdir())
        sizes, _ = scan_files(paths, 3, f"benchmark {folder}")
        self.split = Split(np.zeros(len(paths)), FileImages(paths), 3, sizes=sizes)
        self.preprocessing = Preprocessing(image_size=(size, size), mean=MEAN, std=STD)
        self.config = DataConfig(
            name="folder",
            root=folder,
            batch_size=batch,
            workers=workers,
            resident=False,
            cache=cache is not None,
            cache_folder=cache,
        )

    def passes(self, **augment: Any) -> Callable[[], Iterator[tuple[Any, Any]]]:
        """Each call is an epoch: its normalised batches (B, 3, H, W), each with the places of its images."""
        from vit.data.augment import BatchAugment
        from vit.data.augment_config import AugmentConfig
        from vit.data.loaders import crops_in_loader, train_loader

        config = AugmentConfig(**{"random_resized_crop": True, "flip": 0.5, **augment})
        loader = train_loader(self.split, self.preprocessing, self.config, config, seed=0)
        cropped = crops_in_loader(self.split, self.preprocessing, self.config, config)
        make = BatchAugment(config, num_classes=1, mean=MEAN, std=STD, seed=0, cropped=cropped)
        epoch = itertools.count()

        def run() -> Iterator[tuple[Any, Any]]:
            loader.set_epoch(next(epoch))
            for batch in loader:
                yield make(batch.images, batch.labels, batch.index, loader.epoch)[0], batch.index

        return run


def vit(folder: str, few: str, size: int, batch: int, workers: int, cache: str | None) -> Built:
    """From the files, or from a store of decoded images in `cache`, which the first call makes."""
    whole, epochs = Loaded(folder, size, batch, workers, cache), None

    def timed() -> Any:
        nonlocal epochs
        epochs = epochs or whole.passes()
        return list(epochs())[-1:]

    def answer() -> list[list[float]]:
        ((images, index),) = Loaded(few, size, 100, workers, cache).passes(**SQUARE)()
        return means(images[index.argsort()])

    return timed, answer


def vit_streamed(folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """`data.cache=false`."""
    return vit(folder, few, size, batch, workers, None)


def vit_cached(folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """`data.cache=true`."""
    cache = tempfile.TemporaryDirectory(prefix="crops-", dir=Path(folder).parent)
    timed, answer = vit(folder, few, size, batch, workers, cache.name)
    return lambda: (timed(), cache)[0], answer


def vit_decoding(folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """What `data.cache=true` costs once: a call decodes all photographs into a new store."""
    from vit.data.augment_config import AugmentConfig
    from vit.data.loaders import store_images

    crops = AugmentConfig(random_resized_crop=True)

    def timed() -> None:
        with tempfile.TemporaryDirectory(prefix="crops-", dir=Path(folder).parent) as cache:
            whole = Loaded(folder, size, batch, workers, cache)
            splits = {"train": whole.split, "val": whole.split.subset([])}
            store_images(splits, whole.preprocessing, whole.config, crops)

    return timed, None


def timm_loader(folder: str, size: int, batch: int, workers: int, **crop: Any) -> Any:
    """As timm's train.py makes it: workers that stay, its prefetcher, on the CPU."""
    import torch
    from timm.data import ImageDataset, create_loader

    return create_loader(
        ImageDataset(folder),
        input_size=(3, size, size),
        batch_size=batch,
        is_training=True,
        color_jitter=0.0,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
        **{"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, **crop},
    )


def timm(folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """timm's loader."""
    import torch

    loader = timm_loader(folder, size, batch, workers)

    def timed() -> Any:
        return [images for images, _ in loader][-1:]

    def answer() -> list[list[float]]:
        dataset = timm_loader(few, size, 1, workers, **TIMM_SQUARE).dataset
        pixels = torch.stack([torch.as_tensor(dataset[i][0]) for i in range(len(dataset))])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return means((pixels / 255 - mean) / std)

    return timed, answer


if __name__ == "__main__":
    del sys.path[0]  # a module there may bear a library's name
    here = (vit_cached, vit_streamed, vit_decoding, timm)
    serve({builder.__name__: builder for builder in here})
