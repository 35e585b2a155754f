"""CIFAR-10 and CIFAR-100 as their authors publish them for Python: pickled batches, in a tar.gz or extracted.

The pickles are read by an unpickler that knows bytes, numbers, lists, dictionaries and arrays, and nothing that could
run code.
"""

import io
import pickle
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.inputs.entries import Choices, Inputs, Item, Refused, safe_name
from datamodules.inputs.pngs import encode

_PIXELS = 32 * 32 * 3
_LARGEST_MEMBER = 2**30  # bytes; CIFAR-100's largest file has 155 MB
_BATCH = re.compile(r"data_batch_\d+|test_batch|train|test")
_META = ("batches.meta", "meta")
FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
_WHAT = "cifar-10-python.tar.gz, cifar-100-python.tar.gz, or the folder extracted from one of them"


class Cifar(Inputs):
    """One input per image: pixels 32x32 RGB, written as PNG; fine classes for CIFAR-100.

    Args:
        source: the archive, or the folder of the batches.
        choices: not used.

    Raises:
        ValueError: the batches are missing, or are not what they should be.
    """

    kind = "cifar"
    published = True

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__()
        files = _from_folder(source) if source.is_dir() else self._from_archive(source)
        batches = sorted(name for name in files if _BATCH.fullmatch(name))
        if not batches:
            raise ValueError(
                f"{source} holds no CIFAR batch, but {', '.join(sorted(files)[:5]) or 'nothing'}: {_what()}"
            )
        self._rows: list[tuple[str, int]] = []
        self._pixels: dict[str, NDArray[np.uint8]] = {}
        self._labels: dict[str, list[int]] = {}
        for name in batches:
            self._pixels[name], self._labels[name] = _batch(source, name, load(files[name], f"{source}: {name}"))
            self._rows += [(name, row) for row in range(len(self._labels[name]))]
        meta: Any = next((load(files[name], f"{source}: {name}") for name in _META if name in files), None)
        names = meta.get(b"fine_label_names", meta.get(b"label_names")) if isinstance(meta, dict) else None
        self.class_names = [name.decode("utf-8", "replace") for name in names or [] if isinstance(name, bytes)]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._rows)

    def name(self, number: int) -> str:
        """Batch and row."""
        name, row = self._rows[number]
        return f"{name}#{row}"

    def mark(self, number: int) -> object:
        """Class, and checksum of the pixels."""
        name, row = self._rows[number]
        return self._labels[name][row], zlib.crc32(self._pixels[name][row].tobytes())

    def part(self, number: int) -> str:
        """The authors' split."""
        return "test" if self._rows[number][0].startswith("test") else "train"

    def read(self, number: int) -> Item:
        """PNG of the pixels, and the class."""
        name, row = self._rows[number]
        label = self._labels[name][row]
        if label < 0:
            raise Refused("bad class", f"{label}, expected 0 or more")
        return Item(encode(self._pixels[name][row].reshape(3, 32, 32).transpose(1, 2, 0)), label=label)

    def _from_archive(self, path: Path) -> dict[str, bytes]:
        """Contents of the archive's batches by base name; nothing is unpacked to the disk."""
        found: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:*") as archive:
                for member in archive:
                    base = member.name.rpartition("/")[2]
                    try:
                        safe_name(member.name)
                    except Refused as refusal:
                        self.refused.append((member.name, refusal))
                        continue
                    if not (_BATCH.fullmatch(base) or base in _META):
                        self.left_out += member.isreg()
                        continue
                    file = archive.extractfile(member) if member.isreg() else None
                    if file is None or member.size > _LARGEST_MEMBER:
                        self.refused.append((member.name, Refused("not a regular file", "or more than 1 GiB")))
                        continue
                    found[base] = file.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{path} is not a whole tar archive ({error}): {_what()}") from error
        return found


class _Unpickler(pickle.Unpickler):
    """Reads plain values and numpy arrays; any other name in the pickle is an error, so no code of it can run."""

    def find_class(self, module: str, name: str) -> Any:
        """The few callables that arrays are rebuilt with."""
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")


def _empty_array(kind: type, shape: object, code: object) -> NDArray[Any]:
    """Start of every pickled array; its true shape comes afterwards, with as many bytes."""
    return np.ndarray((0,), dtype=np.uint8)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return str(text).encode("latin1")


def load(data: bytes, name: str) -> Any:
    """Read a pickle of plain values and arrays.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{name} is not a file of plain arrays ({type(error).__name__}: {error}): {_what()}"
        ) from error


def _from_folder(source: Path) -> dict[str, bytes]:
    inner = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    for folder in inner:
        names = [path for path in folder.iterdir() if _BATCH.fullmatch(path.name) or path.name in _META]
        found = {path.name: path.read_bytes() for path in names if path.is_file() and _inside(path, source)}
        if any(_BATCH.fullmatch(name) for name in found):
            return found
    return {}


def _inside(path: Path, source: Path) -> bool:
    return path.resolve().is_relative_to(source.resolve()) and path.stat().st_size <= _LARGEST_MEMBER


def _batch(source: Path, name: str, content: Any) -> tuple[NDArray[np.uint8], list[int]]:
    """Pixels (n, 3072) and classes of one batch."""
    content = content if isinstance(content, dict) else {}
    pixels = content.get(b"data")
    labels = content.get(b"fine_labels", content.get(b"labels"))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise ValueError(f"{source}: {name} holds no pixels of shape (n, {_PIXELS}): {_what()}")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(isinstance(one, int) for one in labels):
        raise ValueError(f"{source}: {name} holds no class for each of its {len(pixels)} images: {_what()}")
    return pixels, labels


def _what() -> str:
    return f"expected {_WHAT}. Download it again, or choose another --kind."
