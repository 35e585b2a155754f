"""Several sets of shards with the same names and keys as one source: each sample has the members of all of them."""

import itertools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodules.order import Ints
from datamodules.shards import ShardSet
from datamodules.source import BadSample, Bytes, Measure, Members, measure_rows


class Joined:
    """Joins columns, e.g. images with the latents and text features computed from them.

    Shard names and counts are compared at once, keys when a shard is first used. Where two columns hold a member of
    the same name, the first one gives it. The order depends on ``primary`` alone.

    Args:
        primary: the samples.
        others: further members by the name of their folder.

    Raises:
        ValueError: the columns do not hold the same shards.
    """

    def __init__(self, primary: ShardSet, others: Mapping[str, ShardSet]) -> None:
        self._parts = {"": primary, **others}
        self._primary = primary
        self.names = primary.names
        self.counts = primary.counts
        self.starts = primary.starts
        self.classes = primary.classes
        self.fingerprint = primary.fingerprint
        self.lost = max(part.lost for part in self._parts.values())
        self._same: set[int] = set()
        self._lock = threading.Lock()
        self._members: dict[str, ShardSet] = {}
        for folder, part in others.items():
            _check_shards(primary, folder, part)
        for part in self._parts.values():
            for extension in part.extensions():
                self._members.setdefault(extension, part)

    def extensions(self) -> tuple[str, ...]:
        """Member names of all columns."""
        return tuple(self._members)

    def key(self, sample: int) -> str:
        """Key of a sample."""
        return self._primary.key(sample)

    def shard(self, sample: int) -> str:
        """Name of the shard that holds a sample; the same in every column."""
        return self._primary.shard(sample)

    def keys(self, shard: int) -> "np.ndarray[tuple[int], np.dtype[np.bytes_]]":
        """Keys of all samples of a shard that can be read, bytes (n,)."""
        return self._primary.keys(shard)

    def keys_at(self, samples: Ints) -> list[str]:
        """Keys of many samples at once."""
        return self._primary.keys_at(samples)

    def sizes_at(self, samples: Ints, extension: str) -> Ints:
        """Bytes of one member of each sample; 0 where it is missing. int64 (n,)."""
        return self._members.get(extension, self._primary).sizes_at(samples, extension)

    def read(self, sample: int) -> Members:
        """Members of a sample from all columns.

        Raises:
            BadSample: one of the columns cannot be read.
            ValueError: the keys of a column differ.
        """
        self._check_keys(self._shard_number(sample))
        members: Members = {}
        for folder, part in self._parts.items():
            try:
                found = part.read(sample)
            except BadSample as error:
                if folder:
                    raise BadSample(f"column {folder}, {error}", error.advice) from error
                raise
            members = {**found, **members}
        return members

    def sizes(self, shard: int, extension: str) -> Ints:
        """Bytes of one member for every sample of a shard; 0 where it is missing. int64 (n,)."""
        return self._members.get(extension, self._primary).sizes(shard, extension)

    def described(self, name: str) -> dict[str, Any]:
        """Entry of the card of the column that has the member ``name``, else of the first that has such an entry."""
        parts = [self._members[name]] if name in self._members else list(self._parts.values())
        return next((entry for part in parts if (entry := part.described(name))), {})

    def measured(self, shard: int, name: str, measure: Measure, width: int) -> Ints:
        """Numbers about every sample of a shard, from whichever column knows them, else measured once and kept."""
        for part in self._parts.values():
            found = part.stored(shard, name, width)
            if found is not None:
                return found
        start, count = int(self.starts[shard]), int(self.counts[shard])
        table, lasting = measure_rows(lambda row: self.read(start + row), count, measure, width)
        if lasting:
            self._primary.keep(shard, name, table)
        return table

    def gather(self, samples: Ints, extension: str, out: Bytes) -> None:
        """Copy one member of equal size from each sample into the rows of ``out``, uint8 (n, size).

        Raises:
            BadSample: a member is missing, unreadable or of another size; ``row`` says which.
            ValueError: the keys of a column differ.
        """
        self._check_samples(samples)
        self._members.get(extension, self._primary).gather(samples, extension, out)

    def pieces(self, samples: Ints, extension: str, begins: Ints, lengths: Ints, out: Bytes, at: Ints) -> None:
        """Copy a part of one member of each sample to places in ``out``.

        Raises:
            BadSample: a member is missing, unreadable or too short; ``row`` says which.
            ValueError: the keys of a column differ.
        """
        self._check_samples(samples)
        self._members.get(extension, self._primary).pieces(samples, extension, begins, lengths, out, at)

    def expect(self, samples: Ints) -> None:
        """Say which samples will be read about one shuffle window from now."""
        for part in self._parts.values():
            part.expect(samples)

    def health(self) -> dict[str, float]:
        """Counters for the log, summed over the columns."""
        total: dict[str, float] = {}
        for part in self._parts.values():
            for name, value in part.health().items():
                total[name] = total.get(name, 0.0) + value
        return total

    def close(self) -> None:
        """Close every file and end background work."""
        for part in self._parts.values():
            part.close()

    def _shard_number(self, sample: int) -> int:
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def _check_samples(self, samples: Ints) -> None:
        for shard in np.unique(np.searchsorted(self.starts, samples, side="right") - 1).tolist():
            self._check_keys(shard)

    def _check_keys(self, shard: int) -> None:
        """Compare the keys of a shard in all columns, once."""
        if shard in self._same:
            return
        try:
            wanted = self._primary.keys(shard)
            found = {folder: part.keys(shard) for folder, part in self._parts.items() if folder}
        except OSError:
            return  # told with the sample that cannot be read
        for folder, keys in found.items():
            if len(keys) == len(wanted) and (keys == wanted).all():
                continue
            pairs = itertools.zip_longest(wanted.tolist(), keys.tolist())
            row, (left, right) = next((row, pair) for row, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ValueError(
                f"data.columns: {self.names[shard]} of {folder} does not hold the samples of the other column: sample "
                f"{row} is {_told(right)}, expected {_told(left)}. Make the column again from these shards."
            )
        with self._lock:
            self._same.add(shard)


def _check_shards(primary: ShardSet, folder: str, part: ShardSet) -> None:
    """Refuse a column with other shards or other counts."""
    for shard, (name, other) in enumerate(zip(primary.names, part.names, strict=True)):
        count, wanted = int(part.counts[shard]), int(primary.counts[shard])
        if name != other or count != wanted:
            raise ValueError(
                f"data.columns: {other} of {folder} holds {count} samples, {name} of {primary.setting} holds {wanted}. "
                "Make the column again from these shards."
            )


def _told(key: bytes | None) -> str:
    return "absent" if key is None else key.decode("utf-8", "backslashreplace")
