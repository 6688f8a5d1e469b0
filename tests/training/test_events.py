"""Event files: what TensorBoard reads back is what was written, and a failed write says so at once."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as byte_by_byte
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vit.errors import VitError
from vit.training.events import EventFile, masked_crc32c


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


@given(st.binary(min_size=4, max_size=300))
def test_checksum_is_tensorboards(data: bytes) -> None:
    assert masked_crc32c(data) == byte_by_byte(data)


def test_scalars_images_and_text_come_back(tmp_path: Path) -> None:
    events = EventFile(tmp_path / "made" / "here")
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    events.scalars({"a/b": 0.5, "ünï": -3.0}, 7)
    events.scalars({"a/b": float("nan")}, 8)
    events.image("colour", picture, 7)
    events.image("grey", Image.fromarray(picture[:, :, 0]), 7)
    events.text("words", "**bold** \udcff", 0)
    events.close()
    found = read(events.folder)
    assert [(e.step, e.value) for e in found.Scalars("ünï")] == [(7, -3.0)]
    assert np.isnan(found.Scalars("a/b")[1].value)
    for tag, expected in (("colour", picture), ("grey", picture[:, :, 0])):
        image = found.Images(tag)[0]
        assert (image.height, image.width, image.step) == (20, 30, 7)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), expected)
    assert found.Tensors("words/text_summary")[0].tensor_proto.string_val == [b"**bold** \\udcff"]


def test_written_after_closing_goes_to_the_same_file(tmp_path: Path) -> None:
    events = EventFile(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is made before there is something to say"
    events.scalars({"x": 1.0}, 1)
    events.close()
    events.close()
    events.scalars({"x": 2.0}, 2)
    events.close()
    assert list(tmp_path.iterdir()) == [events.path]
    assert [e.value for e in read(tmp_path).Scalars("x")] == [1.0, 2.0]


def test_flushed_events_are_there_for_others(tmp_path: Path) -> None:
    events = EventFile(tmp_path)
    events.scalars({"x": 1.0}, 1)
    events.flush()
    events.scalars({"x": 2.0}, 2)
    events.flush(every=3600)  # it was flushed just now
    assert [e.value for e in read(tmp_path).Scalars("x")] == [1.0]
    events.flush()
    assert [e.value for e in read(tmp_path).Scalars("x")] == [1.0, 2.0]
    events.close()


def test_resuming_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = EventFile(tmp_path)
    for step in range(1, 6):
        first.scalars({"x": float(step)}, step)
    first.close()
    second = EventFile(tmp_path)
    second.path = first.path.with_name(first.path.name + ".later")
    second.resume(3)
    second.scalars({"x": 40.0}, 4)
    second.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("x")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_hyperparameters_with_their_metrics(tmp_path: Path) -> None:
    events = EventFile(tmp_path)
    events.hyperparameters({"lr": 0.1, "name": "a\udcff", "flag": True, "n": 3}, {"final/top1": 0.75}, 9)
    events.close()
    assert list(tmp_path.iterdir()) == [events.path], "no run of its own"
    found = read(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("final/top1")] == [(9, 0.75)]
    content = {tag: HParamsPluginData.FromString(value) for tag, value in found.PluginTagToContent("hparams").items()}
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    assert start["lr"].number_value == pytest.approx(0.1)
    assert start["n"].number_value == 3
    assert start["flag"].string_value == "true"
    assert start["name"].string_value == "a\\udcff"
    experiment = content["_hparams_/experiment"].experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["final/top1"]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    events = EventFile(tmp_path)
    os.symlink("/dev/full", events.path)
    events.scalars({"x": 1.0}, 1)
    with pytest.raises(VitError, match="No space left") as caught:
        events.flush()
    assert str(tmp_path) in str(caught.value)
    assert "logging.tensorboard=false" in str(caught.value)
    with pytest.raises(VitError, match="No space left"):
        events.close()
    events.close()


def test_a_folder_that_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VitError, match=r"cannot write TensorBoard events to .*file"):
        EventFile(tmp_path / "file").scalars({"x": 1.0}, 1)
