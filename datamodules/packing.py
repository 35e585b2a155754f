"""Rows of tokens out of documents of any length, planned from the lengths alone, in an order without state.

A row is one item of the training sequence. Three ways to fill rows of T tokens:

``concat``
    The documents, in shuffled order and each with its end-of-document token, are joined into one endless stream of
    tokens, which is cut every T tokens. Nothing is padded and no token is lost: a document that does not fit goes on
    in the next row, and the last row of an epoch is filled with the first documents of the next.
``pack``
    Whole documents are laid into rows, best fit first, so that little is padded; only documents longer than T are cut,
    into pieces of T and a rest. Rows are packed shard by shard, from new documents every epoch, and the rows of a
    window of shards are mixed. How many rows a shard makes depends on its lengths only, not on the epoch.
``padded``
    One document per row, cut off at T.
"""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from datamodules.held import Held
from datamodules.mixture import Schedule, mixture_length, mixture_meaning
from datamodules.order import PACKING, Ints, Meaning, Order, groups, over_shards, remember, sample_bits

MODES = ("concat", "pack", "padded")

_CACHED_EPOCHS = 2
_CACHED_WINDOWS = 2


class Pieces(NamedTuple):
    """What goes where: piece k copies tokens begin..begin+length-1 of a document to a row. All int64 (k,).

    Pieces are sorted by row and column.

    Attributes:
        row: index of the row among the positions asked for.
        at: first column.
        epoch: epoch of the document's source.
        sample: number of the document.
        begin: first token of the document.
        length: number of tokens, at most T; 0 only in "padded" mode, for an empty document.
    """

    row: Ints
    at: Ints
    epoch: Ints
    sample: Ints
    begin: Ints
    length: Ints


class RowLookup(Protocol):
    """Anything that says what stands in the rows at given positions.

    Attributes:
        total: number of documents; samples are 0..total-1.
        width: T, tokens per row.
        content: size of an epoch: tokens in "concat" mode, otherwise rows.
        unit: size of a row in the same measure: T or 1.
    """

    total: int
    width: int
    content: int
    unit: int

    def __call__(self, positions: Ints) -> Pieces:
        """Return the pieces of the rows at some positions."""

    def length(self) -> int:
        """Rows per epoch."""

    def meaning(self) -> Meaning:
        """Settings that give a position its meaning."""


R = TypeVar("R", bound=RowLookup)


class Rows:
    """Rows of one source.

    Every token of every document is in exactly one row per epoch (in "padded" mode its first T tokens are).
    Memory: a few numbers per shard, and 40 bytes per document of two windows.

    Args:
        order: order of the documents.
        lengths: gives the tokens of every document of a shard, with the end-of-document token where there is one,
            int64 (n,); 0 leaves a document out. Called once for every shard at the start ("padded": never), and again
            for the shards of a window. Safe to be called from several threads.
        width: T, tokens per row.
        mode: "concat", "pack" or "padded".

    Raises:
        ValueError: a setting is out of range, or there is no token.
    """

    def __init__(self, order: Order, lengths: Callable[[int], Ints], width: int, mode: str) -> None:
        if width < 1:
            raise ValueError(f"data.length={width}: a row needs at least 1 token. Set e.g. data.length=1024.")
        if mode not in MODES:
            raise ValueError(f"data.mode={mode}: expected {', '.join(MODES)}. Set e.g. data.mode=concat.")
        self.order = order
        self.width = width
        self.mode = mode
        self.total = order.total
        planners: dict[str, Callable[[Order, Callable[[int], Ints], int], _Plan]]
        planners = {"concat": _Joined, "pack": _Packed, "padded": _Single}
        self._plan = planners[mode](order, lengths, width)
        self.content = self._plan.content
        self.unit = width if mode == "concat" else 1

    def __call__(self, positions: Ints) -> Pieces:
        """What stands in the rows at some positions.

        Args:
            positions: places in the endless sequence of rows, int64 (n,).
        """
        return self._plan.pieces(np.asarray(positions, dtype=np.int64))

    def length(self) -> int:
        """Rows per epoch; in "concat" mode rounded up."""
        return -(-self.content // self.unit)

    def meaning(self) -> Meaning:
        """What defines the order of the documents, and how rows are made."""
        return {**self.order.meaning(), "length": self.width, "mode": self.mode}

    def tokens(self) -> int:
        """Tokens of all documents; -1 in "padded" mode, which does not count them."""
        return self._plan.tokens


class MixedRows(Generic[R]):
    """Rows of several sources in fixed shares; documents are numbered through all sources.

    Args:
        rows: the rows of each source, all of one width.
        shares: as ``shares_of(parts, [source.content for source in rows])`` gives them. With ``repeat``, a document
            comes so often per epoch of the mixture; in "concat" mode the end of an epoch may lie inside a row.

    Raises:
        ValueError: numbers of rows and shares differ, or the shares are not usable.
    """

    def __init__(self, rows: Sequence[R], shares: Sequence[int]) -> None:
        if len(rows) != len(shares):
            raise ValueError(f"data.train: {len(rows)} sources, but {len(shares)} shares.")
        self.rows = list(rows)
        self.schedule = Schedule(shares)
        self.width = rows[0].width
        self.unit = rows[0].unit
        self.starts: Ints = np.concatenate([[0], np.cumsum([source.total for source in rows])]).astype(np.int64)
        self.total = int(self.starts[-1])
        self._length = mixture_length(shares, [source.content for source in rows], self.unit)
        self.content = self._length * self.unit

    def __call__(self, positions: Ints) -> Pieces:
        """What stands in the rows at some positions, int64 (n,)."""
        which, inside = self.schedule(positions)
        parts = []
        for source, here in groups(which):
            part = self.rows[source](inside[here])
            parts.append(part._replace(row=here[part.row], sample=part.sample + self.starts[source]))
        return _sorted(parts)

    def length(self) -> int:
        """Rows per epoch of the mixture."""
        return self._length

    def meaning(self) -> Meaning:
        """What defines the rows of the sources, and the shares."""
        return mixture_meaning([source.meaning() for source in self.rows], self.schedule)


class _Plan(Protocol):
    content: int
    tokens: int

    def pieces(self, positions: Ints) -> Pieces: ...


class _Single:
    """One document per row."""

    def __init__(self, order: Order, lengths: Callable[[int], Ints], width: int) -> None:
        self._order = order
        self._width = width
        self._starts: Ints = np.concatenate([[0], np.cumsum(order.counts)]).astype(np.int64)
        self.content = order.total
        self.tokens = -1
        room = order.total * _CACHED_WINDOWS * order.window // len(order.counts)
        self._known = Held(self._starts, lengths, room)

    def pieces(self, positions: Ints) -> Pieces:
        epochs, samples = self._order(positions)
        lengths = self._known(samples, np.searchsorted(self._starts, samples, side="right") - 1)
        none = np.zeros_like(samples)
        return Pieces(np.arange(len(samples)), none, epochs, samples, none, np.minimum(lengths, self._width))


class _Joined:
    """All documents one after the other, cut every ``width`` tokens."""

    def __init__(self, order: Order, lengths: Callable[[int], Ints], width: int) -> None:
        self._order = order
        self._lengths = lengths
        self._width = width
        self._totals = np.array(over_shards(lambda s: int(lengths(s).sum()), len(order.counts)), dtype=np.int64)
        self.content = self.tokens = int(self._totals.sum())
        if not self.tokens:
            raise ValueError(_EMPTY)
        self._epochs: OrderedDict[int, Ints] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()
        self._lock = threading.Lock()

    def pieces(self, positions: Ints) -> Pieces:
        """Cut the rows at the borders of the documents, window by window; nearly always all are in one window."""
        begin = positions * self._width
        end = begin + self._width
        parts = []
        with self._lock:
            for epoch in np.unique(_expand(begin // self.tokens, (end - 1) // self.tokens)[1]).tolist():
                ends = self._ends(epoch)
                offset = epoch * self.tokens
                low, high = (np.clip(edge - offset, 0, self.tokens) for edge in (begin, end))
                first = np.searchsorted(ends, low, side="right")
                last = np.where(low < high, np.searchsorted(ends, high - 1, side="right"), first - 1)
                for window in np.unique(_expand(first, last)[1]).tolist():
                    parts.append(self._inside(epoch, window, begin - offset, end - offset))
        return parts[0] if len(parts) == 1 else _sorted(parts)

    def _inside(self, epoch: int, window: int, begin: Ints, end: Ints) -> Pieces:
        """What rows have of one window; ``begin`` and ``end`` of the rows are counted from the start of the epoch."""
        samples, borders = self._window(epoch, window)
        low, high = np.maximum(begin, borders[0]), np.minimum(end, borders[-1])
        rows = np.flatnonzero(low < high)
        low, high = low[rows], high[rows]
        first = np.searchsorted(borders, low, side="right") - 1
        last = np.searchsorted(borders, high, side="left") - 1
        which, texts = _expand(first, last)
        starts = np.maximum(borders[texts], low[which])
        lengths = np.minimum(borders[texts + 1], high[which]) - starts
        row = rows[which]
        columns = (row, starts - begin[row], np.full(len(row), epoch), samples[texts], starts - borders[texts], lengths)
        if lengths.min(initial=1) > 0:
            return Pieces(*columns)
        return Pieces(*(column[lengths > 0] for column in columns))  # a document without tokens has no part

    def _ends(self, epoch: int) -> Ints:
        """Tokens of an epoch up to the end of each window."""
        if epoch not in self._epochs:
            shards, _ = self._order.windows(epoch)
            firsts = np.arange(0, len(shards), self._order.window)
            ends: Ints = np.cumsum(np.add.reduceat(self._totals[shards], firsts))
            remember(self._epochs, epoch, ends, _CACHED_EPOCHS)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> tuple[Ints, Ints]:
        """Documents of a window in reading order, and where in the epoch each begins; also where the last ends."""
        place = (epoch, window)
        if place not in self._windows:
            lengths = self._order.arrange(epoch, window, self._lengths)
            before = self._ends(epoch)[window - 1] if window else 0
            borders: Ints = before + np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            remember(self._windows, place, (self._order.window_samples(epoch, window), borders), _CACHED_WINDOWS)
        return self._windows[place]


class _Packed:
    """Whole documents in rows, best fit first, packed shard by shard.

    The rows of a shard have the same lengths in them every epoch, but documents of one length are dealt out anew.
    """

    def __init__(self, order: Order, lengths: Callable[[int], Ints], width: int) -> None:
        self._seed = order.seed
        self._lengths = lengths
        self._width = width
        self._starts: Ints = np.concatenate([[0], np.cumsum(order.counts)]).astype(np.int64)
        counted = np.array(over_shards(self._count, len(order.counts)), dtype=np.int64).reshape(-1, 2)
        self.tokens = int(counted[:, 1].sum())
        if not self.tokens:
            raise ValueError(_EMPTY)
        self._rows = Order(counted[:, 0], order.seed, order.window, order.source)
        self.content = self._rows.total
        self._windows: OrderedDict[tuple[int, int], tuple[Ints, Pieces]] = OrderedDict()
        self._lock = threading.Lock()

    def pieces(self, positions: Ints) -> Pieces:
        epochs, inside = np.divmod(positions, self.content)
        parts = []
        with self._lock:
            for epoch, in_epoch in groups(epochs):
                _, ends = self._rows.windows(epoch)
                places = inside[in_epoch]
                for window, among in groups(np.searchsorted(ends, places, side="right")):
                    firsts, planned = self._window(epoch, window)
                    rows = places[among] - (ends[window - 1] if window else 0)
                    which, chosen = _expand(firsts[rows], firsts[rows + 1] - 1)
                    part = Pieces(*(column[chosen] for column in planned))
                    parts.append(part._replace(row=in_epoch[among[which]]))
        return parts[0] if len(parts) == 1 else _sorted(parts)

    def _window(self, epoch: int, window: int) -> tuple[Ints, Pieces]:
        """Where the pieces of each row of a window begin (rows + 1,), and the pieces of all its rows, as they are read.

        Planned once, so that a batch is a slice of it.
        """
        place = (epoch, window)
        if place not in self._windows:
            shards, _ = self._rows.windows(epoch)
            mixed = range(window * self._rows.window, min((window + 1) * self._rows.window, len(shards)))
            packed = {int(shards[k]): self._shard(epoch, int(shards[k])) for k in mixed}
            numbers = np.concatenate([np.diff(firsts) for firsts, _ in packed.values()])  # pieces of every row
            starts = np.cumsum(numbers) - numbers
            shuffled = self._rows.arrange(epoch, window, self._row_numbers(packed))
            which, chosen = _expand(starts[shuffled], starts[shuffled] + numbers[shuffled] - 1)
            columns = zip(*(pieces for _, pieces in packed.values()), strict=True)
            pieces = Pieces(*(np.concatenate(column)[chosen] for column in columns))._replace(row=which)
            firsts = np.concatenate([[0], np.cumsum(numbers[shuffled])]).astype(np.int64)
            remember(self._windows, place, (firsts, pieces), _CACHED_WINDOWS)
        return self._windows[place]

    def _row_numbers(self, packed: Iterable[int]) -> Callable[[int], Ints]:
        """Numbers of the rows of each of several shards, counted through them."""
        counts = self._rows.counts
        starts = dict(zip(packed, np.cumsum([0, *(counts[shard] for shard in packed)]).tolist(), strict=False))
        return lambda shard: np.arange(starts[shard], starts[shard] + counts[shard])

    def _count(self, shard: int) -> tuple[int, int]:
        """Rows and tokens of a shard."""
        lengths = self._lengths(shard)
        _, _, sizes = _chunks(lengths, self._width)
        return best_fit(np.bincount(sizes), self._width)[0], int(lengths.sum())

    def _shard(self, epoch: int, shard: int) -> tuple[Ints, Pieces]:
        """Where the pieces of each row of a shard begin (rows + 1,), and the pieces of all its rows."""
        documents, begins, sizes = _chunks(self._lengths(shard), self._width)
        rows, steps = best_fit(np.bincount(sizes), self._width)
        row, at = _unrolled(steps)
        samples = self._starts[shard] + documents
        epochs = np.full(len(samples), epoch, dtype=np.int64)
        deal = np.lexsort((sample_bits(self._seed, epochs, samples, PACKING), -sizes))  # longest first, then chance
        by_row = np.argsort(row, kind="stable")
        dealt = deal[by_row]
        packed = Pieces(row[by_row], at[by_row], epochs, samples[dealt], begins[dealt], sizes[dealt])
        firsts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
        return firsts, packed


def best_fit(counts: Ints, width: int) -> tuple[int, Ints]:
    """Lay lengths into rows, longest first, each into the fullest row that still has room.

    Lengths that are equal are laid together, and rows that were filled alike are kept as one range, so the work grows
    with the number of different lengths and not with the number of documents.
    Source: best-fit decreasing (Johnson 1973).

    Args:
        counts: how many there are of each length 0..len(counts)-1, int64; none longer than ``width``.
        width: room in a row.

    Returns:
        The number of rows, and int64 (steps, 5) with (first row, rows, lengths per row, length, first column): each
        step lays the next rows * lengths-per-row lengths, in descending order of length.
    """
    rows = 0
    steps: list[tuple[int, int, int, int, int]] = []
    free: dict[int, list[tuple[int, int]]] = {}  # ranges of rows (first, number) by the room they have left
    rooms: list[int] = []  # the keys of ``free``, ascending
    numbers = counts.tolist()

    def give_back(room: int, begin: int, size: int) -> None:
        if room in free:
            free[room].append((begin, size))
        else:
            bisect.insort(rooms, room)
            free[room] = [(begin, size)]

    for length in range(len(numbers) - 1, 0, -1):  # every shard of a set comes by here before the first batch
        left = numbers[length]
        while left:
            place = bisect.bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                first, number = free[room].pop()
                if not free[room]:
                    del free[room], rooms[place]
            else:
                room, first, number = width, rows, -(-left // (width // length))
                rows += number
            each = room // length
            filled = min(number, left // each)
            if not filled:
                filled, each = 1, left
            steps.append((first, filled, each, length, width - room))
            left -= filled * each
            if rest := room - each * length:
                give_back(rest, first, filled)
            if number > filled:
                give_back(room, first + filled, number - filled)
    return rows, np.array(steps, dtype=np.int64).reshape(-1, 5)


_EMPTY = "data.train: the documents hold no tokens. Check data.member, the tokenizer, and data.root."


def _chunks(lengths: Ints, width: int) -> tuple[Ints, Ints, Ints]:
    """Document, first token and size of each piece of at most ``width`` tokens; empty documents have none."""
    if len(lengths) and lengths.max() <= width:  # as in most shards of documents
        documents = np.flatnonzero(lengths)
        return documents, np.zeros_like(documents), lengths[documents]
    numbers = -(-lengths // width)
    documents, index = _expand(np.zeros_like(numbers), numbers - 1)
    begins = index * width
    return documents, begins, np.minimum(lengths[documents] - begins, width)


def _unrolled(steps: Ints) -> tuple[Ints, Ints]:
    """Row and first column of every length that the steps of ``best_fit`` lay, in that order."""
    which, index = _expand(np.zeros(len(steps), dtype=np.int64), steps[:, 1] * steps[:, 2] - 1)
    first, _, each, length, column = steps[which].T
    return first + index // each, column + index % each * length


def _expand(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Every whole number of the ranges first..last (empty if last < first), and the index of its range before it."""
    numbers = last - first + 1
    which = np.repeat(np.arange(len(first)), numbers)
    offsets = np.arange(len(which)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    return which, first[which] + offsets


def _sorted(parts: Sequence[Pieces]) -> Pieces:
    """Pieces of several places together, sorted by row and column."""
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Pieces(none, none, none, none, none, none)
    joined = Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    order = np.lexsort((joined.at, joined.row))
    return Pieces(*(column[order] for column in joined))
