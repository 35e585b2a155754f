"""Captioned pictures for text-to-image runs: one letter or digit each, 32x32 RGB, drawn with Pillow's own font."""

import io
import json
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from datamodules import catalogue
from datamodules.order import sample_bits
from datamodules.writer import DatasetWriter

NAME = "glyphs32"
LICENCE = (
    "Drawn by this program with the typeface Aileron (Sora Sagano), embedded in Pillow; "
    "its name table says 'No Rights Reserved.'"
)
SIZE = 32
TRAIN, VAL = 20_000, 2_000
TRAIN_SHARDS, VAL_SHARDS = 8, 2
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PALETTE: dict[str, tuple[int, int, int]] = {
    "black": (16, 16, 16),
    "white": (244, 244, 244),
    "red": (216, 32, 32),
    "green": (24, 144, 56),
    "blue": (32, 64, 216),
    "yellow": (248, 208, 32),
    "pink": (248, 152, 200),
    "cyan": (64, 208, 232),
}
HEIGHTS = {"small": 12.0, "medium": 17.0, "large": 22.0}  # of a capital letter, in pixels
TILTS = {"upright": 0.0, "left": 20.0, "right": -20.0}  # in degrees, counter-clockwise

_SEED = 32
_FINE = 3  # masks are drawn this much larger, then averaged
_CONTRAST = 90.0  # least difference in luma between letter and ground
_CAPITAL = 0.7  # height of a capital letter in units of the font size
_STROKE = 0.9  # pixels added around the thin strokes of the typeface
_JITTER = {"small": 4, "medium": 2, "large": 1}  # pixels to either side
_WOBBLE = 4  # degrees to either side

Attributes = dict[str, str | float]


def write(root: Path | str) -> None:
    """Write 20,000 training and 2,000 validation pictures to ``root`` unless they are there; about 10 s and 80 MB.

    Members are ``<number>.png`` (RGB), ``<number>.txt`` (the caption), ``<number>.cls`` (place in ``CHARACTERS``) and
    ``<number>.json`` (what the caption says, so that pictures can be checked by rule: see ``colours``).

    Args:
        root: folder of the shards. A folder that already holds this data set is left as it is.

    Raises:
        ValueError: the folder holds something else or cannot be written.
    """
    root = Path(root)
    index = catalogue.read(root)
    if index is not None and index.dataset == NAME:
        return
    if not features.check("freetype2"):
        raise ValueError("the data set glyphs32 needs a Pillow that can draw text. Type: pip install --upgrade pillow")
    sources = {"pillow": version("pillow"), "freetype": str(features.version("freetype2"))}
    with DatasetWriter(root, dataset=NAME, licence=LICENCE, sources=sources) as writer:
        writer.write("train", _samples(range(TRAIN)), per_shard=TRAIN // TRAIN_SHARDS)
        writer.write("val", _samples(range(TRAIN, TRAIN + VAL)), per_shard=VAL // VAL_SHARDS)


def attributes(number: int) -> Attributes:
    """What picture ``number`` shows, as a function of the number alone.

    Returns:
        "character", "colour", "background", "size", "tilt" as words; "angle" in degrees counter-clockwise, "x" and
        "y", the distance of the letter's middle from the picture's, in pixels.
    """
    bits = int(sample_bits(_SEED, np.zeros(1, np.int64), np.array([number]))[0])

    def draw(choices: int) -> int:
        nonlocal bits
        bits, choice = divmod(bits, choices)
        return choice

    character = CHARACTERS[draw(len(CHARACTERS))]
    colour, background = _pairs()[draw(len(_pairs()))]
    size = list(HEIGHTS)[draw(len(HEIGHTS))]
    tilt = list(TILTS)[draw(len(TILTS))]
    jitter = _JITTER[size]
    return {
        "character": character,
        "colour": colour,
        "background": background,
        "size": size,
        "tilt": tilt,
        "angle": TILTS[tilt] + draw(2 * _WOBBLE + 1) - _WOBBLE,
        "x": draw(2 * jitter + 1) - jitter,
        "y": draw(2 * jitter + 1) - jitter,
    }


def caption(shown: Attributes) -> str:
    """A sentence about a picture, e.g. "a large red letter A on blue, tilted left"."""
    kind = "digit" if str(shown["character"]).isdigit() else "letter"
    begin = f"a {shown['size']} {shown['colour']} {kind} {shown['character']} on {shown['background']}"
    return begin if shown["tilt"] == "upright" else f"{begin}, tilted {shown['tilt']}"


def draw(shown: Attributes) -> NDArray[np.uint8]:
    """Draw a picture, uint8 (32, 32, 3)."""
    mask = _mask(str(shown["character"]), str(shown["size"]))
    shift = (_FINE * round(float(shown["x"])), _FINE * round(float(shown["y"])))
    turned = mask.rotate(float(shown["angle"]), resample=Image.Resampling.BILINEAR, translate=shift)
    share = np.asarray(turned.reduce(_FINE), dtype=np.int32)[:, :, None]
    front, back = (np.array(PALETTE[str(shown[name])], dtype=np.int32) for name in ("colour", "background"))
    return ((share * front + (255 - share) * back + 127) // 255).astype(np.uint8)


def colours(image: NDArray[np.uint8]) -> tuple[str, str]:
    """Names of the letter's and the background's colour as the pixels show them, whatever drew the picture.

    Each pixel counts for the nearest colour of ``PALETTE``: the one of the frame's majority is the background, the
    most frequent other one the letter's.

    Args:
        image: uint8 (H, W, 3).
    """
    table = np.array(list(PALETTE.values()), dtype=np.int32)
    distance = np.square(image.astype(np.int32)[:, :, None] - table).sum(axis=3)
    nearest = distance.argmin(axis=2)
    frame = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    background = int(np.bincount(frame, minlength=len(table)).argmax())
    # Half-covered pixels at the letter's edge have mixed colours; only those close to a colour of the table count.
    sure = np.bincount(nearest[distance.min(axis=2) < 1000], minlength=len(table))
    sure[background] = -1
    names = list(PALETTE)
    return names[int(sure.argmax())], names[background]


@cache
def _pairs() -> list[tuple[str, str]]:
    """Letter and background colours that differ enough in luma (ITU-R BT.601) to be read."""
    luma = {name: float(np.dot(rgb, (0.299, 0.587, 0.114))) for name, rgb in PALETTE.items()}
    return [(a, b) for a in PALETTE for b in PALETTE if abs(luma[a] - luma[b]) >= _CONTRAST]


@cache
def _mask(character: str, size: str) -> Image.Image:
    """One upright letter in the middle of a mask, drawn ``_FINE`` times as large as it will be."""
    side = SIZE * _FINE
    mask = Image.new("L", (side, side))
    font = ImageFont.load_default(HEIGHTS[size] * _FINE / _CAPITAL)
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    place = ((side - left - right) / 2, (side - top - bottom) / 2)
    stroke = round(_STROKE * _FINE / 2)
    ImageDraw.Draw(mask).text(place, character, fill=255, font=font, anchor="ls", stroke_width=stroke)
    return mask


def _samples(numbers: range) -> Iterator[dict[str, bytes | str]]:
    for number in numbers:
        shown = attributes(number)
        with io.BytesIO() as file:
            Image.fromarray(draw(shown)).save(file, format="PNG")
            yield {
                "__key__": f"{number:06d}",
                "png": file.getvalue(),
                "txt": caption(shown).encode(),
                "cls": str(CHARACTERS.index(str(shown["character"]))).encode(),
                "json": json.dumps(shown, sort_keys=True).encode(),
            }
