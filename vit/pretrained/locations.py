"""Find and fetch files of weights in a folder, on the hub or at a URL.  Imports torch."""

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
"""Names of weight files, in timm's order of preference."""
ENDINGS = (".safetensors", ".pth", ".bin", ".pt", ".npz")


@dataclass(frozen=True)
class WeightsLocation:
    """Describes where weights are.

    Attributes:
        kind: "hub" (the first of `files` that the repository has), "path" or "url".
        address: the repository; the path of the file or of a bundle's folder; the URL.
        native: whether this project wrote the weights, so that they have its names.
    """

    kind: str
    address: str
    files: tuple[str, ...] = ()
    revision: str | None = None
    native: bool = False


def format_location(location: WeightsLocation | None) -> str:
    """Format where weights are and whether they are on this machine."""
    if location is None:
        return "none: timm has the architecture only"
    if location.kind == "path":
        return location.address
    if location.kind == "url":
        return f"{location.address}, fetched when they are first used"
    paths = (hub.find_in_cache(location.address, file, location.revision) for file in location.files)
    cached = next(filter(None, paths), None)
    pinned = f"@{location.revision}" if location.revision else ""
    here = f"in the cache, {cached}" if cached else "not in the cache: fetched when they are first used"
    return f"{location.address}{pinned} on the hub, {here}"


def find_weights_file(folder: Path) -> Path:
    """Find the file of weights in a folder, as timm does."""
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


def fetch_weights(location: WeightsLocation) -> tuple[Path, str]:
    """Fetch weights if needed; return the local file or folder, and a label for messages."""
    if location.kind == "hub":
        fetched = hub.fetch(location.address, location.files, location.revision)
        at = f", commit {fetched.commit[:12]}" if fetched.commit else ""
        return fetched.path, f"{location.address} on the hub ({fetched.path.name}{at})"
    if location.kind == "url":
        return _download(location.address), location.address
    return Path(location.address), location.address


def _download(url: str) -> Path:
    """Download a file to torch's cache, where timm keeps such files too."""
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


def read_content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    return read_npz(path) if path.suffix == ".npz" else read_pickled(path)
