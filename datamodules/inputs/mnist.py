"""MNIST and its relatives (Fashion, EMNIST, KMNIST): idx files of images and labels, plain or gzip-compressed."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.inputs.entries import Choices, Inputs, Item
from datamodules.inputs.pngs import encode

_LARGEST = 2**32  # bytes of one file; the largest relative has half of that
_UBYTE = 8


class Mnist(Inputs):
    """One input per image, written as grey PNG (RGB if the file has three channels), with its class.

    Args:
        source: folder of the idx files, or one file of images; its labels lie beside it.
        choices: not used.

    Raises:
        ValueError: files are missing, damaged, or do not belong together.
    """

    kind = "mnist"
    published = True

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__()
        files = image_files(source) if source.is_dir() else [source]
        parts = [_part(path) for path in files]
        if not files or len(set(parts)) < len(parts):
            raise ValueError(
                f"{source} holds {len(files)} idx files of images ({', '.join(path.name for path in files[:4])}), "
                "expected one for training and one for testing. Type the path of one file of images."
            )
        self._images: dict[str, NDArray[np.uint8]] = {}
        self._labels: dict[str, NDArray[np.uint8]] = {}
        self._rows: list[tuple[str, int]] = []
        for path, part in zip(files, parts, strict=True):
            images, labels = read_idx(path, 3), read_idx(_labels_beside(path), 1)
            if len(images) != len(labels):
                raise ValueError(
                    f"{path} has {len(images)} images, but there are {len(labels)} labels. Copy both again."
                )
            self._images[part], self._labels[part] = images, labels
            self._rows += [(part, row) for row in range(len(images))]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._rows)

    def name(self, number: int) -> str:
        """Split and row."""
        part, row = self._rows[number]
        return f"{part}#{row}"

    def mark(self, number: int) -> object:
        """Class, and checksum of the pixels."""
        part, row = self._rows[number]
        return int(self._labels[part][row]), zlib.crc32(self._images[part][row].tobytes())

    def part(self, number: int) -> str:
        """The authors' split."""
        return self._rows[number][0]

    def read(self, number: int) -> Item:
        """PNG of the pixels, and the class."""
        part, row = self._rows[number]
        return Item(encode(self._images[part][row]), label=int(self._labels[part][row]))


def image_files(folder: Path) -> list[Path]:
    """Files of images in a folder, one name for each: the plain one where it is there twice."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz")
        if "images" in name and "idx3" in name and path.is_file():
            found.setdefault(name, path)
    return list(found.values())


def read_idx(path: Path, least: int) -> NDArray[np.uint8]:
    """Array of an idx file of unsigned bytes.

    Args:
        path: the file, plain or gzip-compressed.
        least: number of axes it has at least.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            head = file.read(4)
            axes = head[3] if len(head) == 4 else 0
            if head[:3] != bytes([0, 0, _UBYTE]) or not least <= axes <= 4:
                raise ValueError(f"{path} is not an idx file of {least}-axis bytes (it begins with {head!r}).")
            sizes = file.read(4 * axes).ljust(4 * axes, b"\xff")  # what is cut off reads as a negative size
            shape = [int(size) for size in np.frombuffer(sizes, dtype=">i4")]
            size = math.prod(shape)
            if min(shape) < 0 or size > _LARGEST:
                raise ValueError(f"{path} is damaged: its header tells the shape {shape}. Copy it again.")
            data = file.read(size + 1)  # never more than the header tells, whatever is compressed behind it
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}). Copy it again.") from error
    if len(data) != size:
        raise ValueError(f"{path} is damaged: shape {shape}, but {len(data)} bytes or more. Copy it again.")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _labels_beside(images: Path) -> Path:
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    plain = name.removesuffix(".gz")
    for candidate in (name, plain, f"{plain}.gz"):
        if (images.parent / candidate).is_file():
            return images.parent / candidate
    raise ValueError(f"{images} has no labels beside it: {images.parent / name} is missing. Copy it there.")


def _part(path: Path) -> str:
    return "train" if "train" in path.name else "test"
