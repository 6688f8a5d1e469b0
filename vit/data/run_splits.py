"""Writes which image is in which split of a run to `splits.csv` in its folder, and restores the same splits from it.

Notable:
- A split made by seed depends on every name in a folder, so a run that goes on, or is evaluated, uses what was written
  down: images that came since are left out, whatever else happened to the files.
- An image is recognised by its content, wherever it is and whatever its name.  A file's content is its size and a
  CRC-32 of 4 KiB at its start, middle and end: three short reads, where a hash of ImageNet would read 150 GB.  A file
  whose size and time of change are those written down is not read again.  An array's is a CRC-32 of all of it, a
  Parquet row's its file's and its number; of generated images there is none, and their names count.
- Rows are streamed, and contents are read in threads: a million files take about as long as finding them does.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from vit.data.assemble import quote_names
from vit.data.dataset import SPLITS, ImageData, Images, Split
from vit.data.parallel import for_each
from vit.errors import VitError, printable
from vit.files import atomic_write

log = logging.getLogger("vit")

FILE = "splits.csv"
COLUMNS = ("split", "label", "path", "content", "stamp")


def write_splits(path: str | os.PathLike[str], data: ImageData) -> None:
    """Write a row for every image of `data`: its split, class name, path under the data's root, and content.

    Raises `VitError` when the file cannot be written.
    """
    with (
        atomic_write(path) as part,
        open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name, split in data.splits.items():
            assert split.rows is not None
            rows = split.rows.tolist()
            known = [_identify(split.images, rows, kind) for kind in ("content", "stamp")]
            labels = (data.class_names[label] for label in split.labels)
            paths = (_relative(split.images.name(i), data.source.get("root")) for i in rows)
            table.writerows(zip([name] * len(rows), labels, paths, *known, strict=True))


def restore_splits(path: str | os.PathLike[str], data: ImageData) -> ImageData:
    """Cut `data`, all of whose splits count as one, into the splits that `write_splits` wrote to `path`.

    Every image keeps its split and its position there, with its present label. New images are left out. One line
    each is logged for images that are new, changed, renamed or gone.

    Raises:
        VitError: a file that cannot be read or is none of ours, or a split of which no image is left.
    """
    root = data.source.get("root")
    where = root or data.name
    stored = _read(path)
    pool = [(split, i) for split in data.splits.values() for i in range(len(split))]
    rows = [int(split.rows[i]) for split, i in pool]  # type: ignore[index]
    names = [
        _relative(split.images.name(row), data.source.get("root")) for (split, _), row in zip(pool, rows, strict=True)
    ]
    by_name = {name: k for k, name in enumerate(names)}

    def identify(kind: str, indices: Iterable[int]) -> dict[int, str]:
        found: dict[int, str] = {}
        for images in {id(split.images): split.images for split in data.splits.values()}.values():
            here = [k for k in indices if pool[k][0].images is images]
            found |= zip(here, _identify(images, [rows[k] for k in here], kind), strict=True)
        return found

    matched = np.array([by_name.get(row[2], -1) for row in stored], dtype=np.int64)
    named = np.flatnonzero(matched >= 0)
    stamps = identify("stamp", matched[named].tolist())
    doubtful = [k for k in named.tolist() if not stamps[matched[k]] or stamps[matched[k]] != stored[k][4]]
    contents = identify("content", [int(matched[k]) for k in doubtful])
    lost = [k for k in doubtful if contents[int(matched[k])] != stored[k][3]]
    lost += np.flatnonzero(matched < 0).tolist()
    same_name = {k: int(matched[k]) for k in lost if matched[k] >= 0}
    matched[lost] = -1
    free = set(range(len(pool))) - set(matched.tolist())
    renamed = changed = 0
    if lost:
        contents |= identify("content", [k for k in free if k not in contents])
        found = defaultdict(list)
        for k in sorted(free, reverse=True):
            found[contents[k]].append(k)
        for k in sorted(lost):
            if stored[k][3] and found[stored[k][3]]:
                matched[k] = found[stored[k][3]].pop()
                free.discard(int(matched[k]))
                renamed += 1
        for k in sorted(lost):
            if matched[k] < 0 and same_name.get(k, -1) in free:  # another picture of that name, at least
                matched[k] = same_name[k]
                free.discard(same_name[k])
                changed += 1
    gone = [row[2] for row, at in zip(stored, matched, strict=True) if at < 0]
    _report(str(where), len(stored), renamed, changed, gone, [names[k] for k in sorted(free)])

    splits = {}
    of = np.array([SPLITS.index(row[0]) for row in stored], dtype=np.int64)
    for number, name in enumerate(SPLITS):
        picked = matched[(of == number) & (matched >= 0)]
        if not len(picked) and (of == number).any():
            raise VitError(
                f"{printable(where)}: none of the images of the run's {name} split is there: data.root=FOLDER says "
                "where they are now"
            )
        splits[name] = _select([pool[k] for k in picked], data.splits[name])
    return dataclasses.replace(data, splits=splits)


def _read(path: str | os.PathLike[str]) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise VitError(f"{os.fspath(path)}: the run's splits cannot be read: {error}") from error
    if tuple(header) != COLUMNS or any(len(row) != len(COLUMNS) or row[0] not in SPLITS for row in rows):
        raise VitError(f"{os.fspath(path)}: the run's splits cannot be read: expected the columns {', '.join(COLUMNS)}")
    return rows


def _identify(images: Images, rows: list[int], kind: str) -> list[str]:
    """Call `images.content(i)` or `images.stamp(i)` for all of `rows`; empty text where there is no such method."""
    method: Callable[[int], str] | None = getattr(images, kind, None)
    out = [""] * len(rows)
    if method is not None:

        def identify_one(k: int) -> None:
            out[k] = method(rows[k])

        for_each(identify_one, range(len(rows)), len(rows), "Identifying images")
    return out


def _relative(name: str, root: str | None) -> str:
    base = os.path.abspath(root) if root is not None else None
    if base is not None and not os.path.isdir(base):
        base = os.path.dirname(base)
    return name[len(base) :].lstrip(os.sep) if base and name.startswith(base + os.sep) else name


def _report(where: str, total: int, renamed: int, changed: int, gone: list[str], new: list[str]) -> None:
    for count, level, text in (
        (renamed, logging.INFO, "have another name or place; they stay in their splits"),
        (changed, logging.WARNING, "have changed; they stay in their splits"),
        (len(gone), logging.WARNING, f"are gone or cannot be read: {quote_names(gone, 3)}"),
    ):
        if count:
            log.log(level, "%s: of the run's %d images %d %s", printable(where), total, count, text)
    if new:
        log.info("%s: %d other images, which the run does not use: %s", printable(where), len(new), quote_names(new, 3))


def _select(pool: list[tuple[Split, int]], empty: Split) -> Split:
    """Make a split of these images of other splits, in this order."""
    parts = list({id(split): split for split, _ in pool}.values())
    if len(parts) < 2:
        return (parts[0] if parts else empty).subset([i for _, i in pool])
    first = parts[0]
    if any(part.images is not first.images for part in parts):
        raise VitError(f"{first.images.name(0)}: images have moved from one official split of the data to another")
    starts = dict(zip(map(id, parts), np.cumsum([0, *map(len, parts[:-1])]), strict=True))

    def joined(key: str) -> Any:
        values = [getattr(part, key) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    native = {part.native_size for part in parts}
    whole = Split(
        images=first.images,
        channels=first.channels,
        native_size=native.pop() if len(native) == 1 else None,
        **{key: joined(key) for key in ("labels", "rows", "sizes", "boxes", "object_labels")},
    )
    return whole.subset([int(starts[id(split)]) + i for split, i in pool])
