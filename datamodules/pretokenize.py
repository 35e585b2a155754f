"""Tokenise shards of text once, so that training reads numbers."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from datamodules import catalogue, shards
from datamodules.catalogue import Catalogue
from datamodules.shards import ShardSet
from datamodules.source import BadSample, place
from datamodules.tokenizers import Tokenizer, Tokens, storage_type
from datamodules.writer import DatasetWriter

log = logging.getLogger(__name__)

_BATCH = 256  # documents tokenised at a time; tokenizers spread them over the cores
_SPLIT = re.compile(r"(.*?)-?\d*\.tar$")


def pretokenize(
    root: Path | str,
    *,
    texts: Path | str,
    tokenizer: Tokenizer,
    source: Callable[[Path], object] | None = None,
    member: str = "txt",
    keep: Sequence[str] = ("cls",),
) -> None:
    """Write ``root`` with the tokens of all shards in ``texts``, unless it is there already.

    Keys, order and splits stay. The tokens of a document are its member ``tok`` (uint16 up to 65,536 tokens, else
    uint32; without marks of beginning and end), and index.json names the tokenizer that made them. A document that
    cannot be read or tokenised is left out, logged and counted. Use it as the ``source`` of ``data`` with
    ``_partial_: true``; it is then called with ``data.root``.

    Args:
        root: folder for the tokens.
        texts: folder with the shards of text.
        tokenizer: turns text into tokens.
        source: called with ``texts`` first, to make the text if it is not there.
        member: which member of a sample is the text.
        keep: further members to copy where a sample has them.

    Raises:
        ValueError: ``root`` holds tokens of another tokenizer or something else, ``texts`` has no such shards, or none
            of its documents is usable.
    """
    root, texts = Path(root), Path(texts).expanduser()
    if _present(catalogue.read(root), root, tokenizer):
        return
    if source is not None:
        source(texts)
    found = ShardSet(shards.find("*.tar", texts, "texts"), "texts", max_bad_fraction=1.0)
    made = catalogue.read(texts)
    sources = {
        "texts": made.dataset if made else texts.name,
        "texts_fingerprint": found.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }
    name = f"{sources['texts']}-tokens"
    card = {
        "tok": {"dtype": storage_type(tokenizer.size).name},
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.size},
    }
    licence = made.licence if made else ""
    try:
        with DatasetWriter(root, dataset=name, licence=licence, sources=sources, card=card) as writer:
            work = _Work(found, tokenizer, member, keep)
            for split, numbers in _splits(found.names).items():
                writer.write(split, work.samples(numbers), per_shard=int(found.counts[numbers].max()))
            if not work.written:
                raise ValueError(
                    f"none of the {work.skipped} documents in {texts} could be tokenised: {work.error}. "
                    "Check the member and the tokenizer."
                )
            writer.sources["skipped"] = str(work.skipped)
    finally:
        found.close()


def _present(index: Catalogue | None, root: Path, tokenizer: Tokenizer) -> bool:
    """Whether the tokens are there already."""
    if index is None or "tokenizer" not in index.card:
        return False
    made = index.card["tokenizer"].get("fingerprint")
    if made != tokenizer.fingerprint:
        raise ValueError(
            f"{root} holds tokens of the tokenizer {made}, but data.tokenizer is {tokenizer.fingerprint}. "
            "Set data.root to another folder, or data.tokenizer to the former one."
        )
    return True


def _splits(names: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the shards of every split, which is their name without its number."""
    titles = [(match[1] if (match := _SPLIT.match(name)) else "") or "train" for name in names]
    numbered = sorted(range(len(names)), key=lambda number: (titles[number], number))
    return {title: list(group) for title, group in groupby(numbered, key=lambda number: titles[number])}


class _Work:
    """Tokenises documents and counts what became of them."""

    def __init__(self, source: ShardSet, tokenizer: Tokenizer, member: str, keep: Sequence[str]) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.member = member
        self.keep = keep
        self.written = 0
        self.skipped = 0
        self.error = ""

    def samples(self, numbers: Sequence[int]) -> Iterator[dict[str, bytes | str]]:
        """Yield the documents of some shards with their tokens."""
        kind = storage_type(self.tokenizer.size)
        starts = self.source.starts
        documents = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in numbers])
        for batch in np.array_split(documents, max(1, -(-len(documents) // _BATCH))):
            read = [document for sample in batch.tolist() if (document := self._read(sample)) is not None]
            for (sample, members, _), tokens in zip(read, self._encoded(read), strict=True):
                if tokens is not None:
                    self.written += 1
                    kept = {name: members[name] for name in self.keep if name in members}
                    yield {"__key__": self.source.key(sample), "tok": tokens.astype(kind).tobytes(), **kept}

    def _read(self, sample: int) -> tuple[int, dict[str, bytes], str] | None:
        try:
            members = self.source.read(sample)
            if self.member not in members:
                raise BadSample(f"no .{self.member} among its members ({', '.join(members)})")
            return sample, members, members[self.member].decode()
        except ValueError as error:  # BadSample, or not utf-8
            self._skip(sample, error)
            return None

    def _encoded(self, read: list[tuple[int, dict[str, bytes], str]]) -> list[Tokens | None]:
        try:
            return list(self.tokenizer.encode_batch([text for _, _, text in read]))
        except ValueError:  # one of them; find out which
            return [self._one(sample, text) for sample, _, text in read]

    def _one(self, sample: int, text: str) -> Tokens | None:
        try:
            return self.tokenizer.encode(text)
        except ValueError as error:
            self._skip(sample, error)
            return None

    def _skip(self, sample: int, error: ValueError) -> None:
        self.skipped += 1
        self.error = f"{place(self.source, sample)}: {error}"
        log.warning("skipped: %s (%d so far)", self.error, self.skipped)
