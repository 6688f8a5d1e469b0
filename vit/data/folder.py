"""Folders of images: one folder a class, with or without train/, val/ and test/ above.

Notable:
- One class map: the sorted names of the training folders.  A class that a later split lacks shifts nothing; a class
  that only a later split has is an error, because nothing could be learned of it.
- Names of any encoding work; class names become valid Unicode (odd bytes as backslash escapes).
- Whatever the layout, what the person gets to read is what was found and what was expected.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vit.data.assemble import assemble, listing
from vit.data.dataset import SPLITS, FileImages, ImageData
from vit.data.decode import extensions, printable
from vit.data.scan import scan_files
from vit.errors import VitError

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

log = logging.getLogger("vit")

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
LAYOUT = "expected one folder a class (ROOT/cat/*.jpg, ROOT/dog/*.jpg), or those inside ROOT/train, ROOT/val, ROOT/test"

_SPLIT_OF = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}


def folder(config: DataConfig, class_names: list[str] | None) -> ImageData:
    """A person's own images: `data.root` in one of the two layouts."""
    if config.root is None:
        raise VitError(f"data=folder needs data.root=FOLDER: {LAYOUT}")
    root = os.path.abspath(config.root)
    shown = printable(config.root)
    inside, loose = _look(root)
    if _is_split(root, inside):
        found = _splits(root, inside)
        if "train" not in found and class_names is None:
            raise VitError(f"{shown} has {' and '.join(sorted(found))} but no train folder: {LAYOUT}")
        classes = {split: class_files(path, config, strict=split == "train") for split, path in found.items()}
        for split in [split for split in classes if not classes[split]]:
            # often a test set to hand in: images without labels
            log.warning("%s holds no labelled images; as if it were not there", printable(found[split]))
            del classes[split]
    else:
        if not inside and loose:
            raise VitError(f"{shown} holds images but no class folders, so they have no labels: {LAYOUT}")
        classes = {"train": class_files(root, config, strict=True)}
    if not any(classes.values()):
        raise VitError(f"{shown} holds no images: {LAYOUT}")
    files = {split: _flatten(by_class) for split, by_class in classes.items()}
    if sum(len(paths) for paths, _ in files.values()) == 1 and class_names is None:
        raise VitError(f"{shown} holds one image only: nothing can be learned from it")
    return from_files("folder", files, config, class_names, where=shown)


def from_files(
    name: str,
    files: dict[str, tuple[list[str], list[str]]],
    config: DataConfig,
    class_names: list[str] | None,
    *,
    where: str,
    known_classes: Sequence[str] | None = None,
) -> ImageData:
    """A data set of image files: for each split there is, the paths and the class name of each.  See `assemble`."""
    order = [split for split in SPLITS if split in files]
    paths = [path for split in order for path in files[split][0]]
    sizes, reasons = scan_files(paths, config.channels, f"{name}\0{os.path.abspath(config.root or name)}")
    return assemble(
        name,
        FileImages(paths),
        {split: files[split][1] for split in order},
        sizes,
        reasons,
        config,
        where=where,
        known_classes=known_classes,
        trained=class_names is not None,
    )


def _look(path: str) -> tuple[list[str], int]:
    """The names of the folders in `path`, sorted, and the number of image files directly in it."""
    try:
        with os.scandir(path) as entries:
            seen = [(e.name, e.is_dir()) for e in entries if not _hidden(e.name)]
    except FileNotFoundError as error:
        raise VitError(f"data.root={printable(path)}: no such folder") from error
    except NotADirectoryError as error:
        raise VitError(f"data.root={printable(path)} is a file: {LAYOUT}") from error
    except OSError as error:
        raise VitError(f"{printable(path)} cannot be read: {error.strerror or error}") from error
    known = extensions()
    loose = sum(not is_dir and os.path.splitext(name)[1].lower() in known for name, is_dir in seen)
    return sorted(name for name, is_dir in seen if is_dir), loose


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_split(root: str, inside: list[str]) -> bool:
    """Whether these folders are splits, not classes: a split holds class folders, a class (even "train") images."""
    if "train" in inside:
        return bool(_look(os.path.join(root, "train"))[0])
    return bool(inside) and all(name in _SPLIT_OF and _look(os.path.join(root, name))[0] for name in inside)


def _splits(root: str, inside: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in inside:
        split = _SPLIT_OF.get(name)
        if split is None:
            log.warning("%s: the folder %r is neither train, val nor test; it is not used", printable(root), name)
        elif split in found:
            raise VitError(f"{printable(root)} has both {os.path.basename(found[split])} and {name}: keep one of them")
        else:
            found[split] = os.path.join(root, name)
    return found


def class_files(path: str, config: DataConfig, strict: bool) -> dict[str, list[str]]:
    """The image files, however deep, of each class folder in `path`: sorted paths by class name.

    Raises `VitError` for a folder that cannot be read and, if `strict`, for a class without images.
    """
    inside, loose = _look(path)
    shown = printable(path)
    if loose:
        log.warning("%s: %d images lie beside the class folders; they have no label and are not used", shown, loose)
    classes: dict[str, list[str]] = {}
    for name in inside:
        # two names may become one when odd bytes are escaped: then they are one class, and no image is lost
        classes.setdefault(printable(name), []).extend(_files(os.path.join(path, name), extensions(config.channels)))
    empty = [name for name, files in classes.items() if not files]
    if strict and empty and len(empty) < len(classes):
        raise VitError(f"{shown}: no images in {listing(empty)}; add some, or remove the folder")
    return {name: files for name, files in classes.items() if files}


def _files(path: str, known: frozenset[str]) -> list[str]:
    def refuse(error: OSError) -> None:
        raise VitError(f"{printable(error.filename)} cannot be read: {error.strerror or error}") from error

    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(path, followlinks=True, onerror=refuse):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [
            os.path.join(where, name)
            for name in names
            if not _hidden(name) and os.path.splitext(name)[1].lower() in known
        ]
    return sorted(found)


def _flatten(by_class: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    paths = [path for files in by_class.values() for path in files]
    return paths, [name for name, files in by_class.items() for _ in files]
