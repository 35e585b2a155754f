"""Numbers about the samples of the shards in use, in one array, so that those of a whole batch are one look-up."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.order import Ints, groups

_ABSENT = np.iinfo(np.int64).min


class Held:
    """Remembers the values of whole shards; when there is no room for further ones, all are forgotten.

    A batch draws from many shards, and a few operations per shard and batch cost more than copying the batch. Memory: a
    number per shard, and the values of up to ``limit`` samples, while they are moved into a larger array twice.

    Args:
        starts: number of the first sample of each shard, and the total, int64 (shards + 1,).
        load: values of all samples of a shard, (n,) or (n, width), of one type, or of byte strings of any length.
        limit: how many samples are remembered, if one batch does not need more.
    """

    def __init__(self, starts: Ints, load: Callable[[int], NDArray[Any]], limit: int) -> None:
        self._starts = starts
        self._load = load
        self._limit = limit
        self._shift: Ints = np.full(len(starts) - 1, _ABSENT, dtype=np.int64)  # place less sample number
        self._values: NDArray[Any] | None = None
        self._used = 0
        self._lock = threading.Lock()

    def __call__(self, samples: Ints, shards: Ints) -> NDArray[Any]:
        """Values of some samples.

        Args:
            samples: sample numbers, int64 (n,).
            shards: the shard of each, int64 (n,).
        """
        with self._lock:
            shift = self._shift[shards]
            if self._values is not None and (not len(shift) or shift.min() > _ABSENT):
                found: NDArray[Any] = self._values.take(samples + shift, axis=0)
                return found
        loaded = {shard: self._load(shard) for shard in np.unique(shards).tolist()}  # others may go on meanwhile
        with self._lock:
            self._keep(loaded)
        if not loaded:
            return np.zeros(0, dtype=np.int64)
        taken = [(here, loaded[shard][samples[here] - self._starts[shard]]) for shard, here in groups(shards)]
        values = np.concatenate([part for _, part in taken])
        return values[np.argsort(np.concatenate([here for here, _ in taken]))]

    def forget(self, shard: int) -> None:
        """Ask for the values of a shard again when they are next needed."""
        with self._lock:
            self._shift[shard] = _ABSENT

    def _keep(self, loaded: dict[int, NDArray[Any]]) -> None:
        new = {shard: values for shard, values in loaded.items() if self._shift[shard] == _ABSENT and len(values)}
        count = sum(map(len, new.values()))
        if self._used + count > self._limit:
            self._shift[:] = _ABSENT
            self._used = 0
            new = loaded
            count = sum(map(len, new.values()))
        if not new:
            return
        self._make_room(count, np.result_type(*new.values()), next(iter(new.values())).shape[1:])
        assert self._values is not None
        for shard, values in new.items():
            self._values[self._used : self._used + len(values)] = values
            self._shift[shard] = self._used - self._starts[shard]
            self._used += len(values)

    def _make_room(self, count: int, kind: np.dtype[Any], shape: tuple[int, ...]) -> None:
        old = self._values
        if old is not None and self._used:
            kind = np.result_type(kind, old.dtype)
        if old is not None and self._used + count <= len(old) and kind == old.dtype:
            return
        size = max(self._used + count, min(2 * self._used, self._limit))
        self._values = np.empty((size, *shape), dtype=kind)  # looked-up values are copies, so nobody uses the old one
        if old is not None:
            self._values[: self._used] = old[: self._used]
