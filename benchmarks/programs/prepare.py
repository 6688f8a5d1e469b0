"""Photographs into normalised arrays, one after another on one core: a contestant of `benchmarks/preparing.py`.

What answers is the sum over each channel of a few photographs, so that a wrong resize or normalisation shows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from served import serve

Built = tuple[Callable[[], Any], Callable[[], Any] | None]


def contestant(prepare: Callable[[str], Any], folder: str, count: int) -> Built:
    """`prepare` makes (3, H, W) of a path.  A call prepares one photograph, the next one each time."""
    paths = sorted(str(path) for path in Path(folder).iterdir())
    turn = iter(range(1 << 60))

    def timed() -> Any:
        return prepare(paths[next(turn) % len(paths)])

    def answer() -> list[list[float]]:
        arrays = [prepare(path) for path in paths[:count]]
        # means over patches of the model's size: enough to see a shift of a pixel, little enough to send
        return [
            [float(value) for value in array.reshape(3, 14, array.shape[1] // 14, -1).mean((2, 3)).flatten()]
            for array in arrays
        ]

    return timed, answer


def vit_classify(model: str, folder: str, count: int) -> Built:
    """As `vit classify` prepares them, normalisation included."""
    from vit.data.decode import decode
    from vit.inference.bundle import read_bundle

    preprocessing = read_bundle(model).preprocessing

    def prepare(path: str) -> Any:
        image = decode(path, channels=3, target=preprocessing.resize_target)
        return preprocessing(image)

    return contestant(prepare, folder, count)


def timm(model: str, folder: str, count: int) -> Built:
    """As timm's dataset and loader do: Pillow, its transform to uint8, normalised by the prefetcher's arithmetic."""
    import json

    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    torch.set_num_threads(1)
    config = json.loads((Path(model) / "config.json").read_text("ascii"))["pretrained_cfg"]
    settings = resolve_data_config({}, pretrained_cfg=config)
    transform = create_transform(**settings, is_training=False, use_prefetcher=True)
    mean = torch.tensor([255 * value for value in settings["mean"]]).view(3, 1, 1)
    std = torch.tensor([255 * value for value in settings["std"]]).view(3, 1, 1)

    def prepare(path: str) -> Any:
        with open(path, "rb") as file:
            pixels = transform(Image.open(file).convert("RGB"))
        return torch.as_tensor(pixels).float().sub_(mean).div_(std)

    return contestant(prepare, folder, count)


def torchvision(model: str, folder: str, count: int) -> Built:
    """torchvision's own decoder, and its transforms on tensors, uint8 until they are normalised."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import InterpolationMode, v2

    torch.set_num_threads(1)
    size = _size(model)
    transform = v2.Compose(
        [
            v2.Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return contestant(lambda path: transform(decode_jpeg(read_file(path), ImageReadMode.RGB)), folder, count)


def torchvision_pillow(model: str, folder: str, count: int) -> Built:
    """torchvision's transforms on Pillow images, as most training scripts have them."""
    import torch
    from PIL import Image
    from torchvision import transforms

    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.Resize(_size(model), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return contestant(lambda path: transform(Image.open(path).convert("RGB")), folder, count)


def transformers(model: str, folder: str, count: int) -> Built:
    """The processor of its image-classification pipeline."""
    import torch
    from transformers import AutoImageProcessor
    from transformers.image_utils import load_image

    torch.set_num_threads(1)
    processor = AutoImageProcessor.from_pretrained(f"{model}-transformers")
    return contestant(lambda path: processor(load_image(path), return_tensors="pt")["pixel_values"][0], folder, count)


def _size(model: str) -> tuple[int, int]:
    import json

    height, width = json.loads((Path(model) / "config.json").read_text("ascii"))["pretrained_cfg"]["input_size"][1:]
    return height, width


if __name__ == "__main__":
    del sys.path[0]  # a module there may bear a library's name
    here = (vit_classify, timm, torchvision, torchvision_pillow, transformers)
    serve({builder.__name__: builder for builder in here})
