"""Files of weights, wherever they are: in a folder, on the hub, at an address.  Imports torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vit.errors import VitError
from vit.pretrained import hub
from vit.pretrained.jax import read_npz
from vit.pretrained.native import WEIGHTS
from vit.pretrained.reading import load_safetensors, read_pickled

PREFERRED = (
    *(WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_model.safetensors"),
    *("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
)
"""Names of files of weights, in timm's order."""
ENDINGS = (".safetensors", ".pth", ".bin", ".pt", ".npz")


@dataclass(frozen=True)
class WeightsLocation:
    """Where weights are.

    Attributes
        kind: "hub" (the first that there is of `files` in a repository), "path" or "url".
        where: the repository; the file or a bundle's folder; the address.
        own: whether this project wrote them, so that their names are its own.
    """

    kind: str
    where: str
    files: tuple[str, ...] = ()
    revision: str | None = None
    own: bool = False


def whereabouts(place: WeightsLocation | None) -> str:
    """Where weights are and whether they are on this machine, in words."""
    if place is None:
        return "none: timm has the architecture only"
    if place.kind == "path":
        return place.where
    if place.kind == "url":
        return f"{place.where}, fetched when they are first used"
    cached = next(filter(None, (hub.in_cache(place.where, file, place.revision) for file in place.files)), None)
    pinned = f"@{place.revision}" if place.revision else ""
    here = f"in the cache, {cached}" if cached else "not in the cache: fetched when they are first used"
    return f"{place.where}{pinned} on the hub, {here}"


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder, as timm finds it."""
    for name in PREFERRED:
        if (folder / name).is_file():
            return folder / name
    for ending in ENDINGS:
        found = sorted(folder.glob(f"*{ending}"))
        if len(found) > 1:
            raise VitError(f"{folder} holds several files of weights ({found[0].name}, {found[1].name}): name one")
        if found:
            return found[0]
    raise VitError(f"{folder} holds no file of weights: expected {WEIGHTS}, or one ending in {', '.join(ENDINGS)}")


def local(place: WeightsLocation) -> tuple[Path, str]:
    """The file or folder on this machine, fetched if need be, and what to call it."""
    if place.kind == "hub":
        fetched = hub.fetch(place.where, place.files, place.revision)
        at = f", commit {fetched.commit[:12]}" if fetched.commit else ""
        return fetched.path, f"{place.where} on the hub ({fetched.path.name}{at})"
    if place.kind == "url":
        return _download(place.where), place.where
    return Path(place.where), place.where


def _download(url: str) -> Path:
    """A file that timm knows by its address, in torch's cache, where timm keeps such files too."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except OSError as error:  # urllib's are
            raise VitError(
                f"{path.name} is not in {path.parent}, and {url} cannot be fetched ({error}): put the file there"
            ) from None
    return path


def content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    return read_npz(path) if path.suffix == ".npz" else read_pickled(path)
