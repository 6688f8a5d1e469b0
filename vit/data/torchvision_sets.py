"""Opens downloadable data sets with torchvision's downloader, in torchvision's layout.

Notable:
- Files that are there are used as they are, without the network; a downloaded archive that is there is unpacked.
- Without a network, or with `data.download=false`, the error names every file that is needed and where it belongs.
- One process downloads; others that want the same data set at the same time wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.data.dataset import ImageData
from vit.data.decode import printable
from vit.data.folder import from_files
from vit.data.scan import cache_root
from vit.data.small_sets import array_split, with_validation
from vit.errors import VitError
from vit.files import hold_lock

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

Files = dict[str, tuple[list[str], list[str]]]  # paths and class names, by split


def root_of(config: DataConfig) -> Path:
    """Return `data.root`, or the folder in the user's cache where downloads go."""
    return Path(config.root) if config.root is not None else cache_root() / "datasets"


def fetch(kind: str, root: Path, config: DataConfig, archives: Sequence[str], **arguments: Any) -> Any:
    """Have `torchvision.datasets.<kind>(root, download=True, **arguments)` put its files below `root`.

    Args:
        archives: what it downloads, relative to `root`.

    Returns:
        torchvision's data set.

    Raises:
        VitError: no network, no permission, a damaged download, or `data.download=false`.
    """
    import torchvision.datasets

    how = f"put {', '.join(archives)} into {printable(root)}, or set data.root to the folder that holds them"
    build: Callable[..., Any] = getattr(torchvision.datasets, kind)
    try:
        # first without: what is complete needs neither network nor permission to write
        return build(str(root), download=False, **arguments)
    except (OSError, RuntimeError) as error:
        # archives that were put there by hand are for unpacking
        if not config.download and not all((root / archive).is_file() for archive in archives):
            why = "data.download=false and it is not there whole"
            raise VitError(f"data={config.name} is not in {printable(root)} ({why}): {how}") from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        with hold_lock(root / ".download.lock"), _socket_timeout(60):
            return build(str(root), download=True, **arguments)
    except (OSError, RuntimeError, EOFError) as error:
        # torchvision's own text may run over several lines, one a mirror; the last says why
        reason = str(getattr(error, "reason", None) or error).strip().splitlines() or [type(error).__name__]
        raise VitError(f"data={config.name} could not be downloaded ({reason[-1]}): {how}") from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Give up after so many seconds on a server that stops answering: torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before or seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def cifar10(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open CIFAR-10 (Krizhevsky 2009)."""
    return _cifar("CIFAR10", "cifar-10-python.tar.gz", config)


def cifar100(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open CIFAR-100 (Krizhevsky 2009), its fine labels."""
    return _cifar("CIFAR100", "cifar-100-python.tar.gz", config)


def _cifar(kind: str, archive: str, config: DataConfig) -> ImageData:
    root = root_of(config)
    train, test = (fetch(kind, root, config, [archive], train=train) for train in (True, False))
    splits = [
        array_split(np.ascontiguousarray(part.data), np.array(part.targets), f"{config.name}/{name}", config.channels)
        for name, part in (("train", train), ("test", test))
    ]
    return with_validation(config.name, train.classes, splits[0], splits[1], config)


def stl10(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open STL-10 (Coates, Lee and Ng 2011): its 5,000 labelled training images and its 8,000 test images.

    The files are read here: torchvision first checks the 2.7 GB of unlabelled images beside them, every time.
    """
    root = root_of(config)
    folder = root / "stl10_binary"
    files = {split: (folder / f"{split}_X.bin", folder / f"{split}_y.bin") for split in ("train", "test")}
    needed = [folder / "class_names.txt", *files["train"], *files["test"]]
    _ensure(needed, "STL10", root, config, ["stl10_binary.tar.gz"])
    try:
        classes = needed[0].read_text("utf-8").split()
        splits = []
        for name, (images, labels) in files.items():
            pixels = np.fromfile(images, dtype=np.uint8).reshape(-1, 3, 96, 96)  # channels, columns, rows
            numbers = np.fromfile(labels, dtype=np.uint8).astype(np.int64) - 1
            if len(numbers) != len(pixels) or not len(numbers) or numbers.min() < 0 or numbers.max() >= len(classes):
                raise ValueError(f"{labels.name} does not fit {images.name}")
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 2, 1))
            splits.append(array_split(pixels, numbers, f"stl10/{name}", config.channels))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    return with_validation("stl10", classes, splits[0], splits[1], config)


def flowers102(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open the 102 Category Flower Dataset (Nilsback and Zisserman 2008), with its three official splits."""
    root = root_of(config)
    folder = root / "flowers-102"
    needed = [folder / "jpg", folder / "imagelabels.mat", folder / "setid.mat"]
    archives = [f"flowers-102/{name}" for name in ("102flowers.tgz", "imagelabels.mat", "setid.mat")]
    _ensure(needed, "Flowers102", root, config, archives)

    import torchvision.datasets
    from scipy.io import loadmat

    names: list[str] | None = getattr(torchvision.datasets.Flowers102, "classes", None)
    names = names or [f"flower {k}" for k in range(1, 103)]
    try:
        label = loadmat(needed[1], squeeze_me=True)["labels"]
        ids = loadmat(needed[2], squeeze_me=True)
        files: Files = {}
        for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
            paths = [str(folder / "jpg" / f"image_{i:05d}.jpg") for i in ids[key]]
            files[split] = paths, [names[int(label[i - 1]) - 1] for i in ids[key]]
    except Exception as error:  # scipy's reader has exceptions of its own
        raise _damaged(folder, error) from error
    return _from_list(config, class_names, scan_limit, folder, files, names)


def oxford_pets(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open Oxford-IIIT Pet (Parkhi et al. 2012), 37 breeds; "trainval" is cut into train and val."""
    root = root_of(config)
    folder = root / "oxford-iiit-pet"
    lists = {"train": folder / "annotations" / "trainval.txt", "test": folder / "annotations" / "test.txt"}
    archives = ["oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"]
    _ensure([folder / "images", *lists.values()], "OxfordIIITPet", root, config, archives)
    files: Files = {}
    breeds: dict[int, str] = {}
    try:
        for split, path in lists.items():
            rows = [line.split() for line in path.read_text("utf-8").splitlines() if line and line[0] != "#"]
            for stem, number, *_ in rows:
                breeds[int(number)] = stem.rpartition("_")[0].replace("_", " ").title()
            paths = [str(folder / "images" / f"{stem}.jpg") for stem, *_ in rows]
            files[split] = paths, [breeds[int(number)] for _, number, *_ in rows]
    except (OSError, ValueError, IndexError) as error:
        raise _damaged(folder, error) from error
    return _from_list(config, class_names, scan_limit, folder, files, [breeds[number] for number in sorted(breeds)])


def food101(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Food-101 (Bossard, Guillaumin and Van Gool 2014)."""
    root = root_of(config)
    folder = root / "food-101"
    lists = {split: folder / "meta" / f"{split}.json" for split in ("train", "test")}
    _ensure([folder / "images", *lists.values()], "Food101", root, config, ["food-101.tar.gz"])
    files: Files = {}
    try:
        for split, path in lists.items():
            by_class = json.loads(path.read_text("utf-8"))
            pairs = [(stem, name) for name in sorted(by_class) for stem in by_class[name]]
            paths = [str(folder.joinpath("images", *f"{stem}.jpg".split("/"))) for stem, _ in pairs]
            files[split] = paths, [name for _, name in pairs]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error
    return _from_list(config, class_names, scan_limit, folder, files, None)


def _ensure(needed: Sequence[Path], kind: str, root: Path, config: DataConfig, archives: Sequence[str]) -> None:
    """Download unless all of `needed` is there; torchvision need not be imported to see that it is."""
    if not all(path.exists() for path in needed):
        fetch(kind, root, config, archives)
    missing = [printable(path) for path in needed if not path.exists()]
    if missing:
        raise VitError(f"data={config.name}: {', '.join(missing)} missing after unpacking; remove "
                       f"{printable(needed[0].parent)} to begin again")  # fmt: skip


def _from_list(
    config: DataConfig,
    class_names: list[str] | None,
    scan_limit: int | None,
    folder: Path,
    files: Files,
    known: Sequence[str] | None,
) -> ImageData:
    everything = [path for paths, _ in files.values() for path in paths]
    missing = [path for path in everything if not os.path.exists(path)]
    if missing:
        raise VitError(
            f"data={config.name}: {len(missing)} of {len(everything)} images are missing, {printable(missing[0])} for "
            f"one; remove {printable(folder)} to have it unpacked again"
        )
    where = printable(folder)
    return from_files(config.name, files, config, class_names, where=where, known_classes=known, scan_limit=scan_limit)


def _damaged(folder: Path, error: Exception) -> VitError:
    reason = f"{type(error).__name__}: {error}"
    return VitError(f"{printable(folder)}: cannot be read ({reason}); remove the folder to begin again")
