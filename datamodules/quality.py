"""How well an order mixes a data set: measures of shuffle quality, and a study of the window sizes.

The hard case is a set that was written class by class. An order that mixes all of it gives batches whose classes are
those of independent draws; one that mixes little gives batches of few classes, which is bad for training. A set that
was shuffled when it was written is mixed well under any window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.order import InOrder, Ints, Lookup, Order

_WINDOWS = (1, 4, 16, 50)


@dataclass(frozen=True)
class Quality:
    """Measures of one order, means over its batches and epochs.

    Attributes:
        name: what was measured.
        rank_correlation: size of the correlation between the ranks of position and storage place within an epoch, 0..1;
            about 0 if early positions read no other part of the set than late ones.
        neighbours: correlation between the ranks of the storage places of two samples in a row, -1..1; 1 for reading
            in storage order, about 0 for a full shuffle.
        runs: uninterrupted runs of one class per batch, 1..batch.
        total_variation: half the sum of the differences between the class shares of a batch and those of the set, 0..1.
    """

    name: str
    rank_correlation: float
    neighbours: float
    runs: float
    total_variation: float


def measure(name: str, lookup: Lookup, labels: Ints, batch: int, epochs: int = 2) -> Quality:
    """Measure an order over its first epochs.

    Args:
        name: what to call it.
        lookup: the order, of ``len(labels)`` samples; a mixture is not one storage to be ranked in.
        labels: class of every sample in storage order, 0..classes-1, int64 (n,).
        batch: samples per batch; what is left at the end of an epoch is not measured.
        epochs: number of epochs.
    """
    size = len(labels)
    rows = []
    for epoch in range(epochs):
        _, samples = lookup(np.arange(epoch * size, (epoch + 1) * size, dtype=np.int64))
        classes = labels[samples]
        rows.append(
            (
                abs(correlation(np.arange(size), samples)),
                correlation(samples[:-1], samples[1:]),
                class_runs(classes, batch),
                total_variation(classes, batch),
            )
        )
    return Quality(name, *(float(value) for value in np.mean(rows, axis=0)))


def correlation(first: Ints, second: Ints) -> float:
    """Rank correlation of two sequences without ties, -1..1.

    Source: Spearman (1904).
    """
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def class_runs(classes: Ints, batch: int) -> float:
    """Mean number of uninterrupted runs of one class per whole batch.

    A full shuffle of K equally large classes gives 1 + (batch - 1) * (1 - 1/K).
    """
    batches = _batches(classes, batch)
    return 1.0 + float((batches[:, 1:] != batches[:, :-1]).sum(axis=1).mean())


def total_variation(classes: Ints, batch: int) -> float:
    """Mean distance, 0..1, between the class shares of a whole batch and those of the set.

    A full shuffle does not give 0: with few samples per class the shares vary by chance.
    """
    number = int(classes.max()) + 1
    shares = np.bincount(classes, minlength=number) / len(classes)
    batches = _batches(classes, batch)
    places = np.arange(len(batches))[:, None] * number + batches
    counts = np.bincount(places.ravel(), minlength=len(batches) * number).reshape(-1, number)
    return float(0.5 * np.abs(counts / batch - shares).sum(axis=1).mean())


def study(
    samples: int = 100_000, classes: int = 100, shards: int = 50, batch: int = 256, windows: Sequence[int] = _WINDOWS
) -> list[Quality]:
    """Compare window sizes on a set that was written class by class.

    Args:
        samples: size of the set.
        classes: number of equally large classes.
        shards: number of equally large shards.
        batch: samples per batch.
        windows: the windows, in shards.

    Returns:
        Storage order, each window, a full shuffle, and the first window on a set that was shuffled when written.
    """
    counts = np.diff(np.arange(shards + 1) * samples // shards)
    labels = np.arange(samples, dtype=np.int64) * classes // samples
    full = Order([samples], seed=1)
    return [
        measure("storage order", InOrder(samples), labels, batch),
        *(measure(f"window of {window} shards", Order(counts, 0, window), labels, batch) for window in windows),
        measure("full shuffle", full, labels, batch),
        measure(
            f"window of {windows[0]}, shuffled when written",
            Order(counts, 0, windows[0]),
            labels[full(np.arange(samples))[1]],
            batch,
        ),
    ]


def _batches(values: Ints, batch: int) -> Ints:
    whole = len(values) // batch
    if not whole:
        raise ValueError(f"{len(values)} samples make no batch of {batch}. Use a smaller batch.")
    return values[: whole * batch].reshape(whole, batch)
