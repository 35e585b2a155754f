"""Where the shards of a set are, and how to get hold of one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules import catalogue, overview, tarindex
from datamodules.catalogue import ShardEntry
from datamodules.order import Ints
from datamodules.overview import Notes, Overview
from datamodules.setindex import SetIndex
from datamodules.tarindex import TarIndex

_COMPARED_SHARDS = 2000  # with more shards than this, sizes are compared with index.json as the shards are opened


class Files(Protocol):
    """A list of shards, on this machine or elsewhere; safe to use from several threads.

    Attributes:
        names: file names in order.
        entries: what index.json says about each; None where it says nothing.
        sizes: bytes of each.
        place: folder or address, for messages.
        cards: what index.json says about the members, once per folder that has one.
        verified: whether every file is compared with index.json on its way here, so that nobody else need do it.
    """

    names: list[str]
    entries: list[ShardEntry | None]
    sizes: list[int]
    place: str
    cards: list[dict[str, Any]]
    verified: bool

    def open(self, shard: int) -> int:
        """A descriptor of the file, which stays good if the file is removed.

        Raises:
            OSError: it is not to be had.
        """

    def index(self, shard: int) -> TarIndex:
        """What the shard holds.

        Raises:
            OSError: it is not to be had.
        """

    def scan(self, shard: int) -> TarIndex:
        """What the shard holds, from its bytes alone.

        Raises:
            OSError: it is not to be had.
        """

    def recall(self, shard: int, name: str, shape: tuple[int, ...]) -> Ints | None:
        """A column of an overview of many shards, see :mod:`datamodules.overview`, int64 of that shape; or None."""

    def note(self, shard: int, name: str, table: Ints) -> None:
        """Remember a column that ``recall`` did not know."""

    def stored(self, shard: int, name: str, shape: tuple[int, int]) -> Ints | None:
        """A measured column from beside the shard or from the cache, or None."""

    def store(self, shard: int, name: str, table: Ints) -> None:
        """Put a measured column into the cache."""

    def expect(self, shards: Sequence[int]) -> None:
        """These shards will be opened before long."""

    def health(self) -> dict[str, float]:
        """Counters for the log."""

    def close(self) -> None:
        """End what runs in the background."""


class LocalFiles:
    """Shards that are files of this machine.

    Args:
        paths: the files in order.
    """

    verified = False

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._together = SetIndex(self.paths)
        self.names = [path.name for path in self.paths]
        self.place = f"folder {self.paths[0].parent}"
        listed = {folder: catalogue.read(folder) for folder in {path.parent for path in self.paths}}
        self.cards = [index.card for index in listed.values() if index]
        self.entries = [index.shards.get(path.name) if (index := listed[path.parent]) else None for path in self.paths]
        few = len(self.paths) <= _COMPARED_SHARDS
        pairs = list(zip(self.paths, self.entries, strict=True))
        self._stats = [path.stat() if few or entry is None else None for path, entry in pairs]
        stated = [0 if entry is None else entry.bytes for entry in self.entries]
        self.sizes = [size if stat is None else stat.st_size for stat, size in zip(self._stats, stated, strict=True)]
        beside = {folder: Overview(folder / overview.FILE_NAME) for folder in listed}
        self._overviews = [beside[path.parent] for path in self.paths]
        stamps = [None if stat is None else f"{stat.st_size} {stat.st_mtime_ns}" for stat in self._stats]
        self._notes = Notes([str(path.absolute()) for path in self.paths], stamps)

    def open(self, shard: int) -> int:
        """A descriptor of the file."""
        return os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)

    def index(self, shard: int) -> TarIndex:
        """What the shard holds."""
        path = self.paths[shard]
        if self.entries[shard] is not None:
            return tarindex.load(path)
        stat = path.stat()
        index = self._together.find(shard, stat)
        if index is None:
            index = tarindex.load(path)
            if len(index) < tarindex.CACHED_FROM:
                self._together.add(shard, stat, index)
        return index

    def keep(self) -> None:
        """Put what was found out about shards without index.json into the cache."""
        self._together.keep()

    def scan(self, shard: int) -> TarIndex:
        """What the shard holds, from its bytes alone."""
        return tarindex.scan(self.paths[shard])

    def keys_before(self, shard: int) -> NDArray[np.bytes_]:
        """Keys of a shard before it was damaged or went away, (n,): the index beside it knows them, or the cache."""
        path, stat = self.paths[shard], self._stats[shard]
        places = [tarindex.sidecar(path)]
        if stat is not None:
            places.append(tarindex.cache_file(tarindex.identity(path, stat)))
        for place in places:
            try:
                with np.load(place, allow_pickle=False) as table:
                    return np.asarray(table["keys"], dtype=np.bytes_)
            except Exception:  # absent, unreadable or half written
                continue
        return np.zeros(0, dtype="S1")

    def recall(self, shard: int, name: str, shape: tuple[int, ...]) -> Ints | None:
        """A column from the overview beside the shard, or from that in the cache, or None."""
        entry, found = self.entries[shard], None
        if entry is not None:
            found = self._overviews[shard].column(name, self.names[shard], entry.sha256, shape)
        return self._notes.column(shard, name, shape) if found is None else found

    def note(self, shard: int, name: str, table: Ints) -> None:
        """Remember a column that ``recall`` did not know."""
        self._notes.add(shard, name, table)

    def stored(self, shard: int, name: str, shape: tuple[int, int]) -> Ints | None:
        """A measured column from beside the shard or from the cache, or None."""
        path, column = self.paths[shard], f"{overview.MEASURED}{name}"
        found = self.recall(shard, column, shape)
        if found is not None:
            return found
        found = tarindex.read_measured(tarindex.sidecar(path), path.stat().st_size, name, shape)
        if found is None:
            kept = tarindex.cache_file(tarindex.identity(path), name)
            found = tarindex.read_measured(kept, path.stat().st_size, name, shape)
        if found is not None:
            self.note(shard, column, found)
        return found

    def store(self, shard: int, name: str, table: Ints) -> None:
        """Put a measured column into the cache."""
        path = self.paths[shard]
        self.note(shard, f"{overview.MEASURED}{name}", table)
        tarindex.keep_measured(tarindex.cache_file(tarindex.identity(path), name), path.stat().st_size, name, table)

    def expect(self, shards: Sequence[int]) -> None:
        """Nothing to do: they are here."""

    def health(self) -> dict[str, float]:
        """Nothing to count."""
        return {}

    def close(self) -> None:
        """Nothing runs."""
