"""The order of samples: a permutation per epoch, a function of the position, the same for every number of ranks."""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest

from datamodules.order import (
    CAPTION,
    InOrder,
    Order,
    choose,
    fingerprint,
    groups,
    held_out_batches,
    micro_batches,
    over_shards,
    sample_bits,
)

COUNTS = [5, 0, 3, 7, 4, 6, 2]
TOTAL = sum(COUNTS)


def test_every_epoch_is_another_permutation() -> None:
    epochs, samples = Order(COUNTS, seed=3, window=2)(np.arange(3 * TOTAL))
    np.testing.assert_array_equal(epochs, np.repeat([0, 1, 2], TOTAL))
    rounds = samples.reshape(3, TOTAL)
    np.testing.assert_array_equal(np.sort(rounds), np.tile(np.arange(TOTAL), (3, 1)))
    assert len({tuple(row) for row in rounds}) == 3


def test_frozen_values() -> None:
    """A run trained with one version continues with the next: these numbers must never change."""
    _, samples = Order([5, 3, 4], seed=7, window=2)(np.arange(18))
    assert samples.tolist() == [7, 10, 6, 8, 9, 5, 11, 4, 3, 2, 1, 0, 7, 5, 9, 6, 10, 8]
    assert Order([4], seed=2**64 + 7)(np.arange(4))[1].tolist() == Order([4], seed=7)(np.arange(4))[1].tolist()


def test_position_alone_decides() -> None:
    positions = np.random.default_rng(0).permutation(4 * TOTAL)
    together = Order(COUNTS, seed=1, window=3)(positions)[1]
    order = Order(COUNTS, seed=1, window=3)
    one_by_one = [order(np.array([position]))[1][0] for position in positions]
    np.testing.assert_array_equal(together, one_by_one)
    assert (Order(COUNTS, seed=2, window=3)(positions)[1] != together).any()


def test_a_window_mixes_exactly_its_shards() -> None:
    counts = [10] * 12
    _, samples = Order(counts, seed=0, window=4)(np.arange(240))
    for epoch in samples.reshape(2, 3, 40):
        shards = [set(window // 10) for window in epoch]
        assert [len(found) for found in shards] == [4, 4, 4]
        assert set.union(*shards) == set(range(12))
    position = np.arange(120)
    whole = Order(counts, seed=0, window=12)(position)[1]
    assert abs(np.corrcoef(position, whole)[0, 1]) < 0.2


@pytest.mark.parametrize("start", [0, 48, 24 * 7])
def test_any_ranks_and_micro_batches_share_the_same_updates(start: int) -> None:
    for ranks in (1, 2, 3, 4):
        for micro in (1, 2, 6 // ranks if 6 % ranks == 0 else 2):
            steps = 24 // (ranks * micro)
            streams = [islice(micro_batches(start, 24, micro, rank, ranks), 3 * steps) for rank in range(ranks)]
            seen = [np.concatenate(parts) for parts in zip(*streams, strict=True)]
            updates = np.concatenate(seen).reshape(3, 24)
            np.testing.assert_array_equal(updates, start + np.arange(72).reshape(3, 24))


@pytest.mark.parametrize(("total", "batch"), [(445, 64), (4, 64), (5, 2), (129, 128), (1000, 1)])
def test_held_out_samples_come_once_in_equally_many_batches(total: int, batch: int) -> None:
    for ranks in (1, 2, 3, 4):
        parts = [held_out_batches(total, batch, rank, ranks) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        assert min(len(piece) for part in parts for piece in part) > 0
        assert sorted(np.concatenate([np.concatenate(part) for part in parts])) == list(range(total))
        if batch >= ranks:
            assert max(sum(map(len, pieces)) for pieces in zip(*parts, strict=True)) <= max(batch, 2 * ranks)


def test_sequential_order_starts_again() -> None:
    epochs, samples = InOrder(3)(np.arange(7))
    assert (epochs.tolist(), samples.tolist()) == ([0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 0, 1, 2, 0])


def test_augmentation_bits_belong_to_the_sample() -> None:
    samples = np.arange(4000)
    bits = sample_bits(5, np.zeros_like(samples), samples) & np.uint64(1)
    assert 1850 < bits.sum() < 2150  # 2000 expected, standard deviation 32
    np.testing.assert_array_equal(bits[::-1], sample_bits(5, np.zeros_like(samples), samples[::-1]) & np.uint64(1))
    for other in (sample_bits(5, np.ones_like(samples), samples), sample_bits(6, np.zeros_like(samples), samples)):
        assert 1850 < (bits ^ (other & np.uint64(1))).sum() < 2150


def test_fingerprint_sees_names_counts_and_sizes() -> None:
    base = fingerprint(["a", "b"], [1, 2], [3, 4])
    others = [(["b", "a"], [1, 2], [3, 4]), (["a", "b"], [2, 1], [3, 4]), (["a", "b"], [1, 2], [3, 5])]
    assert base not in [fingerprint(*other) for other in others]


def test_nothing_to_order() -> None:
    with pytest.raises(ValueError, match="hold no samples"):
        Order([0, 0])
    with pytest.raises(ValueError, match=r"data\.window=0"):
        Order([1], window=0)


def test_all_permutations_are_equally_likely() -> None:
    samples = Order([3], seed=9, window=1)(np.arange(3 * 6000))[1].reshape(-1, 3)
    _, counts = np.unique(samples, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 120  # standard deviation 29


def test_a_window_is_a_run_of_the_order_and_columns_follow_it() -> None:
    order = Order(COUNTS, seed=5, window=3)
    column = np.split(np.arange(TOTAL) * 10, np.cumsum(COUNTS)[:-1])
    for epoch in range(2):
        shards, ends = order.windows(epoch)
        parts = [order.window_samples(epoch, window) for window in range(len(ends))]
        assert sorted(shards) == list(range(len(COUNTS)))
        assert np.cumsum([len(part) for part in parts]).tolist() == ends.tolist()
        np.testing.assert_array_equal(np.concatenate(parts), order(np.arange(TOTAL) + epoch * TOTAL)[1])
        for window, part in enumerate(parts):
            np.testing.assert_array_equal(order.arrange(epoch, window, column.__getitem__), 10 * part)


def test_sources_of_one_seed_are_shuffled_independently() -> None:
    first, second = (Order([1000], seed=3, source=source)(np.arange(1000))[1] for source in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15  # standard deviation 0.03
    assert first.tolist() == Order([1000], seed=3)(np.arange(1000))[1].tolist()


def test_threads_see_the_same_order() -> None:
    order = Order([7] * 40, seed=1, window=2)
    plans = np.random.default_rng(0).integers(0, 3 * 280, (200, 16))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda plan: order(plan)[1], plans))
    np.testing.assert_array_equal(found, [Order([7] * 40, seed=1, window=2)(plan)[1] for plan in plans])


def test_a_place_far_inside_a_huge_set_is_found_at_once() -> None:
    order = Order(np.full(100_000, 10_000), seed=0, window=16)
    epochs, samples = order(np.arange(5) + 7 * 10**9 + 123_456_789)
    assert epochs.tolist() == [7] * 5
    assert len(set(samples // 10_000)) > 1
    assert sum(len(samples) for samples, _ in order._windows.values()) <= 2 * 160_000


def test_streams_of_bits_are_unrelated() -> None:
    samples = np.arange(4000)
    epochs = np.zeros_like(samples)
    flips, captions = sample_bits(5, epochs, samples), sample_bits(5, epochs, samples, CAPTION)
    for shift in (0, 63):
        same = (flips ^ (captions >> np.uint64(shift))) & np.uint64(1)
        assert 1850 < same.sum() < 2150  # 2000 expected, standard deviation 32
    assert flips[:3].tolist() == [17207079892238523376, 12497286095365104551, 3186597934568593609]


def test_alternatives_are_drawn_with_their_probabilities() -> None:
    samples = np.arange(10_000)
    bits = sample_bits(1, np.zeros_like(samples), samples, CAPTION)
    drawn = np.bincount(choose(bits, [0.0, 0.7, 0.1, 0.2, 0.0]), minlength=5)
    assert drawn[0] == drawn[4] == 0
    assert abs(drawn[1:4] - np.array([7000, 1000, 2000])).max() < 200  # standard deviation at most 46
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert choose(ends, [0.1] * 10).tolist() == [0, 9]
    assert choose(ends, [0.5, 0.5, 0.0]).tolist() == [0, 1]
    for wrong in ([0.5, 0.2], [1.5, -0.5], [], [float("nan")]):
        with pytest.raises(ValueError, match=r"data\.captions: the probabilities"):
            choose(bits, wrong)


def test_groups_name_every_key_once() -> None:
    keys = np.random.default_rng(0).integers(-3, 4, 50)
    assert {key: where.tolist() for key, where in groups(keys)} == {
        key: np.flatnonzero(keys == key).tolist() for key in sorted(set(keys.tolist()))
    }
    assert [key for key, _ in groups(keys)] == sorted(set(keys.tolist()))
    assert list(groups(keys[:0])) == []


def test_numbers_of_shards_come_in_order() -> None:
    for shards in (0, 3, 40):
        assert over_shards(lambda shard: shard * shard, shards) == [shard * shard for shard in range(shards)]
