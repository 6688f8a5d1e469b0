"""Compute the features of a frozen backbone for a whole split, and cache them.

Notable:
- a cache file is named by a hash of everything it depends on: the backbone's weights, the preprocessing and the images
  (for files: path, size and time of change);
- cache files are written atomically, and damaged files are noticed by their checksum and computed again;
- there is no augmentation: each image has one feature vector.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vit.data.catalogue import DataConfig
from vit.data.dataset import ArrayImages, FileImages, Split
from vit.data.decode import printable
from vit.data.parquet import ParquetImages
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.evaluation import collect_logits
from vit.files import atomic_write
from vit.model import VisionTransformer
from vit.training.optim import HEAD_PREFIXES

log = logging.getLogger("vit")

_FORMAT = b"1"
_TRAINING_ONLY_KEYS = ("num_classes", "init", "dropout", "attention_dropout", "drop_path", "patch_dropout")


class Backbone(nn.Module):
    """A model without its head: images (B, C, H, W) -> features (B, D), the input of the head.

    With two heads the features are the mean of their inputs, so that one linear map serves both.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        read = self.model.forward_head(self.model.forward_features(images_BCHW), pre_logits=True)
        return read if self.model.head_dist is None else read.mean(dim=1)

    def fingerprint(self) -> str:
        """Hash the weights and the architecture that the features depend on.

        The head and training-only settings are left out, so a probe and a run that starts from it share their features.
        """
        architecture = {key: value for key, value in self.model.architecture.items() if key not in _TRAINING_ONLY_KEYS}
        digest = hashlib.sha256(json.dumps(architecture, sort_keys=True, default=str).encode())
        for name, tensor in self.model.state_dict().items():
            name = name.replace(".base_layer.", ".")
            if not name.startswith(HEAD_PREFIXES) and ".lora_" not in name:  # LoRA updates start at zero
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def collect_features(
    backbone: Backbone,
    split: Split,
    preprocessing: Preprocessing,
    config: DataConfig,
    *,
    cache: Path | None,
    device: torch.device | str = "cpu",
    label: str = "Computing features",
) -> tuple[Tensor, bool]:
    """Compute or load the features of every image of a split.

    Args:
        cache: the folder of cache files; None: no cache.

    Returns:
        The features, float32 (N, D) on the CPU in the split's order, and whether they came from the cache.

    Raises:
        VitError: an image cannot be read.
    """
    width = int(backbone.model.width)
    if not len(split):
        return torch.zeros(0, width), False
    path = None if cache is None else cache / f"{_cache_key(backbone, split, preprocessing)}.npz"
    if path is not None and (cached := _read_cached(path, (len(split), width))) is not None:
        return torch.from_numpy(cached), True
    features, _ = collect_logits(backbone, split, preprocessing, config, device=device, label=label)
    if path is not None:
        try:
            with atomic_write(path) as part, open(part, "wb") as file:
                np.savez(file, features=features.numpy())
        except VitError as error:  # they can be computed again
            log.warning("the features are not kept: %s", error)
    return features, False


def _read_cached(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            features = archive["features"]
        if features.shape == shape and features.dtype == np.float32 and bool(np.isfinite(features).all()):
            return features
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    log.warning("the features kept in %s are damaged: they are computed anew", path)
    return None


def _cache_key(backbone: Backbone, split: Split, preprocessing: Preprocessing) -> str:
    digest = hashlib.sha256(_FORMAT)
    digest.update(backbone.fingerprint().encode())
    digest.update(json.dumps(preprocessing.to_dict(), sort_keys=True).encode())
    _hash_images(digest, split)
    return digest.hexdigest()


def _hash_images(digest: hashlib._Hash, split: Split) -> None:
    """Feed what tells these images, in this order, from any other: their bytes, or of files that they are the same."""
    images, rows = split.images, split.rows
    assert rows is not None
    digest.update(f"{split.channels} {len(split)}".encode())
    if isinstance(images, ArrayImages):
        digest.update(str(images.pixels.shape[1:]).encode())
        for row in rows.tolist():
            digest.update(np.ascontiguousarray(images.pixels[row]).data)
        return
    for i, row in enumerate(rows.tolist()):
        if isinstance(images, FileImages):
            try:
                status = os.stat(images.name(row))
            except OSError as error:
                raise VitError(f"cannot read {printable(images.name(row))}: {error.strerror or error}") from error
            text = f"\0{os.path.abspath(images.name(row))}\0{status.st_size}\0{status.st_mtime_ns}"
            digest.update(text.encode("utf-8", "surrogateescape"))
        elif isinstance(images, ParquetImages):
            encoded = images.encoded(row)
            digest.update(f"\0{len(encoded)}\0".encode())
            digest.update(encoded)
        else:
            pixels = np.ascontiguousarray(split.image(i))
            digest.update(str(pixels.shape).encode())
            digest.update(pixels.data)
