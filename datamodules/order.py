"""Which sample stands at which position of the endless training sequence.

The order is a pure function of (seed, position), so nothing about it is ever saved: a run that stops after
``samples`` samples continues at position ``samples``, on any number of ranks and workers.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
K = TypeVar("K")
V = TypeVar("V")

_WORD = 2**64 - 1
_CACHED_EPOCHS = 2
_CACHED_WINDOWS = 4


class Lookup(Protocol):
    """Anything that maps positions to (epoch, sample)."""

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return epoch and sample number of every position, both int64 of the same shape."""


class Order:
    """Shuffled order: shards are permuted per epoch, samples are permuted inside windows of neighbouring shards.

    Reads stay inside ``window`` files at a time, which is what disks and page caches like, while a batch still
    mixes the samples of ``window`` shards. Epochs follow one another without a gap.

    Args:
        counts: samples per shard, in the order of the shard list.
        seed: any integer; two seeds give unrelated orders.
        window: number of shards whose samples are mixed.

    Raises:
        ValueError: there is no sample at all, or the window is not positive.
    """

    def __init__(self, counts: Iterable[int], seed: int = 0, window: int = 16) -> None:
        self.counts: Ints = np.asarray(list(counts), dtype=np.int64)
        self.total = int(self.counts.sum())
        if self.total <= 0:
            raise ValueError(f"the {len(self.counts)} shards hold no samples. Check data.root and data.train.")
        if window < 1:
            raise ValueError(f"data.window={window}: a window needs at least 1 shard. Set data.window=16.")
        self.seed = seed
        self.window = window
        self._starts: Ints = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self._epochs: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Ints] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """Look up positions.

        Args:
            positions: places in the endless sequence, int64 (n,), each at least 0.

        Returns:
            Epoch, and sample number 0..total-1 counted through the shard list, of each position; int64 (n,).
        """
        positions = np.asarray(positions, dtype=np.int64)
        epochs, inside = np.divmod(positions, self.total)
        samples = np.empty_like(positions)
        with self._lock:  # worker threads look up concurrently, the caches are shared
            for epoch in np.unique(epochs):
                here = epochs == epoch
                _, ends = self._epoch(int(epoch))
                windows = np.searchsorted(ends, inside, side="right")
                for window in np.unique(windows[here]):
                    chosen = here & (windows == window)
                    begin = ends[window - 1] if window else 0
                    samples[chosen] = self._window(int(epoch), int(window))[inside[chosen] - begin]
        return epochs, samples

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards of one epoch in reading order, and the position inside the epoch at which each window ends."""
        if epoch not in self._epochs:
            shards = self._permutation(len(self.counts), epoch, 0)
            totals = np.cumsum(self.counts[shards])
            ends = totals[self.window - 1 :: self.window]
            if len(shards) % self.window:
                ends = np.append(ends, totals[-1])
            _remember(self._epochs, epoch, (shards, ends), _CACHED_EPOCHS)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> Ints:
        """Sample numbers of one window in reading order."""
        place = (epoch, window)
        if place not in self._windows:
            shards, _ = self._epoch(epoch)
            members = shards[window * self.window : (window + 1) * self.window]
            numbers = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in members])
            shuffled = numbers[self._permutation(len(numbers), epoch, 1 + window)]
            _remember(self._windows, place, shuffled, _CACHED_WINDOWS)
        return self._windows[place]

    def _permutation(self, size: int, epoch: int, stream: int) -> Ints:
        """Uniform permutation of range(size), keyed by (seed, epoch, stream).

        Sorting the generator's raw words keeps the order the same under every numpy version: numpy promises the
        words of a bit generator, but not what ``Generator.permutation`` makes of them.
        """
        bits = np.random.Philox(
            key=np.array([self.seed & _WORD, epoch], dtype=np.uint64),
            counter=np.array([0, 0, 0, stream], dtype=np.uint64),
        )
        return np.argsort(bits.random_raw(size), kind="stable").astype(np.int64)


class InOrder:
    """The order of the shard list itself, for validation and reference sets; it starts again after the last sample.

    Args:
        total: number of samples.
    """

    def __init__(self, total: int) -> None:
        self.total = total

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return epoch and sample number of each position, both int64 (n,)."""
        epochs, samples = np.divmod(np.asarray(positions, dtype=np.int64), self.total)
        return epochs, samples


def micro_batches(start: int, global_batch: int, micro_batch: int, rank: int, world_size: int) -> Iterator[Ints]:
    """Yield the positions of one rank's micro-batches, for ever.

    Update u covers the positions start + u*G .. start + (u+1)*G - 1. Micro-batch j of rank r takes the slice that
    begins at (j*R + r)*b, so the union over ranks and micro-batches is the same for every R and b.

    Args:
        start: first position, the number of samples already trained on.
        global_batch: G, samples per update over all ranks; a multiple of micro_batch * world_size.
        micro_batch: b, samples per rank and micro-batch.
        rank: r, 0..world_size-1.
        world_size: R.
    """
    assert global_batch % (micro_batch * world_size) == 0, (global_batch, micro_batch, world_size)
    offsets = range(rank * micro_batch, global_batch, micro_batch * world_size)
    base = start
    while True:
        for offset in offsets:
            yield np.arange(base + offset, base + offset + micro_batch, dtype=np.int64)
        base += global_batch


def held_out_batches(total: int, batch: int, rank: int, world_size: int) -> list[Ints]:
    """Split a held-out set over ranks: each sample once, the same number of batches on every rank, none empty.

    The set is cut into batches of nearly equal size (at most ``batch`` where that leaves every rank a sample), and
    each of them is dealt out over the ranks, so batch k holds the same samples in all for every world size that
    needs no smaller cut. A rank that ran out of batches would leave the others waiting in a collective for ever.

    Args:
        total: samples in the set, at least world_size.
        batch: samples per batch over all ranks.
        rank: this rank.
        world_size: number of ranks.

    Raises:
        ValueError: fewer samples than ranks.
    """
    if total < world_size:
        raise ValueError(
            f"data.val holds {total} samples, fewer than the {world_size} ranks that share them. "
            f"Use at most {total} devices, or point data.val at more samples."
        )
    pieces = max(1, min(-(-total // batch), total // world_size))
    return [part[rank::world_size] for part in np.array_split(np.arange(total, dtype=np.int64), pieces)]


def sample_bits(seed: int, epochs: Ints, samples: Ints) -> NDArray[np.uint64]:
    """64 random bits per (seed, epoch, sample) for augmentation: no worker, rank or batch size can change them.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied once per word.
    """
    words = np.full(epochs.shape, seed & _WORD, dtype=np.uint64)
    for part in (epochs, samples):
        words = _mix(words ^ _mix(part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return words


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def fingerprint(names: Iterable[str], counts: Iterable[int], sizes: Iterable[int]) -> str:
    """Hash of a shard list: names without folders, samples and bytes per shard, in order. Moving the data keeps it."""
    digest = hashlib.sha256()
    for name, count, size in zip(names, counts, sizes, strict=True):
        digest.update(f"{name}\0{count}\0{size}\n".encode())
    return digest.hexdigest()[:32]


def _remember(cache: "OrderedDict[K, V]", key: K, value: V, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
