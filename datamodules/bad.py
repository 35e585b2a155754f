"""What becomes of samples that cannot be used: skipped, named once, counted, and too many of them stop the run."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from datamodules.order import Ints, Lookup
from datamodules.shards import BadSample

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_AHEAD = 64


class BadSamples:
    """Account of the unusable samples of one set, shared by all its readers and their threads.

    Every process counts those it met itself. Over the epochs every process meets every sample, whatever the number
    of ranks.

    Args:
        total: samples in the set.
        max_fraction: accepted share of them and of those lost before, 0..1.
        lost: samples that were lost before, so that they have no number.
    """

    def __init__(self, total: int, max_fraction: float = 0.0, lost: int = 0) -> None:
        self.total = total
        self.max_fraction = max_fraction
        self.lost = lost
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of different bad samples so far, with those lost before."""
        return self.lost + len(self._seen)

    def __contains__(self, sample: int) -> bool:
        """Whether a sample was found to be bad."""
        return sample in self._seen

    def add(self, sample: int, error: BadSample) -> None:
        """Note a bad sample; the log names it once.

        Args:
            sample: its number.
            error: what is wrong with it, naming shard and key.

        Raises:
            ValueError: more samples are bad than accepted.
        """
        with self._lock:
            new = sample not in self._seen
            self._seen.add(sample)
            count = len(self)
        every = self.total + self.lost
        if count > self.max_fraction * every:
            allowed = f"data.max_bad_fraction={self.max_fraction:g}"
            so_far = f" Bad samples so far: {count} of {every}; training stops above {allowed}."
            raise ValueError(f"{error}. {error.advice}{so_far if self.max_fraction else ''}") from error
        if new:
            log.warning("skipped: %s (%d bad samples so far)", error, count)

    def replacement(self, position: int, lookup: Lookup, read: Callable[[int], T]) -> tuple[int, T]:
        """The next usable sample behind a position: the same for every number of ranks and workers.

        Args:
            position: where the bad sample stands.
            lookup: the order.
            read: reads a sample; raises BadSample.

        Returns:
            Number of the sample that takes its place, and what ``read`` made of it.

        Raises:
            ValueError: more samples are bad than accepted, or none is usable at all.
        """
        tried: set[int] = set()
        while len(tried) < self.total:
            ahead: Ints = np.arange(position + 1, position + 1 + _LOOK_AHEAD, dtype=np.int64)
            for sample in lookup(ahead)[1].tolist():
                if sample not in tried and sample not in self:
                    try:
                        return sample, read(sample)
                    except BadSample as error:
                        self.add(sample, error)
                tried.add(sample)
            position += _LOOK_AHEAD
        raise ValueError(f"None of the {self.total} samples can be read; the last messages of the log say why.")
