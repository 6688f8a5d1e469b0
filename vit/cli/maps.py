"""Write maps into a folder, one overlay for each image, without replacing other files."""

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
    """Writes maps into a folder, which is created with the first file.

    Raises `VitError` if the path exists and is not a folder.
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
        self._counts: dict[str, int] = {}
        self._real = os.path.realpath(path)

    def without_overlays(self, sources: Iterable[Item]) -> Iterator[Item]:
        """Skip overlays in this folder from an earlier call."""
        return (item for item in sources if not (isinstance(item, str) and self.has_overlay(item)))

    def has_overlay(self, path: str) -> bool:
        """Check whether the file is an overlay in this folder."""
        from vit.explain.maps import is_overlay

        try:
            in_folder = os.path.realpath(os.path.dirname(path) or ".") == self._real
        except (OSError, ValueError):
            return False
        return in_folder and is_overlay(Path(path))

    def save(
        self, path: str, pixels: np.ndarray, mapped: Mapped, *, array: bool = False, label: str = "", method: str = ""
    ) -> Path:
        """Write the overlay of an image and, with `array`, the map; return the path of the overlay.

        Files are named after the image; a second image of the same name gets "-2", a third "-3".
        Raises `VitError` when a file cannot be written, or would replace one that vit did not write.
        """
        from vit.explain.maps import is_map, is_overlay, save_map, save_overlay

        stem = self._unique_stem(path)
        overlay = self.path / f"{stem}.png"
        save_overlay(self.check_replaceable(overlay, is_overlay), pixels, mapped.values)
        if array:
            save_map(self.check_replaceable(self.path / f"{stem}.npz", is_map), mapped, label, method)
        return overlay

    def check_replaceable(self, path: Path, is_ours: Callable[[Path], bool]) -> Path:
        """Return `path` if it does not exist or vit wrote it; raise `VitError` otherwise."""
        if os.path.lexists(path) and not is_ours(path):
            raise VitError(
                f"{printable(path)} is there already, and it is none of the files that vit writes: name another folder"
            )
        return path

    def _unique_stem(self, path: str) -> str:
        stem = os.path.splitext(os.path.basename(path))[0]
        stem = os.fsdecode(os.fsencode(stem)[:_LONGEST])
        # some file systems do not tell capitals from small letters
        name, count = stem, self._counts.get(stem.casefold(), 0)
        while name.casefold() in self._counts:
            count += 1
            name = f"{stem}-{count}"
        self._counts[stem.casefold()] = max(count, 1)
        self._counts.setdefault(name.casefold(), 1)
        return name
