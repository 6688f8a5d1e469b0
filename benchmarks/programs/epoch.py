"""An epoch of training on photographs, from files to updated weights: a contestant of `benchmarks/epoch.py`.

A plain loop around each library's loader, model and optimiser: crops of `crops.py`, steps of `step.py`.
The answer is the mean loss of a few photographs' central squares before any step.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crops import MEAN, SQUARE, STD, TIMM_SQUARE, Loaded, timm_loader
from served import serve
from step import own, timms

Built = tuple[Callable[[], Any], Callable[[], Any] | None]


def contestant(model: Any, optimizer: Any, passes: Callable[[], Iterator[Any]], few: Iterator[Any]) -> Built:
    """`passes()` gives normalised batches (B, 3, H, W), `few` one of what answers; the class of all is the first."""
    import torch
    from torch.nn import functional as F

    def loss_of(images: Any) -> Any:
        return F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64))

    (images,) = few
    with torch.inference_mode():
        before = float(loss_of(images))
    model.train()

    def epoch() -> None:
        for images in passes():
            optimizer.zero_grad(set_to_none=True)
            loss_of(images).backward()
            optimizer.step()

    return epoch, lambda: [[before]]


def count(folder: str) -> int:
    """All of a folder, as one batch: a loader for training leaves out what does not fill one."""
    return len(list(Path(folder).iterdir()))


def images_of(run: Callable[[], Iterator[tuple[Any, Any]]]) -> Callable[[], Iterator[Any]]:
    return lambda: (images for images, _ in run())


def vit_streamed(model: str, folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """This project's, decoding in every epoch."""
    whole, part = Loaded(folder, size, batch, workers, None), Loaded(few, size, count(few), workers, None)
    return contestant(*own(model, "adamw"), images_of(whole.passes()), images_of(part.passes(**SQUARE))())


def vit_cached(model: str, folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """This project's with `data.cache=true`; the photographs are decoded before the first epoch."""
    cache = tempfile.TemporaryDirectory(prefix="epoch-", dir=Path(folder).parent)
    whole, part = Loaded(folder, size, batch, workers, cache.name), Loaded(few, size, count(few), workers, cache.name)
    run = images_of(whole.passes())
    epoch, answer = contestant(*own(model, "adamw"), run, images_of(part.passes(**SQUARE))())
    return lambda: (epoch(), cache)[0], answer


def timm(model: str, folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """timm's."""
    loader = timm_loader(folder, size, batch, workers)
    part = timm_loader(few, size, count(few), 0, **TIMM_SQUARE)
    return contestant(*timms(model), images_of(lambda: iter(loader)), images_of(lambda: iter(part))())


def normalising(loaded: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
    """Normalise the batches of uint8 (B, 3, H, W) that a call of `loaded` gives."""
    from vit.data.augment import normalise

    return lambda: (normalise(images, MEAN, STD) for images in loaded())


def cropping(**crop: Any) -> Any:
    """torchvision's random-resized crop, and a mirroring of half of the images: uint8 (3, H, W) of either kind."""
    from torchvision.transforms import InterpolationMode, v2

    taken = v2.RandomResizedCrop(interpolation=InterpolationMode.BICUBIC, antialias=True, **crop)
    return v2.Compose([v2.ToImage(), taken, v2.RandomHorizontalFlip(0.0 if crop.get("scale") == (1.0, 1.0) else 0.5)])


class Decoded:
    """The photographs of a folder, decoded by torchvision: uint8 (3, H, W)."""

    def __init__(self, folder: str, **crop: Any) -> None:
        self.paths = sorted(str(path) for path in Path(folder).iterdir())
        self.crop = cropping(**crop)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        return self.crop(decode_jpeg(read_file(self.paths[i]), mode=ImageReadMode.RGB))


def torchvision(model: str, folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """This project's model behind torchvision's decoder and crops, and torch's loader."""
    from torch.utils.data import DataLoader

    stays: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    loader: Any = DataLoader(Decoded(folder, size=size), batch, shuffle=True, drop_last=True, **stays)  # type: ignore[arg-type]
    part = DataLoader(Decoded(few, size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0)), count(few))  # type: ignore[arg-type]
    return contestant(*own(model, "adamw"), normalising(lambda: iter(loader)), normalising(lambda: iter(part))())


def webdataset(model: str, folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """This project's model behind WebDataset: shards of smaller JPEGs, written before the first epoch."""
    import torch
    import webdataset as wds

    place = tempfile.TemporaryDirectory(prefix="epoch-", dir=Path(folder).parent)

    def loader(source: str, batch: int, workers: int, **crop: Any) -> Any:
        taken, made = cropping(size=size, **crop), Path(place.name) / Path(source).name
        names = write_shards(source, made, shards=max(1, workers))
        files = wds.WebDataset(names, shardshuffle=len(names) if workers else False).shuffle(1000 if workers else 0)
        images = files.decode("pil").to_tuple("jpg").map(lambda sample: taken(sample[0]))
        images = images.batched(batch, collation_fn=torch.stack, partial=not workers)
        return wds.WebLoader(images, batch_size=None, num_workers=workers, persistent_workers=workers > 0)

    whole, part = loader(folder, batch, workers), loader(few, count(few), 0, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    run, answer = normalising(lambda: iter(whole)), normalising(lambda: iter(part))
    epoch, losses = contestant(*own(model, "adamw"), run, answer())
    return lambda: (epoch(), place)[0], losses


def write_shards(folder: str, to: Path, shards: int, side: int = 256) -> list[str]:
    """Write the photographs of a folder to tar files, as JPEGs of quality 95 whose shorter side is `side` pixels."""
    import webdataset as wds
    from PIL import Image

    to.mkdir()
    paths, names = sorted(Path(folder).iterdir()), []
    for number in range(shards):
        names.append(str(to / f"{number}.tar"))
        with wds.TarWriter(names[-1], encoder=True) as tar:
            for path in paths[number::shards]:
                image = Image.open(path).convert("RGB")
                scale = side / min(image.size)
                image = image.resize(
                    (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
                )
                with io.BytesIO() as file:
                    image.save(file, "JPEG", quality=95)
                    tar.write({"__key__": path.stem, "jpg": file.getvalue()})
    return names


if __name__ == "__main__":
    del sys.path[0]  # a module there may bear a library's name
    here = (vit_cached, vit_streamed, timm, torchvision, webdataset)
    serve({builder.__name__: builder for builder in here})
