"""What a file is by its bytes: whatever it is called, every image is one, and nothing else is."""

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit.data.decode import ImageError, decode
from vit.data.filetype import UNDECODED, content_kind, decodable, file_kind

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(200))
NAMES = ["photo", "photo.JPG_large", "photo.txt", "photo.", "photo.jpg?size=large", "photo.backup"]


def png(mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (9, 7), 1).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "ICO", "PCX", "SGI", "QOI", "DDS", "AVIF"]
)
def test_an_image_is_one_whatever_its_name(tmp_path, kind):
    buffer = io.BytesIO()
    try:
        Image.new("RGB", (32, 32), (200, 10, 10)).save(buffer, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    for name in NAMES:
        (tmp_path / name).write_bytes(buffer.getvalue())
        assert file_kind(str(tmp_path / name)) is None
        assert decode(tmp_path / name, channels=3).size == (32, 32)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty file"),
        (b"some words\n", "text file"),
        ("Straße, naïve, 日本".encode(), "text file"),
        ("Straße, naïve und mehr".encode("latin-1"), "text file"),
        ("text".encode("utf-16"), "text file"),
        (b"P is a letter, not a picture", "text file"),
        (b"BM is one, too", "text file"),
        (b'{"a": 1}', "text file"),
        (b'<?xml version="1.0"?><svg width="3"></svg>', "SVG file"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "PDF file"),
        (b"PK\x03\x04" + bytes(99), "archive file"),
        (b"a" + bytes(256) + b"ustar\x0000" + bytes(99), "archive file"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "video file"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "video file"),
        (b"\x1aE\xdf\xa3" + bytes(99), "video file"),
        (b"RIFF\0\0\0\0AVI LIST", "video file"),
        (b"RIFF\0\0\0\0WAVEfmt ", "audio file"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL file"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "RAW file"),
        (b"\x7fELF\2\1\1" + bytes(99), "unknown file"),
        (bytes(600), "unknown file"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, data, kind):
    (tmp_path / "x").write_bytes(data)
    assert file_kind(str(tmp_path / "x")) == kind


def test_an_unknown_kind_goes_by_its_ending(tmp_path):
    for name, kind in [("a.Db", ".db file"), ("a.b.c", ".c file"), ("a", "unknown file"), (".x", "unknown file")]:
        (tmp_path / name).write_bytes(b"\x7fELF\2\1\1" + bytes(99))
        assert file_kind(str(tmp_path / name)) == kind


def test_what_is_no_ordinary_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    assert file_kind(str(tmp_path / "pipe")) == "no ordinary file"
    assert file_kind(str(tmp_path / "lost")) == file_kind(str(tmp_path / "self")) == "broken link"
    assert file_kind(str(tmp_path / "gone")) == "file that cannot be read"


def test_a_camera_s_raw_file_is_not_taken_for_its_preview(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "TIFF")
    for name in ("a.NEF", "a.dng"):
        (tmp_path / name).write_bytes(buffer.getvalue())
        assert file_kind(str(tmp_path / name)) == "RAW file"
        with pytest.raises(ImageError, match="RAW file; convert it"):
            decode(tmp_path / name, channels=3)


def test_numpy_files_are_images_for_models_of_other_channels(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 5), np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "a")
    assert [file_kind(str(tmp_path / "a"), channels) for channels in (1, 3, 5)] == ["NumPy file", "NumPy file", None]


def test_heic_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("vit.data.filetype.importlib.util.find_spec", lambda name: None)
    for name in ("a.HEIC", "a.jpg", "a"):  # telephones also call them .jpg
        (tmp_path / name).write_bytes(HEIC)
        assert file_kind(str(tmp_path / name)) == "HEIC file"
        with pytest.raises(ImageError, match="HEIC file; to read it: pip install pillow-heif"):
            decode(tmp_path / name, channels=3)
    assert content_kind(HEIC) in UNDECODED
    assert not decodable("JPEG XL file")


def test_heic_is_read_with_its_package(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason='pip install "vit-classifier[heic]"')
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30))).save(tmp_path / "a.heic")
    (tmp_path / "a.heic").rename(tmp_path / "IMG_1")
    assert file_kind(str(tmp_path / "IMG_1")) is None
    image = decode(tmp_path / "IMG_1", channels=3)
    assert image.size == (64, 48)
    assert np.abs(np.asarray(image)[24, 32].astype(int) - (200, 30, 30)).max() < 12
    (tmp_path / "b.heic").write_bytes(HEIC)
    with pytest.raises(ImageError):
        decode(tmp_path / "b.heic", channels=3)


heads = st.binary(max_size=600) | st.builds(
    lambda start, rest: start + rest,
    st.sampled_from(
        [b"II*\0", b"\0\0\1\0", b"BM", b"P5\n", b"\0\0\0\x1cftyp", b"RIFF", b"\x0a\5", b"8BPS", b"qoif", b"\xff\xd8"]
    ),
    st.binary(max_size=300),
)


@settings(max_examples=300, deadline=None)
@given(heads)
def test_any_bytes_have_a_kind(tmp_path_factory, head):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(head)
    kind = file_kind(str(path))
    assert kind is None or (kind and kind.isprintable())
