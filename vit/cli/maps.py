"""Where maps go: a folder of overlays, a file an image, and nothing in it that is not ours is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vit.data.decode import printable
from vit.errors import VitError

if TYPE_CHECKING:
    import numpy as np

    from vit.explain.maps import Mapped
    from vit.inference.sources import Item

_LONGEST = 240  # bytes of a stem: with "-999.png" it is still a file name


class Folder:
    """The folder that maps are written to.  Made with its first file.

    Raises `VitError` where there is something else of that name.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not path:
            raise VitError("the name of the folder for maps is empty")
        try:
            other = os.path.lexists(path) and not self.path.is_dir()
        except ValueError:
            other = True
        if other:
            raise VitError(f"cannot write to {printable(path)}: it is not a folder")
        self._taken: dict[str, int] = {}
        self._real = os.path.realpath(path)

    def others(self, sources: Iterable[Item]) -> Iterator[Item]:
        """`sources` without the overlays that lie in this folder from an earlier call."""
        return (item for item in sources if not (isinstance(item, str) and self.owns(item)))

    def owns(self, path: str) -> bool:
        """Whether the file is an overlay in this folder."""
        from vit.explain.maps import is_overlay

        try:
            here = os.path.realpath(os.path.dirname(path) or ".") == self._real
        except (OSError, ValueError):
            return False
        return here and is_overlay(Path(path))

    def save(
        self, path: str, pixels: np.ndarray, mapped: Mapped, *, array: bool = False, label: str = "", method: str = ""
    ) -> Path:
        """Write the overlay of an image and, with `array`, the map; returns where the overlay is.

        Named after the image; of several of one name the second gets "-2", the third "-3".
        Raises `VitError` when it cannot be written, or would replace a file that is not ours.
        """
        from vit.explain.maps import is_map, is_overlay, save_map, save_overlay

        stem = self._free(path)
        overlay = self.path / f"{stem}.png"
        save_overlay(self.own(overlay, is_overlay), pixels, mapped.values)
        if array:
            save_map(self.own(self.path / f"{stem}.npz", is_map), mapped, label, method)
        return overlay

    def own(self, path: Path, is_ours: Callable[[Path], bool]) -> Path:
        """`path`, if nothing is there or what is there is ours.  Raises `VitError`."""
        if os.path.lexists(path) and not is_ours(path):
            raise VitError(
                f"{printable(path)} is there already, and it is none of the files that vit writes: name another folder"
            )
        return path

    def _free(self, path: str) -> str:
        stem = os.path.splitext(os.path.basename(path))[0]
        stem = os.fsdecode(os.fsencode(stem)[:_LONGEST])
        # some file systems do not tell capitals from small letters
        name, count = stem, self._taken.get(stem.casefold(), 0)
        while name.casefold() in self._taken:
            count += 1
            name = f"{stem}-{count}"
        self._taken[stem.casefold()] = max(count, 1)
        self._taken.setdefault(name.casefold(), 1)
        return name
