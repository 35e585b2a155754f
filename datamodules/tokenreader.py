"""From positions to rows of tokens: copied from pre-tokenised documents, or tokenised on the way."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.bad import BadSamples
from datamodules.loader import Buffers
from datamodules.members import Labels, sizes_of
from datamodules.order import Ints
from datamodules.packing import Pieces
from datamodules.source import BadSample, Source, place
from datamodules.tokenizers import Tokenizer, Tokens

Batch = dict[str, Any]
Flags = NDArray[np.bool_]

_CACHED_BYTES = 64 * 2**20  # tokenised documents kept for the rows that go on in them


@dataclass(frozen=True)
class RowLayout:
    """How a row of tokens is laid out.

    Attributes:
        length: T, tokens per row.
        eos: token behind every document; None for none.
        edges: tokens at the beginning and at the end of every row; None for none.
        filler: token at places that hold nothing.
        documents: whether batches say where documents begin and end.
        given: tokens that end the given part of a document; none for no such part.
    """

    length: int
    eos: int | None
    edges: tuple[int, int] | None
    filler: int
    documents: bool
    given: tuple[int, ...] = ()

    @property
    def room(self) -> int:
        """Tokens of documents in a row."""
        return self.length - (2 if self.edges else 0)

    def tokens(self, stored: Ints) -> Ints:
        """Places that documents of ``stored`` tokens take, end mark included.

        An empty one takes one place even without an end mark: so it is looked at, and missed if it should not be empty.
        """
        return np.maximum(stored + (self.eos is not None), 1)


class Documents(Protocol):
    """Where the tokens of documents come from; safe to use from several threads."""

    def lengths(self, source: Source, shard: int) -> Ints:
        """Tokens of every document of a shard, without marks, int64 (n,); 0 for one that cannot be read."""

    def copy(self, pieces: Pieces, starts: Ints, eos: int | None, out: Ints, refuse: "Refuse") -> Flags:
        """Copy pieces of documents.

        Args:
            pieces: which tokens of which documents; one place more than a document has is its end mark.
            starts: where each piece goes in the flattened ``out``, int64 (k,).
            eos: the end mark, None for none.
            out: int64 (B, T); places outside the pieces may be overwritten.
            refuse: called for every document that cannot be used.

        Returns:
            Which pieces were copied, bool (k,).
        """


Refuse = Callable[[int, BadSample], None]


class TokenReader:
    """Turns positions into a batch of rows: plan -> documents -> tokens. Safe to call from several threads.

    Args:
        source: the documents.
        rows: plan of the rows, see :mod:`datamodules.packing`.
        bad: account of unusable documents.
        documents: where the tokens come from.
        layout: how a row is laid out.
        num_classes: one document per row, whose class joins the batch and lies in 0..num_classes-1; 0 for none.
        label_offset: added to every stored class.
        names: names of rows, from the numbers of their first documents and the first tokens of these in the rows.
        buffers: how many batches are kept for reuse.
    """

    def __init__(
        self,
        source: Source,
        rows: Callable[[Ints], Pieces],
        bad: BadSamples,
        documents: Documents,
        layout: RowLayout,
        *,
        names: Callable[[Ints, Ints], list[str]],
        num_classes: int = 0,
        label_offset: int = 0,
        buffers: int = 8,
    ) -> None:
        self.source = source
        self.rows = rows
        self.documents = documents
        self.layout = layout
        self.names = names
        self._classes = Labels(source, num_classes, label_offset) if num_classes else None
        self._bad = bad
        self._buffers = Buffers(buffers)

    def __call__(self, positions: Ints) -> Batch:
        """Read one batch.

        Args:
            positions: int64 (B,).

        Returns:
            "tokens": int64 (B, T); "valid": bool (B, T), False where no token stands, because the row is not full or a
            document cannot be read; "key": B names of rows. With ``documents`` also "document": int32 (B, T), number of
            the document inside the row, -1 where there is none; "position": int64 (B, T), place inside the document.
            With a given part "given": bool (B, T), True in it. With classes "label": int64 (B,).

        Raises:
            ValueError: more documents are unusable than allowed.
        """
        planned, layout = self.rows(positions), self.layout
        shape = (len(positions), layout.length)
        tokens = self._buffers.take(shape, np.int64)
        labels, pieces = self._labels(len(positions), planned)
        starts = pieces.row * layout.length + pieces.at + (1 if layout.edges else 0)
        copied = self.documents.copy(pieces, starts, layout.eos, tokens, self._bad.add)
        if not copied.all():
            pieces, starts = Pieces(*(column[copied] for column in pieces)), starts[copied]
        valid = self._frame(tokens, pieces, starts)
        batch: Batch = {"tokens": torch.from_numpy(tokens), "valid": torch.from_numpy(valid)}
        if layout.documents:
            batch |= self._borders(shape, pieces, starts)
        if layout.given:
            batch["given"] = torch.from_numpy(self._given(tokens, pieces, starts))
        if self._classes is not None:
            batch["label"] = torch.from_numpy(labels)
        firsts = np.searchsorted(planned.row, np.arange(len(positions)))
        batch["key"] = self.names(planned.sample[firsts], planned.begin[firsts])
        return batch

    def _labels(self, count: int, pieces: Pieces) -> tuple[Ints, Pieces]:
        """Class of every row, and the pieces without those whose document has no usable class."""
        labels = np.zeros(count, dtype=np.int64)
        while self._classes is not None and len(pieces.row):
            try:
                labels[pieces.row] = self._classes(pieces.sample)
                break
            except BadSample as error:
                self._bad.add(int(pieces.sample[error.row]), error)
                pieces = Pieces(*(np.delete(column, error.row) for column in pieces))
        return labels, pieces

    def _frame(self, tokens: Ints, pieces: Pieces, starts: Ints) -> Flags:
        """Fill what no piece covers, and say which places hold tokens, bool (B, T)."""
        layout = self.layout
        valid = self._buffers.take(tokens.shape, np.bool_)
        if pieces.length.sum() == len(tokens) * layout.room:
            valid.fill(True)
        else:
            _spread(starts, pieces.length, np.ones(len(starts), dtype=np.bool_), False, valid)
            tokens.reshape(-1)[_gaps(starts, pieces.length, tokens.size)] = layout.filler
        if layout.edges:
            ends = np.ones(len(tokens), dtype=np.int64)
            ends[pieces.row] = starts - pieces.row * layout.length + pieces.length  # the last piece of a row stays
            for columns, mark in ((0, layout.edges[0]), (ends, layout.edges[1])):
                tokens[np.arange(len(tokens)), columns] = mark
                valid[np.arange(len(tokens)), columns] = True
        return valid

    def _given(self, tokens: Ints, pieces: Pieces, starts: Ints) -> Flags:
        """Places from the beginning of a document to the end of the first mark in it, bool (B, T)."""
        flat, mark = tokens.reshape(-1), np.array(self.layout.given)
        hits = np.flatnonzero(flat[: flat.size - len(mark) + 1] == mark[0])
        for offset in range(1, len(mark)):
            hits = hits[flat[hits + offset] == mark[offset]]
        ends = np.append(hits, flat.size)[np.searchsorted(hits, starts)] + len(mark)
        found = (ends <= starts + pieces.length) & (pieces.begin == 0)
        lengths = np.where(found, ends - starts, 0)
        given = self._buffers.take(tokens.shape, np.bool_)
        _spread(starts, lengths, np.ones(len(starts), dtype=np.bool_), False, given)
        return given

    def _borders(self, shape: tuple[int, int], pieces: Pieces, starts: Ints) -> Batch:
        """Number of the document inside the row, and the place inside the document, of every token."""
        document = self._buffers.take(shape, np.int32)
        position = self._buffers.take(shape, np.int64)
        first = np.searchsorted(pieces.row, pieces.row)
        _spread(starts, pieces.length, (np.arange(len(first)) - first).astype(np.int32), np.int32(-1), document)
        _spread(starts, pieces.length, pieces.begin - starts, np.int64(0), position)
        flat = position.reshape(-1)
        flat += np.arange(flat.size)
        flat[_gaps(starts, pieces.length, flat.size)] = 0
        return {"document": torch.from_numpy(document), "position": torch.from_numpy(position)}


class StoredTokens:
    """Documents that were tokenised before, as raw numbers of one size.

    Args:
        source: the documents.
        member: which member holds the tokens.
        kind: its number format.
        planned: number of a document to the places it was given; needed by ``copy`` alone.
    """

    def __init__(
        self, source: Source, member: str, kind: np.dtype[Any], planned: Callable[[int], int] | None = None
    ) -> None:
        self.source = source
        self.member = member
        self.kind = kind
        self.planned = planned or _unplanned
        self._buffers = Buffers(8)

    def lengths(self, source: Source, shard: int) -> Ints:
        """Tokens of every document of a shard, int64 (n,); 0 for one that cannot be read."""
        return source.sizes(shard, self.member) // self.kind.itemsize

    def copy(self, pieces: Pieces, starts: Ints, eos: int | None, out: Ints, refuse: Refuse) -> Flags:
        """Copy pieces of documents, see :class:`Documents`."""
        width = self.kind.itemsize
        sizes = sizes_of(self.source, pieces.sample, self.member)
        stored = sizes // width
        ends = pieces.begin + pieces.length
        bodies = np.minimum(ends, stored) - pieces.begin
        copied = np.ones(len(starts), dtype=np.bool_)
        doubtful = (bodies < pieces.length - (eos is not None)) | (stored == 0) | (sizes % width != 0)
        for piece in np.flatnonzero(
            (pieces.begin == 0) & (pieces.length == 1) & (stored + (eos is not None) > 1)
        ).tolist():
            doubtful[piece] |= self.planned(int(pieces.sample[piece])) == 1  # it could not be counted at the time
        for piece in np.flatnonzero(doubtful).tolist():
            copied[piece] = self._passes(int(pieces.sample[piece]), int(sizes[piece]), eos, refuse)
        raw = self._buffers.take(out.shape, self.kind)
        self._gather(pieces, bodies, starts, raw.view(np.uint8), copied, refuse)
        out[...] = raw
        if eos is not None:
            out.reshape(-1)[(starts + bodies)[copied & (bodies < pieces.length)]] = eos
        return copied

    def _gather(
        self, pieces: Pieces, bodies: Ints, starts: Ints, raw: NDArray[np.uint8], copied: Flags, refuse: Refuse
    ) -> None:
        """Copy what ``copied`` marks, and take the mark from what cannot be read."""
        width = self.kind.itemsize
        while True:
            wanted = np.flatnonzero(copied & (bodies > 0))
            columns = (pieces.begin[wanted] * width, bodies[wanted] * width)
            try:
                self.source.pieces(pieces.sample[wanted], self.member, *columns, raw, starts[wanted] * width)
                return
            except BadSample as error:
                sample = int(pieces.sample[wanted[error.row]])
                refuse(sample, error)
                copied[pieces.sample == sample] = False

    def _passes(self, sample: int, size: int, eos: int | None, refuse: Refuse) -> bool:
        """Whether a document that looks wrong in the index is nothing worse than empty."""
        where = place(self.source, sample)
        try:
            data = self.source.read(sample).get(self.member)
            if data is None:
                raise BadSample(f"{where}: no .{self.member} among its members")
            if len(data) % self.kind.itemsize:
                raise BadSample(f"{where}: its {len(data)} bytes are no whole number of {self.kind} tokens")
            if data:
                tokens = len(data) // self.kind.itemsize
                raise BadSample(f"{where}: it has {tokens} tokens ({size} bytes in the index), not those planned with")
        except BadSample as error:
            refuse(sample, error)
            return False
        return eos is not None  # an empty document is its end mark


class RawText:
    """Documents that are tokenised as they are read; those that go on in the next rows are kept for a while.

    Args:
        source: the documents.
        member: which member holds the text.
        tokenizer: turns text into tokens.
        planned: number of a document to the places it was given; needed by ``copy`` alone.
    """

    def __init__(
        self, source: Source, member: str, tokenizer: Tokenizer, planned: Callable[[int], int] | None = None
    ) -> None:
        self.source = source
        self.member = member
        self.tokenizer = tokenizer
        self.planned = planned or _unplanned
        self._kept: OrderedDict[int, Tokens] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def lengths(self, source: Source, shard: int) -> Ints:
        """Tokens of every document of a shard, int64 (n,); 0 for one that cannot be read.

        Bytes are counted by the index; otherwise every document is tokenised once, and the counts are kept.
        """
        if self.tokenizer.one_per_byte:
            return source.sizes(shard, self.member)
        name = f"tokens-{self.member}-{self.tokenizer.fingerprint}"
        return source.measured(shard, name, self._measure, 1)[:, 0]

    def copy(self, pieces: Pieces, starts: Ints, eos: int | None, out: Ints, refuse: Refuse) -> Flags:
        """Copy pieces of documents, see :class:`Documents`."""
        found = self._tokens(np.unique(pieces.sample).tolist(), refuse)
        flat = out.reshape(-1)
        copied = np.zeros(len(starts), dtype=np.bool_)
        columns = (pieces.sample, pieces.begin, pieces.length, starts)
        for piece, (sample, begin, length, start) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            tokens = found.get(sample)
            if tokens is None:
                continue
            body = min(length, len(tokens) - begin)
            if body < length - (eos is not None):
                if len(tokens):  # else it is empty, and its place holds nothing
                    refuse(sample, self._changed(sample, len(tokens)))
                continue
            if begin == 0 and length == 1 < len(tokens) + (eos is not None) and self.planned(sample) == 1:
                refuse(sample, self._changed(sample, len(tokens)))
                continue
            flat[start : start + body] = tokens[begin : begin + body]
            if eos is not None and body < length:
                flat[start + body] = eos
            copied[piece] = True
        return copied

    def _tokens(self, samples: Sequence[int], refuse: Refuse) -> dict[int, Tokens]:
        """Tokens of documents by number, without those that cannot be used."""
        with self._lock:
            found = {sample: self._kept[sample] for sample in samples if sample in self._kept}
        texts: dict[int, str] = {}
        for sample in samples:
            if sample not in found:
                try:
                    texts[sample] = self._text(sample, self.source.read(sample))
                except BadSample as error:
                    refuse(sample, error)
        new = self._encoded(texts, refuse)
        with self._lock:
            for sample, tokens in new.items():
                if sample not in self._kept:
                    self._kept[sample] = tokens
                    self._bytes += tokens.nbytes
            while self._bytes > _CACHED_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found | new

    def _encoded(self, texts: dict[int, str], refuse: Refuse) -> dict[int, Tokens]:
        try:
            return dict(zip(texts, self.tokenizer.encode_batch(list(texts.values())), strict=True))
        except ValueError:  # one of them; find out which
            found = {}
            for sample, text in texts.items():
                try:
                    found[sample] = self.tokenizer.encode(text)
                except ValueError as error:
                    refuse(sample, BadSample(f"{place(self.source, sample)}: {error}"))
            return found

    def _text(self, sample: int, members: dict[str, bytes]) -> str:
        data = members.get(self.member)
        if data is None:
            where = place(self.source, sample)
            raise BadSample(f"{where}: no .{self.member} among its members ({', '.join(members)})")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise BadSample(f"{place(self.source, sample)}: not utf-8 at byte {error.start}") from error

    def _measure(self, members: dict[str, bytes]) -> Sequence[int]:
        """Number of tokens of a document; any error is raised again when the document is used."""
        return [len(self.tokenizer.encode(members.get(self.member, b"").decode()))]

    def _changed(self, sample: int, tokens: int) -> BadSample:
        return BadSample(f"{place(self.source, sample)}: it has {tokens} tokens, not as many as when they were counted")


def _unplanned(sample: int) -> int:
    raise AssertionError(f"nobody planned places for document {sample}")


def _gaps(starts: Ints, lengths: Ints, size: int) -> Ints:
    """Places 0..size-1 that no span covers, ascending; the spans are in ascending order and do not overlap."""
    begins = np.concatenate([[0], starts + lengths])
    sizes = np.append(starts, size) - begins
    return np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


def _spread(starts: Ints, lengths: Ints, values: NDArray[Any], other: Any, out: NDArray[Any]) -> None:
    """Write ``values[k]`` to the places starts[k]..starts[k]+lengths[k]-1 of the flattened ``out``, else ``other``.

    The spans are in ascending order and do not overlap.
    """
    ends = starts + lengths
    gaps = np.diff(starts, append=out.size)
    gaps -= lengths
    runs = np.stack([lengths, gaps], axis=1).reshape(-1)
    kinds = np.stack([values, np.full_like(values, other)], axis=1).reshape(-1)
    first = int(starts[0]) if len(starts) else out.size
    flat = out.reshape(-1)
    flat[:first] = other
    if len(ends):
        flat[first:] = np.repeat(kinds, runs)
