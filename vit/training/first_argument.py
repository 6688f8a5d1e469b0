"""Expand the first argument of `vit train` and `vit eval`, the data or the model, which may have no key."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vit.errors import VitError, did_you_mean
from vit.shell import quote_for_hydra


def expand_data_argument(text: str, catalogue: Sequence[str]) -> list[str]:
    """Return the overrides that `vit train TEXT` stands for.

    A name in `catalogue`, the choices of the group `data`, takes precedence over a folder of that name;
    ./NAME is the folder.

    Raises:
        VitError: TEXT is no data set, no folder and no Parquet file; the message names similar ones.
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
        raise VitError(f"{text}: {what} .parquet file of that name; {_suggest(text, catalogue)}")
    return [f"data={kind}", f"data.root={quote_for_hydra(path)}"]


def expand_model_argument(text: str, catalogue: Sequence[str]) -> list[str]:
    """Return the overrides that `vit eval TEXT` stands for."""
    return [f"checkpoint={quote_for_hydra(text)}"]


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _suggest(text: str, catalogue: Sequence[str]) -> str:
    folder = os.path.dirname(text)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            names = [entry.name for entry in entries if entry.is_dir() or _is_parquet(entry.name)]
    except OSError:
        names = []
    paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
    close = did_you_mean(text, [*catalogue, *paths])
    return close if close.startswith("did you mean") else did_you_mean(text, catalogue)
