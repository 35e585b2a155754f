"""A look at samples: a contact sheet of pictures with their classes and captions, or lines of text for the rest."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datamodules import survey, tarindex
from datamodules.check import ITEM_BYTES
from datamodules.transforms import IMAGE_EXTENSIONS

PAPER, INK, PALE, FRAME = (250, 250, 248), (38, 38, 42), (112, 112, 120), (224, 224, 220)
_CELL = 160  # pixels of a cell's longer side
_SMALL = 96  # images below this are enlarged by a whole factor, without blur
_GAP = 14
_CAPTION_LINES = 4
_TEXT_LINES = 6
_TEXT_WIDTH = 100
_WIDE = "DejaVuSans.ttf"  # has more scripts than Pillow's own font, where it is installed

Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Look:
    """One sample taken out to be looked at: shard, key, and members by extension."""

    shard: str
    key: str
    members: dict[str, bytes]

    def picture(self) -> Image.Image | None:
        """The image in RGB, None if there is none or it cannot be decoded."""
        data = next((self.members[kind] for kind in IMAGE_EXTENSIONS if kind in self.members), None)
        if data is None:
            return None
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
        except Exception:  # decoders raise a dozen types; data check tells which
            return None


def pick(paths: Sequence[Path], count: int) -> list[Look]:
    """Samples spread evenly over all shards.

    Args:
        paths: the shards.
        count: how many samples, at most.

    Raises:
        ValueError: a shard cannot be read.
    """
    found: list[Look] = []
    try:
        indices = [tarindex.load(path) for path in paths]
        starts = np.cumsum([0] + [len(index) for index in indices])
        total = int(starts[-1])
        for sample in np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)):
            shard = int(np.searchsorted(starts, sample, side="right")) - 1
            row = int(sample - starts[shard])
            with paths[shard].open("rb") as file:
                members = survey.read_row(file.fileno(), indices[shard], row)
            found.append(Look(paths[shard].name, indices[shard].key(row), members))
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror or error}. Check all of it with data check.") from error
    return found


def sheet(looks: Sequence[Look], title: str, details: str, class_names: Sequence[str]) -> Image.Image:
    """Draw pictures in rows, each with its class and caption below.

    Small pictures are enlarged by one whole factor for all of them, without blur; large ones are brought to the size
    of a cell. Proportions are kept.

    Args:
        looks: samples with images; what cannot be decoded is drawn as an empty frame.
        title: what it is, drawn large.
        details: counts and sizes, drawn pale beside it.
        class_names: names of the classes 0, 1, ...; may be empty.

    Returns:
        RGB image.
    """
    pictures = [look.picture() for look in looks]
    sides = [max(picture.size) for picture in pictures if picture is not None] or [_CELL]
    cell = max(1, _CELL // max(sides)) * max(sides) if max(sides) <= _SMALL else _CELL
    small, large = _font(12), _font(17)
    captions = [_wrapped(small, _caption(look), cell) for look in looks]
    classes = [_class(look, class_names) for look in looks]
    columns = _columns(len(looks))
    line = 16
    below = [(line if name else 0) + line * len(lines) for name, lines in zip(classes, captions, strict=True)]
    rows = [range(begin, min(begin + columns, len(looks))) for begin in range(0, len(looks), columns)]
    fitted = [None if picture is None else _fit(picture, cell, max(sides)) for picture in pictures]
    heights = [max([fitted[i].height if fitted[i] else cell // 2 for i in row]) for row in rows]  # type: ignore[union-attr]
    tall = [height + 6 + max(below[i] for i in row) for height, row in zip(heights, rows, strict=True)]
    width = max(columns * (cell + _GAP) + _GAP, 480)
    head = _heading(large, small, title, details, width - 2 * _GAP)
    top = _GAP + 24 + line * (len(head) - 1)
    canvas = Image.new("RGB", (width, top + sum(tall) + _GAP * (len(rows) + 1)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, _GAP), title, INK, large)
    draw.text((_GAP + large.getlength(title) + 12, _GAP + 4), head[0], PALE, small)
    for number, text in enumerate(head[1:], 1):
        draw.text((_GAP, _GAP + 8 + line * number), text, PALE, small)
    y = top + _GAP
    for height, total, row in zip(heights, tall, rows, strict=True):
        for column, number in enumerate(row):
            x = _GAP + column * (cell + _GAP)
            _draw_picture(canvas, fitted[number], (x, y), (cell, height))
            at = y + height + 6
            if classes[number]:
                draw.text((x, at), _cut(small, classes[number], cell), INK, small)
                at += line
            for text in captions[number]:
                draw.text((x, at), text, PALE, small)
                at += line
        y += total + _GAP
    return canvas


def lines_of(look: Look, card: dict[str, Any]) -> list[str]:
    """A sample without picture as text: a title line, then the first lines of documents and the shapes of arrays."""
    found = [f"{look.shard}  {look.key}"]
    for name, data in sorted(look.members.items()):
        kind = name.rpartition(".")[2]
        if kind in ("txt", "py", "json", "cls"):
            shown = data.decode("utf-8", "replace").rstrip().splitlines()
            many = f"  ({len(shown)} lines, {len(data)} bytes)" if len(shown) > 1 else ""
            found.append(f"  .{name}{many}")
            found += [f"    {_shortened(text)}" for text in shown[:_TEXT_LINES]]
            found += ["    ..."] if len(shown) > _TEXT_LINES else []
        else:
            found.append(f"  .{name}  {_array(data, card.get(name))}")
    return found


def _array(data: bytes, card: Any) -> str:
    if not isinstance(card, dict) or card.get("dtype") not in ITEM_BYTES:
        return f"{len(data)} bytes"
    items = len(data) // ITEM_BYTES[card["dtype"]]
    shape = card.get("shape")
    told = f"{card['dtype']} {list(shape)}" if isinstance(shape, list) else f"{items} x {card['dtype']}"
    kind = {"float16": np.float16, "float32": np.float32, "uint16": np.uint16, "uint32": np.uint32}.get(card["dtype"])
    if kind is None or len(data) % ITEM_BYTES[card["dtype"]]:
        return f"{told}, {len(data)} bytes"
    values = np.frombuffer(data, dtype=kind)
    if values.size and np.issubdtype(values.dtype, np.floating):
        wide = values.astype(np.float64)
        return f"{told}, mean {wide.mean():.3g}, deviation {wide.std():.3g}, {wide.min():.3g} to {wide.max():.3g}"
    return f"{told}: {' '.join(map(str, values[:12]))}{' ...' if values.size > 12 else ''}"


def _columns(count: int) -> int:
    """Columns of a sheet somewhat wider than high, without a nearly empty last row where that can be had."""
    about = max(1, round((1.5 * count) ** 0.5))
    choices = range(max(1, about - 1), about + 3)
    return min(count, min(choices, key=lambda columns: (-count % columns, abs(columns - about)))) or 1


def _caption(look: Look) -> str:
    return " ".join(look.members.get("txt", b"").decode("utf-8", "replace").split())


def _class(look: Look, names: Sequence[str]) -> str:
    text = look.members.get("cls", b"").decode("ascii", "replace").strip()
    if text.isdigit() and int(text) < len(names):
        return f"{text} {names[int(text)]}" if names[int(text)] != text else text
    return text


def _fit(picture: Image.Image, cell: int, largest: int) -> Image.Image:
    if largest <= _SMALL:
        factor = cell // largest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _draw_picture(canvas: Image.Image, picture: Image.Image | None, at: tuple[int, int], box: tuple[int, int]) -> None:
    """Place a picture at the bottom left of its box, or a crossed frame where there is none."""
    if picture is not None:
        canvas.paste(picture, (at[0], at[1] + box[1] - picture.height))
        return
    draw = ImageDraw.Draw(canvas)
    right, bottom = at[0] + box[0] - 1, at[1] + box[1] - 1
    draw.rectangle((*at, right, bottom), outline=FRAME)
    draw.text(((at[0] + right) // 2, (at[1] + bottom) // 2), "not readable", PALE, _font(12), anchor="mm")


def _heading(large: Font, small: Font, title: str, details: str, room: int) -> list[str]:
    """Details cut into lines; the first one stands beside the title."""
    first = room - large.getlength(title) - 12
    words, lines = details.split(" "), [""]
    for word in words:
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if small.getlength(longer) <= (first if len(lines) == 1 else room):
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _wrapped(font: Font, text: str, room: int) -> list[str]:
    """A caption in a few lines of the width of a cell."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        elif len(lines) == _CAPTION_LINES:
            lines[-1] = _cut(font, f"{lines[-1]} {word}", room)
            break
        else:
            lines.append(word)
    return [_cut(font, line, room) for line in lines]


def _cut(font: Font, text: str, room: int) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}...") > room:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _shortened(text: str) -> str:
    text = text.expandtabs(4)
    return text if len(text) <= _TEXT_WIDTH else f"{text[: _TEXT_WIDTH - 3]}..."


def _font(size: int) -> Font:
    try:
        return ImageFont.truetype(_WIDE, size)
    except OSError:
        font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # a plain bitmap font only without FreeType, which wheels contain
    return font
