"""A TensorBoard event file, written by the thread that trains.

Notable:
- `torch.utils.tensorboard.SummaryWriter` writes from a thread of its own: a full disk then shows as a traceback from
  somewhere else, at some later time.  Here a failed write is a `VitError` where it happens.
- All scalars of a step travel in one record, which costs a tenth of a record each; checksums do not go byte by byte.
- The summaries themselves are torch's and TensorBoard's, so anything that makes one can be written: see `write`.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams, text

from vit.files import CannotWrite


class EventFile:
    """Write summaries to one new event file in `folder`; `close` and later writes append to the same file.

    The file is made by the first write.  Every method raises `VitError` when the folder cannot be written or the disk
    is full.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns() % 1_000_000}"
        self.path = self.folder / f"events.out.tfevents.{stamp}"
        self._file: BinaryIO | None = None
        self._flushed = 0.0

    def write(self, summary: Summary, step: int) -> None:
        """Append one summary, which may hold any number of values, at global step `step`."""
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def resume(self, step: int) -> None:
        """Hide what earlier files in the folder say of steps after `step`: training has gone back there."""
        self._append(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        self.write(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step)

    def image(self, tag: str, image: np.ndarray | Image.Image, step: int) -> None:
        """Write a picture: uint8 (H, W) or (H, W, 3), or a Pillow image, kept as PNG."""
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        png = io.BytesIO()
        image.save(png, "PNG", compress_level=2)  # half the time of the default, for a quarter more bytes
        value = Summary.Image(height=image.height, width=image.width, colorspace=len(image.getbands()))
        value.encoded_image_string = png.getvalue()
        self.write(Summary(value=[Summary.Value(tag=tag, image=value)]), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a text, which TensorBoard shows as Markdown."""
        self.write(text(tag, _encodable(markdown)), step)

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Write the run's row of the HParams tab: flat names to numbers or text, and what came of them.

        The metrics are written as scalars too, which is where that tab reads them.
        """
        for part in hparams({key: _shown(value) for key, value in parameters.items()}, dict(metrics)):
            self.write(part, step)
        self.scalars(metrics, step)

    def flush(self, every: float = 0.0) -> None:
        """Hand everything to the system, for others to read, unless that was done less than `every` seconds ago."""
        if self._file is not None and time.monotonic() - self._flushed >= every:
            try:
                self._file.flush()
            except OSError as error:
                raise self._failed(error) from error
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close.  A later write opens the file again."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                raise self._failed(error) from error

    def _append(self, event: Event) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(_record(event))
        except OSError as error:
            raise self._failed(error) from error

    def _open(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "ab", buffering=1 << 16)  # noqa: SIM115  # open for as long as the run
        if file.tell() == 0:
            source = SourceMetadata(writer="vit.training.events")
            file.write(_record(Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=source)))
        return file

    def _failed(self, error: OSError) -> CannotWrite:
        return CannotWrite(
            f"cannot write TensorBoard events to {self.folder}: {error.strerror or error}; "
            "logging.tensorboard=false trains without them"
        )


def _record(event: Event) -> bytes:
    """An event as it stands in the file: length, its checksum, the event, its checksum (TensorFlow's TFRecord)."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))


def masked_crc32c(data: bytes) -> int:
    """The masked CRC-32C that TFRecord files carry.  TensorBoard's own is Python: 0.3 s a megabyte."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _shown(value: Any) -> Any:
    """A hyperparameter as a number or text; torch would take `True` for 1."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, int | float) else _encodable(str(value))


def _encodable(text: str) -> str:
    """`text` for UTF-8: a path whose bytes are none has its stray bytes escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
