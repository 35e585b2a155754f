"""What every set of samples offers, whether it lies in shards, in a folder, elsewhere or in several places."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.order import Ints

Members = dict[str, bytes]
Measure = Callable[[Members], Sequence[int]]
Bytes = NDArray[np.uint8]

_RESTORE = "Restore the data, or accept such losses with e.g. data.max_bad_fraction=0.001."


class BadSample(ValueError):
    """A sample that cannot be used.

    Args:
        text: what is wrong, naming shard and sample; no full stop at the end.
        advice: what the user can do about it, a sentence.

    Attributes:
        row: which of several samples asked for at once is meant; -1 where only one was.
    """

    def __init__(self, text: str, advice: str = _RESTORE, row: int = -1) -> None:
        super().__init__(text)
        self.advice = advice
        self.row = row


class Source(Protocol):
    """A numbered set of samples, the same for every rank and worker; safe to read from several threads.

    Attributes:
        names: names of the shards, in order.
        counts: samples per shard, int64.
        starts: number of the first sample of each shard, and the total behind them; int64 (len(names) + 1,).
        classes: per shard, samples per stored class; None if that is not known beforehand.
        fingerprint: hash over names, counts and sizes; changes when the set changes.
        lost: samples that damage took before the start, so that they are not among the counts.
    """

    names: list[str]
    counts: Ints
    starts: Ints
    classes: list[Counter[int]] | None
    fingerprint: str
    lost: int

    def extensions(self) -> tuple[str, ...]:
        """Member names of the first shard's samples."""

    def key(self, sample: int) -> str:
        """Key of a sample, for messages and ledgers."""

    def shard(self, sample: int) -> str:
        """Name of the shard that holds a sample."""

    def read(self, sample: int) -> Members:
        """Members of a sample by extension.

        Raises:
            BadSample: the sample cannot be read.
        """

    def described(self, name: str) -> dict[str, Any]:
        """What the card in index.json says about a member, e.g. its "dtype"; empty where it says nothing."""

    def sizes(self, shard: int, extension: str) -> Ints:
        """Bytes of one member for every sample of a shard, from its index; 0 where a sample lacks it. int64 (n,)."""

    def measured(self, shard: int, name: str, measure: Measure, width: int) -> Ints:
        """Numbers about every sample of a shard that are needed before it is decoded.

        They are looked up in the index beside the shard, then in the user's cache, and else found by reading every
        sample of the shard once.

        Args:
            shard: number of the shard.
            name: what is measured, e.g. "shape"; part of the key of the cache.
            measure: members of a sample to ``width`` whole numbers.
            width: how many numbers.

        Returns:
            int64 (n, width); zeros for a sample that cannot be read or measured.
        """

    def gather(self, samples: Ints, extension: str, out: Bytes) -> None:
        """Copy one member of equal size from each of several samples, as fast as memory allows.

        Args:
            samples: sample numbers, int64 (n,).
            extension: which member.
            out: uint8 (n, size), C-contiguous; row i takes the member of ``samples[i]``.

        Raises:
            BadSample: a member is missing, unreadable or of another size; ``row`` says which. Rows behind it may be
                unfilled: put another sample in its place and ask again.
        """

    def pieces(self, samples: Ints, extension: str, begins: Ints, lengths: Ints, out: Bytes, at: Ints) -> None:
        """Copy a part of one member of each of several samples, e.g. some tokens of each of several documents.

        Args:
            samples: sample numbers, int64 (n,).
            extension: which member.
            begins: first byte inside the member, int64 (n,).
            lengths: number of bytes, int64 (n,).
            out: uint8, C-contiguous, of any shape; addressed as a flat array.
            at: where in ``out`` each part goes, int64 (n,).

        Raises:
            BadSample: a member is missing, unreadable or too short; ``row`` says which, the ones behind it may be
                unfilled.
        """

    def expect(self, samples: Ints) -> None:
        """Say which samples will be read about one shuffle window from now; remote shards are fetched meanwhile."""

    def health(self) -> dict[str, float]:
        """Counters for the log: "cache_hits" and "cache_misses" of remote shards; empty for local ones."""

    def close(self) -> None:
        """Close files and end threads; reading again opens them again."""


def measure_rows(read: Callable[[int], Members], count: int, measure: Measure, width: int) -> tuple[Ints, bool]:
    """Measure ``count`` samples one by one; zeros where one cannot be read or measured.

    Args:
        read: row to members.
        count: number of rows.
        measure: members to ``width`` whole numbers.
        width: how many numbers.

    Returns:
        int64 (count, width); and whether it may be kept, False where a file was out of reach, which may come back.
    """
    table, lasting = np.zeros((count, width), dtype=np.int64), True
    for row in range(count):
        try:
            members = read(row)
        except ValueError as error:  # reported with shard and key when the sample is used
            lasting = lasting and not _out_of_reach(error)
            continue
        with contextlib.suppress(ValueError):
            table[row] = measure(members)
    return table, lasting


def _out_of_reach(error: BaseException | None) -> bool:
    """Whether the system could not give what was asked for, rather than that what it gave is damaged."""
    return error is not None and (isinstance(error, OSError) or _out_of_reach(error.__cause__))


def first_dots(extensions: Sequence[str], wanted: Sequence[str]) -> str:
    """A hint for whoever misses members that are there, but behind a dot in the key; else nothing.

    Args:
        extensions: members that samples have.
        wanted: those that are missed.
    """
    found = next((name for name in extensions if name.rpartition(".")[2] in wanted), None)
    if found is None:
        return ""
    return (
        f" A key ends at the first dot of the name, so KEY.{found} is the member .{found} of the sample KEY, and names "
        "with more dots fall together to one sample: write the shards again without dots in the keys."
    )


def place(source: Source, sample: int) -> str:
    """Shard and key of a sample, for messages."""
    return f"{source.shard(sample)}, sample {source.key(sample)}"
