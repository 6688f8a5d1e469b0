"""Every kind of image becomes what the model expects, by the written rule; everything else becomes an ImageError."""

import contextlib
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from vit.data.decode import ImageError, decode, extensions, measure, named_as_image, printable
from vit.errors import VitError


def pixels(source, channels=3, **options):
    image = decode(source, channels=channels, **options)
    if isinstance(image, Image.Image):
        assert image.mode == {1: "L", 3: "RGB"}[channels]
    return np.asarray(image)


def reason(source, channels=3, **options):
    with pytest.raises(ImageError) as caught:
        decode(source, channels=channels, **options)
    assert "\n" not in str(caught.value)
    assert "\n" not in caught.value.reason
    return caught.value.reason


# --- files as they should be


def test_path_bytes_pillow_and_array_agree(tmp_path, picture):
    image = picture(21, 34)
    path = tmp_path / "a.png"
    image.save(path)
    expected = np.asarray(image)
    for source in (path, str(path), path.read_bytes(), image, expected):
        assert np.array_equal(pixels(source), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI", "JPEG2000", "WEBP"])
def test_lossless_formats(kind, picture, encoded):
    image = picture(32, 32)
    options = {"lossless": True} if kind == "WEBP" else {}
    try:
        data = encoded(image, kind, **options)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow cannot write {kind}: {error}")
    assert np.array_equal(pixels(data), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "GIF"])
def test_lossy_formats_are_close(kind, picture, encoded):
    image = picture(48, 40)
    try:
        data = encoded(image, kind)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow cannot write {kind}: {error}")
    assert np.abs(pixels(data).astype(int) - np.asarray(image)).mean() < 8


def test_icon_gives_its_largest_image(picture, encoded):
    data = encoded(picture(64, 64), "ICO", sizes=[(16, 16), (64, 64), (32, 32)])
    assert pixels(data).shape == (64, 64, 3)


def test_progressive_jpeg(picture, encoded):
    image = picture(40, 40)
    baseline, progressive = encoded(image, quality=90), encoded(image, quality=90, progressive=True)
    assert np.array_equal(pixels(progressive), pixels(baseline))


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation(kind, orientation, encoded):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = (255, 0, 0)
    upright[:8, 24:] = (0, 255, 0)
    upright[8:, :8] = (0, 0, 255)
    # what a camera would store, so that the orientation's turn makes it upright (EXIF 2.32, 4.6.4 A)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    got = pixels(data)
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).max() < 12
    assert measure(data, channels=3) == (16, 32)
    # and once only, whoever looks at the result next
    assert np.array_equal(pixels(decode(data, channels=3)), got)


def test_orientation_of_a_pillow_image_is_applied_and_the_image_left_alone(picture, encoded):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(io.BytesIO(encoded(picture(10, 20), exif=exif)))
    before = np.asarray(image)
    assert pixels(image).shape == (20, 10, 3)
    assert image.getexif()[ExifTags.Base.Orientation] == 6
    assert np.array_equal(np.asarray(image), before)


def test_damaged_exif_does_not_cost_the_image(picture, encoded):
    data = encoded(picture(16, 16))
    payload = b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40
    segment = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
    broken = data[:2] + segment + data[2:]
    assert np.array_equal(pixels(broken), pixels(data))


def test_odd_metadata_is_not_worth_a_warning(picture, encoded, tmp_path):
    payload = b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40
    data = encoded(picture(16, 16))
    (tmp_path / "a.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:])
    code = f"from vit.data.decode import decode; print(decode({str(tmp_path / 'a.jpg')!r}, channels=3).size)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert (done.stdout.strip(), done.stderr) == ("(16, 16)", "")


# --- colour


def test_greyscale_and_colour(picture, encoded):
    grey = picture(12, 12).convert("L")
    assert np.array_equal(pixels(encoded(grey, "PNG")), np.repeat(np.asarray(grey)[:, :, None], 3, axis=2))
    colour = picture(12, 12)
    weights = np.array([0.299, 0.587, 0.114])
    expected = np.asarray(colour, dtype=np.float64) @ weights
    assert np.abs(pixels(encoded(colour, "PNG"), 1) - expected).max() <= 1
    assert np.array_equal(pixels(encoded(grey, "PNG"), 1), np.asarray(grey))


def test_black_and_white(encoded):
    bits = np.random.default_rng(0).random((9, 11)) < 0.5
    assert np.array_equal(pixels(encoded(Image.fromarray(bits), "PNG"), 1), bits * 255)
    assert np.array_equal(pixels(encoded(Image.fromarray(bits), "TIFF"))[:, :, 1], bits * 255)


def test_palette(picture, encoded):
    image = picture(16, 16).quantize(20)
    assert np.array_equal(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_palette_with_a_transparent_colour(encoded):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    got = pixels(encoded(image, "PNG", transparency=0))
    assert got[0, 1].tolist() == [200, 100, 50]
    assert (got[1] == 255).all()
    # a whole alpha table, as PNG has it: half of (10, 20, 30) over white
    got = pixels(encoded(image, "PNG", transparency=bytes([128, 255])))
    assert np.abs(got[1, 0].astype(int) - [132, 137, 142]).max() <= 1


def test_alpha_is_laid_over_white(encoded):
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[..., :3] = (90, 0, 210)
    rgba[..., 3] = [[0, 128, 255]] * 2
    alpha = np.array([0, 128, 255])[:, None] / 255
    expected = alpha * np.array([90, 0, 210]) + (1 - alpha) * 255
    for source in (encoded(Image.fromarray(rgba), "PNG"), rgba, Image.fromarray(rgba)):
        assert np.abs(pixels(source)[0] - expected).max() <= 1
    la = Image.fromarray(rgba).convert("LA")
    luma = expected @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(encoded(la, "PNG"), 1)[0] - luma).max() <= 2


def test_transparent_colour_of_a_plain_png(encoded):
    image = Image.new("RGB", (3, 1), (1, 2, 3))
    image.putpixel((1, 0), (50, 60, 70))
    assert pixels(encoded(image, "PNG", transparency=(1, 2, 3))).tolist() == [[[255] * 3, [50, 60, 70], [255] * 3]]


def test_cmyk_jpeg(picture, encoded):
    image = picture(24, 24)
    got = pixels(encoded(image.convert("CMYK"), quality=95))
    assert np.abs(got.astype(int) - np.asarray(image)).mean() < 6


def test_lab_and_ycbcr_tiff(picture, encoded):
    from PIL import ImageCms

    image = picture(16, 16)
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(pixels(encoded(lab, "TIFF")).astype(int) - np.asarray(image)).mean() < 4
    assert np.abs(pixels(image.convert("YCbCr")).astype(int) - np.asarray(image)).max() <= 3
    assert np.abs(pixels(image.convert("HSV")).astype(int) - np.asarray(image)).max() <= 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey(kind, encoded):
    values = np.array([[0, 128, 129, 257, 514, 32768, 65407, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(values), kind)
    expected = np.rint(values / 257)
    assert np.array_equal(pixels(data, 1), expected)
    assert np.array_equal(pixels(data)[:, :, 2], expected)


def test_big_endian_sixteen_bit():
    values = np.array([[0, 1000, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert pixels(image, 1).tolist() == [[0, 4, 255]]


def test_sixteen_bit_colour_png(encoded):
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 257, 25700, 65535, 32896, 514) for _ in range(2))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert pixels(data).tolist() == [[[0, 1, 100], [255, 128, 2]]] * 2


def test_integers_and_floats(encoded):
    whole = Image.fromarray(np.array([[-5, 0, 257, 65535, 1_000_000]], dtype=np.int32))
    assert pixels(encoded(whole, "TIFF"), 1).tolist() == [[0, 0, 1, 255, 255]]
    unit = Image.fromarray(np.array([[-1.0, 0.0, 0.5, 1.0, np.nan]], dtype=np.float32))
    assert pixels(encoded(unit, "TIFF"), 1).tolist() == [[0, 0, 128, 255, 0]]
    wide = Image.fromarray(np.array([[0.4, 100.6, 255.0, 900.0]], dtype=np.float32))
    assert pixels(encoded(wide, "TIFF"), 1).tolist() == [[0, 101, 255, 255]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animated_gives_the_first_frame(kind, encoded):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("#f00000", "#00f000", "#0000f0")]
    options = {"lossless": True} if kind == "WEBP" else {}
    try:
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow cannot write {kind}: {error}")
    red, green, blue = pixels(data)[8, 8].astype(int)
    assert red > 220
    assert max(green, blue) < 30


# --- arrays


def test_arrays_of_other_types():
    assert pixels(np.array([[True, False]]), 1).tolist() == [[255, 0]]
    assert pixels(np.array([[0, 255]], dtype=np.int64), 1).tolist() == [[0, 255]]
    assert pixels(np.array([[0, 65535]], dtype=np.uint16), 1).tolist() == [[0, 255]]
    assert pixels(np.array([[0.0, 1.0, 0.2]]), 1).tolist() == [[0, 255, 51]]
    assert pixels(np.full((2, 3, 1), 7, dtype=np.uint8)).tolist() == [[[7, 7, 7]] * 3] * 2
    assert pixels(np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3)))[1, 3].tolist() == [21, 22, 23]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 32, 32), np.uint8), "put the channels last"),
        (np.zeros((4,), np.uint8), "expected (H, W) or (H, W, C)"),
        (np.zeros((2, 2, 2, 3), np.uint8), "expected (H, W) or (H, W, C)"),
        (np.zeros((0, 5, 3), np.uint8), "expected (H, W) or (H, W, C)"),
        (np.array([[-1, 3]]), "values from -1 to 3"),
        (np.array([[300]]), "expected 0 to 255"),
        (np.array([["a"]]), "expected numbers"),
        (np.array([[1 + 2j]]), "expected numbers"),
    ],
)
def test_arrays_that_are_no_image(array, words):
    assert words in reason(array)


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_other_numbers_of_channels(channels, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 7, channels), dtype=np.uint8)
    assert np.array_equal(pixels(array, channels), array)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(pixels(tmp_path / "a.npy", channels), array)
    assert measure(tmp_path / "a.npy", channels=channels) == (6, 7)
    assert f"expected (H, W, {channels})" in reason(array[:, :, :1], channels)


def test_four_bands_for_four_channels(picture, encoded):
    image = picture(8, 8).convert("CMYK")
    assert np.array_equal(pixels(encoded(image, "TIFF"), 4), np.asarray(image))
    assert "expects 4" in reason(encoded(picture(8, 8), "PNG"), 4)


def test_npy_is_read_for_grey_and_colour_and_never_unpickled(tmp_path):
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(pixels(tmp_path / "a.npy"), array)
    np.save(tmp_path / "evil.npy", np.array([[os.getpid]], dtype=object), allow_pickle=True)
    assert "damaged .npy" in reason(tmp_path / "evil.npy")
    data = (tmp_path / "a.npy").read_bytes()
    assert "damaged .npy" in reason(data[:-9])
    assert "damaged .npy" in reason(data[:9])


# --- large images


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("target", [(20, 30), (40, 60), (33, 17), (100, 100)])
def test_a_jpeg_shrinks_in_its_decoder_but_never_below_twice_the_target(target, orientation, picture, encoded):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(picture(330, 500), quality=95, exif=exif)
    full = decode(data, channels=3)
    small = decode(data, channels=3, target=target)
    factor = full.height / small.height
    assert round(factor) in (1, 2, 4, 8)
    assert small.height >= min(2 * target[0], full.height)
    assert small.width >= min(2 * target[1], full.width)
    if full.height >= 4 * target[0] and full.width >= 4 * target[1]:
        assert factor > 1.5
    again = full.resize(small.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(again)).mean() < 4


def test_target_changes_nothing_for_other_formats(picture, encoded):
    data = encoded(picture(300, 300), "PNG")
    assert np.array_equal(pixels(data, target=(10, 10)), pixels(data))


def test_decompression_bomb(monkeypatch, encoded, picture):
    data = encoded(Image.new("L", (200, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    assert reason(data).startswith("too large")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert pixels(data).shape == (100, 200, 3)  # large, but under the limit: no error, and no warning either


def test_a_real_bomb_is_refused_from_its_header():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    assert reason(data).startswith("too large")


# --- what is no image


def test_truncated_at_any_point(picture, encoded):
    image = picture(64, 64)
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {})):
        data = encoded(image, kind, **options)
        for share in (0.0, 0.05, 0.3, 0.6, 0.9, 0.97):
            part = data[: int(share * len(data))]
            why = reason(part)
            with pytest.raises(ImageError) as caught:
                measure(part, channels=3)
            assert caught.value.reason.split(":")[0] == why.split(":")[0]
    assert reason(encoded(image)[:-200]).startswith("truncated JPEG: ")
    assert reason(encoded(image, "PNG")[:-200]).startswith("truncated PNG: ")


def test_the_shrinking_decoder_finds_truncation_too(photos):
    data = photos[0].read_bytes()
    for missing in (1, 2, 100, 5_000, len(data) // 2):
        for call in (lambda part: decode(part, channels=3, target=(16, 16)), lambda part: measure(part, channels=3)):
            with pytest.raises(ImageError, match="truncated JPEG"):
                call(data[:-missing])


def test_pillows_global_switch_is_left_alone(picture, encoded):
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    reason(encoded(picture(64, 64))[:-100])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_files_that_are_no_images(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("dear diary\n" * 100)
    assert "not an image" in reason(text)
    (tmp_path / "empty.jpg").touch()
    assert reason(tmp_path / "empty.jpg") == "empty file"
    assert reason(b"") == "empty file"
    assert reason(tmp_path / "nothing.jpg") == "no such file"
    assert reason(text / "below") == "no such file"
    assert reason(tmp_path) == "is a folder, not an image"
    assert reason(str(tmp_path / "nul\0byte.jpg")) == "no such file"
    assert reason(tmp_path / ("x" * 300)) == "file name too long"
    assert "not an image" in reason(os.urandom(5_000))


def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path):
    fifo = tmp_path / "fifo.jpg"
    os.mkfifo(fifo)
    done = threading.Event()
    threading.Thread(target=lambda: (reason(fifo), done.set()), daemon=True).start()
    assert done.wait(20)
    assert reason("/dev/zero") == "not a regular file"
    place = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        assert reason(place) == "not a regular file"


def test_links(tmp_path, picture):
    picture(8, 8).save(tmp_path / "a.png")
    (tmp_path / "good.png").symlink_to("a.png")
    (tmp_path / "dangling.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert pixels(tmp_path / "good.png").shape == (8, 8, 3)
    assert reason(tmp_path / "dangling.png") == "no such file"
    assert "symbolic links" in reason(tmp_path / "loop.png")


def test_no_permission(unprivileged, picture):
    with unprivileged() as folder:
        path = folder / "a.png"
        picture(8, 8).save(path)
        path.chmod(0)
        assert reason(path) == "permission denied"


def test_formats_that_pillow_only_recognises():
    assert reason(b"\x89HDF\r\n\x1a\n" + bytes(100)).startswith("no decoder for HDF5 here")


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
]


@pytest.mark.parametrize("mode", [*MODES, "I;16B", "I;16L", "I;16N"])
def test_every_mode_of_pillow(mode):
    try:
        image = Image.new(mode, (6, 5))
    except ValueError:
        pytest.skip(f"this Pillow has no mode {mode}")
    assert pixels(image).shape == (5, 6, 3)
    assert pixels(image, 1).shape == (5, 6)


def test_hostile_bytes_raise_nothing_else(encoded, picture):
    rng = np.random.default_rng(0)
    sources = [
        encoded(picture(24, 24), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "TGA", "PPM")
    ]
    for data in sources:
        for _ in range(40):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), 6):
                broken[place] = rng.integers(0, 256)
            with contextlib.suppress(ImageError):
                assert decode(bytes(broken), channels=3).mode == "RGB"


# --- names and messages


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"new\nline.png", b"tab\t.png", "☃ snow.png".encode(), b"-rf.png"])
def test_names_of_any_kind(name, tmp_path, picture):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        picture(8, 8).save(file, "PNG")
    text = os.fsdecode(path)
    assert pixels(text).shape == (8, 8, 3)
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(ImageError) as caught:
        decode(text, channels=3)
    message = str(caught.value)
    message.encode("utf-8")
    assert message.isprintable()
    assert "\n" not in message
    assert caught.value.reason in message


def test_printable():
    assert printable(os.fsdecode(b"caf\xe9\n.jpg")) == "caf\\xe9\\n.jpg"
    assert printable("☃.jpg") == "☃.jpg"


def test_the_error_is_ours_and_travels_between_processes(tmp_path):
    with pytest.raises(VitError) as caught:
        decode(tmp_path / "a.jpg", channels=3)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason, again.name) == (str(caught.value), "no such file", str(tmp_path / "a.jpg"))


def test_many_threads_at_once(picture, encoded):
    sources = [encoded(picture(60, 70, seed), kind) for seed in range(8) for kind in ("JPEG", "PNG", "WEBP", "GIF")]
    expected = [pixels(data) for data in sources]
    stop = time.monotonic() + 1.0

    def work(k):
        while time.monotonic() < stop:
            assert np.array_equal(pixels(sources[k]), expected[k])
            assert reason(sources[k][: len(sources[k]) // 2])
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(len(sources))))


def test_names_of_images_are_those_of_pillows_readers():
    """The usual ones are known without loading them all."""
    for channels in (1, 3, 5):
        known = extensions(channels)
        assert {".jpg", ".png", ".webp", ".tiff"} <= known
        assert not {".txt", ".pdf", ".json", ""} & known
        for ending in (*known, ".txt", ".pdf", ".npy", ".jpg.txt", ""):
            assert named_as_image(f"a{ending.upper()}", channels) == (ending in known), ending
    assert (".npy" in extensions(3), ".npy" in extensions(5)) == (False, True)
