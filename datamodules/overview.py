"""Numbers about every sample of a set that plans need, in one file: ``overview.safetensors`` beside index.json.

Rows of text follow from the lengths of all documents, buckets from the shapes of all images, and opening the index file
of every shard for them takes a millisecond each. The file holds one column per number, e.g. "size/txt", the samples of
all shards one after the other, smallest number format that fits. A second file of this kind, in the user's cache, holds
what was found out about shards that have no such file.

A column is believed for the content it was made from and no other: every shard carries a stamp, beside index.json the
sha256 that index.json states, in the cache size and time of change of the file; and every part of a column a checksum.
Whatever does not fit is as good as absent, since index files and shards tell the same.
"""

import contextlib
import json
import math
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from datamodules import tarindex
from datamodules.catalogue import ShardEntry
from datamodules.order import Ints
from datamodules.tarindex import TarIndex

FILE_NAME = "overview.safetensors"
SIZE, MEASURED = "size/", "measured/"

_FORMAT = 1
_ABOUT = "overview"
_KINDS: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_LENGTH = 8  # bytes of the number with which a safetensors file begins: the size of its header
_LONGEST = 2**30  # bytes of a header
_NOTED = 2**24  # samples of a set whose columns are noted, 2 to 8 bytes each while they are held


@dataclass(frozen=True)
class _Column:
    """Where a column lies: first byte, number format, shape and bytes of a sample's, and checksum of each shard's."""

    begin: int
    kind: np.dtype[Any]
    shape: tuple[int, ...]
    step: int
    sums: list[int]


@dataclass(frozen=True)
class _Header:
    """What a file holds: per shard its number, stamp, first row and rows; and the columns by name."""

    shards: dict[str, tuple[int, str, int, int]]
    columns: dict[str, _Column]


class Overview:
    """One such file, read shard by shard; nothing of the columns is kept. Safe to use from several threads.

    Args:
        path: where it is, or would be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header: _Header | None = None
        self._lock = threading.Lock()

    def column(self, name: str, shard: str, stamp: str, shape: tuple[int, ...]) -> Ints | None:
        """Numbers about the samples of a shard.

        Args:
            name: of the column, e.g. "size/txt" or "measured/shape".
            shard: name of the shard in this file.
            stamp: what stands for its content.
            shape: samples, and numbers per sample if there may be several.

        Returns:
            int64 of that shape; None where the file does not tell.
        """
        with self._lock:
            if self._header is None:
                self._header = _header(self.path)
        number, stated, first, rows = self._header.shards.get(shard, (0, "", 0, 0))
        column = self._header.columns.get(name)
        if column is None or stated != stamp or shape != (rows, *column.shape):
            return None
        data = _read(self.path, rows * column.step, column.begin + first * column.step)
        if len(data) != rows * column.step or zlib.crc32(data) != column.sums[number]:
            return None
        return np.frombuffer(data, dtype=column.kind).astype(np.int64).reshape(shape)


class Notes:
    """Columns of one list of shards that no overview beside them has, one file of the user's cache for each.

    A file is written once the column of the last shard is known; until then the columns are held.

    Args:
        places: paths or addresses of the shards; the files belong to exactly this list.
        stamps: what stands for the content of each; None for what cannot be told from other content.
    """

    def __init__(self, places: Sequence[str], stamps: Sequence[str | None]) -> None:
        self._list = "\0".join(places)
        self._stamps = list(stamps)
        self._files: dict[str, Overview] = {}
        self._held: dict[str, dict[int, NDArray[Any]]] = {}
        self._room: dict[str, int] = {}  # samples that may still be held, by column
        self._lock = threading.Lock()

    def column(self, shard: int, name: str, shape: tuple[int, ...]) -> Ints | None:
        """Numbers about the samples of a shard, int64 of that shape, or None."""
        stamp = self._stamps[shard]
        return None if stamp is None else self._file(name).column(name, str(shard), stamp, shape)

    def add(self, shard: int, name: str, table: Ints) -> None:
        """Note a column that ``column`` did not know; best effort, a full disk costs time and never the run."""
        with self._lock:
            held = self._held.setdefault(name, {})
            room = self._room.setdefault(name, 0 if None in self._stamps else _NOTED)
            if shard in held or room < 0:
                return
            held[shard] = _small(table)
            self._room[name] = room - len(table)
            if self._room[name] < 0:
                held.clear()
            if len(held) < len(self._stamps):
                return
            parts = [held[number] for number in range(len(self._stamps))]
            held.clear()
            self._room[name] = -1
        stamps = [(str(number), str(stamp)) for number, stamp in enumerate(self._stamps)]
        with contextlib.suppress(OSError):
            file = self._file(name).path
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, stamps, {name: parts})

    def _file(self, name: str) -> Overview:
        with self._lock:
            if name not in self._files:
                self._files[name] = Overview(tarindex.cache_file(self._list, name).with_suffix(".safetensors"))
            return self._files[name]


def write(path: Path, shards: Iterable[tuple[str, str]], columns: Mapping[str, Sequence[NDArray[Any]]]) -> None:
    """Write such a file in one step; equal input gives equal bytes.

    Args:
        path: the file.
        shards: name and stamp of each shard.
        columns: by name, the numbers about the samples of each shard, integers (n,) or (n, width).

    Raises:
        OSError: it cannot be written.
    """
    joined = {name: _small(np.concatenate(parts)) for name, parts in columns.items()}
    counts = [len(part) for part in next(iter(columns.values()))]
    ends = np.cumsum(counts)[:-1]
    about = {
        "format": _FORMAT,
        "shards": [[*shard, count] for shard, count in zip(shards, counts, strict=True)],
        "sums": {name: list(map(_sum, np.split(table, ends))) for name, table in joined.items()},
    }
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".overview-") as folder:
        made = Path(folder) / path.name
        with made.open("wb") as file:
            file.write(save(joined, {_ABOUT: json.dumps(about)}))  # one entry, as several come in any order
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)


def describe(folder: Path, shards: Mapping[str, ShardEntry]) -> None:
    """Write the overview of a folder from the index files of its shards.

    Args:
        folder: of finished shards.
        shards: what index.json says about them; one whose index file does not fit is left out.

    Raises:
        OSError: it cannot be written.
    """
    found = {name: columns for name in sorted(shards) if (columns := _columns(folder / name, shards[name]))}
    titles = dict.fromkeys(title for columns in found.values() for title in columns)
    for name, columns in found.items():
        for title in titles:
            if title.startswith(SIZE):  # a shard without such members
                columns.setdefault(title, np.zeros(shards[name].samples, dtype=np.int64))
    shapes = {
        title: {columns[title].shape[1:] if title in columns else None for columns in found.values()}
        for title in titles
    }
    complete = [title for title in titles if len(shapes[title]) == 1]  # all shards have it, and alike
    if complete:
        listed = [(name, shards[name].sha256) for name in found]
        write(folder / FILE_NAME, listed, {title: [columns[title] for columns in found.values()] for title in complete})


def resized(index: TarIndex, planned: Callable[[str], Ints | None]) -> dict[int, str]:
    """Rows of a shard with members of other sizes than plans are made with, and what to say about each.

    Args:
        index: what the shard holds.
        planned: name of a column to the numbers of all its samples, which may be more than there are left, or None.
    """
    wrong = np.zeros(len(index), dtype=np.bool_)
    for column, extension in enumerate(index.extensions):
        sizes = planned(f"{SIZE}{extension}")
        if sizes is not None:
            both = min(len(sizes), len(index))
            wrong[:both] |= index.sizes[:both, column] != sizes[:both]
    told = "its members have other sizes than when the shard was indexed"
    return {row: f"sample {index.key(row)}: {told}" for row in np.flatnonzero(wrong).tolist()}


def agrees(overview: Overview, shard: str, stamp: str, index: TarIndex) -> bool | None:
    """Whether an overview says what a scan of a sound shard finds; None if it does not tell about the shard."""
    found = [overview.column(f"{SIZE}{extension}", shard, stamp, (len(index),)) for extension in index.extensions]
    told = [sizes for sizes in found if sizes is not None]
    return np.array_equal(np.stack(told, axis=1), index.sizes) if len(told) == len(found) > 0 else None


def _columns(shard: Path, entry: ShardEntry) -> dict[str, NDArray[Any]]:
    """What the index file beside a shard says about its samples; nothing if it is not that of index.json's shard."""
    sidecar = tarindex.sidecar(shard)
    index = tarindex.read(sidecar, entry.bytes)
    if index is None or index.problem or len(index) != entry.samples:
        return {}
    columns: dict[str, NDArray[Any]] = {}
    for column, extension in enumerate(index.extensions):
        columns[f"{SIZE}{extension}"] = index.sizes[:, column]
    with np.load(sidecar, allow_pickle=False) as table:
        return columns | {name: table[name] for name in table.files if name.startswith(MEASURED)}


def _sum(part: NDArray[Any]) -> int:
    return zlib.crc32(part.tobytes())


def _small(table: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in the smallest format there is for them."""
    low, high = int(table.min(initial=0)), int(table.max(initial=0))
    fitting = (kind for kind in _KINDS.values() if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return np.ascontiguousarray(table, dtype=next(fitting))


def _header(path: Path) -> _Header:
    """What a file holds; nothing if it is absent or cannot be understood."""
    try:
        size = int.from_bytes(_read(path, _LENGTH, 0), "little")
        listed = json.loads(_read(path, min(size, _LONGEST), _LENGTH))
        about = json.loads(listed.pop("__metadata__")[_ABOUT])
        if about["format"] != _FORMAT:
            return _Header({}, {})
        firsts = np.cumsum([0, *(rows for _, _, rows in about["shards"])]).tolist()
        shards = {
            str(name): (number, str(stamp), firsts[number], int(rows))
            for number, (name, stamp, rows) in enumerate(about["shards"])
        }
        columns = {}
        for name, entry in listed.items():
            kind, shape = _KINDS[entry["dtype"]], tuple(entry["shape"][1:])
            begin, step = _LENGTH + size + entry["data_offsets"][0], kind.itemsize * math.prod(shape)
            if len(sums := about["sums"][name]) == len(shards):
                columns[name] = _Column(begin, kind, shape, step, sums)
    except Exception:  # absent, unreadable or half copied: index files and shards are the truth
        return _Header({}, {})
    return _Header(shards, columns)


def _read(path: Path, size: int, begin: int) -> bytes:
    """Bytes of a file, fewer where it ends; none if it is not to be had."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(file, size, begin)
    except OSError:
        return b""
    finally:
        os.close(file)
