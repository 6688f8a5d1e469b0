"""The first argument of `vit train` and `vit eval`, which may stand without a key: the data, the model."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vit.errors import VitError, did_you_mean
from vit.shell import quote_for_hydra


def data_overrides(text: str, catalogue: Sequence[str]) -> list[str]:
    """Return the overrides that `vit train TEXT` stands for.

    A name in `catalogue`, the choices of the group `data`, wins over a folder of that name, which is then written
    ./NAME.  Raises `VitError` for anything else than these, a folder or a Parquet file; it names the nearest.
    """
    if text in catalogue:
        return [f"data={text}"]
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        kind = "parquet" if any(map(_is_parquet, os.listdir(path))) else "folder"
    elif _is_parquet(path) and os.path.isfile(path):
        kind = "parquet"
    else:
        what = "is no folder of images and no" if os.path.exists(path) else "there is no folder, data set or"
        raise VitError(f"{text}: {what} .parquet file of that name; {_nearest(text, catalogue)}")
    return [f"data={kind}", f"data.root={quote_for_hydra(path)}"]


def model_overrides(text: str, catalogue: Sequence[str]) -> list[str]:
    """Return the overrides that `vit eval TEXT` stands for."""
    return [f"checkpoint={quote_for_hydra(text)}"]


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _nearest(text: str, catalogue: Sequence[str]) -> str:
    folder = os.path.dirname(text)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = [each.name for each in entries if each.is_dir() or _is_parquet(each.name)]
    except OSError:
        found = []
    beside = [os.path.join(folder, name) for name in found if not name.startswith(".")]
    close = did_you_mean(text, [*catalogue, *beside])
    return close if close.startswith("did you mean") else did_you_mean(text, catalogue)
