"""Opens folders of images: one folder a class, with or without train/, val/ and test/ above.

Notable:
- One class map: the sorted names of the training folders.  A class that a later split lacks shifts nothing; a class
  that only a later split has is an error, because nothing could be learned of it.
- Names of any encoding work; class names become valid Unicode (odd bytes as backslash escapes) in its composed form
  (NFC), so that no two classes print the same.
- Each real folder is in one class at most, and whatever is no image of a class is counted (`vit.data.walk`).
- Splits have many names; where it is not clear whether a folder is a split or a class, it is refused.
- Every refusal says what was found and what was expected.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from unicodedata import normalize

from vit.data.assemble import assemble, quote_names
from vit.data.dataset import SPLITS, FileImages, ImageData
from vit.data.decode import printable
from vit.data.filetype import BROKEN_LINK, NOT_READ
from vit.data.scan import scan_files
from vit.data.walk import FolderListing, Walk, describe, list_folder
from vit.errors import VitError

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

log = logging.getLogger("vit")

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""What folders of splits are called, in capitals or not, and with or without "set" behind."""
LAYOUT = "expected one folder a class (ROOT/cat/*.jpg, ROOT/dog/*.jpg), or those inside ROOT/train, ROOT/val, ROOT/test"
_NO_LABEL = "image without a label"


def folder(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open a person's own images: `data.root` in one of the two layouts."""
    if config.root is None:
        raise VitError(f"data=folder needs data.root=FOLDER: {LAYOUT}")
    root = os.path.abspath(config.root)
    shown = printable(config.root)
    walk = Walk(config.channels, say=log.info)
    inside = _list(root)
    found = _splits(root, inside.folders, walk, {normalize("NFC", name) for name in class_names or ()})
    if found:
        if "train" not in found and class_names is None:
            raise VitError(f"{shown} has {' and '.join(sorted(found))} but no train folder: {LAYOUT}")
        _count_loose(root, inside, walk)
        classes = {split: class_files(path, walk, strict=split == "train") for split, path in found.items()}
        for split in [split for split in classes if not classes[split]]:
            # often a test set to hand in: images without labels
            log.warning("%s holds no labelled images; as if it were not there", printable(found[split]))
            del classes[split]
    else:
        classes = {"train": class_files(root, walk, strict=True)}
        if not classes["train"] and walk.passed_over[_NO_LABEL]:
            raise VitError(f"{shown} holds images but no class folders, so they have no labels: {LAYOUT}")
    if not any(classes.values()):
        raise VitError(f"{shown} holds no images{_aside(walk)}: {LAYOUT}")
    files = {split: _flatten(by_class) for split, by_class in classes.items()}
    if sum(len(paths) for paths, _ in files.values()) == 1 and class_names is None:
        raise VitError(f"{shown} holds one image only{_aside(walk)}: nothing can be learned from it")
    data = from_files("folder", files, config, class_names, where=shown, scan_limit=scan_limit)
    data.passed_over = dict(walk.passed_over)
    return data


def from_files(
    name: str,
    files: dict[str, tuple[list[str], list[str]]],
    config: DataConfig,
    class_names: list[str] | None,
    *,
    where: str,
    known_classes: Sequence[str] | None = None,
    scan_limit: int | None = None,
) -> ImageData:
    """Make a data set of image files: for each split there is, the paths and the class name of each. See `assemble`."""
    order = [split for split in SPLITS if split in files]
    paths = [path for split in order for path in files[split][0]]
    memory = f"{name}\0{os.path.abspath(config.root or name)}"
    sizes, reasons = scan_files(paths, config.channels, memory, scan_limit)
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


def _list(path: str) -> FolderListing:
    """List `path`. Raises `VitError`."""
    try:
        return list_folder(path)
    except FileNotFoundError as error:
        raise VitError(f"data.root={printable(path)}: no such folder") from error
    except NotADirectoryError as error:
        raise VitError(f"data.root={printable(path)} is a file: {LAYOUT}") from error
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> VitError:
    return VitError(f"{printable(error.filename)} cannot be read: {error.strerror or error}")


def _aside(walk: Walk) -> str:
    return f" (passed over: {describe(walk.passed_over)})" if walk.passed_over else ""


def split_of(name: str) -> str | None:
    """Return the split that a folder of this name is; None for any other name."""
    return SPLIT_NAMES.get(name.casefold().removesuffix("set").rstrip(" _-"))


def _splits(root: str, inside: Sequence[str], walk: Walk, known: set[str]) -> dict[str, str]:
    """Find the folder of each split; none where the folders are classes. A split holds class folders, a class images.

    Args:
        inside: the names of the folders in `root`.
        known: the classes of the model, if there is one: such a folder is that class.

    Raises:
        VitError: where the folders may be either, or there are two for a split.
    """
    named = [(name, split) for name in inside if (split := split_of(name))]
    nested = [name for name, _ in named if _list(os.path.join(root, name)).folders]
    others = [name for name in inside if not split_of(name)]
    flat = [name for name, split in named if name not in nested and normalize("NFC", name) not in known]
    shown = printable(root)
    if not nested:
        # a class may well be called "train", but not all of them are, nor is "test" one
        if doubtful := flat if not others else [name for name in flat if split_of(name) != "train"]:
            images = [name for name in doubtful if _holds_images(os.path.join(root, name), Walk(walk.channels))]
            if images and others:
                raise VitError(
                    f"{shown} has {quote_names(images)} beside the class folders {quote_names(others, 5)}: if that is "
                    "a split, put the class folders inside splits; if it is a class, give it another name"
                )
            if images:
                raise VitError(f"{shown}: {quote_names(images)} hold images but no class folders: {LAYOUT}")
        return {}
    found: dict[str, str] = {}
    for name, split in named:
        if split in found:
            raise VitError(f"{shown} has both {os.path.basename(found[split])} and {name}: keep one of them")
        found[split] = os.path.join(root, name)
    for name in others:
        if _holds_images(os.path.join(root, name), walk):
            raise VitError(
                f"{shown} has {quote_names(nested)} with folders inside, as splits have, and beside {name!r} with "
                "images: put all classes inside train, or move what is neither train, val nor test out of it"
            )
        log.warning("%s: the folder %r is neither train, val nor test, and holds no images", shown, name)
    return found


def _holds_images(path: str, walk: Walk) -> bool:
    for found in walk.files(path):
        if isinstance(found, OSError):
            raise _unreadable(found)
        if found.kind is None:
            return True
        walk.passed_over[found.kind] += 1
    return False


def _count_loose(path: str, inside: FolderListing, walk: Walk) -> None:
    """Count the files beside the folders in `path`. Raises `VitError` for a link that may have been a folder."""
    walk.enter(path)
    walk.passed_over.update(inside.passed_over)
    kinds = Counter[str]()
    for found in walk.kinds(path, inside.files):
        if found.kind in (BROKEN_LINK, NOT_READ) and os.path.islink(found.path):
            target = printable(os.readlink(found.path))
            raise VitError(f"{printable(found.path)} is a link to {target}, which cannot be read: mend or remove it")
        kinds[found.kind or _NO_LABEL] += 1
    if loose := kinds[_NO_LABEL]:
        log.warning(
            "%s: %d images lie beside the class folders; they have no label and are not used", printable(path), loose
        )
    walk.passed_over.update(kinds)


def class_files(path: str, walk: Walk, strict: bool) -> dict[str, list[str]]:
    """Find the image files, however deep, of each class folder in `path`: sorted paths by class name.

    Raises `VitError` for a folder that cannot be read or is reached by two names and, if `strict`, for a class without
    images.
    """
    inside = _list(path)
    shown = printable(path)
    _count_loose(path, inside, walk)
    classes: dict[str, list[str]] = {}
    spelled: dict[str, list[str]] = {}
    for name in inside.folders:
        whole = os.path.join(path, name)
        try:
            if earlier := walk.first_path(whole):
                raise VitError(
                    f"{printable(whole)} and {printable(earlier)} are the same folder, by a link: remove one of them"
                )
        except OSError as error:
            raise _unreadable(error) from error
        # names may become one when odd bytes are escaped or accents composed: then they are one class, nothing is lost
        label = normalize("NFC", printable(name))
        spelled.setdefault(label, []).append(name)
        images = classes.setdefault(label, [])
        for found in walk.files(whole):
            if isinstance(found, OSError):
                raise _unreadable(found)
            if found.kind is None:
                images.append(found.path)
            else:
                walk.passed_over[found.kind] += 1
    empty = [name for name, files in classes.items() if not files]
    if strict and empty and len(empty) < len(classes):
        raise VitError(f"{shown}: no images in {quote_names(empty)}; add some, or remove the folder{_aside(walk)}")
    for label, names in spelled.items():
        if len(names) > 1:
            forms = ", ".join(ascii(name) for name in names)
            log.warning("%s: %s are one class, %r: the same letters in several encodings", shown, forms, label)
    _warn_of_names(shown, classes)
    return {name: files for name, files in classes.items() if files}


def _warn_of_names(shown: str, names: Iterable[str]) -> None:
    """Log names that are easily confused."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
        if name != name.strip():
            log.warning("%s: the class name %r begins or ends with a blank", shown, name)
    for twins in alike.values():
        if len(twins) > 1:
            log.warning("%s: %s are classes of their own: they differ in capitals or blanks", shown, quote_names(twins))


def _flatten(by_class: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    paths = [path for files in by_class.values() for path in files]
    return paths, [name for name, files in by_class.items() for _ in files]
