"""Several sources in one training sequence, in fixed proportions that arithmetic alone decides.

A mixture deals its positions out to the sources like a fair dealer: after any number of items each source has had its
share to within about one item. Which source stands at a position, and the how-manieth item of that source it is, are
closed formulas, so a mixture needs no table, no random choice and no state, and may be entered at any position.

Each source keeps its own order and its own epochs: one that is used up starts its next epoch, newly shuffled, while
the others are still in their first.

``weight``
    Proportion of the items. Weights 3 and 1 take three items of the first source for each one of the second, however
    large the sources are. Weights need not sum to 1. An epoch of the mixture is as many items as the sources hold
    together.
``repeat``
    Whole number of times that each sample of the source comes in one epoch of the mixture: exactly so often, neither
    more nor less. A source without ``weight`` and ``repeat`` is repeated once.
"""

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np

from datamodules.members import keys_of, sizes_of
from datamodules.order import Ints, Lookup, Meaning, groups
from datamodules.source import BadSample, Bytes, Measure, Members, Source

L = TypeVar("L", bound=Lookup)

_LARGEST_PERIOD = 2**50  # up to here a float64 quotient is off by less than 1, see _scaled
_WEIGHT_STEPS = 10**6
_ROUNDED_PERIOD = 2**30


class Schedule:
    """Deals the positions 0, 1, 2, ... out to sources: source i gets exactly shares[i] of every period.

    Sources are split in two halves, again and again, and each half gets its positions by rounding its exact share, the
    way a line is drawn on a raster. So the number of items of a source among the first n positions differs from
    n * shares[i] / sum(shares) by at most (1 + log2(number of sources)) / 2, rounded up.

    Args:
        shares: positions per period of each source, at least 0, not all 0.

    Raises:
        ValueError: no share is positive, one is negative, or their sum is beyond 2**50.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        if not any(shares) or min(shares) < 0:
            raise ValueError(f"data.train: the shares {list(shares)} of the sources need to be at least 0, not all 0.")
        divisor = math.gcd(*shares)
        self.shares = [share // divisor for share in shares]
        self._bounds = [0]
        for share in self.shares:
            self._bounds.append(self._bounds[-1] + share)
        self.period = self._bounds[-1]
        if self.period > _LARGEST_PERIOD:
            raise ValueError(
                f"data.train: the mixture repeats itself only after {self.period} items; at most {_LARGEST_PERIOD} "
                "are possible. Give the sources a weight instead of repeat."
            )

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """Source of every position, and which of that source's items it is; int64 (n,) each."""
        inside = np.array(positions, dtype=np.int64)
        which = np.empty_like(inside)
        self._deal(inside, which, np.arange(len(inside)), 0, len(self.shares))
        return which, inside

    def counts(self, positions: int) -> list[int]:
        """Items of each source among the first ``positions`` items."""
        counts = [0] * len(self.shares)

        def split(items: int, low: int, high: int) -> None:
            if high - low == 1:
                counts[low] = items
                return
            middle, share, total = self._node(low, high)
            left = (items * share + total // 2) // total if total else 0
            split(left, low, middle)
            split(items - left, middle, high)

        split(positions, 0, len(self.shares))
        return counts

    def positions(self, source: int, items: Ints) -> Ints:
        """Position of each of a source's items, the inverse of the call; int64 (n,). Its share must not be 0."""
        path = []
        low, high = 0, len(self.shares)
        while high - low > 1:
            middle, share, total = self._node(low, high)
            path.append((source < middle, share, total))
            low, high = (low, middle) if source < middle else (middle, high)
        for left, share, total in reversed(path):
            half = total // 2
            if left:
                periods, rest = np.divmod(items, share)
                items = periods * total + _scaled(rest, total, total - half - 1, share)
            else:
                periods, rest = np.divmod(items, total - share)
                items = periods * total + _scaled(rest, total, half, total - share)
        return items

    def _deal(self, inside: Ints, which: Ints, here: Ints, low: int, high: int) -> None:
        """Replace the positions ``inside[here]`` of the group low..high-1 by those of its members."""
        if not len(here):
            return
        if high - low == 1:
            which[here] = low
            return
        middle, share, total = self._node(low, high)
        before = inside[here]
        periods, rest = np.divmod(before, total)
        left, after = _scaled(np.stack([rest, rest + 1]), share, total // 2, total)
        goes_left = after > left
        left += periods * share
        inside[here] = np.where(goes_left, left, before - left)
        self._deal(inside, which, here[goes_left], low, middle)
        self._deal(inside, which, here[~goes_left], middle, high)

    def _node(self, low: int, high: int) -> tuple[int, int, int]:
        """Where the group low..high-1 is split, the share of its left half, and the share of both."""
        middle = (low + high) // 2
        return middle, self._bounds[middle] - self._bounds[low], self._bounds[high] - self._bounds[low]


class Mixed(Generic[L]):
    """A lookup over several lookups; samples are numbered through all sources, epochs are those of the source.

    Args:
        orders: one lookup per source.
        shares: items of each source per period of the schedule, see ``shares_of``.

    Raises:
        ValueError: numbers of orders and shares differ, or the shares are not usable.
    """

    def __init__(self, orders: Sequence[L], shares: Sequence[int]) -> None:
        if len(orders) != len(shares):
            raise ValueError(f"data.train: {len(orders)} sources, but {len(shares)} shares.")
        self.orders = list(orders)
        self.schedule = Schedule(shares)
        self.starts: Ints = np.concatenate([[0], np.cumsum([order.total for order in orders])]).astype(np.int64)
        self.total = int(self.starts[-1])
        self._length = mixture_length(shares, [order.length() for order in orders])

    def __call__(self, positions: Ints) -> tuple[Ints, Ints]:
        """Epoch of the source concerned, and sample number through all sources, of each position; int64 (n,)."""
        which, inside = self.schedule(positions)
        epochs, samples = np.empty_like(inside), np.empty_like(inside)
        for source, here in groups(which):
            epochs[here], samples[here] = self.orders[source](inside[here])
        return epochs, samples + self.starts[which]

    def length(self) -> int:
        """Items per epoch of the mixture, see the module."""
        return self._length

    def meaning(self) -> Meaning:
        """What gives the positions of the sources their meaning, and the shares."""
        return mixture_meaning([order.meaning() for order in self.orders], self.schedule)


class Concatenated:
    """Several sources as one: samples and shards are numbered through, names and keys begin with the source's name.

    Args:
        sources: source by name, in the order of the numbering.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.sources = dict(sources)
        self._parts = list(self.sources.values())
        self._titles = list(self.sources)
        self.names = [f"{title}/{name}" for title, part in self.sources.items() for name in part.names]
        self.counts: Ints = np.concatenate([part.counts for part in self._parts])
        self.starts: Ints = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        known = [part.classes for part in self._parts]
        listed = [classes for classes in known if classes is not None]
        self.classes: list[Counter[int]] | None = list(chain(*listed)) if len(listed) == len(known) else None
        digest = hashlib.sha256("\0".join(part.fingerprint for part in self._parts).encode())
        self.fingerprint = digest.hexdigest()[:32]
        self.lost = sum(part.lost for part in self._parts)
        self._samples = np.concatenate([[0], np.cumsum([int(part.counts.sum()) for part in self._parts])])
        self._shards = np.concatenate([[0], np.cumsum([len(part.names) for part in self._parts])])

    def key(self, sample: int) -> str:
        """Key of a sample, ``source/key``."""
        part, inside = _place(self._samples, sample)
        return f"{self._titles[part]}/{self._parts[part].key(inside)}"

    def keys_at(self, samples: Ints) -> list[str]:
        """Keys of many samples at once, as ``key`` gives them."""
        found = [""] * len(samples)
        for part, here, inside in self._split(samples):
            for row, key in zip(here.tolist(), keys_of(self._parts[part], inside), strict=True):
                found[row] = f"{self._titles[part]}/{key}"
        return found

    def sizes_at(self, samples: Ints, extension: str) -> Ints:
        """Bytes of one member of each sample, 0 where it is absent, int64 (n,)."""
        sizes = np.empty(len(samples), dtype=np.int64)
        for part, here, inside in self._split(samples):
            sizes[here] = sizes_of(self._parts[part], inside, extension)
        return sizes

    def shard(self, sample: int) -> str:
        """Name of the shard that holds a sample, ``source/shard``."""
        part, inside = _place(self._samples, sample)
        return f"{self._titles[part]}/{self._parts[part].shard(inside)}"

    def read(self, sample: int) -> Members:
        """Members of a sample by extension.

        Raises:
            BadSample: the sample cannot be read.
        """
        part, inside = _place(self._samples, sample)
        return self._parts[part].read(inside)

    def extensions(self) -> tuple[str, ...]:
        """Members that the samples of every source have, in the order of the first."""
        first, *others = [part.extensions() for part in self._parts]
        return tuple(name for name in first if all(name in other for other in others))

    def described(self, name: str) -> dict[str, Any]:
        """What the cards say about a member; sources whose cards say nothing are taken to agree.

        Raises:
            ValueError: two sources say different things.
        """
        told = [(title, card) for title, part in self.sources.items() if (card := part.described(name))]
        for title, card in told[1:]:
            if card != told[0][1]:
                raise ValueError(
                    f"data.train: .{name} is {told[0][1]} in {told[0][0]}, but {card} in {title}; the sources of a "
                    "mixture need to agree. Prepare them alike, or leave one out."
                )
        return told[0][1] if told else {}

    def measured(self, shard: int, name: str, measure: Measure, width: int) -> Ints:
        """Numbers about each sample of a shard, int64 (n, width)."""
        part, inside = _place(self._shards, shard)
        return self._parts[part].measured(inside, name, measure, width)

    def sizes(self, shard: int, extension: str) -> Ints:
        """Bytes of one member for every sample of a shard, 0 where it is absent, int64 (n,)."""
        part, inside = _place(self._shards, shard)
        return self._parts[part].sizes(inside, extension)

    def gather(self, samples: Ints, extension: str, out: Bytes) -> None:
        """Copy members of one size into the rows of ``out``.

        Raises:
            BadSample: a member cannot be read or has another size; ``row`` is its row of ``out``.
        """
        for part, here, inside in self._split(samples):
            rows = out if len(here) == len(samples) else np.empty((len(here), out.shape[1]), dtype=np.uint8)
            with _rows_named(here):
                self._parts[part].gather(inside, extension, rows)
            if rows is not out:
                out[here] = rows

    def pieces(self, samples: Ints, extension: str, begins: Ints, lengths: Ints, out: Bytes, at: Ints) -> None:
        """Copy a part of one member of each of several samples to the places ``at`` of ``out``.

        Raises:
            BadSample: a member is missing, unreadable or too short; ``row`` is its index among the samples.
        """
        for part, here, inside in self._split(samples):
            with _rows_named(here):
                self._parts[part].pieces(inside, extension, begins[here], lengths[here], out, at[here])

    def expect(self, samples: Ints) -> None:
        """Say which samples will be read about one shuffle window from now."""
        for part, _, inside in self._split(samples):
            self._parts[part].expect(inside)

    def health(self) -> dict[str, float]:
        """Sum of what the sources count."""
        total: dict[str, float] = {}
        for part in self._parts:
            for name, value in part.health().items():
                total[name] = total.get(name, 0.0) + value
        return total

    def close(self) -> None:
        """Close every file; reading again opens them again."""
        for part in self._parts:
            part.close()

    def _split(self, samples: Ints) -> Iterator[tuple[int, Ints, Ints]]:
        """Yield each source concerned, the indices of its samples, and their numbers inside it."""
        for part, here in groups(np.searchsorted(self._samples, samples, side="right") - 1):
            yield part, here, samples[here] - self._samples[part]


def shares_of(parts: Mapping[str, Mapping[str, Any]], totals: Sequence[int], setting: str = "data.train") -> list[int]:
    """Shares of the sources of a mixture, from the ``weight`` or the ``repeat`` of each.

    Args:
        parts: per source, its settings; all give ``weight``, or none does.
        totals: items per epoch of each source, in the same order (for concatenated text the tokens).
        setting: where the parts are set, for messages.

    Returns:
        Whole numbers, to be given to ``Mixed``: weights in lowest terms, or repeat * total.

    Raises:
        ValueError: kinds are mixed, a number is not usable, or all are 0.
    """
    weighted = [name for name, part in parts.items() if part.get("weight") is not None]
    repeated = [name for name, part in parts.items() if part.get("repeat") is not None]
    for name in weighted:
        if name in repeated:
            raise ValueError(f"{setting}.{name} has both weight and repeat. Remove {setting}.{name}.repeat.")
    if weighted and len(weighted) < len(parts):
        other = next(name for name in parts if name not in weighted)
        raise ValueError(
            f"{setting}.{weighted[0]} has a weight, but {setting}.{other} has none; a mixture has one kind. "
            f"Set {setting}.{other}.weight=1, or give every source a repeat."
        )
    if weighted:
        shares = _whole([_weight(part["weight"], f"{setting}.{name}.weight") for name, part in parts.items()])
    else:
        times = [_repeat(part.get("repeat"), f"{setting}.{name}.repeat") for name, part in parts.items()]
        shares = [number * total for number, total in zip(times, totals, strict=True)]
    if not any(shares):
        kind = "weight" if weighted else "repeat"
        raise ValueError(f"{setting}: every {kind} is 0. Set e.g. {setting}.{next(iter(parts))}.{kind}=1.")
    return shares


def mixture_length(shares: Sequence[int], lengths: Sequence[int], unit: int = 1) -> int:
    """Items per epoch of a mixture.

    Args:
        shares: as ``shares_of`` gives them.
        lengths: size of an epoch of each source, in units.
        unit: units per item: 1, or the tokens of a row.

    Returns:
        A period of the schedule where it uses up every source a whole number of times (``repeat``), else as many items
        as the sources hold together.
    """
    whole = all(share % length == 0 for share, length in zip(shares, lengths, strict=True))
    return -(-(sum(shares) if whole else sum(lengths)) // unit)


def mixture_meaning(parts: Sequence[Meaning], schedule: Schedule) -> Meaning:
    """Join what defines the sources: settings they share once, others as a list in the order of the sources."""
    joined: Meaning = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part.get(name, "") for part in parts]
        joined[name] = values[0] if len(set(values)) == 1 else ",".join(str(value) for value in values)
    return {**joined, "shares": ":".join(str(share) for share in schedule.shares)}


def _weight(value: Any, setting: str) -> Fraction:
    try:
        weight = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        weight = Fraction(-1)
    if weight < 0:
        raise ValueError(f"{setting}={value}: expected a number of at least 0. Set e.g. {setting}=0.5.")
    return weight


def _repeat(value: Any, setting: str) -> int:
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise ValueError(
            f"{setting}={value}: expected a whole number of times, at least 0. Set e.g. {setting}=2, or give every "
            "source a weight, which may be any number."
        )
    return int(value)


def _whole(weights: Sequence[Fraction]) -> list[int]:
    """The weights as whole numbers in lowest terms; proportions finer than 2**-30 are rounded, never to 0."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * scale) for weight in weights]
    if sum(shares) > _ROUNDED_PERIOD:
        total = sum(shares)
        shares = [max(1, round(share * _ROUNDED_PERIOD / total)) if share else 0 for share in shares]
    divisor = math.gcd(*shares) or 1
    return [share // divisor for share in shares]


def _place(starts: Ints, number: int) -> tuple[int, int]:
    part = int(np.searchsorted(starts, number, side="right")) - 1
    return part, int(number - starts[part])


@contextlib.contextmanager
def _rows_named(here: Ints) -> Iterator[None]:
    """Let a bad sample's row be that among all samples asked for, not that among those of its source."""
    try:
        yield
    except BadSample as error:
        if error.row >= 0:
            error.row = int(here[error.row])
        raise


def _scaled(values: Ints, factor: int, offset: int, divisor: int) -> Ints:
    """floor((values * factor + offset) / divisor), exactly, where values <= divisor or factor <= divisor <= 2**50.

    The products may be far beyond 64 bits. The float quotient is off by at most 1, and the remainder that belongs to it
    is small, so it comes out right of arithmetic modulo 2**64, and corrects the quotient.
    """
    if not divisor:
        return np.zeros_like(values)
    quotient = (values.astype(np.float64) * factor / divisor + offset / divisor).astype(np.int64)
    remainder = values * factor + offset - quotient * divisor  # arrays wrap around without a word
    return quotient + remainder // divisor
