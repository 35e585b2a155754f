"""Schedules of masking, and the samplers that reveal masked tokens, with models whose answers are known."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightningmodules.shared import masking
from lightningmodules.shared.masking import (
    Cosine,
    CosineSquared,
    Exponential,
    Geometric,
    LogLinear,
    Power,
    Schedule,
    Shifted,
)
from lightningmodules.shared.noise import SampleNoise
from lightningmodules.shared.samplers import masked
from lightningmodules.shared.samplers.masked import Draw, Drawn, Plan, Wino, best, reveal, wino

V, LENGTH = 5, 12
SCHEDULES: list[Schedule] = [
    LogLinear(),
    LogLinear(1e-3),
    Cosine(),
    CosineSquared(),
    Power(3.0),
    Exponential(),
    Geometric(1e-3, 5.0),
    Shifted(-4.0),
    Shifted(2.0, Cosine()),
]


class Fixed:
    """A model that always says the same about a position, and notes when it was asked."""

    mask_id, cost = V, 1

    def __init__(self, log_probs: Tensor, carries: bool = False, outside: Tensor | None = None) -> None:
        self.log_probs, self.carries = log_probs.log_softmax(-1), carries
        self.outside = self.log_probs if outside is None else outside.log_softmax(-1)
        self.asked: list[Tensor] = []
        self.times: list[tuple[float, float]] = []

    def predict(self, tokens: Tensor, where: Tensor, t: Tensor) -> Tensor:
        assert (tokens[where] == V).all()
        self.asked.append(where.sum(dim=1))
        return self.log_probs.expand(len(tokens), -1, -1)[where]

    def predict_twice(
        self, tokens: Tensor, where: Tensor, start: Tensor, held: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        slots = (start.unsqueeze(1) + torch.arange(held.shape[1])).clamp(max=tokens.shape[1] - 1)
        assert (tokens.gather(1, slots)[held] != V).all()
        outside = self.outside.expand(len(tokens), -1, -1)
        return self.predict(tokens, where, t), outside.gather(1, slots.unsqueeze(-1).expand(-1, -1, V))[held]

    def advance(self, before: Tensor, after: Tensor, log_probs: Tensor, where: Tensor, t: Tensor, s: Tensor) -> None:
        assert (s <= t).all()
        self.times.append((float(t[0]), float(s[0])))


def blank(rows: int) -> tuple[Tensor, Tensor]:
    return torch.full((rows, LENGTH), V), torch.ones(rows, LENGTH, dtype=torch.bool)


def run(plan: Plan, rows: int = 3, model: Fixed | None = None, seeds: list[int] | None = None) -> tuple[Drawn, list]:
    model = model or Fixed(torch.randn(LENGTH, V, generator=torch.Generator().manual_seed(0)))
    frames: list[Tensor] = []
    found = reveal(model, *blank(rows), SampleNoise(seeds or range(rows)), plan, Draw(), frames.append)
    return found, frames


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_schedules_agree_with_themselves(schedule: Schedule) -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    lost = schedule.lost(t)
    (rate,) = torch.autograd.grad(lost.sum(), t)
    t, lost = t.detach(), lost.detach()
    torch.testing.assert_close(schedule.rate(t), rate)
    torch.testing.assert_close(schedule.keep(t), 1 - lost)
    torch.testing.assert_close(schedule.time_of(lost), t)
    torch.testing.assert_close(schedule.total_noise(t), -torch.log(1 - lost))
    torch.testing.assert_close(schedule.weight(t), schedule.noise_rate(t) / torch.expm1(schedule.total_noise(t)))
    assert lost.diff().min() > 0


def test_times_are_spread_over_the_global_batch() -> None:
    index = torch.arange(8).double()
    u = masking.stratified(torch.rand(8, dtype=torch.float64), index, 8)
    assert torch.equal((u * 8).floor().sort().values, index)
    assert masking.discretise(torch.tensor([0.01, 0.99]), 4).tolist() == [0.25, 1.0]


def test_counting_masks_keeps_the_bound() -> None:
    """Weights are exact: the sum over counts of weight x masked tokens / draws is the number of tokens."""
    eligible = torch.ones(4000, 6, dtype=torch.bool)
    eligible[:, 4:] = False
    share = torch.arange(4000) / 4000
    masked, lost, weight = masking.count_masks(torch.rand(4000, 6, dtype=torch.float64), eligible, share)
    assert not masked[:, 4:].any()
    assert torch.equal(masked.sum(1), 1 + (share * 4).long())
    assert (weight * masked.sum(1) == 4).all()
    # The l-th smallest of 4 uniform draws has mean l / 5.
    means = torch.stack([lost[masked.sum(1) == count].mean() for count in range(1, 5)])
    torch.testing.assert_close(means, torch.arange(1, 5) / 5.0, atol=0.02, rtol=0, check_dtype=False)


@pytest.mark.parametrize("order", ["ancestral", "random", "confidence", "margin", "entropy"])
@pytest.mark.parametrize("block", [0, 5])
def test_everything_is_revealed_and_nothing_else_changes(order: str, block: int) -> None:
    model = Fixed(torch.randn(LENGTH, V))
    tokens, free = blank(4)
    free[:, [0, 7]] = False
    tokens[:, [0, 7]] = 3
    free[3, :6], tokens[3, :6] = False, 1
    plan = Plan(LogLinear(), 6, order, block=block)
    found = reveal(model, tokens, free, SampleNoise(range(4)), plan, Draw())
    assert found.tokens.max() < V
    assert torch.equal(found.tokens[~free], tokens[~free])
    assert (found.evaluations <= 6).all()
    assert (found.evaluations >= 1).all()


@pytest.mark.parametrize("carries", [False, True])
def test_rows_do_not_influence_one_another(carries: bool) -> None:
    for order in ("ancestral", "confidence", "random"):
        plan = Plan(LogLinear(), 5, order, block=5)
        log_probs = torch.randn(LENGTH, V, generator=torch.Generator().manual_seed(1))
        together, _ = run(plan, 3, Fixed(log_probs, carries), [4, 5, 6])
        alone, _ = run(plan, 1, Fixed(log_probs, carries), [5])
        assert torch.equal(together.tokens[1:2], alone.tokens)
        assert together.evaluations[1] == alone.evaluations[0]


def test_caching_changes_evaluations_and_nothing_else() -> None:
    full, _ = run(Plan(LogLinear(), 64, cache=False))
    cached, _ = run(Plan(LogLinear(), 64))
    assert torch.equal(full.tokens, cached.tokens)
    assert (cached.evaluations <= LENGTH).all()
    assert (full.evaluations > cached.evaluations).all()


def test_only_revealed_positions_are_paid_for() -> None:
    model = Fixed(torch.zeros(LENGTH, V))
    run(Plan(LogLinear(), 8), 2, model)
    assert torch.stack(model.asked).sum(0).tolist() == [LENGTH, LENGTH]
    carrying = Fixed(torch.zeros(LENGTH, V), carries=True)
    _found, frames = run(Plan(LogLinear(), 8), 2, carrying)
    masks = torch.stack([(frame == V).sum(1) for frame in frames[:-1]])
    assert torch.equal(torch.stack(carrying.asked), masks)
    assert [t for t, _ in carrying.times] == pytest.approx([1 - k / 8 for k in range(len(carrying.times))])


def test_surest_come_first() -> None:
    sharp = torch.arange(LENGTH).float().unsqueeze(1) * torch.tensor([1.0, 0, 0, 0, 0])
    for order in ("confidence", "margin", "entropy"):
        _, frames = run(Plan(LogLinear(), LENGTH, order), 1, Fixed(sharp))
        revealed = [int((after != before).nonzero()[0, 1]) for before, after in itertools.pairwise(frames)]
        assert revealed == list(range(LENGTH))[::-1]


@pytest.mark.parametrize(("counts", "expected"), [("even", [3, 3, 2, 2, 2]), ("floor", [2, 2, 2, 2, 4])])
def test_numbers_per_step(counts: str, expected: list[int]) -> None:
    _, frames = run(Plan(LogLinear(), 5, "random", counts=counts), 1)
    masks = [int((frame == V).sum()) for frame in frames]
    assert [a - b for a, b in itertools.pairwise(masks)] == expected


def test_the_law_of_the_next_masks() -> None:
    """Remasking keeps the share of masks that the schedule asks for."""
    for remask, strength in (("none", 0.0), ("cap", 0.4), ("rescale", 0.7)):
        plan = Plan(Cosine(), 8, remask=remask, remask_strength=strength)
        t, s = torch.tensor(0.6).double(), torch.tensor(0.5).double()
        flip, back = plan.chances(t, s)
        lost_t = plan.schedule.lost(t)
        torch.testing.assert_close(lost_t * (1 - flip) + (1 - lost_t) * back, plan.schedule.lost(s))
    found, frames = run(Plan(LogLinear(), 30, remask="rescale", remask_strength=0.9), 2)
    assert found.tokens.max() < V
    again = [((after == V) & (before != V)).any() for before, after in itertools.pairwise(frames)]
    assert any(again)


@pytest.mark.parametrize("many", [1, 3 * V, 7 * V])
def test_what_is_handled_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    plan = Plan(LogLinear(), 5, "entropy")
    draw = Draw(temperature=0.8, temperature_start=2.0, top_k=4, top_p=0.9)
    log_probs, u = torch.randn(9, V).log_softmax(1), torch.rand(9).double()
    t = torch.linspace(0, 1, 9).double()
    shaped, whole = draw.shape(log_probs, t), run(plan, 3)[0].tokens
    tokens = draw.tokens(shaped, u)
    monkeypatch.setattr(masked, "MANY", many)
    assert torch.equal(draw.shape(log_probs, t), shaped)
    assert torch.equal(draw.tokens(shaped, u), tokens)
    assert torch.equal(run(plan, 3)[0].tokens, whole)


def test_draws_follow_the_probabilities() -> None:
    log_probs = torch.tensor([0.5, 0.25, 0.0, 0.25, 0.0]).log().expand(4, -1)
    u = torch.tensor([0.0, 0.499, 0.501, 1 - 2**-53], dtype=torch.float64)
    assert Draw().tokens(log_probs, u).tolist() == [0, 0, 1, 3]
    assert Draw(temperature=0.0).tokens(log_probs, u).tolist() == [0] * 4
    t = torch.ones(4)
    assert (Draw(top_k=1).shape(log_probs, t).exp()[:, 0] == 1).all()
    shaped = Draw(top_p=0.6).shape(log_probs, t).exp()
    torch.testing.assert_close(shaped[0], torch.tensor([2 / 3, 1 / 3, 0, 0, 0]))
    torch.testing.assert_close(
        Draw(temperature_start=2.0).shape(log_probs[:1], t[:1]).exp()[0, 0], torch.tensor(2**-0.5 / (2**-0.5 + 1))
    )


def test_rare_tokens_survive_in_float64() -> None:
    """One step in a thousand reveals a token of fifty thousand; draws in float32 must not change how often."""
    rows, vocabulary = 4000, 50_000
    u = SampleNoise(range(rows)).uniform(2, 1, dtype=torch.float64)
    chance = Plan(LogLinear(), 1000).chances(torch.tensor(1.0).double(), torch.tensor(0.999).double())[0]
    revealed = int((u[:, 0] < chance).sum())
    assert 0 < revealed < 20
    drawn = Draw().tokens(torch.full((64, vocabulary), -math.log(vocabulary)), u[:64, 1, 0])
    torch.testing.assert_close(drawn.double() / vocabulary, u[:64, 1, 0], atol=1e-4, rtol=0)


def test_best_takes_what_is_there() -> None:
    scores = torch.tensor([[3.0, 1.0, -math.inf, 2.0]])
    eligible = torch.tensor([[False, True, True, True]])
    assert best(scores, eligible, torch.tensor([2])).tolist() == [[False, True, False, True]]
    assert best(scores, eligible, torch.tensor([9])).tolist() == [[False, True, True, True]]


def test_wino_without_doubt_reveals_one_by_one_or_many() -> None:
    log_probs = torch.randn(LENGTH, V)
    single = wino(Fixed(log_probs), *blank(2), SampleNoise([0, 1]), Wino(LogLinear(), draft=1.0, verify=0.0), Draw())
    assert single.evaluations.tolist() == [LENGTH, LENGTH]
    greedy = Draw(temperature=0.0)
    many = wino(Fixed(log_probs), *blank(2), SampleNoise([0, 1]), Wino(LogLinear(), 0, 0.0, 0.0), greedy)
    assert many.evaluations[0] < LENGTH / 2
    assert torch.equal(many.tokens[0], log_probs.argmax(1))


def test_wino_by_the_likeliest_token_keeps_how_often_tokens_come() -> None:
    """A slot is chosen before its token is drawn; by the drawn one, likely tokens come first and more often."""
    log_probs = torch.tensor([0.6] + [0.4 / (V - 1)] * (V - 1)).log().expand(2, V)  # two slots that know nothing
    rows = 4000
    first = {}
    for by in ("drawn", "likeliest"):
        frames: list[Tensor] = []
        tokens = torch.full((rows, 2), V)
        how = Wino(LogLinear(), draft=1.0, verify=0.0, draft_by=by)  # type: ignore[arg-type]
        wino(Fixed(log_probs), tokens, tokens == V, SampleNoise(range(rows)), how, Draw(), frames.append)
        shown = frames[1].amin(dim=1)  # of the two, the one that is not the mask
        first[by] = (shown == 0).double().mean().item()
    assert first["likeliest"] == pytest.approx(0.6, abs=0.03)
    assert first["drawn"] == pytest.approx(1 - 0.4**2, abs=0.03)


def test_wino_ends_for_a_model_that_doubts_everything() -> None:
    model = Fixed(torch.randn(LENGTH, V), outside=torch.full((LENGTH, V), -1.0), carries=True)
    tokens, free = blank(3)
    tokens[:, 4], free[:, 4] = 2, False
    tokens[2, :8], free[2, :8] = 1, False
    frames: list[Tensor] = []
    how = Wino(LogLinear(), 10, 0.0, 0.99)
    found = wino(model, tokens, free, SampleNoise(range(3)), how, Draw(), frames.append)
    assert found.tokens.max() < V
    assert torch.equal(found.tokens[~free], tokens[~free])
    assert any(((after == V) & (before != V)).any() for before, after in itertools.pairwise(frames))
    alone = wino(model, tokens[1:2], free[1:2], SampleNoise([1]), how, Draw())
    assert torch.equal(alone.tokens, found.tokens[1:2])
    assert alone.evaluations[0] == found.evaluations[1]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        Plan(LogLinear(), 0)
    with pytest.raises(ValueError, match="fewer than one per block"):
        run(Plan(LogLinear(), 2, block=4))
    with pytest.raises(ValueError, match=r"goes with sampling\.order=ancestral"):
        Plan(LogLinear(), 2, "entropy", remask="cap")
    with pytest.raises(ValueError, match=r"sampling.top_p=0"):
        Draw(top_p=0.0)
    with pytest.raises(ValueError, match=r"sampling.verify=2"):
        Wino(LogLinear(), verify=2.0)
