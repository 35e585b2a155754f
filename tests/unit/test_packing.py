"""Rows of tokens: every token exactly once per epoch, at any position, whatever the lengths."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from datamodules.mixture import shares_of
from datamodules.order import Ints, Order
from datamodules.packing import MixedRows, Pieces, RowLookup, Rows, best_fit
from datamodules.textrows import ShuffledRows


def filled(lookup: RowLookup, positions: Ints) -> Ints:
    """(epoch, document, token) of every place of the rows, -1 where there is none; int64 (n, T, 3)."""
    grid = np.full((len(positions), lookup.width, 3), -1)
    pieces = lookup(positions)
    assert (np.lexsort((pieces.at, pieces.row)) == np.arange(len(pieces.row))).all()
    for row, at, epoch, sample, begin, length in zip(*pieces, strict=True):
        assert at + length <= lookup.width
        assert (grid[row, at : at + length] == -1).all()
        grid[row, at : at + length, :2] = epoch, sample
        grid[row, at : at + length, 2] = np.arange(begin, begin + length)
    return grid


def random_case(draw: np.random.Generator) -> tuple[Order, list[Ints], int]:
    """An order, lengths per shard with empty documents and empty shards among them, and T."""
    counts = draw.integers(0, 25, int(draw.integers(1, 9)))
    counts[0] += 1
    lengths = [draw.integers(draw.integers(2), draw.integers(3, 40), count) for count in counts]
    lengths[0][0] += 1
    return Order(counts, int(draw.integers(99)), int(draw.integers(1, 5))), lengths, int(draw.integers(1, 40))


def test_concat_cuts_the_endless_stream_of_documents() -> None:
    draw = np.random.default_rng(0)
    for _ in range(30):
        order, lengths, width = random_case(draw)
        rows = Rows(order, lengths.__getitem__, width, "concat")
        texts = np.concatenate(lengths)
        assert rows.tokens() == texts.sum()
        count = 3 * rows.length() + 2
        epochs, samples = order(np.arange((4 + count * width // rows.tokens()) * order.total))
        stream = np.concatenate(
            [
                np.stack([np.full(texts[s], e), np.full(texts[s], s), np.arange(texts[s])], 1)
                for e, s in zip(epochs, samples, strict=True)
            ]
        )
        grid = filled(rows, np.arange(count))
        np.testing.assert_array_equal(grid.reshape(-1, 3), stream[: count * width])
        for lookup in (rows, Rows(order, lengths.__getitem__, width, "concat")):
            places = draw.integers(0, count, 12)
            np.testing.assert_array_equal(filled(lookup, places), grid[places])


def test_far_rows_of_the_stream_are_found_without_going_there() -> None:
    draw = np.random.default_rng(4)
    for _ in range(10):
        order, lengths, width = random_case(draw)
        texts = np.concatenate(lengths)
        tokens = int(texts.sum())
        for position in (10**12, 0, 10**6):
            epoch, skipped = divmod(position * width, tokens)
            epochs = range(epoch, epoch + 2 + 3 * width // tokens)
            _, samples = order(np.arange(epochs[0] * order.total, (epochs[-1] + 1) * order.total))
            stream = np.concatenate([np.stack([np.full(texts[s], s), np.arange(texts[s])], 1) for s in samples])
            grid = filled(Rows(order, lengths.__getitem__, width, "concat"), position + np.arange(3))
            expected = stream[skipped : skipped + 3 * width]
            np.testing.assert_array_equal(grid.reshape(-1, 3)[:, 1:], expected)


@pytest.mark.parametrize("mode", ["concat", "pack", "padded"])
def test_far_rows_are_those_that_walking_there_finds(mode: str) -> None:
    lengths = [np.random.default_rng(shard).integers(0, 40, 30 + shard) for shard in range(7)]

    def rows() -> RowLookup:
        made = Rows(Order([len(part) for part in lengths], 5, 2), lengths.__getitem__, 16, mode)
        return ShuffledRows(made) if mode == "concat" else made

    walker, places, step = rows(), np.array([0, 50_000, 99_999, 100_000]), 1000
    for begin in range(0, 101_000, step):
        walked = walker(np.arange(begin, begin + step))
        for place in places[places // step == begin // step]:
            here = walked.row == place - begin
            found = rows()(place[None])
            for left, right in zip(found[1:], walked[1:], strict=True):
                np.testing.assert_array_equal(left, right[here])


@pytest.mark.parametrize("mode", ["pack", "padded"])
def test_every_epoch_has_every_token_once(mode: str) -> None:
    draw = np.random.default_rng(1)
    for _ in range(30):
        order, lengths, width = random_case(draw)
        rows = Rows(order, lengths.__getitem__, width, mode)
        texts = np.concatenate(lengths)
        kept = np.minimum(texts, width) if mode == "padded" else texts
        expected = [[sample, token] for sample in range(len(texts)) for token in range(kept[sample])]
        count = rows.length()
        grid = filled(rows, np.arange(3 * count))
        for epoch in range(3):
            part = grid[epoch * count : (epoch + 1) * count].reshape(-1, 3)
            part = part[part[:, 0] >= 0]
            assert set(part[:, 0]) == {epoch}
            assert sorted(part[:, 1:].tolist()) == expected
        places = draw.integers(0, 3 * count, 12)
        np.testing.assert_array_equal(filled(rows, places), grid[places])


def test_packing_cuts_long_documents_only() -> None:
    lengths = np.array([25, 10, 7, 3, 0, 1])
    pieces = Rows(Order([6]), lambda _: lengths, 10, "pack")(np.arange(5))
    parts = sorted(zip(pieces.sample.tolist(), pieces.begin.tolist(), pieces.length.tolist(), strict=True))
    assert parts == [(0, 0, 10), (0, 10, 10), (0, 20, 5), (1, 0, 10), (2, 0, 7), (3, 0, 3), (5, 0, 1)]


def test_padded_keeps_a_row_for_an_empty_document() -> None:
    pieces = Rows(Order([3]), lambda _: np.array([0, 0, 0]), 10, "padded")(np.arange(3))
    assert (pieces.row.tolist(), pieces.length.tolist()) == ([0, 1, 2], [0, 0, 0])


def test_rows_are_packed_anew_every_epoch() -> None:
    lengths = np.full(40, 5)
    rows = Rows(Order([40], seed=1), lambda _: lengths, 10, "pack")
    pairs = []
    for epoch in range(2):
        sample = rows(np.arange(20) + 20 * epoch).sample.reshape(20, 2)
        pairs.append({frozenset(pair) for pair in sample.tolist()})
    assert len(pairs[0] & pairs[1]) < 5


def one_by_one(lengths: list[int], width: int) -> int:
    """Rows that best-fit decreasing makes."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else width) - length)
    return len(rooms)


def test_best_fit_needs_as_many_rows_as_fitting_one_by_one() -> None:
    draw = np.random.default_rng(0)
    for _ in range(150):
        width = int(draw.integers(1, 60))
        lengths = draw.integers(1, width + 1, int(draw.integers(1, 80)))
        rows, steps = best_fit(np.bincount(lengths), width)
        assert rows == one_by_one(lengths.tolist(), width)
        assert (steps[:, 1] * steps[:, 2]).sum() == len(lengths)
    assert best_fit(np.bincount([0, 0]), 4) == (0, pytest.approx(np.zeros((0, 5))))


def test_packing_leaves_little_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 5000).astype(np.int64) + 1
    rows = Rows(Order([5000]), lambda _: lengths, 1024, "pack")
    assert rows.tokens() / (rows.content * rows.width) > 0.99


def test_far_rows_are_found_from_the_lengths_of_a_window() -> None:
    lengths = [np.random.default_rng(shard).integers(1, 300, 200) for shard in range(200)]
    asked: list[int] = []

    def lookup(shard: int) -> Ints:
        asked.append(shard)
        return lengths[shard]

    for mode in ("concat", "pack", "padded"):
        rows = Rows(Order([200] * 200, 0, 8), lookup, 128, mode)
        asked.clear()
        pieces = rows(10**9 + np.arange(8))
        assert len(asked) <= 16
        assert set(pieces.row.tolist()) == set(range(8))


def test_threads_see_the_same_rows() -> None:
    draw = np.random.default_rng(2)
    lengths = [draw.integers(1, 30, 9) for _ in range(40)]

    def make(mode: str) -> Callable[[Ints], Pieces]:
        return Rows(Order([9] * 40, 1, 2), lengths.__getitem__, 16, mode)

    for mode in ("concat", "pack", "padded"):
        plans = [np.arange(4) + 4 * batch for batch in draw.integers(0, 200, 40)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(make(mode), plans))
        alone = make(mode)
        for pieces, plan in zip(found, plans, strict=True):
            for column, expected in zip(pieces, alone(plan), strict=True):
                np.testing.assert_array_equal(column, expected)


def test_mixed_rows_repeat_documents_exactly() -> None:
    draw = np.random.default_rng(4)
    lengths = [[draw.integers(1, 30, 9) for _ in range(4)] for _ in range(2)]
    for mode, slack in (("pack", 0), ("concat", 2)):
        sources = [Rows(Order([9] * 4, 1, 2, k), lengths[k].__getitem__, 16, mode) for k in range(2)]
        shares = shares_of({"a": {"repeat": 1}, "b": {"repeat": 3}}, [source.content for source in sources])
        rows = MixedRows(sources, shares)
        for epochs in (1, 4):
            grid = filled(rows, np.arange(epochs * rows.length())).reshape(-1, 3)
            grid = grid[grid[:, 0] >= 0]
            tokens = np.bincount(grid[:, 1] // 36, minlength=2)
            ideal = [epochs * sources[0].tokens(), 3 * epochs * sources[1].tokens()]
            assert abs(tokens - ideal).max() <= 16 * (slack + epochs * (slack > 0))
            if not slack:
                seen = np.bincount(grid[:, 1], minlength=72) / np.concatenate([*lengths[0], *lengths[1]])
                assert seen.tolist() == [epochs] * 36 + [3 * epochs] * 36
        places = draw.integers(0, 50, 10)
        np.testing.assert_array_equal(filled(rows, places), filled(rows, np.arange(50))[places])
    assert rows.meaning() == {
        "seed": 1,
        "window": 2,
        "length": 16,
        "mode": "concat",
        "shares": ":".join(str(share) for share in rows.schedule.shares),
    }


def test_unusable_rows() -> None:
    order, lengths = Order([3]), [np.array([1, 0, 2])]
    with pytest.raises(ValueError, match=r"data\.length=0"):
        Rows(order, lengths.__getitem__, 0, "concat")
    with pytest.raises(ValueError, match=r"data\.mode=best: expected concat, pack, padded"):
        Rows(order, lengths.__getitem__, 4, "best")
    for mode in ("concat", "pack"):
        with pytest.raises(ValueError, match="hold no tokens"):
            Rows(order, lambda _: np.zeros(3, dtype=np.int64), 4, mode)
