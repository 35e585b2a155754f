"""Facts about many samples at once: their keys, the sizes of their members, and the classes written in them."""

import numpy as np

from datamodules.held import Held
from datamodules.order import Ints, groups
from datamodules.source import BadSample, Source, place

_DIGITS = 18  # bytes of a class; every such number is an int64
_UNKNOWN = np.iinfo(np.int64).min
_KEPT = 2**22  # classes of samples, 8 bytes each


def shards_of(source: Source, samples: Ints) -> Ints:
    """Number of the shard that holds each sample, int64 (n,)."""
    return np.searchsorted(source.starts, samples, side="right") - 1


def keys_of(source: Source, samples: Ints) -> list[str]:
    """Key of each sample, as ``source.key`` gives them."""
    listed = getattr(source, "keys_at", None)
    if listed is None:
        return [source.key(sample) for sample in samples.tolist()]
    found: list[str] = listed(samples)
    return found


def sizes_of(source: Source, samples: Ints, extension: str) -> Ints:
    """Bytes of one member of each sample, 0 where it is missing, int64 (n,)."""
    listed = getattr(source, "sizes_at", None)
    if listed is not None:
        return np.asarray(listed(samples, extension), dtype=np.int64)
    sizes = np.empty(len(samples), dtype=np.int64)
    for shard, here in groups(shards_of(source, samples)):
        sizes[here] = source.sizes(shard, extension)[samples[here] - source.starts[shard]]
    return sizes


class Labels:
    """Class of any sample, from its ``cls`` member; those of a shard are read together and kept for a while.

    Args:
        source: the samples.
        num_classes: labels must lie in 0..num_classes-1.
        offset: added to every stored class.
    """

    def __init__(self, source: Source, num_classes: int, offset: int) -> None:
        self._source = source
        self._num_classes = num_classes
        self._offset = offset
        self._kept = Held(source.starts, self._shard, _KEPT)

    def __call__(self, samples: Ints) -> Ints:
        """Label of each sample, int64 (n,).

        Raises:
            BadSample: a class is missing, no number, or out of range; ``row`` says which.
        """
        stored: Ints = self._kept(samples, shards_of(self._source, samples))
        labels = stored + self._offset
        wrong = np.flatnonzero((stored == _UNKNOWN) | (labels < 0) | (labels >= self._num_classes))
        for row in wrong.tolist():  # usually none; what could not be read with its shard gets another chance
            labels[row] = self._one(int(samples[row]), row)
        return labels

    def _shard(self, shard: int) -> Ints:
        """Stored classes of a shard, ``_UNKNOWN`` for what is not to be had."""
        samples = np.arange(self._source.starts[shard], self._source.starts[shard + 1], dtype=np.int64)
        try:
            return self._read(shard, samples)
        except ValueError:  # at least one of them
            return np.array([self._try(sample) for sample in samples.tolist()], dtype=np.int64)

    def _read(self, shard: int, samples: Ints) -> Ints:
        sizes = self._source.sizes(shard, "cls")
        if (sizes > _DIGITS).any() or (sizes == 0).any():
            raise ValueError
        text = np.zeros((len(samples), _DIGITS), dtype=np.uint8)
        places = np.arange(len(samples), dtype=np.int64) * _DIGITS
        self._source.pieces(samples, "cls", np.zeros_like(places), sizes, text, places)
        return text.view(f"S{_DIGITS}").ravel().astype(np.int64)

    def _try(self, sample: int) -> int:
        try:
            return int(self._source.read(sample).get("cls", b"")[:_DIGITS])
        except ValueError:  # BadSample, or no number
            return _UNKNOWN

    def _one(self, sample: int, row: int) -> int:
        """Label of one sample, or what is wrong with it."""
        try:
            members = self._source.read(sample)
        except BadSample as error:
            error.row = row
            raise
        where = place(self._source, sample)
        text = members.get("cls")
        if text is None:
            raise BadSample(f"{where}: no class (.cls) among its members ({', '.join(members)})", row=row)
        try:
            label = int(text) + self._offset
        except ValueError as error:
            told = f"the class is {text[:20]!r}, expected a whole number"
            raise BadSample(f"{where}: {told}", row=row) from error
        if not 0 <= label < self._num_classes:
            raise BadSample(
                f"Label {label} in shard {where}, but data.num_classes={self._num_classes} allows "
                f"0..{self._num_classes - 1} (stored class {label - self._offset}, data.label_offset={self._offset})",
                advice="Correct data.label_offset or data.num_classes.",
                row=row,
            )
        return label
