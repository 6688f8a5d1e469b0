"""Decodes an image file of any kind to the pixels a model expects, or says shortly why it cannot.

Notable:
- One function, `decode`, for paths, bytes, Pillow images and arrays; training, evaluation and classification all
  go through it, so an image means the same everywhere.
- The colour rules are written once, in `decode`'s docstring (and as a table in docs/data.md).
- A JPEG far larger than needed is shrunk inside its decoder (libjpeg's scaled inverse DCT), which still reads the
  whole file, so a truncated one is still found.
- Whatever is wrong with a file, the one exception is `ImageError`.  Pillow's global `LOAD_TRUNCATED_IMAGES` is
  never touched: half an image is not an image.
- No state: any number of threads may decode at once.

NumPy and Pillow only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit.data.filetype import HEAD, UNDECODED, content_kind, decodable, load_heif
from vit.errors import VitError
from vit.errors import printable as printable  # for those who read images and speak of their files

Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# Pillow warns from 89 megapixels on and refuses from twice that on.  The refusal is the rule here (it becomes an
# ImageError); the warning would only repeat, for a photograph that decodes well, that it is large.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What its readers say about odd metadata is either of no consequence, or followed by an error, which is reported.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.\w+ImagePlugin")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python itself would print it, naming no file

_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> what makes the image upright (EXIF 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_COMMON = {".bmp", ".gif", ".jpeg", ".jpg", ".png"}
# Formats that Pillow recognises by name only, for programs that bring a decoder of their own; and HEIF, whose reader is
# loaded when the first such file is met: what an ending says must not depend on that
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "HEIF", "MPEG", "WMF", "IPTC", "PDF"}


class ImageError(VitError):
    """An image that cannot be used.

    `reason` is short and names no file ("truncated JPEG: ..."); `str(error)` puts the file's name before it.
    """

    def __init__(self, reason: str, name: str | None = None) -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = " ".join(reason.split())
        self.name = name

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str | None]]:
        return type(self), (self.reason, self.name)


@functools.cache
def extensions(channels: int = 3) -> frozenset[str]:
    """Return the lower-case file name extensions taken for images. Loads all of Pillow's readers."""
    Image.init()
    known = Image.registered_extensions().items()
    found = {ext for ext, kind in known if kind in Image.OPEN and kind not in NOT_DECODED}
    return frozenset(found if channels in (1, 3) else found | {".npy"})


def named_as_image(name: str, channels: int = 3) -> bool:
    """Say whether a file of this name is taken for an image, without loading more of Pillow for the usual names."""
    extension = os.path.splitext(name)[1].lower()
    return extension in _COMMON or (extension != "" and extension in extensions(channels))


def decode(source: Source, *, channels: int, target: tuple[int, int] | None = None) -> Image.Image | np.ndarray:
    """Read one image: upright, first frame, 8 bits a channel.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array (H, W) or (H, W, C).  A Pillow image is
            not changed.  A path may also be a NumPy `.npy` file holding such an array.
        channels: 1 gives mode "L", 3 gives mode "RGB".  Any other count takes only an array, a `.npy` file or an
            image with exactly that many bands, as it is, and gives an array uint8 (H, W, C).
        target: (H, W) that the image will be resized to.  A JPEG may then be decoded at 1/2, 1/4 or 1/8 of its
            size, never below twice the target in either direction.

    The colour rules, in order:
        - EXIF orientation (also from XMP) is applied; colour profiles are not.
        - Palette images take their palette's colours.  Transparency of any kind is laid over white.
        - CMYK, YCbCr, HSV and LAB become RGB by the usual formulas.
        - 16-bit values are divided by 257, so that 65535 becomes 255.  32-bit integers are taken as 16-bit, clipped.
          (Pillow itself reduces 16-bit *colour* files to their upper 8 bits.)
        - Floating point: if no value exceeds 1, 1 is white; otherwise 255 is; clipped, and NaN is black.
        - Black-and-white becomes 0 and 255.  Grey to RGB repeats; RGB to grey is ITU-R 601 luma.
        - Arrays: bool, uint8, uint16 and floats by the same rules; other integers must lie in 0..255.

    Raises:
        ImageError: missing, unreadable, empty, truncated, damaged, too large, or not an image at all.
    """
    with _as_image_errors(source):
        if isinstance(source, np.ndarray):
            return _from_array(source, channels)
        if isinstance(source, Image.Image):
            source.load()
            return _convert(source, channels)
        with _open(source) as file:
            return _read(file, channels, target)[0]


def measure(source: str | os.PathLike[str] | bytes, *, channels: int) -> tuple[int, int]:
    """Return the upright (H, W) of an image file that `decode` can read to its end. Raises `ImageError`.

    A JPEG is decoded at an eighth of its size: every byte is still read, most of the arithmetic is not done.
    """
    with _as_image_errors(source), _open(source) as file:
        return _read(file, channels, (1, 1))[1]


@contextlib.contextmanager
def _as_image_errors(source: object) -> Iterator[None]:
    """Turn any error into an `ImageError` that names the file."""
    name = printable(source) if isinstance(source, str | os.PathLike) else None
    try:
        yield
    except ImageError as error:
        raise ImageError(error.reason, name) from error.__cause__
    except OSError as error:
        raise ImageError(_os_reason(error), name) from error
    except Exception as error:  # decoders meet hostile bytes with every exception there is
        raise ImageError(_decoder_reason(error, "image"), name) from error


def _open(source: str | os.PathLike[str] | bytes) -> BinaryIO:
    """Open a regular file, or say what it is instead; never waits on a pipe or reads from a device."""
    if isinstance(source, bytes):
        if not source:
            raise ImageError("empty file")
        return io.BytesIO(source)
    if "\0" in os.fsdecode(source):
        raise ImageError("no such file")
    status = os.stat(source)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not a regular file")
    if status.st_size == 0:
        raise ImageError("empty file")
    return open(source, "rb")


def _os_reason(error: OSError) -> str:
    known = {
        errno.ENOENT: "no such file",
        errno.ENOTDIR: "no such file",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EISDIR: "is a folder, not an image",
        errno.ENAMETOOLONG: "file name too long",
    }
    return known.get(error.errno or 0) or f"cannot be read: {error.strerror or error}"


def _read(
    file: BinaryIO, channels: int, target: tuple[int, int] | None
) -> tuple[Image.Image | np.ndarray, tuple[int, int]]:
    """Decode the image; return it and its upright size (H, W) in the file."""
    head = file.read(HEAD)
    kind = content_kind(head, str(getattr(file, "name", "")))
    file.seek(0)
    if kind == "NumPy file":
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ImageError(f"damaged .npy file: {error}") from error
        return _from_array(array, channels), (array.shape[0], array.shape[1])
    if kind == "HEIC file" and decodable(kind):
        load_heif()
    if kind == "RAW file":  # Pillow would give the small preview in it
        raise ImageError(f"{kind}; {UNDECODED[kind]}")
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        if kind in UNDECODED:
            reason = f"{kind}; {UNDECODED[kind]}" if not decodable(kind) else f"damaged {kind}"
        else:
            reason = "not an image, or damaged at its beginning" + (f" ({kind})" if kind not in (None, "image") else "")
        raise ImageError(reason) from error
    except Exception as error:
        raise ImageError(_decoder_reason(error, "image")) from error
    try:
        size = None
        if target is not None and image.format in ("JPEG", "MPO"):
            height, width = target
            size = (image.height, image.width)
            if _orientation(image) in _SIDEWAYS:
                height, width = width, height
                size = (image.width, image.height)
            image.draft(None, (2 * width, 2 * height))
        image.load()
        result = _convert(image, channels, owned=True)
        if size is None:
            size = result.shape[:2] if isinstance(result, np.ndarray) else (result.height, result.width)
        return result, size
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_decoder_reason(error, image.format or "image")) from error


def _decoder_reason(error: Exception, kind: str) -> str:
    """Put a decoder's error into words."""
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    text = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {text}"
    lower = text.lower()
    if isinstance(error, EOFError) or "truncated" in lower or "end of file" in lower:
        return f"truncated {kind}: {text}"
    if "cannot find loader" in lower or "ghostscript" in lower:  # formats that Pillow leaves to other programs
        return f"no decoder for {kind} here: {text}"
    return f"damaged {kind}: {text}"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata beside sound pixels: the image is usable, as stored
        return 1


def _convert(image: Image.Image, channels: int, owned: bool = False) -> Image.Image | np.ndarray:
    """Apply the rules of `decode` to a loaded image. `owned`: its metadata may be removed."""
    if 0 in image.size:
        raise ImageError(f"has no pixels ({image.width} x {image.height})")
    upright = _UPRIGHT.get(_orientation(image))
    result = image if upright is None else image.transpose(upright)

    if channels not in (1, 3):
        bands = len(result.getbands())
        if bands != channels or result.mode in ("P", "I", "F") or result.mode.startswith("I;"):
            raise ImageError(f"has {bands} channels (mode {result.mode}), the model expects {channels}")
        return np.asarray(result)

    wanted = "L" if channels == 1 else "RGB"
    if result.mode.startswith("I;16"):
        result = Image.fromarray(_from_uint16(np.asarray(result)))
    elif result.mode == "I":
        result = Image.fromarray(_from_uint16(np.asarray(result).clip(0, 65535).astype(np.uint16)))
    elif result.mode == "F":
        result = Image.fromarray(_from_float(np.asarray(result)))
    elif result.has_transparency_data:
        layer = result.convert("LA") if result.mode == "La" else result
        layer = layer if layer.mode == "RGBA" else layer.convert("RGBA")
        result = Image.new("RGB", layer.size, (255, 255, 255))
        result.paste(layer, mask=layer.getchannel("A"))
    elif result.mode == "LAB":
        result = _from_lab(result)
    if result.mode != wanted:
        if result.mode not in ("1", "L", "RGB"):
            result = result.convert("RGB")
        result = result.convert(wanted)
    if result is image and not owned:
        return result
    if result is image and upright is None and _ORIENTATION in image.getexif():
        del image.getexif()[_ORIENTATION]
    result.info = {}  # the pixels are upright and opaque now; stale metadata would have a second reader turn them again
    return result


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def _from_uint16(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_float(values: np.ndarray) -> np.ndarray:
    values = np.nan_to_num(values.astype(np.float32), nan=0.0)
    white = 1.0 if values.max() <= 1.0 else 255.0
    return np.rint(values.clip(0.0, white) * (255.0 / white)).astype(np.uint8)


def _from_array(array: np.ndarray, channels: int) -> Image.Image | np.ndarray:
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ImageError(f"array of shape {array.shape}: expected (H, W) or (H, W, C)")
    pixels = array[:, :, None] if array.ndim == 2 else array
    bands = pixels.shape[2]
    if bands not in ((1, 3, 4) if channels in (1, 3) else (channels,)):
        hint = "; put the channels last" if array.shape[0] in (1, 3, 4, channels) else ""
        raise ImageError(f"array of shape {array.shape}: expected (H, W, {channels}){hint}")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    elif pixels.dtype == np.uint16:
        pixels = _from_uint16(pixels)
    elif pixels.dtype.kind == "f":
        pixels = _from_float(pixels)
    elif pixels.dtype.kind in "iu" and pixels.dtype != np.uint8:
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 255:
            raise ImageError(f"{pixels.dtype} array with values from {low} to {high}: expected 0 to 255")
        pixels = pixels.astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise ImageError(f"array of {pixels.dtype}: expected numbers")
    if channels not in (1, 3):
        return pixels
    return _convert(Image.fromarray(pixels[:, :, 0] if bands == 1 else pixels), channels, owned=True)
