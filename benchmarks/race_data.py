"""What every contestant of the race is given: decoded images of this project's own split, and the sizes of its model.

`python -m benchmarks.race_data DIR [overrides of train.py]` writes `train`, `val` and `test` as NumPy files, uint8
(N, H, W, C) and int64 (N,), and `about.json`: `architecture`, `mean`, `std`, `images` by split, `recipe` (what this
project trains with) and `copy`, which says how a Parquet copy's images are encoded.

A process of its own, since the driver measures others and should hold nothing itself.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any


def make(folder: Path, typed: list[str]) -> None:
    """Write everything that training with the overrides `typed` would train on into `folder`."""
    import hydra
    import numpy as np

    from vit.data.catalogue import open_data, preprocessing_for
    from vit.model import VisionTransformer
    from vit.training.app import CONF, resolve_config
    from vit.training.auto import resolve_auto
    from vit.training.config import load_config

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = load_config(resolve_config(hydra.compose("train", typed)))
    data = open_data(config.data)
    preprocessing = preprocessing_for(config.data, data)
    config = resolve_auto(config, data, typed)
    model = VisionTransformer(**config.model.arguments(len(data.class_names)))
    for name, split in data.splits.items():
        np.save(folder / f"{name}_images.npy", split.array(preprocessing))
        np.save(folder / f"{name}_labels.npy", split.labels)
    plain = config.to_dict()
    about: dict[str, Any] = {
        "architecture": model.architecture,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "images": {name: len(split) for name, split in data.splits.items()},
        "recipe": {
            **{key: plain[key] for key in ("model", "optim", "schedule", "augment")},
            "batch_size": config.data.batch_size,
        },
        "copy": encoding(Path(config.data.root)) if config.data.name == "parquet" and config.data.root else None,
    }
    (folder / "about.json").write_text(json.dumps(about, default=list), "utf-8")


def encoding(root: Path) -> str | None:
    """How the first image of a Parquet data set is encoded, such as "JPEG, quality 75" or "PNG"."""
    import pyarrow.parquet as pq
    from PIL import Image

    file = min(root.rglob("*.parquet")) if root.is_dir() else root
    row = next(pq.ParquetFile(file).iter_batches(1)).to_pylist()[0]
    found = [value["bytes"] for value in row.values() if isinstance(value, dict) and value.get("bytes")]
    if not found:
        return None
    image: Any = Image.open(io.BytesIO(found[0]))
    if image.format != "JPEG":
        return image.format
    for quality in range(100, 0, -1):  # the tables of a quality are what Pillow writes with it
        part = io.BytesIO()
        Image.new("RGB", (8, 8)).save(part, "JPEG", quality=quality)
        own: Any = Image.open(part)
        if own.quantization[0] == image.quantization[0]:
            return f"JPEG, quality {quality}"
    return "JPEG"


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2:])
