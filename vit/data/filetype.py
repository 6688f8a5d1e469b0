"""Recognises a file by its first bytes: an image that can be read here, or the name of its kind.

Notable:
- The name of a file decides nothing but this: camera RAW files are TIFF files by their bytes, with a small preview
  that Pillow takes for the image, so their endings are listed.
- A file is opened only where it is an ordinary one, and one block of it is read.
- Only bytes that no signature names are shown to Pillow, which loads all of its readers for that.

Standard library only; Pillow where a function needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import stat
from collections.abc import Callable

HEAD = 512
"""Bytes read of each file; the signature of a tar archive ends at 262."""

_CONVERT = "convert it to JPEG or PNG"
UNDECODED = {
    "HEIC file": "to read it: pip install pillow-heif",
    "AVIF file": "Pillow from 11.3 on reads it",
    "JPEG XL file": _CONVERT,
    "RAW file": _CONVERT,
}
"""Images that cannot be read here, and what would help."""

NOT_READ = "file that cannot be read"
BROKEN_LINK = "broken link"

_IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# offset, first bytes, kind: the specifications of each format, as collected by file(1) and libmagic
_SIGNATURES = (
    (0, b"\xff\x0a", "JPEG XL file"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL file"),
    (0, b"FUJIFILMCCD-RAW", "RAW file"),
    (0, b"IIRO", "RAW file"),
    (0, b"IIRS", "RAW file"),
    (0, b"IIU\0", "RAW file"),
    (0, b"FOVb", "RAW file"),
    (0, b"\0MRM", "RAW file"),
    (0, b"\x93NUMPY", "NumPy file"),
    (0, b"%PDF", "PDF file"),
    (0, b"PK\x03\x04", "archive file"),
    (0, b"\x1f\x8b", "archive file"),
    (0, b"BZh", "archive file"),
    (0, b"\xfd7zXZ\0", "archive file"),
    (0, b"7z\xbc\xaf'\x1c", "archive file"),
    (0, b"Rar!\x1a\x07", "archive file"),
    (0, b"(\xb5/\xfd", "archive file"),
    (257, b"ustar", "archive file"),
    (0, b"\x1aE\xdf\xa3", "video file"),
    (8, b"AVI ", "video file"),
    (4, b"moov", "video file"),
    (4, b"mdat", "video file"),
    (4, b"wide", "video file"),
    (0, b"\0\0\1\xba", "video file"),
    (0, b"\0\0\1\xb3", "video file"),
    (0, b"FLV\1", "video file"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "video file"),
    (8, b"WAVE", "audio file"),
    (0, b"ID3", "audio file"),
    (0, b"fLaC", "audio file"),
    (0, b"OggS", "audio file"),
)
# brands of ISO base media files (ISO/IEC 14496-12, 23008-12, 23000-22)
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF = {b"avif", b"avis"}
_RAW_ENDINGS = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw", ".nef",
    ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip
_TEXT = bytes(range(7, 14)) + b"\x1b" + bytes(range(32, 256))
_PIXMAP = re.compile(rb"P[1-6][\s#]")  # the header of a portable pixmap is text


def content_kind(head: bytes, name: str = "") -> str | None:
    """Name the kind of a file that begins with the bytes `head`; `name` is the file's.

    Returns "image" for a format that Pillow always reads; a phrase such as "HEIC file", "video file" or "text file"; or
    None where no signature fits.
    """
    if head.startswith(_IMAGES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "image"
    if head.startswith(_TIFF):
        return "RAW file" if os.path.splitext(name)[1].lower() in _RAW_ENDINGS else "image"
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4]), len(head))
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, end, 4))}
        if head[8:12] == b"crx ":
            return "RAW file"
        return "AVIF file" if brands & _AVIF else "HEIC file" if brands & _HEIC else "video file"
    for offset, magic, kind in _SIGNATURES:
        if head.startswith(magic, offset):
            return kind
    if head and not _PIXMAP.match(head) and _is_text(head):
        return "SVG file" if b"<svg" in head else "text file"
    return None


def decodable(kind: str) -> bool:
    """Say whether an installed library reads this kind of image, which Pillow alone, or an older Pillow, does not."""
    if kind == "HEIC file":
        return importlib.util.find_spec("pillow_heif") is not None
    return kind == "AVIF file" and _reads_avif()


@functools.cache
def load_heif() -> None:
    """Let Pillow read HEIC files, with the package pillow-heif."""
    from pillow_heif import register_heif_opener

    register_heif_opener()


def file_kind(path: str, channels: int = 3) -> str | None:
    """Name the kind of a file that is no image, or none that can be read here; None for an image that can.

    Reads one block of it.  `channels` are the model's: one of more or less than 1 or 3 also takes NumPy files.
    """
    ending = os.path.splitext(path)[1]
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "no ordinary file"
        if status.st_size == 0:
            return "empty file"
        with open(path, "rb", buffering=0) as file:
            head = file.read(HEAD) or b""
    except OSError as error:
        return BROKEN_LINK if os.path.islink(path) and not isinstance(error, PermissionError) else NOT_READ
    kind = content_kind(head, path)
    if kind == "image" or (kind == "NumPy file" and channels not in (1, 3)):
        return None
    if kind is not None:
        return None if kind in UNDECODED and decodable(kind) else kind
    if _pillow_reads(path, head):
        return None
    return f"{ending.lower()} file" if 1 < len(ending) <= 12 and ending.isprintable() else "unknown file"


def _is_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 says so
        return True
    if head.translate(None, _TEXT):  # controls that no text has
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:  # cut within a letter, or an older encoding, mostly ASCII
        return error.start > len(head) - 4 or sum(byte > 127 for byte in head) < len(head) // 4
    return True


def _pillow_reads(path: str, head: bytes) -> bool:
    """Say whether one of Pillow's readers recognises the file by its bytes."""
    from PIL import Image, UnidentifiedImageError

    formats = [name for name, accept in _readers().items() if accept(head)]
    try:
        if formats:
            Image.open(path, formats=formats).close()
    except (OSError, SyntaxError, UnidentifiedImageError):
        return False
    except Exception:  # too large, or damaged after its header: an image, and decoding it says what is wrong
        return True
    return bool(formats)


@functools.cache
def _readers() -> dict[str, Callable[[bytes], object]]:
    """Return Pillow's test of first bytes for each format that has one. PostScript needs another program to read."""
    from PIL import Image

    from vit.data.decode import NOT_DECODED

    def guarded(accept: Callable[[bytes], object], head: bytes) -> object:
        try:
            return accept(head[:16])
        except Exception:  # fewer bytes than the test unpacks
            return False

    Image.init()
    left_out = NOT_DECODED | {"EPS"}
    return {
        name: functools.partial(guarded, accept)
        for name, (_, accept) in Image.OPEN.items()
        if accept and name not in left_out
    }


@functools.cache
def _reads_avif() -> bool:
    from PIL import Image, features

    Image.init()
    return "AVIF" in Image.OPEN and bool(features.check("avif"))
