"""Write TensorBoard event files from the training thread.

Notable:
- `torch.utils.tensorboard.SummaryWriter` writes from its own thread, so a full disk raises an error elsewhere and
  later.  Here a failed write raises a `VitError` at once.
- All scalars of a step are one record, ten times faster than one record each.  Checksums are computed in C.
- The summaries are those of torch and TensorBoard, so `write` takes any of them.
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

    The first write creates the file.  Every method raises `VitError` if the folder cannot be written or the
    disk is full.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns() % 1_000_000}"
        self.path = self.folder / f"events.out.tfevents.{stamp}"
        self._file: BinaryIO | None = None
        self._flushed = 0.0

    def write(self, summary: Summary, step: int) -> None:
        """Append a summary with any number of values at global step `step`."""
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def resume(self, step: int) -> None:
        """Make TensorBoard drop the records of earlier files after `step`, where training resumes."""
        self._append(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        self.write(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step)

    def image(self, tag: str, image: np.ndarray | Image.Image, step: int) -> None:
        """Write a picture as PNG: uint8 (H, W) or (H, W, 3), or a Pillow image."""
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        png = io.BytesIO()
        image.save(png, "PNG", compress_level=2)  # twice as fast as the default, a quarter more bytes
        value = Summary.Image(height=image.height, width=image.width, colorspace=len(image.getbands()))
        value.encoded_image_string = png.getvalue()
        self.write(Summary(value=[Summary.Value(tag=tag, image=value)]), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a Markdown text."""
        self.write(text(tag, _escape_invalid(markdown)), step)

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Write the run's row of the HParams tab: parameters (flat names to numbers or text) and metrics.

        The metrics are also written as scalars, because that tab reads them there.
        """
        for part in hparams({key: _to_hyperparameter(value) for key, value in parameters.items()}, dict(metrics)):
            self.write(part, step)
        self.scalars(metrics, step)

    def flush(self, every: float = 0.0) -> None:
        """Flush the file, so that others can read it, unless it was flushed less than `every` seconds ago."""
        if self._file is not None and time.monotonic() - self._flushed >= every:
            try:
                self._file.flush()
            except OSError as error:
                raise self._write_error(error) from error
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file.  A later write opens it again."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                raise self._write_error(error) from error

    def _append(self, event: Event) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(_encode_record(event))
        except OSError as error:
            raise self._write_error(error) from error

    def _open(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "ab", buffering=1 << 16)  # noqa: SIM115  # stays open during the run
        if file.tell() == 0:
            source = SourceMetadata(writer="vit.training.events")
            file.write(
                _encode_record(Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=source))
            )
        return file

    def _write_error(self, error: OSError) -> CannotWrite:
        return CannotWrite(
            f"cannot write TensorBoard events to {self.folder}: {error.strerror or error}; "
            "logging.tensorboard=false trains without them"
        )


def _encode_record(event: Event) -> bytes:
    """Encode an event as a TFRecord: length, its checksum, the event, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))


def masked_crc32c(data: bytes) -> int:
    """Compute the masked CRC-32C of TFRecord files.  TensorBoard's own is in Python: 0.3 s per megabyte."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _to_hyperparameter(value: Any) -> Any:
    """Convert a hyperparameter to a number or text; torch would write `True` as 1."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, int | float) else _escape_invalid(str(value))


def _escape_invalid(text: str) -> str:
    """Escape characters of `text` that UTF-8 cannot encode, as in paths with invalid bytes."""
    return text.encode("utf-8", "backslashreplace").decode()
