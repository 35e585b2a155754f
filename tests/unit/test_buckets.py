"""Aspect-ratio buckets: shapes, and an order in which every update is of one shape and nothing is lost."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from datamodules.buckets import BucketOrder, Buckets
from datamodules.mixture import Mixed
from datamodules.order import InOrder, Ints, Order

BUCKETS = Buckets(64, 8, ["1:1", "3:2", "2:3", "2:1"])
SHAPES = np.array([[64, 64], [56, 80], [90, 60], [40, 90], [0, 0]])


def test_shapes_have_about_equal_area() -> None:
    buckets = Buckets(256, 8, ["21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21"])
    assert buckets.shapes == [
        (168, 392),
        (192, 344),
        (208, 312),
        (232, 288),
        (256, 256),
        (288, 232),
        (312, 208),
        (344, 192),
        (392, 168),
    ]


def test_images_go_to_the_nearest_ratio() -> None:
    assert BUCKETS.assign(SHAPES).tolist() == [0, 1, 2, 3, 0]
    draw = np.random.default_rng(0)
    shapes = draw.integers(1, 3000, (500, 2))
    logs = np.log(np.array([1, 3 / 2, 2 / 3, 2]))
    nearest = np.abs(np.log(shapes[:, 1] / shapes[:, 0])[:, None] - logs).argmin(axis=1)
    np.testing.assert_array_equal(BUCKETS.assign(shapes), nearest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 256, "ratios": ["16x9"]}, "16x9: expected width:height"),
        ({"size": 256, "ratios": ["0:9"]}, "0:9: expected width:height"),
        ({"size": 256, "ratios": ["1:0"]}, "1:0: expected width:height"),
        ({"size": 256, "ratios": [969]}, 'written 16:9, quote it: "16:9"'),
        ({"size": 256, "ratios": []}, "has 0 ratios"),
        ({"size": 16, "multiple": 16, "ratios": ["1:1", "5:4"]}, "1:1 and 5:4 both lead to 16x16 pixels"),
        ({"size": 4, "multiple": 8}, "expected 1 <= multiple <= size"),
    ],
)
def test_unusable_buckets(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(**settings)  # type: ignore[arg-type]


def by_hand(order: Order | Mixed[Order], buckets: Ints, size: int, count: int) -> list[tuple[int, list[list[int]]]]:
    """Updates among the first ``count`` items, found by going through them one by one."""
    waiting: dict[int, list[list[int]]] = {}
    updates = []
    for epoch, sample in zip(*(part.tolist() for part in order(np.arange(count))), strict=True):
        bucket = int(buckets[sample])
        row = waiting.setdefault(bucket, [])
        row.append([epoch, sample])
        if len(row) == size:
            updates.append((bucket, waiting.pop(bucket)))
    return updates


def random_case(draw: np.random.Generator) -> tuple[Order | Mixed[Order], list[Ints], int]:
    """An order of one or several sources with buckets of very different sizes, the shapes per shard, and G."""
    sources = int(draw.integers(1, 4))
    seed = int(draw.integers(99))
    orders, shapes = [], []
    for source in range(sources):
        counts = draw.integers(0, 25, int(draw.integers(1, 9)))
        counts[0] += 1
        orders.append(Order(counts, seed, int(draw.integers(1, 5)), source))
        shapes += [SHAPES[draw.choice(5, count, p=draw.dirichlet([0.3] * 5))].reshape(-1, 2) for count in counts]
    order = orders[0] if sources == 1 else Mixed(orders, [int(share) for share in draw.integers(1, 5, sources)])
    return order, shapes, int(draw.integers(1, 20))


def test_updates_are_those_of_going_through_the_order_item_by_item() -> None:
    draw = np.random.default_rng(0)
    found = 0
    for _ in range(20):
        order, shapes, size = random_case(draw)
        expected = by_hand(order, BUCKETS.assign(np.concatenate(shapes)), size, 4 * order.total + 50)
        lookup = BucketOrder(order, BUCKETS, shapes.__getitem__, size)
        for update in draw.permutation(len(expected))[:12]:
            positions = np.arange(update * size, (update + 1) * size)
            bucket, items = expected[update]
            assert lookup.bucket(positions) == bucket
            assert np.stack(lookup(positions), axis=1).tolist() == items
        if expected:
            every = np.stack(BucketOrder(order, BUCKETS, shapes.__getitem__, size)(np.arange(len(expected) * size)), 1)
            assert every.tolist() == [item for _, items in expected for item in items]
            found += len(expected)
    assert found > 300


def test_no_item_is_lost_or_doubled_across_epochs() -> None:
    shapes = [SHAPES[np.random.default_rng(shard).integers(0, 4, 30)] for shard in range(6)]
    lookup = BucketOrder(Order([30] * 6, 2, 2), BUCKETS, shapes.__getitem__, 8)
    epochs, samples = lookup(np.arange(8 * 180))
    seen = np.bincount(epochs * 180 + samples, minlength=10 * 180)
    assert seen.max() == 1
    assert (seen[: 7 * 180] == 1).all()  # at most 4 * 7 items wait, so the first epochs are complete
    assert lookup.length() == 180


def test_any_position_of_a_large_set_is_found_at_once() -> None:
    counts = np.full(200, 500)
    shares = [0.6, 0.25, 0.149, 0.001]  # the last bucket fills an update in about three epochs
    asked: list[int] = []

    def shapes(shard: int) -> Ints:
        asked.append(shard)
        return SHAPES[np.random.default_rng(shard).choice(4, 500, p=shares)]

    lookup = BucketOrder(Order(counts, 0, 16), BUCKETS, shapes, 256)
    asked.clear()
    far = 256 * 40_000_000
    positions = far + np.arange(256 * 100)
    _, samples = lookup(positions[:256])
    assert len(asked) <= 5 * 16
    buckets = BUCKETS.assign(np.concatenate([shapes(shard) for shard in range(200)]))
    for update in range(100):
        part = positions[256 * update : 256 * (update + 1)]
        _, samples = lookup(part)
        assert set(buckets[samples]) == {lookup.bucket(part)}
        assert len(set(samples)) == 256 or lookup.bucket(part) == 3


def test_threads_see_the_same_updates() -> None:
    draw = np.random.default_rng(3)
    shapes = [SHAPES[draw.integers(0, 4, 9)] for _ in range(40)]
    lookup = BucketOrder(Order([9] * 40, 1, 2), BUCKETS, shapes.__getitem__, 4)
    plans = [np.arange(4) + 4 * update for update in draw.integers(0, 300, 60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda plan: lookup(plan)[1], plans))
    alone = BucketOrder(Order([9] * 40, 1, 2), BUCKETS, shapes.__getitem__, 4)
    np.testing.assert_array_equal(found, [alone(plan)[1] for plan in plans])


def test_the_meaning_names_the_shapes_and_the_update() -> None:
    lookup = BucketOrder(Order([3], 1, 2), Buckets(64, 8, ["1:1", "2:1"]), lambda _: SHAPES[:3], 2)
    assert lookup.meaning() == {"seed": 1, "window": 2, "buckets": "64x64,48x88", "batch_size": 2}
    with pytest.raises(AssertionError, match="2 updates"):
        lookup.bucket(np.array([1, 2]))


def test_only_orders_can_be_bucketed() -> None:
    with pytest.raises(ValueError, match=r"Remove data\.buckets"):
        BucketOrder(Mixed([InOrder(3)], [1]), BUCKETS, lambda _: SHAPES[:3], 2)  # type: ignore[arg-type]
