"""Text from tar shards as rows of tokens, in an order any number of ranks can continue."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import ShardData
from datamodules.members import keys_of
from datamodules.mixture import shares_of
from datamodules.order import Ints, Meaning, Order
from datamodules.packing import MODES, MixedRows, Pieces, RowLookup, Rows
from datamodules.source import Source, first_dots
from datamodules.textrows import Lengths, ShuffledRows, TextRows
from datamodules.tokenizers import TEXT_MEMBERS, Tokenizer
from datamodules.tokenreader import Documents, RawText, RowLayout, StoredTokens, TokenReader

log = logging.getLogger(__name__)

TOKENS = "tok"

_ANNOUNCED = 50_000  # documents; counting the tokens of more takes long enough to say so


class Text(ShardData):
    """Train and validation text as batches of rows of tokens.

    A sample of the shards is a document: raw text in utf-8, tokenised on the way, or tokens stored before by
    :func:`datamodules.pretokenize.pretokenize`. An item of the training sequence is a row of ``length`` tokens.

    A batch is a dict: "tokens" int64 (B, T); "valid" bool (B, T), False where no token stands; "key" list of B
    strings, key of the first document of a row and the token it starts with there; with ``documents`` also "document"
    int32 (B, T), the number of the document inside the row or -1, and "position" int64 (B, T), the place inside the
    document, from which block-diagonal attention and its positions follow; with ``given_to`` also "given" bool (B, T),
    True in the part of a document that is only read; with classes "label" int64 (B,).

    A document that cannot be read, or is not utf-8, leaves its places invalid. Raw text is tokenised once as a whole
    before the first start, to count its tokens (bytes need no counting); the counts are kept in the cache folder. From
    about a gigabyte on, store tokens instead. Memory: up to four bytes per document of the set, and 64 MiB of raw
    documents that go on in later rows.

    Args:
        root: folder that relative names start from.
        train: shards, as a name with wildcards or braces, a URL, a folder, or a list of them; or a mixture
            {name: {path, weight or repeat}}.
        val: held-out samples, given alike but not as a mixture; None for none. Every token is in exactly one row of a
            validation pass (in mode "padded" the first of every document are).
        source: called with ``root`` before anything is read, to make the shards if they are not there.
        tokenizer: turns text into tokens, see :mod:`datamodules.tokenizers`.
        length: T, tokens per row.
        mode: "concat" joins documents, cuts the stream into rows and shuffles these; "pack" lays whole documents into
            rows, best fit first; "padded" has one document per row, cut off at T.
        member: which member of a sample is the document: "txt", "py" or another name for text, "tok" for stored tokens.
        add_eos: put the tokenizer's end mark behind every document.
        wrap: begin every row with the tokenizer's bos and end its content with eos; both count for ``length``. In mode
            "padded" this replaces ``add_eos``; with "pack" it is not possible.
        documents: whether batches have "document" and "position"; None for yes in mode "pack" alone.
        given_to: text that ends the prompt of a document, in modes "padded" and "pack": all to the end of its first
            occurrence is read, but neither learnt nor scored; a document without it in its first row is learnt as a
            whole. It is found by the tokens that it has when it stands alone, so it should begin and end where tokens
            do. "" for none.
        num_classes: number of classes of documents, for mode "padded"; 0 for none.
        label_offset: added to every stored class.
        batch_size: G, rows per update over all ranks and micro-batches.
        micro_batch: rows per rank and forward pass; None for batch_size / ranks.
        val_batch_size: validation rows per batch over all ranks; None for as many as a training pass takes.
        workers: reader threads per rank; 0 reads in the training thread.
        window: shards whose documents are mixed with one another.
        seed: seed of the order.
        allow_missing: accept that some of the named shards are absent.
        max_bad_fraction: accepted share of unusable documents, 0..1; each is logged with shard and key.
        columns: folders below ``root`` with shards of the same names and keys, whose members join the samples.
        cache_gib: size of the local cache for shards that come from elsewhere, in GiB.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
        val: str | Sequence[str] | None = None,
        source: Callable[[Path], object] | None = None,
        tokenizer: Tokenizer,
        length: int,
        mode: str = "concat",
        member: str = "txt",
        add_eos: bool = True,
        wrap: bool = False,
        documents: bool | None = None,
        given_to: str = "",
        num_classes: int = 0,
        label_offset: int = 0,
        batch_size: int,
        micro_batch: int | None = None,
        val_batch_size: int | None = None,
        workers: int = 1,
        window: int = 16,
        seed: int = 0,
        allow_missing: bool = False,
        max_bad_fraction: float = 0.0,
        columns: Sequence[str] = (),
        cache_gib: float = 64.0,
    ) -> None:
        super().__init__(
            root=root,
            train=train,
            val=val,
            source=source,
            batch_size=batch_size,
            micro_batch=micro_batch,
            val_batch_size=val_batch_size,
            workers=workers,
            window=window,
            seed=seed,
            allow_missing=allow_missing,
            max_bad_fraction=max_bad_fraction,
            columns=columns,
            cache_gib=cache_gib,
        )
        self.tokenizer = tokenizer
        self.length = length
        self.mode = mode
        self.member = member
        self.add_eos = add_eos
        self.wrap = wrap
        self.documents = mode == "pack" if documents is None else documents
        self.given_to = given_to
        self.num_classes = num_classes
        self.label_offset = label_offset
        least = 3 if wrap else 1
        classed = "0 (none), or more with data.mode=padded"
        self.check_limits(
            {
                "length": (length >= least, f"at least {least} token{'s' * (least > 1)}", "1024"),
                "mode": (mode in MODES, " or ".join(MODES), "concat"),
                "wrap": (not (wrap and mode == "pack"), "false with data.mode=pack", "false"),
                "documents": (not (wrap and self.documents), "false with data.wrap=true", "false"),
                "given_to": (not given_to or mode != "concat", "no text with data.mode=concat", "''"),
                "num_classes": (num_classes == 0 or (num_classes > 0 and mode == "padded"), classed, "0"),
            }
        )
        self._layout: RowLayout | None = None
        self._counted: dict[int, Lengths] = {}
        self._kind: np.dtype[Any] | None = None

    # The sequence

    def sequence(self, source: Source, number: int) -> RowLookup:
        """Rows of one source, its documents in shuffled order, and the rows, too."""
        total = int(source.counts.sum())
        if self.member != TOKENS and not self.tokenizer.one_per_byte and total > _ANNOUNCED:
            log.info("counting the tokens of %d documents; later starts find the counts in the cache folder", total)
        rows = self._rows(source, Order(source.counts, self.seed, self.window, source=number))
        return ShuffledRows(rows) if self.mode == "concat" else rows

    def mixed(self, sequences: list[Any], parts: Mapping[str, Mapping[str, Any]]) -> MixedRows[RowLookup]:
        """Rows of several sources; a row never mixes them."""
        return MixedRows(sequences, shares_of(parts, [rows.content for rows in sequences]))

    def arrange(self, lookup: RowLookup) -> TextRows:
        """The training sequence, which the layout of rows gives its meaning, too."""
        return TextRows(lookup, self._meant())

    def held_out(self, source: Source) -> TextRows:
        """Rows in which every token stands once: an order of its own, which no setting changes, and no second epoch."""
        return TextRows(self._rows(source, Order(source.counts, seed=0, window=1)), self._meant(), epochs=1)

    def upcoming(self, positions: Ints) -> Ints:
        """Documents of the rows at about these positions."""
        pieces: Pieces = self.training_sequence()(positions)
        return pieces.sample

    def key_at(self, position: int) -> str:
        """Name of the row at a training position."""
        pieces = self.training_sequence()(np.array([position], dtype=np.int64))
        return self._names("train", pieces.sample[:1], pieces.begin[:1])[0]

    def facts(self) -> dict[str, Any]:
        """How rows are made."""
        return {
            "rows": self.training_sequence().length(),
            "length": self.length,
            "mode": self.mode,
            "vocabulary": self.tokenizer.size,
            "tokenizer": self.tokenizer.fingerprint,
        }

    # Reading

    def reader(self, split: str, lookup: TextRows, training: bool) -> TokenReader:
        """A reader of the split's rows."""
        source = self.source_of(split)
        return TokenReader(
            source,
            lookup,
            self.bad_of(split),
            self._documents(source, partial(self._places, source)),
            self.layout,
            names=partial(self._names, split),
            num_classes=self.num_classes,
            label_offset=self.label_offset,
            buffers=self.buffers,
        )

    @property
    def layout(self) -> RowLayout:
        """How a row is laid out.

        Raises:
            ValueError: the tokenizer lacks a mark that the settings ask for.
        """
        if self._layout is None:
            bos, eos = self.tokenizer.bos, self.tokenizer.eos
            behind = self.add_eos and not (self.wrap and self.mode == "padded")
            if self.wrap and (bos is None or eos is None):
                raise ValueError(_lacking("data.wrap", "a bos and an eos"))
            if behind and eos is None:
                raise ValueError(_lacking("data.add_eos", "an eos"))
            given = tuple(np.asarray(self.tokenizer.encode(self.given_to)).tolist()) if self.given_to else ()
            if self.given_to and not given:
                raise ValueError(f"data.given_to={self.given_to!r} has no token under this tokenizer. Choose another.")
            pads = (self.tokenizer.pad, eos, 0)
            self._layout = RowLayout(
                length=self.length,
                eos=eos if behind else None,
                edges=(bos, eos) if self.wrap and bos is not None and eos is not None else None,
                filler=next(mark for mark in pads if mark is not None),
                documents=self.documents,
                given=given,
            )
        return self._layout

    def check_source(self, source: Source, setting: str) -> None:
        """Refuse a source without the documents, or with tokens of another tokenizer."""
        members = source.extensions()
        wanted = [self.member, *(["cls"] if self.num_classes else [])]
        for member in wanted:
            if member not in members:
                listed = ", ".join(f".{name}" for name in members)
                near = next((name for name in (*TEXT_MEMBERS, TOKENS) if name in members), None)
                advice = "data.num_classes=0" if member == "cls" else f"data.member={near}"
                raise ValueError(
                    f"{setting}: the samples of {source.names[0]} have {listed}, but no .{member}. "
                    + (f"Set {advice}." if near or member == "cls" else f"Set {setting} to shards of text.")
                    + first_dots(members, [member])
                )
        _ = self.layout  # refuse what the tokenizer cannot do before anything is read
        if self.member == TOKENS:
            kind = token_type(source, self.tokenizer, setting)
            if self._kind not in (None, kind):
                raise ValueError(f"{setting}: tokens are stored as {kind}, in other shards as {self._kind}.")
            self._kind = kind

    # Details

    def _rows(self, source: Source, order: Order) -> Rows:
        return Rows(order, self._lengths(source), self.layout.room, self.mode)

    def _lengths(self, source: Source) -> Lengths:
        if id(source) not in self._counted:
            self._counted[id(source)] = Lengths(source, self._documents(source), self.layout)
        return self._counted[id(source)]

    def _places(self, source: Source, sample: int) -> int:
        """Places that were given to a document of a source or of a mixture."""
        parts: list[Source] = list(getattr(source, "sources", {"": source}).values())
        for part in parts[:-1]:
            if sample < part.starts[-1]:
                return self._lengths(part).one(sample)
            sample -= int(part.starts[-1])
        return self._lengths(parts[-1]).one(sample)

    def _documents(self, source: Source, planned: Callable[[int], int] | None = None) -> Documents:
        if self.member == TOKENS:
            assert self._kind is not None  # check_source has seen the source
            return StoredTokens(source, TOKENS, self._kind, planned)
        return RawText(source, self.member, self.tokenizer, planned)

    def _names(self, split: str, samples: Ints, begins: Ints) -> list[str]:
        keys = keys_of(self.source_of(split), samples)
        if self.mode == "padded":
            return keys
        return [f"{key}+{begin}" for key, begin in zip(keys, begins.tolist(), strict=True)]

    def _meant(self) -> Meaning:
        return {
            "length": self.length,
            "member": self.member,
            "add_eos": self.add_eos,
            "wrap": self.wrap,
            "tokenizer": self.tokenizer.fingerprint,
        }


def token_type(source: Source, tokenizer: Tokenizer, setting: str) -> np.dtype[Any]:
    """Number format of a source's stored tokens, after a check that ``tokenizer`` made them.

    Raises:
        ValueError: the card in index.json is missing, or names another tokenizer or another format.
    """
    kind = str(source.described(TOKENS).get("dtype"))
    made = source.described("tokenizer").get("fingerprint")
    if kind not in ("uint16", "uint32") or made is None:
        raise ValueError(
            f"{setting}: index.json beside {source.names[0]} does not say which tokenizer made the tokens (.{TOKENS}), "
            "nor in which format. Make the shards again with datamodules.pretokenize.pretokenize."
        )
    if made != tokenizer.fingerprint:
        raise ValueError(
            f"{setting}: the tokens of {source.names[0]} were made by the tokenizer {made}, but data.tokenizer is "
            f"{tokenizer.fingerprint}. Set data.tokenizer to that one, or tokenise the text again into another folder."
        )
    return np.dtype(kind).newbyteorder("<")


def _lacking(setting: str, marks: str) -> str:
    return (
        f"{setting}=true, but the tokenizer has not {marks}. "
        f"Set {setting}=false, or switch the mark on, e.g. data.tokenizer.eos=true."
    )
