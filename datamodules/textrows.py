"""Rows of text as a training or validation sequence: remembered lengths, shuffled rows, and what a position means."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.order import Ints, Meaning, Order
from datamodules.packing import Pieces, RowLookup, Rows
from datamodules.source import Source
from datamodules.tokenreader import Documents, RowLayout

_BLOCK_TOKENS = 2**24  # raw text as long as this is kept tokenised, so that no row of a block tokenises it again
_ROW_STREAM = 2**32  # keeps the order of rows apart from that of documents


class Lengths:
    """Places that every document of a shard takes, remembered: a shard that goes later must not move the others.

    One to four bytes per document of the whole set.

    Args:
        source: the documents.
        documents: tells their tokens.
        layout: tells the marks.
    """

    def __init__(self, source: Source, documents: Documents, layout: RowLayout) -> None:
        self._source = source
        self._documents = documents
        self._layout = layout
        self._kept: dict[int, NDArray[Any]] = {}

    def __call__(self, shard: int) -> Ints:
        """Places of every document of a shard, int64 (n,)."""
        found = self._kept.get(shard)
        if found is None:
            found = self._layout.tokens(self._documents.lengths(self._source, shard))
            self._kept[shard] = found = found.astype(np.min_scalar_type(int(found.max(initial=0))))
        return found.astype(np.int64)

    def one(self, sample: int) -> int:
        """Places of one document."""
        shard = int(np.searchsorted(self._source.starts, sample, side="right")) - 1
        return int(self(shard)[sample - self._source.starts[shard]])


class ShuffledRows:
    """Rows of mode "concat" in shuffled order: one after the other, a batch would hold the pieces of a few documents.

    The endless sequence of rows is cut into blocks of the length of half a shuffle window, at most 16 million tokens,
    and every block is permuted. It depends on nothing but the seed and the number of the block, so every row stays
    where arithmetic finds it, and reads stay within two windows.

    Args:
        rows: the rows in the order of their documents.
    """

    def __init__(self, rows: Rows) -> None:
        order = rows.order
        self.rows = rows
        self.total = rows.total
        self.width = rows.width
        self.content = rows.content
        self.unit = rows.unit
        window = rows.content * min(order.window, len(order.counts)) // len(order.counts)
        self.block = max(1, min(window // 2, _BLOCK_TOKENS) // rows.width)
        self._order = Order([self.block], order.seed, window=1, source=order.source + _ROW_STREAM)

    def __call__(self, positions: Ints) -> Pieces:
        """What stands in the rows at some positions, int64 (n,)."""
        blocks, inside = self._order(positions)
        return self.rows(blocks * self.block + inside)

    def length(self) -> int:
        """Rows per epoch, rounded up."""
        return self.rows.length()

    def meaning(self) -> Meaning:
        """What defines the rows; their order follows from it."""
        return self.rows.meaning()


class TextRows:
    """Rows with more settings to their meaning, and an end where they have one.

    Args:
        rows: the rows.
        meant: settings that give a row its meaning, beside those of ``rows``.
        epochs: how many epochs there are; None for no end. What a last row would take from the next one is left out.
    """

    def __init__(self, rows: RowLookup, meant: Meaning, epochs: int | None = None) -> None:
        self._rows = rows
        self._meant = meant
        self._epochs = epochs

    def __call__(self, positions: Ints) -> Pieces:
        """What stands in the rows at some positions, int64 (n,)."""
        pieces = self._rows(positions)
        if self._epochs is None:
            return pieces
        return Pieces(*(column[pieces.epoch < self._epochs] for column in pieces))

    def length(self) -> int:
        """Rows per epoch."""
        return self._rows.length()

    def meaning(self) -> Meaning:
        """What defines the rows; the size of an epoch among it, which tells when documents were lost before a start."""
        return {**self._rows.meaning(), **self._meant, "content": self._rows.content}
