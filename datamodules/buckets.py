"""Aspect-ratio buckets: batches of images of one shape each, out of images of many shapes, in an order without state.

The items that the order gives to one bucket form a sequence of their own. It is cut into runs of one update each, and
a run is trained on when its last item has arrived. What is left of a bucket at the end of a window or an epoch waits
for more, so no item is lost and none comes twice. How many items of each bucket stand before a position follows from
the histograms of the shards, so any update can be found without going through those before it.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from datamodules.mixture import Mixed, Schedule
from datamodules.order import Ints, Meaning, Order, over_shards, remember

_CACHED_EPOCHS = 2
_CACHED_WINDOWS = 2
_CACHED_RUNS = 16
_CACHED_ITEMS = 2**20  # of rare buckets, 16 bytes each
_SCANNED = 256
_MOST_RATIOS = 256


class Buckets:
    """Shapes of about equal area that images are sorted into.

    Height and width for the ratio R = width / height and the size S are S / sqrt(R) and S * sqrt(R), each rounded to
    the nearest multiple. Source: STARFlow (Gu et al. 2025), training with mixed aspect ratios.

    Args:
        size: S, side of the square bucket in pixels.
        multiple: heights and widths are multiples of this; the autoencoder's factor times the patch size.
        ratios: "width:height" of each bucket, e.g. "16:9" (quoted: YAML reads 16:9 as a number of minutes).

    Attributes:
        shapes: (height, width) of each bucket in pixels.
        names: the ratios as they were given.

    Raises:
        ValueError: a setting is out of range, a ratio is not one, or two ratios lead to one shape.
    """

    def __init__(self, size: int, multiple: int = 8, ratios: Iterable[str] = ("1:1",)) -> None:
        if multiple < 1 or size < multiple:
            raise ValueError(
                f"data.buckets: size={size} and multiple={multiple}: expected 1 <= multiple <= size. "
                "Set e.g. data.buckets.size=256 data.buckets.multiple=8."
            )
        self.size = size
        self.multiple = multiple
        self.names = [str(ratio) for ratio in ratios]
        if not 1 <= len(self.names) <= _MOST_RATIOS:
            raise ValueError(f"data.buckets.ratios has {len(self.names)} ratios; expected 1..{_MOST_RATIOS}.")
        values = [_ratio(name) for name in self.names]
        self.shapes = [(self._rounded(size / math.sqrt(r)), self._rounded(size * math.sqrt(r))) for r in values]
        for number, shape in enumerate(self.shapes):
            if shape in self.shapes[:number]:
                same = self.names[self.shapes.index(shape)]
                raise ValueError(
                    f"data.buckets.ratios: {same} and {self.names[number]} both lead to {shape[0]}x{shape[1]} pixels "
                    f"(size={size}, multiple={multiple}). Remove one of them."
                )
        self._ratios = np.array(values)

    def assign(self, shapes: Ints) -> Ints:
        """Bucket of each image: the one whose ratio is nearest in proportion.

        Args:
            shapes: height and width of each image in pixels, int64 (n, 2); (0, 0) where it is not known.

        Returns:
            Numbers of the buckets, int64 (n,); images of unknown shape go where square ones go.
        """
        sides = np.maximum(shapes, 1)
        order = np.argsort(self._ratios)
        ascending = self._ratios[order]
        limits = np.sqrt(ascending[1:] * ascending[:-1])  # half-way between neighbours in proportion
        return order[np.searchsorted(limits, sides[:, 1] / sides[:, 0])].astype(np.int64)

    def _rounded(self, side: float) -> int:
        return max(1, math.floor(side / self.multiple + 0.5)) * self.multiple


class BucketOrder:
    """Order of a bucketed training set: every update, G positions from a multiple of G on, is of one bucket.

    An update's place in the sequence is that of its last item in the order underneath, so updates come as well mixed
    as items do. The position only has a meaning for one G.

    Memory: shards * buckets numbers, two windows of each source at about 25 bytes per sample, and 16 MiB for what rare
    buckets have waiting.

    Args:
        order: the order without buckets, of one source or a mixture of orders.
        buckets: the buckets.
        shapes: gives height and width of every image of a shard, int64 (n, 2); shards of a mixture are numbered
            through. Called once for every shard at the start, and again for the shards of a window.
        batch_size: G, items per update over all ranks.

    Raises:
        ValueError: a mixture of something else than orders.
    """

    def __init__(
        self, order: "Order | Mixed[Order]", buckets: Buckets, shapes: Callable[[int], Ints], batch_size: int
    ) -> None:
        self.order = order
        self.buckets = buckets
        self.batch_size = batch_size
        self.total = order.total
        orders = order.orders if isinstance(order, Mixed) else [order]
        if not all(isinstance(part, Order) for part in orders):
            raise ValueError("data.buckets cannot be used with this kind of sequence. Remove data.buckets.")
        self._schedule = order.schedule if isinstance(order, Mixed) else Schedule([1])
        self._streams = []
        first_shard = first_sample = 0
        for part in orders:
            assigned = _shifted(shapes, buckets, first_shard)
            self._streams.append(_Stream(part, assigned, len(buckets.shapes), first_sample, batch_size))
            first_shard += len(part.counts)
            first_sample += part.total
        self._runs: OrderedDict[int, tuple[int, Ints, Ints]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """Epoch (of the source) and sample number of each position, int64 (n,) each."""
        updates, places = np.divmod(np.asarray(positions, dtype=np.int64), self.batch_size)
        epochs, samples = np.empty_like(updates), np.empty_like(updates)
        for update in np.unique(updates):
            here = updates == update
            _, of_epochs, of_samples = self._run(int(update))
            epochs[here], samples[here] = of_epochs[places[here]], of_samples[places[here]]
        return epochs, samples

    def bucket(self, positions: Ints) -> int:
        """Bucket of the update that the positions belong to; they all belong to one."""
        updates = np.unique(np.asarray(positions) // self.batch_size)
        assert len(updates) == 1, f"positions of {len(updates)} updates have no bucket in common"
        return self._run(int(updates[0]))[0]

    def length(self) -> int:
        """Items per epoch of the order underneath."""
        return self.order.length()

    def meaning(self) -> Meaning:
        """What defines the order underneath, the buckets, and the update."""
        buckets = ",".join(f"{height}x{width}" for height, width in self.buckets.shapes)
        return {**self.order.meaning(), "buckets": buckets, "batch_size": self.batch_size}

    def _run(self, update: int) -> tuple[int, Ints, Ints]:
        """Bucket, epochs (G,) and samples (G,) of an update."""
        with self._lock:
            if update not in self._runs:
                bucket, end = self._completed(update)
                epochs, samples = self._last_items(bucket, end)
                remember(self._runs, update, (bucket, epochs, samples), _CACHED_RUNS)
            return self._runs[update]

    def _completed(self, update: int) -> tuple[int, int]:
        """Bucket of an update, and the position in the order underneath after its last item.

        Among the first t items at most t // G updates are complete, and the buckets' remainders are less than G items
        each, so the last item of update u is one of the buckets * (G - 1) + 1 that follow the first (u + 1) * G - 1.
        """
        size = self.batch_size
        begin = (update + 1) * size - 1
        counts = self._counts(begin)
        missing = update - int((counts // size).sum())  # updates that complete before this one from here on
        scanned = min(max(2 * size, _SCANNED), len(self.buckets.shapes) * (size - 1) + 1)
        while True:
            found = self._buckets_of(np.arange(begin, begin + scanned, dtype=np.int64))
            ends = np.flatnonzero((_ordinals(found, counts) + 1) % size == 0)
            if missing < len(ends):
                return int(found[ends[missing]]), begin + int(ends[missing]) + 1
            missing -= len(ends)
            counts = counts + np.bincount(found, minlength=len(counts))
            begin += len(found)

    def _last_items(self, bucket: int, end: int) -> tuple[Ints, Ints]:
        """Epochs and samples of the last G items of a bucket before a position of the order underneath."""
        items = self._schedule.counts(end)
        # The source with the most items of the bucket goes first: how far back its items reach bounds the others.
        shares = self._schedule.shares
        densest = sorted(range(len(items)), key=lambda s: self._streams[s].rate(bucket) * shares[s], reverse=True)
        floor = 0
        parts: list[tuple[Ints, Ints, Ints]] = []
        for source in densest:
            stream = self._streams[source]
            stop = stream.count(items[source], bucket)
            start = stream.count(self._schedule.counts(floor)[source], bucket) if floor else 0
            start = max(start, stop - self.batch_size)
            if start >= stop:
                continue
            inside, epochs, samples = stream.members(bucket, start, stop)
            positions = self._schedule.positions(source, inside)
            parts.append((positions, epochs, samples))
            if len(positions) == self.batch_size:
                floor = max(floor, int(positions[0]))
        positions, epochs, samples = (np.concatenate(column) for column in zip(*parts, strict=True))
        chosen = np.argsort(positions)[-self.batch_size :]
        return epochs[chosen], samples[chosen]

    def _counts(self, position: int) -> Ints:
        """Items of each bucket among the first items of the order underneath, int64 (buckets,)."""
        items = self._schedule.counts(position)
        return np.sum([stream.counts(n) for stream, n in zip(self._streams, items, strict=True)], axis=0)

    def _buckets_of(self, positions: Ints) -> Ints:
        """Buckets of neighbouring positions of the order underneath."""
        which, inside = self._schedule(positions)
        found = np.empty_like(positions)
        for source, stream in enumerate(self._streams):
            here = which == source
            if here.any():
                found[here] = stream.buckets(int(inside[here][0]), int(inside[here][-1]) + 1)
        return found


class _Stream:
    """The buckets of one order's endless sequence: how many items before a place, and which item is the n-th of one.

    Args:
        order: the order.
        assigned: gives the bucket of every sample of a shard, int64 (n,).
        buckets: number of buckets.
        first_sample: added to the order's sample numbers.
        rare: a bucket with fewer items than this in a window is looked for in many windows at once.
    """

    def __init__(
        self, order: Order, assigned: Callable[[int], Ints], buckets: int, first_sample: int, rare: int
    ) -> None:
        self._order = order
        self._assigned = assigned
        self._number = buckets
        self._first = first_sample
        self._rare = rare
        self._histogram: Ints = np.stack(over_shards(self._count_shard, len(order.counts)))
        self._totals: Ints = self._histogram.sum(axis=0)
        self._tables: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[NDArray[np.uint8], Ints]] = OrderedDict()
        self._pieces: OrderedDict[tuple[int, int, int], tuple[Ints, Ints]] = OrderedDict()

    def rate(self, bucket: int) -> float:
        """Share of the items that belong to a bucket."""
        return float(self._totals[bucket] / self._order.total)

    def counts(self, items: int) -> Ints:
        """Items of each bucket among the first ``items``, int64 (buckets,)."""
        epoch, inside = divmod(items, self._order.total)
        ends, table = self._table(epoch)
        window = int(np.searchsorted(ends, inside, side="right"))
        counts: Ints = epoch * self._totals + table[window]
        rest = inside - (int(ends[window - 1]) if window else 0)
        if rest:
            counts = counts + np.bincount(self._window(epoch, window)[0][:rest], minlength=self._number)
        return counts

    def count(self, items: int, bucket: int) -> int:
        """Items of one bucket among the first ``items``."""
        return int(self.counts(items)[bucket]) if self._totals[bucket] else 0

    def buckets(self, begin: int, end: int) -> Ints:
        """Buckets of the items begin..end-1, int64."""
        parts = []
        while begin < end:
            epoch, inside = divmod(begin, self._order.total)
            ends, _ = self._table(epoch)
            window = int(np.searchsorted(ends, inside, side="right"))
            start = int(ends[window - 1]) if window else 0
            stop = min(int(ends[window]), inside + end - begin)
            parts.append(self._window(epoch, window)[0][inside - start : stop - start])
            begin += stop - inside
        return np.concatenate(parts).astype(np.int64)

    def members(self, bucket: int, begin: int, end: int) -> tuple[Ints, Ints, Ints]:
        """Place in the sequence, epoch, and sample number of the items begin..end-1 of one bucket, int64 each."""
        places, epochs, samples = [], [], []
        total = int(self._totals[bucket])
        while begin < end:
            epoch, inside = divmod(begin, total)
            ends, table = self._table(epoch)
            window = int(np.searchsorted(table[1:, bucket], inside, side="right"))
            where, numbers = self._piece(epoch, window, bucket)
            skipped = inside - int(table[window, bucket])
            taken = min(len(where) - skipped, end - begin)
            start = epoch * self._order.total + (int(ends[window - 1]) if window else 0)
            places.append(start + where[skipped : skipped + taken])
            samples.append(self._first + numbers[skipped : skipped + taken])
            epochs.append(np.full(taken, epoch, dtype=np.int64))
            begin += taken
        return np.concatenate(places), np.concatenate(epochs), np.concatenate(samples)

    def _count_shard(self, shard: int) -> Ints:
        return np.bincount(self._assigned(shard), minlength=self._number).astype(np.int64)

    def _table(self, epoch: int) -> tuple[Ints, Ints]:
        """Ends of an epoch's windows (windows,), and items per bucket before each and after the last (windows+1, b)."""
        if epoch not in self._tables:
            shards, ends = self._order.windows(epoch)
            firsts = np.arange(0, len(shards), self._order.window)
            sums = np.cumsum(np.add.reduceat(self._histogram[shards], firsts, axis=0), axis=0)
            table = np.concatenate([np.zeros((1, self._number), dtype=np.int64), sums])
            remember(self._tables, epoch, (ends, table), _CACHED_EPOCHS)
        return self._tables[epoch]

    def _window(self, epoch: int, window: int) -> tuple[NDArray[np.uint8], Ints]:
        """Bucket of each item of a window, in order, and the sample numbers.

        The items of rare buckets are kept longer than the window: they are needed again once a whole update of them has
        arrived, and come from many windows then.
        """
        place = (epoch, window)
        if place not in self._windows:
            samples = self._order.window_samples(epoch, window)
            assigned = self._order.arrange(epoch, window, self._assigned).astype(np.uint8)
            sizes = np.bincount(assigned, minlength=self._number)
            for bucket in np.flatnonzero((sizes > 0) & (sizes < self._rare)):
                where = np.flatnonzero(assigned == bucket)
                limit = max(_CACHED_ITEMS // self._rare, self._number)
                remember(self._pieces, (epoch, window, int(bucket)), (where, samples[where]), limit)
            remember(self._windows, place, (assigned, samples), _CACHED_WINDOWS)
        return self._windows[place]

    def _piece(self, epoch: int, window: int, bucket: int) -> tuple[Ints, Ints]:
        """Places inside a window, and sample numbers, of the items of one bucket."""
        place = (epoch, window, bucket)
        if place in self._pieces:
            return self._pieces[place]
        assigned, samples = self._window(epoch, window)
        where = np.flatnonzero(assigned == bucket)
        return where, samples[where]


def _shifted(shapes: Callable[[int], Ints], buckets: Buckets, first: int) -> Callable[[int], Ints]:
    return lambda shard: buckets.assign(shapes(first + shard))


def _ordinals(buckets: Ints, counts: Ints) -> Ints:
    """Number of each item within its bucket, where ``counts`` items of each bucket came before."""
    order = np.argsort(buckets, kind="stable")
    sizes = np.bincount(buckets, minlength=len(counts))
    numbers = np.empty_like(buckets)
    numbers[order] = np.arange(len(buckets)) + np.repeat(counts - (np.cumsum(sizes) - sizes), sizes)
    return numbers


def _ratio(name: str) -> float:
    """Value of "width:height"."""
    width, colon, height = name.partition(":")
    try:
        value = float(width) / (float(height) if colon else 1.0)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if 1 / 32 <= value <= 32:
        return value
    hint = f' If it was written {int(value) // 60}:{int(value) % 60}, quote it: "16:9".' if value == int(value) else ""
    raise ValueError(
        f'data.buckets.ratios: {name}: expected width:height between 1:32 and 32:1, e.g. "16:9".{hint if value else ""}'
    )
