"""Opens images in Parquet files, in the layout of the Hugging Face hub: `image.bytes` and a label.

Notable:
- One file, several, or a folder of shards; splits are recognised by the files' names (train-*, validation-*, test-*).
- Columns and class names are found from the schema's own description where there is one.
- The encoded images stay in memory if they fit in half of it; else row groups are read as they are needed, which is
  slow in random order, and the log says so.

Needs pyarrow, which is optional (`pip install "vit-classifier[parquet]"`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vit.data.assemble import assemble
from vit.data.dataset import SPLITS, ImageData
from vit.data.decode import ImageError, decode, measure, printable
from vit.data.scan import file_content, file_fingerprint, name_fingerprint, scan
from vit.errors import VitError, did_you_mean

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

log = logging.getLogger("vit")

LAYOUT = "expected a .parquet file, or a folder of them named train-*.parquet, validation-*.parquet, test-*.parquet"
_SPLIT_NAME = re.compile(r"(?:^|[-_.])(train|validation|valid|val|test)(?=$|[-_.\d])")
_SHARD = re.compile(r"^(.*)-(\d+)-of-(\d+)")
_LABEL_NAMES = ("label", "labels", "class", "target", "fine_label", "category")
_MAX_GROUPS = 8


@dataclass(frozen=True)
class Columns:
    """Names the columns to read: `image` is a leaf such as "image.bytes"; `names` are the schema's classes, if any."""

    image: str
    label: str
    names: tuple[str, ...] | None


class ParquetImages:
    """Reads encoded images from row groups on first use. Safe for threads, cheap to send to a process."""

    def __init__(self, groups: list[tuple[str, int, int]], column: str, max_groups: int | None) -> None:
        """Read `groups`, (file, row group, its rows) in order; keep at most `max_groups` in memory, None for all."""
        self._groups = groups
        self._starts = np.cumsum([0] + [rows for _, _, rows in groups])
        first_of: dict[str, int] = {}
        for (path, _, _), start in zip(groups, self._starts, strict=False):
            first_of.setdefault(path, int(start))
        self._first_of = first_of
        self._column = column
        self._contents: dict[str, str] = {}
        self._max_groups = max_groups
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def name(self, i: int) -> str:
        path = self._groups[self._group_of(i)][0]
        return f"{path}, row {i - self._first_of[path]}"

    def content(self, i: int) -> str:
        """Return the checksum by which `vit.data.run_splits` recognises the image."""
        path = self._groups[self._group_of(i)][0]
        if path not in self._contents:
            self._contents[path] = file_content(path)
        return f"{self._contents[path]}/{i - self._first_of[path]}"

    def encoded(self, i: int) -> bytes:
        """Return the bytes of image `i` as they are in the file. Raises `ImageError` where there are none."""
        group = self._group_of(i)
        try:
            value = self._rows(group)[i - int(self._starts[group])].as_py()
        except VitError as error:
            raise ImageError(str(error)) from error
        if value is None:
            raise ImageError("no image bytes in this row")
        return value

    def read(self, i: int, channels: int, target: tuple[int, int] | None) -> Image.Image | np.ndarray:
        try:
            return decode(self.encoded(i), channels=channels, target=target)
        except ImageError as error:
            raise ImageError(error.reason, printable(self.name(i))) from error

    def fingerprints(self, rows: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """See `vit.data.dataset.FileBacked`; a row has the state of its file."""
        names = _row_fingerprints(self._groups, lambda path: name_fingerprint(f"{path}\0{self._column}"))
        return names[rows], _row_fingerprints(self._groups, lambda path: file_fingerprint(path, channels))[rows]

    def size(self, i: int, channels: int) -> tuple[int, int]:
        """Return (H, W) of image `i` after decoding all of it. Raises `ImageError`."""
        return measure(self.encoded(i), channels=channels)

    def _group_of(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _rows(self, group: int) -> Any:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            path, index, _ = self._groups[group]
            with _file(path) as file:
                column = _leaf(file.read_row_group(index, columns=[self._column]).column(0))
            rows = column.combine_chunks()
            rows = rows.chunk(0) if hasattr(rows, "chunk") else rows
            self._cache[group] = rows
            if self._max_groups is not None and len(self._cache) > self._max_groups:
                self._cache.popitem(last=False)
            return rows


def parquet(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open the data set in `data.root`: a Parquet file or a folder of them."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise VitError(
            'data=parquet needs pyarrow, which is not installed: pip install "vit-classifier[parquet]"'
        ) from error
    if config.root is None:
        raise VitError(f"data=parquet needs data.root=PATH: {LAYOUT}")
    shown = printable(config.root)
    files = _find(os.path.abspath(config.root), shown)
    order = [split for split in SPLITS if split in files]
    first = files[order[0]][0]  # of train, where there is one: its description is the class map
    with _file(first) as file:
        columns = find_columns(file.schema_arrow, config, shown)

    groups: list[tuple[str, int, int]] = []
    raw: dict[str, list[Any]] = {}
    weight = 0
    for split in order:
        values: list[Any] = []
        found: list[tuple[str, int, int]] = []
        for path in files[split]:
            with _file(path) as file:
                for column in (columns.image, columns.label):
                    if column.split(".")[0] not in file.schema_arrow.names:
                        raise VitError(f"{printable(path)} has no column {column!r}, unlike {printable(first)}")
                for group in range(file.metadata.num_row_groups):
                    rows = file.metadata.row_group(group)
                    found.append((path, group, rows.num_rows))
                    weight += rows.total_byte_size
                labels = file.read(columns=[columns.label]).column(0).to_pylist()
                if columns.names is not None:
                    # by this file's own numbers: they need not be those of the file beside it
                    own = _class_names(file.schema_arrow, columns.label) or columns.names
                    labels = _named(labels, own, printable(path))
                values += labels
        if values and all(value is None or value == -1 for value in values):
            log.warning("%s: the %s split has no labels; it is not used", shown, split)
            continue
        if any(value is None or (columns.names and value == -1) for value in values):
            raise VitError(f"{shown}: some rows of the {split} split have no label in column {columns.label!r}")
        groups += found
        raw[split] = values
    if not any(raw.values()):
        raise VitError(f"{shown} holds no images with labels: {LAYOUT}")

    names, known = _names(raw, columns)
    memory = total_memory()
    fits = memory is None or weight < memory / 2
    if not fits:
        log.warning("%s does not fit in memory: images in random order will come slowly; a folder is faster", shown)
    images = ParquetImages(groups, columns.image, None if fits else _MAX_GROUPS)
    sizes, reasons = scan(
        _row_fingerprints(groups, lambda path: file_fingerprint(path, config.channels)),
        lambda i: images.size(i, config.channels),
        f"parquet\0{os.path.abspath(config.root)}",
        "Checking images",
        scan_limit,
    )
    return assemble(
        "parquet",
        images,
        names,
        sizes,
        reasons,
        config,
        where=shown,
        known_classes=known,
        trained=class_names is not None,
    )


@contextlib.contextmanager
def _file(path: str) -> Iterator[Any]:
    """Open a Parquet file; what goes wrong while it is open becomes a `VitError` that names it."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise VitError(f"{printable(path)} cannot be read as a Parquet file: {error}") from error


def _leaf(column: Any) -> Any:
    """`column`, or its `bytes` field where pyarrow gives the struct around it (which depends on its release)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _find(root: str, shown: str) -> dict[str, list[str]]:
    """Find the Parquet files of each split."""
    if os.path.isfile(root):
        return {"train": [root]}
    if not os.path.isdir(root):
        raise VitError(f"data.root={shown}: no such file or folder")
    paths = sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(root)
        for name in names
        if name.endswith(".parquet") and not name.startswith(".")
    )
    if not paths:
        raise VitError(f"{shown} holds no .parquet files: {LAYOUT}")
    files: dict[str, list[str]] = {}
    unnamed: list[str] = []
    for path in paths:
        # the file's own name first, then the folders above it ("default/train/0000.parquet")
        parts = reversed(os.path.relpath(path, root).removesuffix(".parquet").split(os.sep))
        match = next((m for m in map(_SPLIT_NAME.search, parts) if m), None)
        if match is None:
            unnamed.append(path)
        else:
            split = "val" if match[1].startswith("val") else match[1]
            files.setdefault(split, []).append(path)
    if not files:
        return {"train": paths}
    if unnamed:
        raise VitError(f"{printable(unnamed[0])} belongs to no split by its name: {LAYOUT}")
    if "train" not in files:
        log.warning("%s has no train files", shown)
    _warn_of_missing_shards(paths)
    return files


def _warn_of_missing_shards(paths: list[str]) -> None:
    seen: dict[tuple[str, int], int] = {}
    for path in paths:
        if match := _SHARD.match(path):
            key = match[1], int(match[3])
            seen[key] = seen.get(key, 0) + 1
    for (stem, total), count in seen.items():
        if count < total:
            log.warning("%s: %d of %d files are there", printable(stem), count, total)


def find_columns(schema: Any, config: Any, shown: str) -> Columns:
    """Find the image and label columns: as configured, as the schema describes them, or the only ones possible.

    `config` has `image_column` and `label_column`.  Raises `VitError`.
    """
    import pyarrow as pa

    features = _features(schema)

    def is_image(name: str) -> bool:
        kind = schema.field(name).type
        fields = [kind.field(k).name for k in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        return "bytes" in fields or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_label(name: str) -> bool:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return (
            pa.types.is_integer(kind)
            or pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_boolean(kind)
        )

    def choose(key: str, given: str | None, fits: Any, kind: str, usual: tuple[str, ...], what: str) -> str:
        possible = [name for name in schema.names if fits(name)]
        if given is not None:
            if given not in possible:
                raise VitError(
                    f"data.{key}={given!r}: {shown} has no such column of {what}; {did_you_mean(given, possible)}"
                )
            return given
        for choice in (
            [name for name in possible if features.get(name, {}).get("_type") == kind],
            [name for name in usual if name in possible][:1],
            possible,
        ):
            if len(choice) == 1:
                return choice[0]
        if not possible:
            raise VitError(f"{shown} has no column of {what}; its columns are {', '.join(schema.names)}")
        raise VitError(f"{shown} has several columns of {what}: set data.{key} to one of {', '.join(possible)}")

    image = choose("image_column", config.image_column, is_image, "Image", ("image", "img"), "images")
    label = choose("label_column", config.label_column, is_label, "ClassLabel", _LABEL_NAMES, "labels")
    leaf = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    return Columns(leaf, label, _class_names(schema, label))


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Read the names of the labels 0, 1, ... of a file, where it has them. Names that repeat get their number."""
    import pyarrow as pa

    names = _features(schema).get(label, {}).get("names")
    if not pa.types.is_integer(schema.field(label).type) or not isinstance(names, list):
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    often = Counter(names)  # ImageNet has two cranes
    return tuple(f"{name} ({k})" if often[name] > 1 else name for k, name in enumerate(names))


def _named(labels: list[int | None], names: Sequence[str], shown: str) -> list[Any]:
    """Turn labels into class names; missing ones (None, -1) stay."""
    good = {None, *range(-1, len(names))}
    wrong = [label for label in labels if label not in good]
    if wrong:
        raise VitError(f"{shown}: label {wrong[0]!r}, but there are {len(names)} class names")
    return [label if label is None or label == -1 else names[label] for label in labels]


def _features(schema: Any) -> dict[str, Any]:
    """Read what the `datasets` library wrote about the columns; empty where there is nothing valid."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _names(raw: dict[str, list[Any]], columns: Columns) -> tuple[dict[str, list[str]], list[str] | None]:
    """Return the class name of every row, and the class map where it is not the sorted names of train."""
    named = {split: [str(value) for value in values] for split, values in raw.items()}
    train = set(raw.get("train", ()))
    if columns.names is not None:
        return named, [*columns.names, *sorted(train - set(columns.names))]
    numbers = all(isinstance(value, int) for values in raw.values() for value in values)
    # 2 before 10
    return named, [str(value) for value in sorted(train)] if numbers else None


def _row_fingerprints(groups: list[tuple[str, int, int]], fingerprint_of: Callable[[str], int]) -> np.ndarray:
    """Compute a fingerprint for each row: the file's, plus an odd constant a row."""
    fingerprints: list[np.ndarray] = []
    row_of: dict[str, int] = {}
    for path, _, rows in groups:
        first = row_of.get(path, 0)
        row_of[path] = first + rows
        base = np.uint64(fingerprint_of(path))
        fingerprints.append(base + np.arange(first, first + rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.concatenate(fingerprints)


def total_memory() -> int | None:
    """Return the bytes of memory in this machine, None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
