"""One file of the user's cache for the indices of many small shards: opening a file for each would take seconds."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules import tarindex
from datamodules.tarindex import TarIndex

_LARGEST = 2**20  # samples in one file; about 40 bytes each, held in memory as long as the set is open

Stamp = tuple[int, int]  # size and time of change


class SetIndex:
    """Indices of the small shards of one list of files, each for as long as its size and time of change stay.

    Args:
        paths: the shards; the cache file belongs to exactly this list.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._count = len(paths)
        self._file = tarindex.cache_file("\0".join(str(path.absolute()) for path in paths), "all")
        self._known: dict[int, tuple[Stamp, TarIndex]] | None = None
        self._held: int | None = None  # samples noted, also those that found no room
        self._changed = False

    def find(self, shard: int, stat: os.stat_result) -> TarIndex | None:
        """Index of a shard, if it is known and the file has not changed since."""
        if self._known is None:
            self._known = _read(self._file, self._count)
        stamp, index = self._known.get(shard, ((-1, -1), None))
        return index if stamp == (stat.st_size, stat.st_mtime_ns) else None

    def add(self, shard: int, stat: os.stat_result, index: TarIndex) -> None:
        """Note the index of a shard that ``find`` did not know."""
        if self._known is None or index.size != stat.st_size:
            return
        self._known.pop(shard, None)
        held = sum(len(known) for _, known in self._known.values()) if self._held is None else self._held
        self._held = held + len(index)
        if self._held <= _LARGEST:
            self._known[shard] = ((stat.st_size, stat.st_mtime_ns), index)
            self._changed = True

    def keep(self) -> None:
        """Write the file if there is anything new, and the disk allows."""
        if self._changed and self._known:
            tarindex.keep_arrays(self._file, _arrays(self._known))
        self._changed = False


def _arrays(known: dict[int, tuple[Stamp, TarIndex]]) -> dict[str, NDArray[Any]]:
    indices = [index for _, index in known.values()]
    facts = [
        [shard, *stamp, len(index), index.lost, index.sizes.dtype.itemsize] for shard, (stamp, index) in known.items()
    ]
    texts = [[*index.extensions, index.problem, index.problem_key] for index in indices]
    return {
        "facts": np.array(facts, dtype=np.int64),
        "texts": np.array(json.dumps(texts)),
        "keys": np.concatenate([index.keys for index in indices]),
        "offsets": np.concatenate([index.offsets.ravel() for index in indices]),
        "sizes": np.concatenate([index.sizes.ravel() for index in indices]).astype(np.int64),
    }


def _read(file: Path, count: int) -> dict[int, tuple[Stamp, TarIndex]]:
    """What a file holds; nothing if it cannot be understood."""
    known: dict[int, tuple[Stamp, TarIndex]] = {}
    try:
        with np.load(file, allow_pickle=False) as table:
            facts, texts = table["facts"].tolist(), json.loads(str(table["texts"]))
            keys, offsets, sizes = table["keys"], table["offsets"], table["sizes"]
        row = cell = 0
        for (shard, size, changed, samples, lost, width), (*extensions, problem, key) in zip(facts, texts, strict=True):
            cells = slice(cell, cell + samples * len(extensions))
            shape = (samples, len(extensions))
            index = TarIndex(
                keys=keys[row : row + samples],
                extensions=tuple(extensions),
                offsets=offsets[cells].reshape(shape),
                sizes=sizes[cells].reshape(shape).astype(np.int64 if width > np.int32().itemsize else np.int32),
                problem=problem,
                problem_key=key,
                size=size,
                lost=lost,
            )
            known[shard] = ((size, changed), index)
            row, cell = row + samples, cells.stop
    except Exception:  # absent, unreadable or half written: the shards themselves are the truth
        return {}
    return known if max(known, default=0) < count else {}
