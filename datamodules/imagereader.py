"""From positions to batches: look up, read once per sample, hand the members to what fills the batch, replace the bad.

A batch is filled by columns. Each makes one or more entries of the batch: pixels, labels, captions. A column lives for
one batch; what it needs for all batches it gets from the function that makes it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from datamodules.bad import BadSamples
from datamodules.loader import Buffers
from datamodules.order import Ints, Lookup, sample_bits
from datamodules.source import BadSample, Source, place
from datamodules.transforms import Group, decode_into, picture_of

Batch = dict[str, Any]
Members = dict[str, bytes]
Take = Callable[[int, int, Members], None]

_TOGETHER = 16  # samples read before they are decoded: the code of each step stays in the caches, 3 % faster


class Items(NamedTuple):
    """What a batch is made of.

    Attributes:
        positions: int64 (B,).
        epochs: int64 (B,).
        samples: sample numbers, int64 (B,); a replacement changes its entry.
        bucket: number of the aspect ratio that all of them share; None without buckets.
    """

    positions: Ints
    epochs: Ints
    samples: Ints
    bucket: int | None


class Column(Protocol):
    """Fills some entries of one batch."""

    def take(self, row: int, sample: int, members: Members) -> None:
        """Use one sample; a later call for the same row replaces it.

        Raises:
            ValueError: the sample cannot be used; the message does not name it, or is a ``BadSample`` that does.
        """

    def entries(self) -> Batch:
        """The finished entries, after every row was filled."""


Columns = Callable[[Items], Column]


class SampleReader:
    """Turns positions into a batch; safe to call from several threads.

    Args:
        source: the samples.
        lookup: which sample stands at a position; one with a ``bucket`` method gives every batch an aspect ratio.
        bad: account of unusable samples.
        columns: each makes the column of one batch from its items.

    Attributes:
        reading: seconds spent so far on getting bytes; the rest of the time goes into decoding.
    """

    def __init__(self, source: Source, lookup: Lookup, bad: BadSamples, columns: Sequence[Columns]) -> None:
        self.source = source
        self.lookup = lookup
        self.columns = tuple(columns)
        self.reading = 0.0
        self._bad = bad
        self._bucket: Callable[[Ints], int] | None = getattr(lookup, "bucket", None)

    def __call__(self, positions: Ints) -> Batch:
        """Read one batch.

        Args:
            positions: int64 (B,).

        Returns:
            The entries of all columns, and "key", a list of B strings. Where a sample cannot be used and
            ``data.max_bad_fraction`` allows it, the next usable one in the order stands in its place, whatever the
            number of ranks or workers.

        Raises:
            ValueError: more samples than allowed cannot be used.
        """
        epochs, samples = self.lookup(positions)
        items = Items(positions, epochs, samples, self._bucket(positions) if self._bucket else None)
        columns = [column(items) for column in self.columns]
        takes = [column.take for column in columns]
        for begin in range(0, len(samples), _TOGETHER):
            for row, error in self._fill(takes, begin, samples[begin : begin + _TOGETHER].tolist()):
                sample = int(samples[row])
                self._bad.add(sample, self._named(sample, error))
                samples[row] = self._replace(takes, row, int(positions[row]))
        batch: Batch = {}
        for column in columns:
            batch |= column.entries()
        key = self.source.key
        batch["key"] = [key(sample) for sample in samples.tolist()]
        return batch

    def _fill(self, takes: Sequence[Take], first: int, samples: Sequence[int]) -> list[tuple[int, ValueError]]:
        """Fill the rows from ``first`` on, one step for all of them after the other.

        Returns:
            Rows that could not be filled, ascending, and why.
        """
        failed: dict[int, ValueError] = {}
        begin = time.perf_counter()
        found: list[tuple[int, int, Members]] = []
        read = self.source.read
        for row, sample in enumerate(samples, first):
            try:
                found.append((row, sample, read(sample)))
            except ValueError as error:
                failed[row] = error
        self.reading += time.perf_counter() - begin  # threads may lose each other's time, which does not matter here
        for take in takes:
            for row, sample, members in found:
                try:
                    take(row, sample, members)
                except ValueError as error:
                    failed.setdefault(row, error)
        return sorted(failed.items())

    def _replace(self, takes: Sequence[Take], row: int, position: int) -> int:
        def read(sample: int) -> None:
            try:
                members = self.source.read(sample)
                for take in takes:
                    take(row, sample, members)
            except ValueError as error:
                raise self._named(sample, error) from error

        return self._bad.replacement(position, self.lookup, read)[0]

    def _named(self, sample: int, error: ValueError) -> BadSample:
        if isinstance(error, BadSample):
            return error
        return BadSample(f"{place(self.source, sample)}: {error}")


class Pictures:
    """The column "image": uint8 (B, C, H, W), a channels-last view of a recycled buffer.

    With a flip seed half of them are mirrored, drawn from (seed, epoch, sample).

    Args:
        items: the batch's items.
        shape: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        buffers: where the memory comes from.
        flip_seed: seed of the horizontal flip; None for no flip.
        ratio: becomes the entry "bucket"; None for no such entry.
    """

    def __init__(
        self,
        items: Items,
        shape: tuple[int, int],
        channels: int,
        buffers: Buffers,
        flip_seed: int | None,
        ratio: str | None,
    ) -> None:
        self._epochs = items.epochs
        self._first: list[int] = items.samples.tolist()
        self._ratio = ratio
        self._flip_seed = flip_seed
        self._mirrored = self._drawn(items.epochs, items.samples)
        self._pixels = buffers.take((len(items.positions), *shape, channels))
        self._group = Group(buffers.take)

    def take(self, row: int, sample: int, members: Members) -> None:
        """Decode the image of one sample."""
        mirrored = self._mirrored[row]
        if sample != self._first[row]:  # a replacement draws for itself
            mirrored = self._drawn(self._epochs[row : row + 1], np.array([sample], dtype=np.int64))[0]
            self._group.finish()  # what it replaces may wait there
        decode_into(picture_of(members), self._pixels[row], mirrored, self._group)

    def entries(self) -> Batch:
        """The images."""
        self._group.finish()
        batch: Batch = {"image": torch.from_numpy(self._pixels).permute(0, 3, 1, 2)}
        if self._ratio is not None:
            batch["bucket"] = self._ratio
        return batch

    def _drawn(self, epochs: Ints, samples: Ints) -> list[bool]:
        """Which samples to mirror."""
        if self._flip_seed is None:
            return [False] * len(samples)
        mirrored: list[bool] = (sample_bits(self._flip_seed, epochs, samples) & np.uint64(1)).astype(bool).tolist()
        return mirrored


class Labels:
    """The column "label": int64 (B,), from the member ``cls``.

    Args:
        items: the batch's items.
        source: the samples, for messages.
        num_classes: labels lie in 0..num_classes-1.
        label_offset: added to every stored class.
    """

    def __init__(self, items: Items, source: Source, num_classes: int, label_offset: int) -> None:
        self._source = source
        self._num_classes = num_classes
        self._offset = label_offset
        self._labels = np.zeros(len(items.positions), dtype=np.int64)

    def take(self, row: int, sample: int, members: Members) -> None:
        """Read the class of one sample."""
        text = members.get("cls")
        if text is None:
            raise ValueError(f"no class (.cls) among its members ({', '.join(members)})")
        try:
            label = int(text) + self._offset
        except ValueError as error:
            raise ValueError(f"the class is {text[:20]!r}, expected a whole number") from error
        if not 0 <= label < self._num_classes:
            raise BadSample(
                f"Label {label} in shard {place(self._source, sample)}, but data.num_classes={self._num_classes} "
                f"allows 0..{self._num_classes - 1} (stored class {label - self._offset}, "
                f"data.label_offset={self._offset})",
                advice="Correct data.label_offset or data.num_classes.",
            )
        self._labels[row] = label

    def entries(self) -> Batch:
        """The labels."""
        return {"label": torch.from_numpy(self._labels)}
