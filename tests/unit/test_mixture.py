"""Mixtures: exact proportions at any position, per-source epochs, and several sources read as one."""

from collections import Counter

import numpy as np
import pytest

from datamodules.mixture import Concatenated, Mixed, Schedule, shares_of
from datamodules.order import Ints, Order
from datamodules.source import BadSample

HUGE = 2**49


def test_a_schedule_deals_exact_shares_evenly() -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        shares = [int(share) for share in draw.integers(0, 12, int(draw.integers(1, 8)))]
        shares[0] += 1
        schedule = Schedule(shares)
        n = 2 * schedule.period + 5
        which, inside = schedule(np.arange(n))
        for source, share in enumerate(schedule.shares):
            mine = np.flatnonzero(which == source)
            np.testing.assert_array_equal(inside[mine], np.arange(len(mine)))
            dealt = np.concatenate([[0], np.cumsum(which == source)])
            ideal = np.arange(n + 1) * share / schedule.period
            assert abs(dealt - ideal).max() <= (1 + np.log2(len(shares))) / 2 + 1e-9
            assert dealt[schedule.period] == share
            for place in draw.integers(0, n + 1, 4):
                assert schedule.counts(int(place))[source] == dealt[place]
            if share:
                np.testing.assert_array_equal(schedule.positions(source, np.arange(len(mine))), mine)


def test_a_schedule_is_exact_far_beyond_64_bit_products() -> None:
    schedule = Schedule([HUGE - 12, 12345, HUGE - 12345, 7])
    positions = np.random.default_rng(0).integers(0, 2**60, 300)
    which, inside = schedule(positions)
    for position, source, item in zip(positions.tolist(), which.tolist(), inside.tolist(), strict=True):
        assert schedule.counts(position)[source] == item  # computed with Python's integers
        assert schedule.counts(position + 1)[source] == item + 1
    for source in range(3):
        mine = which == source
        np.testing.assert_array_equal(schedule.positions(source, inside[mine]), positions[mine])


def test_unusable_shares() -> None:
    for shares in ([0, 0], [1, -1], []):
        with pytest.raises(ValueError, match="shares"):
            Schedule(shares)
    with pytest.raises(ValueError, match="repeats itself only after"):
        Schedule([2**50, 1])
    with pytest.raises(ValueError, match="1 sources, but 2 shares"):
        Mixed([Order([3])], [1, 1])


def mixed(shares: list[int]) -> Mixed[Order]:
    return Mixed([Order([4, 3], 1, 2), Order([2], 1, 2, source=1), Order([5, 1], 1, 2, source=2)], shares)


def test_every_source_keeps_its_own_order_and_epochs() -> None:
    lookup = mixed([3, 1, 2])
    epochs, samples = lookup(np.arange(60))
    begin = 0
    for source, order in enumerate(lookup.orders):
        mine = (samples >= begin) & (samples < begin + order.total)
        assert mine.sum() == [30, 10, 20][source]
        own_epochs, own_samples = order(np.arange(mine.sum()))
        np.testing.assert_array_equal(samples[mine] - begin, own_samples)
        np.testing.assert_array_equal(epochs[mine], own_epochs)
        begin += order.total
    places = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(mixed([3, 1, 2])(places)[1], samples[places])
    assert lookup.length() == lookup.total == 15


def test_repeat_shows_each_sample_exactly_so_often_per_epoch() -> None:
    parts = {"a": {"repeat": 2}, "b": {"repeat": 5}, "c": {}}
    shares = shares_of(parts, [7, 2, 6])
    assert shares == [14, 10, 6]
    lookup = mixed(shares)
    assert lookup.length() == 30
    expected = np.repeat([2, 5, 1], [7, 2, 6])
    for epoch in range(3):
        _, samples = lookup(np.arange(30) + 30 * epoch)
        np.testing.assert_array_equal(np.bincount(samples, minlength=15), expected)


def test_weights_become_whole_shares() -> None:
    def weights(*values: object) -> list[int]:
        return shares_of({f"s{k}": {"weight": value} for k, value in enumerate(values)}, [1] * len(values))

    assert weights(0.7, 0.3) == [7, 3]
    assert weights(1, 2.5, 0) == [2, 5, 0]
    assert weights("1/3", "1/6") == [2, 1]
    odd = weights(0.123456789012, 1e-15, 3.14159265358979)
    assert min(odd) >= 1
    assert odd[0] / odd[2] == pytest.approx(0.123456789012 / 3.14159265358979, rel=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": {"weight": 1, "repeat": 2}}, r"data\.train\.a has both weight and repeat"),
        ({"a": {"weight": 1}, "b": {"repeat": 2}}, r"data\.train\.a has a weight, but data\.train\.b has none"),
        ({"a": {"weight": -1}}, r"data\.train\.a\.weight=-1: expected"),
        ({"a": {"weight": "much"}}, r"data\.train\.a\.weight=much: expected"),
        ({"a": {"weight": float("nan")}}, r"data\.train\.a\.weight=nan: expected"),
        ({"a": {"repeat": 1.5}}, r"data\.train\.a\.repeat=1.5: expected a whole number"),
        ({"a": {"weight": 0}, "b": {"weight": 0}}, r"every weight is 0\. Set e\.g\. data\.train\.a\.weight=1"),
    ],
)
def test_unusable_mixtures(parts: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares_of(parts, [3] * len(parts))


def test_the_meaning_of_a_mixture_names_what_differs() -> None:
    lookup = Mixed([Order([3], 1, 2), Order([3], 1, 4)], [4, 2])
    assert lookup.meaning() == {"seed": 1, "window": "2,4", "shares": "2:1"}


class Numbers:
    """A source whose members tell which sample they are."""

    def __init__(self, first: int, counts: list[int], card: dict[str, object] | None = None) -> None:
        self.first = first
        self.names = [f"{shard:06d}.tar" for shard in range(len(counts))]
        self.counts: Ints = np.array(counts)
        self.starts: Ints = np.concatenate([[0], np.cumsum(counts)])
        self.classes = [Counter({first: count}) for count in counts]
        self.fingerprint = f"{first}{counts}"
        self.lost = 0
        self.card = card or {}
        self.expected: list[int] = []

    def extensions(self) -> tuple[str, ...]:
        return ("cls", "jpg") if self.first else ("jpg", "txt", "cls")

    def key(self, sample: int) -> str:
        return f"k{sample}"

    def shard(self, sample: int) -> str:
        return self.names[int(np.searchsorted(self.starts, sample, side="right")) - 1]

    def read(self, sample: int) -> dict[str, bytes]:
        return {"cls": bytes([self.first + sample])}

    def described(self, name: str) -> dict[str, object]:
        return self.card

    def sizes(self, shard: int, extension: str) -> Ints:
        return self.first + np.arange(self.starts[shard], self.starts[shard + 1])

    def measured(self, shard: int, name: str, measure: object, width: int) -> Ints:
        return np.repeat(self.sizes(shard, "")[:, None], width, axis=1)

    def gather(self, samples: Ints, extension: str, out: np.ndarray) -> None:
        for row, sample in enumerate(samples):
            if extension == "bad" and self.first + sample == 13:
                raise BadSample("no such member", row=row)
            out[row] = self.first + sample

    def pieces(self, samples: Ints, extension: str, begins: Ints, lengths: Ints, out: np.ndarray, at: Ints) -> None:
        for sample, begin, length, place in zip(samples, begins, lengths, at, strict=True):
            out.reshape(-1)[place : place + length] = self.first + sample + begin

    def expect(self, samples: Ints) -> None:
        self.expected.extend((self.first + samples).tolist())

    def health(self) -> dict[str, float]:
        return {"cache_hits": 2.0}

    def close(self) -> None:
        self.names = []


def both() -> Concatenated:
    return Concatenated({"a": Numbers(0, [3, 2]), "b": Numbers(10, [1, 4])})  # type: ignore[dict-item]


def test_concatenated_sources_are_numbered_through() -> None:
    source = both()
    assert source.counts.tolist() == [3, 2, 1, 4]
    assert source.starts.tolist() == [0, 3, 5, 6, 10]
    assert [source.key(4), source.key(5), source.shard(4), source.shard(6)] == [
        "a/k4",
        "b/k0",
        "a/000001.tar",
        "b/000001.tar",
    ]
    assert [source.read(sample)["cls"][0] for sample in (0, 4, 5, 9)] == [0, 4, 10, 14]
    assert np.concatenate([source.sizes(shard, "") for shard in range(4)]).tolist() == [0, 1, 2, 3, 4, *range(10, 15)]
    assert source.measured(3, "shape", lambda _: (1, 1), 2).tolist() == [[11, 11], [12, 12], [13, 13], [14, 14]]
    assert source.extensions() == ("jpg", "cls")
    assert source.classes == [{0: 3}, {0: 2}, {10: 1}, {10: 4}]
    assert source.health() == {"cache_hits": 4.0}
    assert source.fingerprint != Concatenated({"a": source.sources["b"], "b": source.sources["a"]}).fingerprint
    samples = np.array([9, 0, 5, 4, 6])
    assert source.keys_at(samples) == [source.key(sample) for sample in samples]
    assert source.sizes_at(samples, "").tolist() == [14, 0, 10, 4, 11]
    source.expect(np.array([9, 1]))
    assert [part.expected for part in source.sources.values()] == [[1], [14]]  # type: ignore[attr-defined]


def test_members_of_several_sources_are_copied_to_their_rows() -> None:
    source = both()
    samples = np.array([9, 0, 5, 4, 6])
    out = np.zeros((5, 3), dtype=np.uint8)
    source.gather(samples, "lat", out)
    assert out.tolist() == [[value] * 3 for value in (14, 0, 10, 4, 11)]
    source.gather(samples[1:2], "lat", out[:1])
    assert out[0].tolist() == [0, 0, 0]
    with pytest.raises(BadSample, match="no such member") as caught:
        source.gather(np.array([0, 9, 1, 8]), "bad", out[:4])
    assert caught.value.row == 3
    tokens = np.zeros((2, 4), dtype=np.uint8)
    source.pieces(np.array([9, 0, 6]), "tok", np.array([1, 2, 0]), np.array([3, 1, 4]), tokens, np.array([0, 3, 4]))
    assert tokens.tolist() == [[15, 15, 15, 2], [11, 11, 11, 11]]


def test_cards_of_a_mixture_agree_or_are_refused() -> None:
    def described(*cards: dict[str, object]) -> dict[str, object]:
        return Concatenated({f"s{k}": Numbers(k, [1], card) for k, card in enumerate(cards)}).described("lat")  # type: ignore[misc]

    assert described({"scale": 1}, {}, {"scale": 1}) == {"scale": 1}
    assert described({}, {}) == {}
    with pytest.raises(ValueError, match=r"\.lat is \{'scale': 1\} in s0, but \{'scale': 2\} in s1"):
        described({"scale": 1}, {"scale": 2})
