"""What may go into a shard: whole pictures of bearable size, and documents in utf-8."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from datamodules.inputs.entries import Refused
from datamodules.inputs.pngs import encode
from datamodules.transforms import decode_into

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb, and the readers'
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_CONVERTED = ("BMP", "GIF", "PPM", "TIFF")  # to PNG
_FORMATS = ("JPEG", "PNG", "WEBP", *_CONVERTED)
_SIMPLEJPEG = ("RGB", "YCbCr", "Gray")  # colour spaces the readers decode with it
_ORIENTATION = 0x0112

# Above half of its limit Pillow warns; --max-pixels decides here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Picture:
    """An image file as it goes into a shard.

    Attributes:
        extension: "jpg", "png" or "webp".
        data: the file.
        change: why it is not the file that came: "", "resized", "turned" (its EXIF orientation is now in the pixels)
            or "converted" (from a format that readers do not know).
    """

    extension: str
    data: bytes
    change: str = ""


def picture(data: bytes, max_pixels: int, size: int | None) -> Picture:
    """Check an image file by decoding it, and bring it into the form to be stored.

    A file in a format that readers know, upright and of the right size, stays as it is, byte for byte. Anything
    else is stored as PNG. Resizing is the readers' own: the shorter side to ``size``, then the centre.

    Args:
        data: the file.
        max_pixels: largest height x width, looked at before anything is decoded.
        size: height and width to store; None keeps every size.

    Raises:
        Refused: it is no image, it is damaged, too large, animated, or has more than 8 bits per channel.
    """
    with _refusing(data, max_pixels):
        return _picture(data, max_pixels, size)


def whole(data: bytes) -> tuple[int, int]:
    """Height and width of an image file that readers can decode to the end.

    Raises:
        Refused: they cannot.
    """
    with _refusing(data, MAX_PIXELS), Image.open(io.BytesIO(data), formats=list(_FORMATS)) as image:
        _bearable(image, MAX_PIXELS)
        _decode(data, image)
        return image.height, image.width


@contextmanager
def _refusing(data: bytes, max_pixels: int) -> Iterator[None]:
    """Turn what decoders raise into a refusal."""
    if not data:
        raise Refused("empty")
    try:
        yield
    except Refused:
        raise
    except UnidentifiedImageError as error:
        raise Refused("not an image", f"it begins with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise Refused("too many pixels", f"more than {max_pixels}") from error
    except Exception as error:  # decoders raise a dozen types for broken input
        raise Refused("broken image", f"{type(error).__name__}: {error}"[:200]) from error


def _bearable(image: Image.Image, max_pixels: int) -> None:
    """Refuse by what the header tells, before anything is decoded."""
    width, height = image.size
    if width * height > max_pixels:
        raise Refused("too many pixels", f"{width}x{height}, the limit is {max_pixels}")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise Refused("animation", f"{getattr(image, 'n_frames', 0)} frames")
    if image.mode.startswith(("I", "F")):
        raise Refused("not 8 bits per channel", f"mode {image.mode}")


def _picture(data: bytes, max_pixels: int, size: int | None) -> Picture:
    with Image.open(io.BytesIO(data), formats=list(_FORMATS)) as image:
        _bearable(image, max_pixels)
        width, height = image.size
        kind = image.format or ""
        turned = _orientation(image) != 1
        if kind in _KEPT and not turned and size in (None, height) and size in (None, width):
            _decode(data, image)
            return Picture(_KEPT[kind], data)
        change = "turned" if turned else "converted"
        grey = _grey(image)
        if turned or kind in _CONVERTED:
            upright = ImageOps.exif_transpose(image)
            data = encode(np.asarray(upright.convert("L" if grey else "RGB")))
    if size is None:
        return Picture("png", data, change)
    pixels = np.empty((size, size, 1 if grey else 3), dtype=np.uint8)
    decode_into(data, pixels)
    return Picture("png", encode(pixels[:, :, 0] if grey else pixels), "resized")


def document(data: bytes) -> bytes:
    """Check a document.

    Raises:
        Refused: it is empty or blank, or not utf-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("not utf-8", f"byte {data[error.start]:#04x} at {error.start}") from error
    if not text.strip():
        raise Refused("empty")
    return data


def _decode(data: bytes, image: Image.Image) -> None:
    """Decode with what the readers will use, so that nothing is stored that they cannot read."""
    if data[:2] == b"\xff\xd8" and simplejpeg.decode_jpeg_header(data)[2] in _SIMPLEJPEG:
        simplejpeg.decode_jpeg(data)
    else:
        image.load()


def _grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1)) or 1
    except Exception:  # damaged EXIF data do not make the picture worse
        return 1
