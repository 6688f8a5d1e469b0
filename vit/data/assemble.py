"""Assembles a data set from images with class names: leaves out bad files, makes one class map, cuts missing splits.

Shared by folders, Parquet files and the larger downloads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vit.data.dataset import SPLITS, ImageData, Images, Split
from vit.data.scan import check_unreadable
from vit.data.splits import stratified
from vit.errors import VitError

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

log = logging.getLogger("vit")


def assemble(
    name: str,
    images: Images,
    names: dict[str, list[str]],
    sizes: np.ndarray,
    reasons: dict[int, str],
    config: DataConfig,
    *,
    where: str,
    known_classes: Sequence[str] | None = None,
    trained: bool = False,
) -> ImageData:
    """Assemble a data set.

    Args:
        images: all images, in the order train, val, test (as far as there are such splits).
        names: the class name of each image, by split, in the same order.  Splits that are missing are cut out of
            train, stratified: validation always (unless its fraction is 0), test only if train is all there is.
        sizes: int32 (N, 2), (H, W) of every image; 0 for those that cannot be read.
        reasons: why not, by index.
        where: the name of the data in messages.
        known_classes: the class map, where the data set defines it; else it is what train holds, sorted.
        trained: the data is for a model that has its classes already: train may lack some, or be missing.

    Raises:
        VitError: too many unreadable images, a class of train with no readable image, a class that train lacks.
    """
    order = [split for split in SPLITS if split in names]
    label_of = [label for split in order for label in names[split]]
    ends = np.cumsum([0] + [len(names[split]) for split in order])
    bad = [(images.name(i), reason) for i, reason in reasons.items()]
    check_unreadable(bad, len(label_of), config.max_bad_fraction, where)

    good = sizes[:, 0] > 0
    rows = {split: ends[k] + np.flatnonzero(good[ends[k] : ends[k + 1]]) for k, split in enumerate(order)}
    present = {split: {label_of[i] for i in rows[split]} for split in order}
    in_train = present.get("train", set())
    if lost := sorted(set(names.get("train", ())) - in_train):
        raise VitError(f"{where}: no image of {quote_names(lost)} can be read; mend them, or remove the class")
    class_map = sorted(in_train) if known_classes is None else list(known_classes)
    if trained:
        class_map += sorted(set().union(*present.values()) - set(class_map))
    else:
        for split in order:
            if extra := sorted(present[split] - in_train):
                raise VitError(
                    f"{where}: {split} has {quote_names(extra)}, which train does not have, so nothing of it can be "
                    "learned; move some of its images to train, or remove it"
                )
    number = {label: k for k, label in enumerate(class_map)}
    labels = np.fromiter((number.get(label, -1) for label in label_of), dtype=np.int64, count=len(label_of))
    rows = _cut(rows, labels, config, where, trained)

    def split_of(indices: np.ndarray) -> Split:
        same = len(indices) > 0 and bool((sizes[indices] == sizes[indices[0]]).all())
        native = (int(sizes[indices[0], 0]), int(sizes[indices[0], 1])) if same else None
        return Split(labels[indices], images, config.channels, rows=indices, native_size=native, sizes=sizes[indices])

    return ImageData(name, class_map, {s: split_of(rows[s]) for s in SPLITS}, bad_files=bad, channels=config.channels)


def _cut(
    rows: dict[str, np.ndarray], labels: np.ndarray, config: DataConfig, where: str, trained: bool
) -> dict[str, np.ndarray]:
    """Cut validation and test, where they are missing, out of train."""
    nothing = np.empty(0, dtype=np.int64)
    test = config.test_fraction if set(rows) == {"train"} else 0.0
    val = config.val_fraction if "val" not in rows else 0.0
    rows = {split: rows.get(split, nothing) for split in SPLITS}
    train = rows["train"]
    if trained and test == 1.0:  # a model is judged on all of a folder
        return {"train": nothing, "val": nothing, "test": train}
    if not len(train) or val + test == 0:
        return rows
    if val + test >= 1:
        raise VitError(f"data.val_fraction={val:g} and data.test_fraction={test:g} leave nothing to train on")
    single = np.flatnonzero(np.bincount(labels[train]) == 1)
    if len(single):
        log.warning(
            "%s: %s with one image only: it goes to train, and nothing tests it",
            where,
            "1 class" if len(single) == 1 else f"{len(single)} classes",
        )
    train_rows, val_rows, test_rows = stratified(labels[train], (val, test), config.split_seed)
    return {
        "train": train[train_rows],
        "val": train[val_rows] if val else rows["val"],
        "test": train[test_rows] if test else rows["test"],
    }


def quote_names(names: Sequence[str], limit: int = 20) -> str:
    """Quote names for a message, `limit` of them at most."""
    quoted = ", ".join(repr(name) for name in names[:limit])
    return quoted if len(names) <= limit else f"{quoted}, ... ({len(names)} in all)"
