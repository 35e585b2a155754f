"""Which sample stands at which position of the endless training sequence.

The order is a pure function of (seed, position), so nothing about it is ever saved: a run that stops after
``samples`` samples continues at position ``samples``, on any number of ranks and workers.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Meaning = dict[str, str | int | float]
K = TypeVar("K")
V = TypeVar("V")

_WORD = 2**64 - 1
_CACHED_EPOCHS = 2
_CACHED_WINDOWS = 2
_PLANNERS = 8  # threads that fetch the planning numbers of many shards; network file systems answer slowly
_TURNS = 8  # of each thread, so that none waits long for the others

FLIP, CAPTION, PACKING = 0, 1, 2  # streams of sample_bits


class Lookup(Protocol):
    """Anything that maps positions of a sequence to (epoch, sample).

    Attributes:
        total: size of the numbering; samples are 0..total-1.
    """

    total: int

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return epoch and sample number of every position, both int64 of the same shape."""

    def length(self) -> int:
        """Items per epoch of the sequence, for progress; at least 1."""

    def meaning(self) -> Meaning:
        """Settings that give a position its meaning; saved with it, and compared when a run continues."""


class Order:
    """Shuffled order: shards are permuted per epoch, samples are permuted inside windows of neighbouring shards.

    Reads stay inside ``window`` files at a time, which is what disks and page caches like, while a batch still
    mixes the samples of ``window`` shards. Epochs follow one another without a gap. Two windows are held in memory,
    at 16 bytes per sample.

    Args:
        counts: samples per shard, in the order of the shard list.
        seed: any integer; two seeds give unrelated orders.
        window: number of shards whose samples are mixed.
        source: number of the source in a mixture; sources of one seed get unrelated orders.

    Raises:
        ValueError: there is no sample at all, or the window is not positive.
    """

    def __init__(self, counts: Iterable[int] | Ints, seed: int = 0, window: int = 16, source: int = 0) -> None:
        self.counts: Ints = np.asarray(counts if isinstance(counts, np.ndarray) else list(counts), dtype=np.int64)
        self.total = int(self.counts.sum())
        if self.total <= 0:
            raise ValueError(f"the {len(self.counts)} shards hold no samples. Check data.root and data.train.")
        if window < 1:
            raise ValueError(f"data.window={window}: a window needs at least 1 shard. Set data.window=16.")
        self.seed = seed
        self.window = window
        self.source = source
        self._starts: Ints = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self._epochs: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()
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
            for epoch, here in groups(epochs):
                _, ends = self._epoch(epoch)
                places = inside[here]
                for window, among in groups(np.searchsorted(ends, places, side="right")):
                    begin = ends[window - 1] if window else 0
                    samples[here[among]] = self._window(epoch, window)[0][places[among] - begin]
        return epochs, samples

    def length(self) -> int:
        """Samples per epoch."""
        return self.total

    def meaning(self) -> Meaning:
        """Seed and window; the list of shards is the source's to answer for."""
        return {"seed": self.seed, "window": self.window}

    def windows(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards of an epoch in reading order (shards,), and where each window ends inside the epoch (windows,).

        Window w mixes the shards ``w * self.window`` .. ``(w + 1) * self.window - 1`` of that list.
        """
        with self._lock:
            return self._epoch(epoch)

    def window_samples(self, epoch: int, window: int) -> Ints:
        """Sample numbers of one window in reading order, int64 (n,); not to be written to."""
        with self._lock:
            return self._window(epoch, window)[0]

    def arrange(self, epoch: int, window: int, column: Callable[[int], Ints]) -> Ints:
        """Values of the samples of one window, in reading order.

        Args:
            epoch: the epoch.
            window: number of the window inside the epoch.
            column: gives the values of all samples of a shard, (samples, ...).

        Returns:
            The values in the order of ``window_samples``, (n, ...).
        """
        with self._lock:
            shards, _ = self._epoch(epoch)
            _, permutation = self._window(epoch, window)
        members = shards[window * self.window : (window + 1) * self.window]
        return np.concatenate([column(int(shard)) for shard in members])[permutation]

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        if epoch not in self._epochs:
            shards = self._permutation(len(self.counts), epoch, 0)
            totals = np.cumsum(self.counts[shards])
            ends = totals[self.window - 1 :: self.window]
            if len(shards) % self.window:
                ends = np.append(ends, totals[-1])
            remember(self._epochs, epoch, (shards, ends), _CACHED_EPOCHS)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> tuple[Ints, Ints]:
        """Sample numbers of one window in reading order, and the permutation that made them from shard order."""
        place = (epoch, window)
        if place not in self._windows:
            shards, _ = self._epoch(epoch)
            members = shards[window * self.window : (window + 1) * self.window]
            numbers = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in members])
            permutation = self._permutation(len(numbers), epoch, 1 + window)
            remember(self._windows, place, (numbers[permutation], permutation), _CACHED_WINDOWS)
        return self._windows[place]

    def _permutation(self, size: int, epoch: int, stream: int) -> Ints:
        """Uniform permutation of range(size), keyed by (seed, source, epoch, stream).

        Sorting the generator's raw words keeps the order the same under every numpy version: numpy promises the
        words of a bit generator, but not what ``Generator.permutation`` makes of them.
        """
        bits = np.random.Philox(
            key=np.array([self.seed & _WORD, epoch], dtype=np.uint64),
            counter=np.array([0, 0, self.source, stream], dtype=np.uint64),
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

    def length(self) -> int:
        """Samples per epoch."""
        return self.total

    def meaning(self) -> Meaning:
        """Nothing but the list of shards decides."""
        return {}


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


def sample_bits(seed: int, epochs: Ints, samples: Ints, stream: int = FLIP) -> NDArray[np.uint64]:
    """64 random bits per (seed, epoch, sample) for augmentation: no worker, rank or batch size can change them.

    Args:
        seed: any integer.
        epochs: epoch of each item, int64 (n,).
        samples: sample number of each item, int64 (n,).
        stream: what the bits are for; those of two streams are unrelated.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied once per word.
    """
    words = np.full(epochs.shape, seed & _WORD, dtype=np.uint64)
    parts = [epochs, samples]
    if stream:
        parts.append(np.full(epochs.shape, stream))
    for part in parts:
        words = _mix(words ^ _mix(part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return words


def choose(bits: NDArray[np.uint64], probabilities: Sequence[float], setting: str = "data.captions") -> Ints:
    """Draw one of several alternatives per item, e.g. the original or a re-written caption.

    Args:
        bits: uniform random words, uint64 (n,), as ``sample_bits(seed, epochs, samples, CAPTION)`` gives them.
        probabilities: of each alternative, at least 0, summing to 1.
        setting: name of the setting that holds the probabilities, for messages.

    Returns:
        Number of the alternative, 0..len(probabilities)-1, int64 (n,). One of probability 0 is never drawn.

    Raises:
        ValueError: the probabilities are none.
    """
    shares = np.asarray(probabilities, dtype=np.float64)
    if shares.ndim != 1 or not len(shares) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(
            f"{setting}: the probabilities {list(probabilities)} sum to {shares.sum():g}; expected numbers from 0 to 1 "
            "that sum to 1, e.g. 0.5 and 0.5 for two alternatives."
        )
    drawn = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    possible = np.flatnonzero(shares)
    limits = np.cumsum(shares[possible])[:-1]  # without the last: rounding must not leave a gap below 1
    return possible[np.searchsorted(limits, drawn, side="right")].astype(np.int64)


def groups(keys: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield every different key with the indices at which it stands, keys ascending, indices ascending, int64 (k,)."""
    if not len(keys):
        return
    if keys[0] == keys[-1] and (keys == keys[0]).all():  # nearly always: a batch lies in one window of one epoch
        yield int(keys[0]), np.arange(len(keys))
        return
    order = np.argsort(keys, kind="stable")
    firsts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[0]] - 1))
    for part in np.split(order, firsts[1:]):
        yield int(keys[part[0]]), part


def over_shards(measure: Callable[[int], V], shards: int) -> list[V]:
    """Apply a function to the number of every shard, in threads because it reads files; results in order."""
    if shards < 2 * _PLANNERS:
        return [measure(shard) for shard in range(shards)]
    step = -(-shards // (_PLANNERS * _TURNS))  # handing a shard over costs more than what is looked up for most of them

    def several(first: int) -> list[V]:
        return [measure(shard) for shard in range(first, min(first + step, shards))]

    with ThreadPoolExecutor(_PLANNERS, thread_name_prefix="plan") as pool:
        return list(chain.from_iterable(pool.map(several, range(0, shards, step))))


def remember(cache: "OrderedDict[K, V]", key: K, value: V, limit: int) -> V:
    """Put a value into a cache of at most ``limit`` entries, of which the oldest goes first; return the value."""
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
    return value


def fingerprint(names: Iterable[str], counts: Iterable[int], sizes: Iterable[int]) -> str:
    """Hash of a shard list: names without folders, samples and bytes per shard, in order. Moving the data keeps it."""
    digest = hashlib.sha256()
    for name, count, size in zip(names, counts, sizes, strict=True):
        digest.update(f"{name}\0{count}\0{size}\n".encode())
    return digest.hexdigest()[:32]


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
