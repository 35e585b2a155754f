"""Drawing: grids of samples with titles and labels in the margin, film strips, and their encoded files.

Pictures are made for cards about 350 pixels wide: small samples are enlarged by whole factors without blur, never
stretched in value. The same input gives the same bytes. A grid's file remembers where its tiles are, so that later
pictures can be built from earlier files.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

PAPER = (250, 250, 248)
INK = (38, 38, 42)
PALE = (112, 112, 120)
CARD = 350  # pixels a small picture may be wide and its tiles high
PAD = 6
SEPARATOR = "   "
LAYOUT_KEY = "layout"


@dataclass(frozen=True)
class Layout:
    """Where the tiles of a grid are, in pixels; ``scale`` is the whole factor they were enlarged by."""

    left: int
    top: int
    width: int
    height: int
    gap: int
    columns: int
    count: int
    scale: int


@dataclass(frozen=True)
class Grid:
    """A drawn grid: (H, W, 3) uint8 pixels, its layout and its title."""

    pixels: np.ndarray
    layout: Layout
    title: str


def to_tiles(images: Tensor | np.ndarray, white: int = 255) -> np.ndarray:
    """Pictures of a codec as drawable tiles.

    Args:
        images: (N, 1 or 3, H, W) uint8.
        white: stored value shown as white; a property of the data set, never of the pictures at hand.

    Returns:
        (N, H, W, 3) uint8 on the CPU.
    """
    array = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images).transpose(0, 2, 3, 1)
    if white != 255:
        array = np.rint(array * (255.0 / white)).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:3], 3)))


def shrink(tiles: np.ndarray, side: int) -> np.ndarray:
    """Reduce tiles by the smallest whole factor that makes them at most ``side`` pixels wide and high."""
    factor = -(-max(tiles.shape[1:3]) // side)
    if factor == 1:
        return tiles
    return np.stack([np.asarray(Image.fromarray(tile).reduce(factor)) for tile in tiles])


def even_columns(count: int, most: int) -> int:
    """Columns of a near-square grid of ``count`` tiles with full rows if possible, at most ``most``."""
    root = max(1, min(most, round(count**0.5)))
    return next((c for c in range(root, min(most, 2 * root) + 1) if count % c == 0), root)


def grid(
    tiles: np.ndarray,
    columns: int,
    *,
    heading: str,
    details: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    card: int = CARD,
) -> Grid:
    """Draw tiles row by row below a title.

    Args:
        tiles: (N, H, W, 3) uint8; a last row may be short.
        columns: tiles per row.
        heading: first words of the title, in dark ink.
        details: further parts of the title, in pale ink; a line breaks only between parts.
        row_labels: one per row, drawn in the left margin.
        column_labels: one per column, drawn above the tiles.
        card: width available to small pictures; larger samples are drawn at their own size.

    Returns:
        The picture, ``card`` wide unless the samples themselves are wider; tiles stand in the middle.
    """
    count, height, width = tiles.shape[:3]
    rows = -(-count // columns)
    gap = 2 if max(height, width) <= 32 else 4
    small = _font(11)
    label_width = max((_width(small, label) for label in row_labels), default=-PAD // 2) + PAD // 2
    left = PAD + label_width
    room = card - left - PAD - (columns - 1) * gap, card - (rows - 1) * gap
    scale = max(1, min(room[0] // (columns * width), room[1] // (rows * height)))
    tile_w, tile_h = width * scale, height * scale
    total_w = left + columns * tile_w + (columns - 1) * gap + PAD
    font = _font(12 if total_w <= 400 else 15)
    # A card stretches whatever it shows to its own width; a narrower picture would lose its whole factor there.
    left, total_w = left + max(0, card - total_w) // 2, max(card, total_w)
    lines = _wrap(font, [heading, *details], total_w - 2 * PAD)
    line_h = round(font.size * 1.35)
    top = PAD + len(lines) * line_h + (line_h if column_labels else PAD // 2)
    canvas = Image.new("RGB", (total_w, top + rows * tile_h + (rows - 1) * gap + PAD), PAPER)
    layout = Layout(left, top, tile_w, tile_h, gap, columns, count, scale)
    draw = ImageDraw.Draw(canvas)
    _draw_title(draw, lines, font, line_h, len(heading.replace(" ", "  ")))
    for tile, box in zip(tiles, _boxes(layout), strict=True):
        canvas.paste(Image.fromarray(tile).resize((tile_w, tile_h), Image.Resampling.NEAREST), box[:2])
    for row, label in enumerate(row_labels):
        middle = top + row * (tile_h + gap) + tile_h // 2
        draw.text((left - PAD // 2 - 1, middle), label, INK, small, anchor="rm")
    for column, label in enumerate(column_labels):
        middle = left + column * (tile_w + gap) + tile_w // 2
        draw.text((middle, top - 3), label, PALE, small, anchor="ms")
    return Grid(np.asarray(canvas), layout, SEPARATOR.join([heading, *details]))


def encode_png(picture: Grid) -> bytes:
    """PNG with the title and the layout as text chunks."""
    info = PngImagePlugin.PngInfo()
    info.add_text("title", picture.title)
    info.add_text(LAYOUT_KEY, json.dumps(asdict(picture.layout)))
    buffer = io.BytesIO()
    Image.fromarray(picture.pixels).save(buffer, "PNG", pnginfo=info, compress_level=6)
    return buffer.getvalue()


def read_tiles(path: Path) -> np.ndarray:
    """Samples in a file written by :func:`encode_png`, at their own size, (N, H, W, 3) uint8.

    Raises:
        ValueError: the file is no such grid.
    """
    with Image.open(path) as opened:
        text = getattr(opened, "text", {}).get(LAYOUT_KEY)
        if text is None:
            raise ValueError(f"{path} is not a grid drawn by callbacks.pictures; it has no layout. Remove it.")
        layout, pixels = Layout(**json.loads(text)), np.asarray(opened.convert("RGB"))
    return np.stack([pixels[y0 : y1 : layout.scale, x0 : x1 : layout.scale] for x0, y0, x1, y1 in _boxes(layout)])


def write_grid(path: Path, images: np.ndarray, *, title: str, white: int = 255, columns: int | None = None) -> Path:
    """Draw pictures as a near-square grid into a file.

    Args:
        path: of the PNG; its folder exists.
        images: (N, 1 or 3, H, W) uint8.
        title: words; the first is the heading.
        white: stored value shown as white.
        columns: tiles per row, or None to choose.

    Returns:
        ``path``.
    """
    heading, *details = re.split(r" (?![\d-])", title)  # a number stays with its word
    columns = columns or even_columns(len(images), 12 if max(images.shape[2:]) <= 32 else 8)
    drawn = grid(to_tiles(images, white), columns, heading=heading, details=details)
    path.write_bytes(encode_png(drawn))
    return path


def film_strip(columns: Sequence[np.ndarray], labels: Sequence[str], heading: str, details: Sequence[str] = ()) -> Grid:
    """The same samples at several moments: one column per moment, one row per sample.

    Args:
        columns: (N, H, W, 3) uint8 tiles per moment, equal shapes.
        labels: one per column.
        heading: first words of the title.
        details: further parts of the title.
    """
    tiles = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])
    return grid(tiles, len(columns), heading=heading, details=details, column_labels=labels)


def animation(
    frames: Sequence[np.ndarray], columns: int, captions: Sequence[str], *, side: int = 160, seconds: float = 2.4
) -> bytes:
    """Animated PNG of grids, first and last frame held longer, endless.

    Args:
        frames: (N, H, W, 3) uint8 tiles per frame.
        columns: tiles per row.
        captions: one per frame, drawn below.
        side: largest width and height in pixels.
        seconds: of one round, besides the extra time of the first and the last frame.
    """
    count = len(frames[0])
    rows = -(-count // columns)
    pad, gap, foot = 4, 2, 14
    across, down = (side - 2 * pad - (columns - 1) * gap) // columns, (side - pad - foot - (rows - 1) * gap) // rows
    frames = [shrink(tiles, min(across, down)) for tiles in frames]
    height, width = frames[0].shape[1:3]
    scale = max(1, min(across // width, down // height))
    layout = Layout(pad, pad, width * scale, height * scale, gap, columns, count, scale)
    size = layout.columns * (layout.width + gap) - gap + 2 * pad, rows * (layout.height + gap) - gap + pad + foot
    drawn = []
    for tiles, caption in zip(frames, captions, strict=True):
        canvas = Image.new("RGB", size, PAPER)
        for tile, box in zip(tiles, _boxes(layout), strict=True):
            canvas.paste(Image.fromarray(tile).resize((layout.width, layout.height), Image.Resampling.NEAREST), box[:2])
        ImageDraw.Draw(canvas).text((size[0] // 2, size[1] - 3), caption, PALE, _font(10), anchor="ms")
        drawn.append(canvas)
    step = round(1000 * seconds / len(drawn))
    held = [step + 300, *[step] * (len(drawn) - 2), step + 1500][-len(drawn) :]
    buffer = io.BytesIO()
    drawn[0].save(buffer, "PNG", save_all=True, append_images=drawn[1:], duration=held, loop=0, compress_level=6)
    return buffer.getvalue()


def short_count(number: float) -> str:
    """A count in at most five characters: 950, 1.2k, 307k, 12M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            value = number / limit
            return (f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}") + suffix
    return f"{number:.0f}"


def _boxes(layout: Layout) -> list[tuple[int, int, int, int]]:
    boxes = []
    for index in range(layout.count):
        row, column = divmod(index, layout.columns)
        x, y = layout.left + column * (layout.width + layout.gap), layout.top + row * (layout.height + layout.gap)
        boxes.append((x, y, x + layout.width, y + layout.height))
    return boxes


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # a plain bitmap font only without FreeType, which wheels contain
    return font


def _width(font: ImageFont.FreeTypeFont, words: str) -> int:
    return round(font.getlength(words))


def _wrap(font: ImageFont.FreeTypeFont, parts: Sequence[str], room: int) -> list[str]:
    first, *others = [part.replace(" ", "  ") for part in parts]  # the font's own space is a hair wide at this size
    lines = [first]
    for part in others:
        longer = lines[-1] + " " * 4 + part
        if _width(font, longer) <= room:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _draw_title(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], font: ImageFont.FreeTypeFont, line_h: int, heading: int
) -> None:
    for index, line in enumerate(lines):
        x, y = float(PAD), PAD + index * line_h
        if index == 0:
            draw.text((x, y), line[:heading], INK, font)
            x, line = x + font.getlength(line[:heading]), line[heading:]
        draw.text((x, y), line, PALE, font)
