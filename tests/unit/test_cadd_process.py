"""The formulas of CADD: against simulation, against the exact oracle, and at their limits."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightningmodules.cadd import process
from lightningmodules.cadd.oracle import ExactDenoiser, Oracle, one_token
from lightningmodules.cadd.sampler import LatentMotion, guided, shadow_layout
from lightningmodules.shared.masking import LogLinear, Power, Shifted
from lightningmodules.shared.samplers.masked import Draw, Plan, reveal


class Batched:
    """Draws for many rows at once, where it does not matter which row gets which."""

    def __init__(self, rows: int) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(7)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.rows, *shape, dtype=dtype, generator=self.generator)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(self.rows, *shape, dtype=dtype, generator=self.generator)

    def normal_at(self, where: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(int(where.sum()), *shape, dtype=dtype, generator=self.generator)


def drawn(oracle: Oracle, estimator: str | None, steps: int, rows: int) -> Tensor:
    length = oracle.states.shape[1]
    motion = None if estimator is None else LatentMotion(estimator)  # type: ignore[arg-type]
    model = ExactDenoiser(oracle, Batched(rows), (rows, length), motion)
    blank = torch.full((rows, length), oracle.vocabulary)
    plan = Plan(LogLinear(), steps)
    return reveal(model, blank, torch.ones_like(blank, dtype=torch.bool), model.noise, plan, Draw()).tokens


def test_single_token_sampler_against_the_truth() -> None:
    """The sampled estimate is exact at any number of steps, the soft one in the limit, the hard one never."""
    oracle, rows = one_token(), 50_000

    def distance(estimator: str, steps: int) -> float:
        counts = torch.bincount(drawn(oracle, estimator, steps, rows).flatten(), minlength=5)
        return float(0.5 * (counts / rows - oracle.prob).abs().sum())

    assert distance("sampled", 4) < 0.01
    assert distance("soft", 2) > distance("soft", 12) + 0.01
    assert distance("hard", 4) > 0.1


def test_the_latent_coordinates_tokens_drawn_at_once() -> None:
    """Two twins in two steps: without a latent both are drawn at once half of the time."""
    states = torch.arange(4).unsqueeze(1).expand(4, 2)
    table = process.unit_rows(torch.eye(4), process.latent_radius(4)).double()
    oracle = Oracle(states, torch.full((4,), 0.25, dtype=torch.float64), table)
    shares = {kind: _twins(drawn(oracle, kind, 2, 20_000)) for kind in (None, "soft", "hard")}
    assert shares[None] == pytest.approx(1 - 0.75 / 2, abs=0.015)
    assert shares["soft"] > shares[None] + 0.05
    assert shares["hard"] > shares[None] + 0.05


def _twins(tokens: Tensor) -> float:
    return float((tokens[:, 0] == tokens[:, 1]).double().mean())


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_a_step_lands_on_the_marginal(path: process.Path) -> None:
    """Noising to t and stepping back to s with the clean latent known gives the marginal at s."""
    gamma_t, gamma_s = torch.tensor(0.3).double(), torch.tensor(0.7).double()
    for eta in (0.0, 0.5, 1.0):
        step = process.reverse_step(gamma_t, gamma_s, path=path, eta=eta)
        signal_t, noise_t = process.signal_and_noise(gamma_t, path)
        signal_s, noise_s = process.signal_and_noise(gamma_s, path)
        torch.testing.assert_close(step.z0 + step.zt * signal_t, signal_s)
        torch.testing.assert_close((step.zt * noise_t).square() + step.std.square(), noise_s.square())


def test_limits_of_a_step() -> None:
    zero, one, half = (torch.tensor(value).double() for value in (0.0, 1.0, 0.5))
    still = process.reverse_step(half, half)
    assert (float(still.z0), float(still.zt), float(still.std)) == (0.0, 1.0, 0.0)
    last = process.reverse_step(half, one)
    assert (float(last.z0), float(last.zt), float(last.std)) == (1.0, 0.0, 0.0)
    first = process.reverse_step(zero, half)
    torch.testing.assert_close(first.std.square() + first.zt.square(), half)
    assert float(process.squared_error_weight(half, one)) == 0.0


def test_large_rows_under_a_shifted_schedule_say_as_much_as_small_ones() -> None:
    """The same ratio of signal to noise at every time, so the same posterior, and the same weight in the bound."""
    large, small, t = 4.0, 0.7, torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    base, shifted = LogLinear(), Shifted(2 * math.log(small / large))
    ours, theirs = (
        torch.stack([process.snr(s.keep(t)), process.squared_error_rate(s.keep(t), s.rate(t))]) * norm**2
        for s, norm in ((shifted, large), (base, small))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_the_weights_of_steps_add_up_to_the_rate(path: process.Path) -> None:
    schedule, t = Power(2.0), torch.tensor(0.4).double()
    near = process.squared_error_weight(schedule.keep(t), schedule.keep(t - 1e-5), path) / 1e-5
    torch.testing.assert_close(
        process.squared_error_rate(schedule.keep(t), schedule.rate(t), path), near, rtol=1e-3, atol=0
    )


def test_estimates() -> None:
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    table = torch.eye(3)
    assert process.estimate(log_probs, table, "hard").tolist() == [[1, 0, 0]]
    torch.testing.assert_close(process.estimate(log_probs, table, "soft"), log_probs.exp())
    sharp = process.estimate(log_probs, table, "soft", temperature=1e-3)
    torch.testing.assert_close(sharp, torch.tensor([[1.0, 0, 0]]))
    cut = process.estimate(log_probs, table, "soft", top_k=2)
    torch.testing.assert_close(cut, torch.tensor([[0.625, 0.375, 0]]))
    for u, token in ((0.49, 0), (0.51, 1), (0.9, 2)):
        guess = process.estimate(log_probs, table, "sampled", uniform=torch.tensor([u]).double())
        assert guess.argmax() == token


@pytest.mark.parametrize("width", [5, 768, 1024, 2100])
def test_a_draw_leads_to_a_place_of_its_weight(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weights = torch.rand(400, width, generator=generator) ** 8
    weights[:, 0] = weights[:, -1] = 0.0
    weights[0, 1:-3] = 0.0
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    uniform[0] = uniform[1] = 1.0 - 2.0**-53
    uniform[2] = 0.0
    place = process.drawn_at(weights, uniform)
    assert bool((weights.gather(1, place.unsqueeze(1)) > 0).all())
    ends = (weights.double() / weights.double().sum(dim=1, keepdim=True)).cumsum(dim=1)
    assert bool((ends.gather(1, place.unsqueeze(1)).squeeze(1) >= uniform - 1e-6).all())
    before = ends.gather(1, (place - 1).unsqueeze(1)).squeeze(1)
    assert bool((before <= uniform + 1e-6).all())


@pytest.mark.parametrize("width", [5, 1023, 1024, 2100])
def test_the_likeliest_is_the_first_of_the_largest(width: int) -> None:
    values = torch.randint(6, (40, width), generator=torch.Generator().manual_seed(width)).float()
    assert torch.equal(process.likeliest(values), values.argmax(dim=1))
    values[:, -1] = 9.0
    assert torch.equal(process.likeliest(values), torch.full((40,), width - 1))


def test_radius_and_rows() -> None:
    assert [round(process.latent_radius(size), 2) for size in (50257, 256, 27)] == [4.65, 3.33, 2.57]
    assert process.latent_radius(27, 1.5) == 1.5
    rows = process.unit_rows(torch.randn(6, 8), 3.0)
    torch.testing.assert_close(rows.norm(dim=1), torch.full((6,), 3.0))


def test_guidance_is_that_of_the_house() -> None:
    conditional, unconditional = (torch.tensor([p]).log() for p in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5]))
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0), unconditional)
    tempered = (conditional.exp() ** 2 / unconditional.exp()).log().log_softmax(-1)
    torch.testing.assert_close(guided(conditional, unconditional, 2.0), tempered)


def test_shadows_see_all_but_their_twins() -> None:
    positions, mask = shadow_layout(6, 4, torch.tensor([0, 4]))
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 4, 5, 5, 5]]
    assert mask[:, :, :6].sum(1).tolist() == [[9] * 4 + [10] * 2, [10] * 4 + [9] * 2]
    assert not mask[:, :6, 6:].any()
    assert mask[0, 6:, 6:].all()
    assert mask[1, 6:, 6:].tolist() == [[True, True, False, False]] * 4
    assert not mask[0, 7, 1]


def test_forward_simulation_agrees_with_the_closed_form() -> None:
    """A chain of 6 steps: whenever a position was masked, its latent at the end has the marginal of the end."""
    rows, steps, clean = 60_000, 6, 1.7
    generator = torch.Generator().manual_seed(0)
    gamma: Callable[[int], float] = lambda k: 1 - 0.9 * k / steps  # noqa: E731
    z, masked_at = torch.full((rows,), clean), torch.zeros(rows, dtype=torch.int64)
    for k in range(1, steps + 1):
        fresh = torch.randn(rows, generator=generator)
        flips = (masked_at == 0) & (torch.rand(rows, generator=generator) < 1 / (steps - k + 2))
        ratio = gamma(k) / gamma(k - 1)
        z = torch.where(masked_at > 0, ratio**0.5 * z + (1 - ratio) ** 0.5 * fresh, z)
        z = torch.where(flips, gamma(k) ** 0.5 * z + (1 - gamma(k)) ** 0.5 * fresh, z)
        masked_at[flips] = k
    expected = process.noisy_latent(torch.tensor(clean), torch.zeros(()), torch.tensor(gamma(steps)))
    for k in range(1, steps + 1):
        group = z[masked_at == k]
        torch.testing.assert_close(group.mean(), expected, atol=0.05, rtol=0)
        torch.testing.assert_close(group.var(), torch.tensor(1 - gamma(steps)), atol=0.05, rtol=0)
