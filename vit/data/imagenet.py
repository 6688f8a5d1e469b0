"""ImageNet-1k from its `train/` and `val/` folders, one folder a synset (n01440764, ...).

Notable:
- The official validation images are the test split, as everywhere in the literature; validation, which chooses
  between checkpoints, is a stratified part of train.
- Classes are in the order of their synset numbers, which is the order of every published model, and have names that
  people can read.  A model is matched by whichever of the usual names it has for them.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit.data.dataset import ImageData
from vit.data.decode import printable
from vit.data.folder import class_files, from_files
from vit.data.walk import Walk
from vit.errors import VitError

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

log = logging.getLogger("vit")

LAYOUT = "expected ROOT/train/n01440764/*.JPEG and ROOT/val/n01440764/*.JPEG, one folder a synset in both"


def imagenet(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open ImageNet-1k, or any part of it in the same layout."""
    if config.root is None:
        raise VitError(f"data=imagenet cannot be downloaded, it needs data.root=FOLDER: {LAYOUT}")
    root = os.path.abspath(config.root)
    found, walk = {}, Walk(config.channels, say=log.info)
    for split, name in (("train", "train"), ("test", "val")):
        path = os.path.join(root, name)
        if os.path.isdir(path):
            found[split] = class_files(path, walk, strict=split == "train")
            if not found[split]:
                raise VitError(f"{printable(path)} holds no images in class folders: {LAYOUT}")
        elif class_names is None or split == "test":
            raise VitError(f"data.root={printable(config.root)} has no {name} folder: {LAYOUT}")
    synsets = sorted(set().union(*found.values()))
    files = {
        split: (
            [path for paths in by_class.values() for path in paths],
            [synset for synset, paths in by_class.items() for _ in paths],
        )
        for split, by_class in found.items()
    }
    data = from_files("imagenet", files, config, class_names, where=printable(config.root), scan_limit=scan_limit)
    data.passed_over = dict(walk.passed_over)
    synsets = data.class_names
    indices = _class_indices(synsets, class_names) if class_names is not None else None
    if indices is None:
        data.class_names = _readable_names(synsets)
    else:
        for part in data.splits.values():
            part.labels = np.array(indices, dtype=np.int64)[part.labels]
        data.class_names = list(class_names or ())
    return data


def _readable_names(synsets: Sequence[str], whole: bool = True) -> list[str]:
    """Return WordNet's words for each synset, or the first of them; with its number where two have the same."""
    words = [_lemmas().get(synset, synset) for synset in synsets]
    names = words if whole else [text.split(",")[0] for text in words]
    occurrences = Counter(names)
    return [
        f"{name} ({synset})" if occurrences[name] > 1 else name for synset, name in zip(synsets, names, strict=True)
    ]


def _class_indices(synsets: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """Find the index in `class_names` of each synset; None if they are not there under any usual name."""
    for names in (
        _readable_names(synsets),
        synsets,
        [f"{synset} {_lemmas().get(synset, '')}" for synset in synsets],
        _readable_names(synsets, whole=False),
    ):
        if set(names) <= set(class_names):
            return [class_names.index(name) for name in names]
    # all thousand in the usual order, where two may be called "crane"
    standard = _standard_synsets()
    if len(class_names) == len(standard) and set(synsets) <= set(standard):
        indices = [standard.index(synset) for synset in synsets]
        words = ([synset, *_lemmas().get(synset, "").split(", ")] for synset in synsets)
        if all(class_names[k].split(",")[0] in known for k, known in zip(indices, words, strict=True)):
            return indices
    return None


@functools.cache
def _lemmas() -> dict[str, str]:
    """Read WordNet's words for each synset from timm's table."""
    rows = (line.split("\t", 1) for line in _table("imagenet_synset_to_lemma.txt"))
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


@functools.cache
def _standard_synsets() -> list[str]:
    """Read the thousand synsets of ImageNet-1k, in the order of every published model."""
    return _table("imagenet_synsets.txt")


def _table(name: str) -> list[str]:
    """Read the lines of one of timm's tables as a file: timm is not imported. Without timm, none."""
    spec = importlib.util.find_spec("timm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "data" / "_info" / name
        if path.is_file():
            return path.read_text("utf-8").splitlines()
    return []
