"""Facts about members of many samples at once: their sizes, and the classes written in them."""

import numpy as np

from datamodules.order import Ints, groups
from datamodules.source import BadSample, Source, place

_DIGITS = 18  # bytes of a class; every such number is an int64


def shards_of(source: Source, samples: Ints) -> Ints:
    """Number of the shard that holds each sample, int64 (n,)."""
    return np.searchsorted(source.starts, samples, side="right") - 1


def sizes_of(source: Source, samples: Ints, extension: str) -> Ints:
    """Bytes of one member of each sample, 0 where it is missing, int64 (n,)."""
    sizes = np.empty(len(samples), dtype=np.int64)
    for shard, here in groups(shards_of(source, samples)):
        sizes[here] = source.sizes(shard, extension)[samples[here] - source.starts[shard]]
    return sizes


def labels_of(source: Source, samples: Ints, num_classes: int, offset: int) -> Ints:
    """Class of each sample, from its ``cls`` member, int64 (n,).

    Args:
        source: the samples.
        samples: sample numbers, int64 (n,).
        num_classes: labels must lie in 0..num_classes-1.
        offset: added to every stored class.

    Raises:
        BadSample: a class is missing, no number, or out of range; ``row`` says which.
    """
    sizes = sizes_of(source, samples, "cls")
    long = np.flatnonzero(sizes > _DIGITS)
    if len(long):
        raise BadSample(f"{_place(source, samples, long[0])}: its class (.cls) has {sizes[long[0]]} bytes", row=long[0])
    text = np.zeros((len(samples), _DIGITS), dtype=np.uint8)
    rows = np.arange(len(samples), dtype=np.int64)
    source.pieces(samples, "cls", np.zeros_like(rows), sizes, text, rows * _DIGITS)
    words = text.view(f"S{_DIGITS}").ravel()
    try:
        labels = words.astype(np.int64)
    except ValueError:
        row = next(row for row, word in enumerate(words.tolist()) if not _is_number(word))
        told = f"the class is {words[row]!r}, expected a whole number"
        raise BadSample(f"{_place(source, samples, row)}: {told}", row=row) from None
    labels += offset
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        row, label = int(wrong[0]), int(labels[wrong[0]])
        raise BadSample(
            f"Label {label} in shard {_place(source, samples, row)}, but data.num_classes={num_classes} allows "
            f"0..{num_classes - 1} (stored class {label - offset}, data.label_offset={offset})",
            advice="Correct data.label_offset or data.num_classes.",
            row=row,
        )
    return labels


def _is_number(word: bytes) -> bool:
    try:
        int(word)
    except ValueError:
        return False
    return True


def _place(source: Source, samples: Ints, row: int) -> str:
    return place(source, int(samples[row]))
