"""Absorbing-state corruption of tokens: how much is masked at which time, what is predicted, and what a loss weighs.

Time is t = 0 for clean and t = 1 for (nearly) all masked. A schedule gives the share ``lost(t)`` = 1 - alpha_t, the
probability that a token is masked at time t; signal schedules of a Gaussian companion have the same form.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = -1e6  # log-probability of what cannot be, in the parameterisation of MDLM


class Schedule:
    """How a share of the signal is lost over time; subclasses say ``lost``, ``rate`` and ``time_of``."""

    def lost(self, t: Tensor) -> Tensor:
        """Share lost at time t, 1 - alpha_t; accurate for small t."""
        raise TypeError(f"{type(self).__name__} must define lost().")

    def rate(self, t: Tensor) -> Tensor:
        """Derivative of :meth:`lost`, -d alpha / dt >= 0."""
        raise TypeError(f"{type(self).__name__} must define rate().")

    def time_of(self, lost: Tensor) -> Tensor:
        """The time at which a share is lost, in [0, 1]; the inverse of :meth:`lost`."""
        raise TypeError(f"{type(self).__name__} must define time_of().")

    def keep(self, t: Tensor) -> Tensor:
        """Share kept, alpha_t; accurate near t = 1 too."""
        return 1.0 - self.lost(t)

    def total_noise(self, t: Tensor) -> Tensor:
        """Sigma = -log alpha_t >= 0; infinite where nothing is kept."""
        lost = self.lost(t)
        return torch.where(lost < 0.5, -torch.log1p(-lost), -torch.log(self.keep(t)))

    def noise_rate(self, t: Tensor) -> Tensor:
        """D sigma / dt."""
        return self.rate(t) / self.keep(t)

    def weight(self, t: Tensor) -> Tensor:
        """Weight of the cross-entropy in the continuous-time bound, -alpha' / (1 - alpha)."""
        return self.rate(t) / self.lost(t)


class LogLinear(Schedule):
    """alpha = 1 - (1 - eps) t, whose cross-entropy weight is exactly 1 / t.

    Args:
        eps: share kept at t = 1, in [0, 1); 0 is the straight line 1 - t, MDLM uses 1e-3.

    Source: arXiv 2406.07524 (MDLM), log-linear noise.
    """

    def __init__(self, eps: float = 0.0) -> None:
        self.eps = _checked(eps)

    def lost(self, t: Tensor) -> Tensor:
        """(1 - eps) t."""
        return (1.0 - self.eps) * t

    def rate(self, t: Tensor) -> Tensor:
        """1 - eps."""
        return torch.full_like(t, 1.0 - self.eps)

    def time_of(self, lost: Tensor) -> Tensor:
        """Lost / (1 - eps)."""
        return (lost / (1.0 - self.eps)).clamp(0.0, 1.0)


class Cosine(Schedule):
    """alpha = eps + (1 - eps) cos(pi t / 2).

    Args:
        eps: share kept at t = 1, in [0, 1).

    Source: arXiv 2406.07524 (MDLM), cosine noise.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = _checked(eps)

    def lost(self, t: Tensor) -> Tensor:
        """2 (1 - eps) sin^2(pi t / 4)."""
        return 2.0 * (1.0 - self.eps) * torch.sin(0.25 * math.pi * t).square()

    def keep(self, t: Tensor) -> Tensor:
        """Eps + (1 - eps) cos(pi t / 2)."""
        return self.eps + (1.0 - self.eps) * torch.cos(0.5 * math.pi * t).clamp(min=0.0)

    def rate(self, t: Tensor) -> Tensor:
        """(1 - eps) (pi / 2) sin(pi t / 2)."""
        return 0.5 * math.pi * (1.0 - self.eps) * torch.sin(0.5 * math.pi * t)

    def time_of(self, lost: Tensor) -> Tensor:
        """(4 / pi) asin sqrt(lost / (2 (1 - eps)))."""
        return (4.0 / math.pi) * torch.asin((0.5 * lost / (1.0 - self.eps)).clamp(0.0, 0.5).sqrt())


class CosineSquared(Schedule):
    """alpha = eps + (1 - eps) cos^2(pi t / 2).

    Args:
        eps: share kept at t = 1, in [0, 1).

    Source: arXiv 2406.07524 (MDLM), squared cosine noise.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = _checked(eps)

    def lost(self, t: Tensor) -> Tensor:
        """(1 - eps) sin^2(pi t / 2)."""
        return (1.0 - self.eps) * torch.sin(0.5 * math.pi * t).square()

    def keep(self, t: Tensor) -> Tensor:
        """Eps + (1 - eps) cos^2(pi t / 2)."""
        return self.eps + (1.0 - self.eps) * torch.cos(0.5 * math.pi * t).square()

    def rate(self, t: Tensor) -> Tensor:
        """(1 - eps) (pi / 2) sin(pi t)."""
        return 0.5 * math.pi * (1.0 - self.eps) * torch.sin(math.pi * t)

    def time_of(self, lost: Tensor) -> Tensor:
        """(2 / pi) asin sqrt(lost / (1 - eps))."""
        return (2.0 / math.pi) * torch.asin((lost / (1.0 - self.eps)).clamp(0.0, 1.0).sqrt())


class Power(Schedule):
    """alpha = (1 - t)^exponent.

    Args:
        exponent: > 0; 1 is the straight line, 3 is used for pixels.
    """

    def __init__(self, exponent: float = 1.0) -> None:
        if exponent <= 0:
            raise ValueError(f"A schedule (1 - t)^{exponent:g} came; the exponent is > 0, e.g. 3.")
        self.exponent = exponent

    def lost(self, t: Tensor) -> Tensor:
        """1 - (1 - t)^exponent."""
        return -torch.expm1(self.exponent * torch.log1p(-t))

    def keep(self, t: Tensor) -> Tensor:
        """(1 - t)^exponent."""
        return (1.0 - t).pow(self.exponent)

    def rate(self, t: Tensor) -> Tensor:
        """Exponent (1 - t)^(exponent - 1)."""
        return self.exponent * (1.0 - t).pow(self.exponent - 1.0)

    def time_of(self, lost: Tensor) -> Tensor:
        """1 - (1 - lost)^(1 / exponent)."""
        return -torch.expm1(torch.log1p(-lost.clamp(max=1.0)) / self.exponent)


class Exponential(Schedule):
    """alpha = exp(-(low + (high - low) t)), the "linear" noise of MDLM.

    Args:
        low: total noise at t = 0.
        high: total noise at t = 1.

    Source: arXiv 2406.07524 (MDLM), linear noise.
    """

    def __init__(self, low: float = 0.0, high: float = 10.0) -> None:
        self.low, self.high = low, high

    def total_noise(self, t: Tensor) -> Tensor:
        """Low + (high - low) t."""
        return self.low + (self.high - self.low) * t

    def lost(self, t: Tensor) -> Tensor:
        """1 - exp(-sigma)."""
        return -torch.expm1(-self.total_noise(t))

    def keep(self, t: Tensor) -> Tensor:
        """exp(-sigma)."""
        return torch.exp(-self.total_noise(t))

    def noise_rate(self, t: Tensor) -> Tensor:
        """High - low."""
        return torch.full_like(t, self.high - self.low)

    def rate(self, t: Tensor) -> Tensor:
        """(high - low) exp(-sigma)."""
        return self.noise_rate(t) * self.keep(t)

    def time_of(self, lost: Tensor) -> Tensor:
        """(-log(1 - lost) - low) / (high - low)."""
        return ((-torch.log1p(-lost) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)


class Geometric(Exponential):
    """alpha = exp(-low^(1-t) high^t).

    Source: arXiv 2406.07524 (MDLM), geometric noise.
    """

    def __init__(self, low: float = 1e-3, high: float = 1.0) -> None:
        super().__init__(low, high)

    def total_noise(self, t: Tensor) -> Tensor:
        """low^(1-t) high^t."""
        return self.low ** (1.0 - t) * self.high**t

    def noise_rate(self, t: Tensor) -> Tensor:
        """Sigma log(high / low)."""
        return self.total_noise(t) * math.log(self.high / self.low)

    def time_of(self, lost: Tensor) -> Tensor:
        """log(-log(1 - lost) / low) / log(high / low)."""
        ratio = torch.log(-torch.log1p(-lost) / self.low)
        return (ratio / math.log(self.high / self.low)).clamp(0.0, 1.0)


class Shifted(Schedule):
    """Another schedule whose ratio of signal to noise is multiplied at every time.

    For the signal of a latent: rows of norm r under this schedule with ``log_snr = 2 ln(q / r)`` tell tokens apart when
    rows of norm q under ``base`` do. With r = sqrt(hidden) the latent has unit variance at every noise level, and the
    network reads the rows of a small q as easily as those of a large one.

    Args:
        log_snr: added to the logarithm of keep / lost.
        base: the other schedule; None for 1 - t.
    """

    def __init__(self, log_snr: float, base: Schedule | None = None) -> None:
        if not -30.0 < log_snr < 30.0:
            raise ValueError(f"Shifted: log_snr={log_snr}: expected a number between -30 and 30, e.g. -4.")
        self.factor, self.base = math.exp(log_snr), base or LogLinear()

    def lost(self, t: Tensor) -> Tensor:
        """Lost / (lost + factor kept)."""
        lost = self.base.lost(t)
        return lost / (lost + self.factor * self.base.keep(t))

    def keep(self, t: Tensor) -> Tensor:
        """Factor kept / (lost + factor kept)."""
        kept = self.factor * self.base.keep(t)
        return kept / (self.base.lost(t) + kept)

    def rate(self, t: Tensor) -> Tensor:
        """Factor rate / (lost + factor kept)^2."""
        return self.factor * self.base.rate(t) / (self.base.lost(t) + self.factor * self.base.keep(t)).square()

    def time_of(self, lost: Tensor) -> Tensor:
        """The base's time of factor lost / (1 - lost + factor lost)."""
        return self.base.time_of(self.factor * lost / (1.0 - lost + self.factor * lost))


class Bound(NamedTuple):
    """A bound on -log p of rows, draw by draw; its mean over draws is the estimate.

    Attributes:
        t: time of every draw and row, (K, B).
        cross_entropy: part of the tokens, nats per row, (K, B) float64.
        continuous: part of a latent beside the tokens, nats per row, (K, B) float64; 0 without one.
        tokens: tokens counted in every row, (B,).
    """

    t: Tensor
    cross_entropy: Tensor
    continuous: Tensor
    tokens: Tensor

    def log_likelihood(self) -> Tensor:
        """The lower bound on the log-probability of every row, (B,) nats."""
        return -(self.cross_entropy + self.continuous).mean(dim=0)

    def over_time(self, bins: int, rows: Tensor) -> Tensor:
        """What each equal part of the time from 0 to 1 adds to both parts of the bound, summed over some of the rows.

        Args:
            bins: parts of the time.
            rows: (B,) bool, rows that count.

        Returns:
            (2, bins) float64 nats, cross-entropy and latent; together minus the sum of ``log_likelihood`` over the
            rows.
        """
        parts = torch.stack([self.cross_entropy, self.continuous])[:, :, rows].flatten(1)
        place = (self.t[:, rows].flatten() * bins).long().clamp(0, bins - 1)
        sums = torch.zeros(2, bins, dtype=torch.float64, device=parts.device)
        return sums.index_add(1, place, parts) / len(self.t)


def stratified(uniform: Tensor, index: Tensor, count: int) -> Tensor:
    """Spread one draw per row evenly: row i of a batch of ``count`` falls into the i-th of as many equal parts.

    Args:
        uniform: (B,) draws in [0, 1).
        index: (B,) number of each row in the global batch, 0 .. count - 1.
        count: rows of the global batch.

    Returns:
        (B,) in [0, 1).

    Source: arXiv 2107.00630, "low-discrepancy sampler"; kuleshov-group/mdlm calls it antithetic.
    """
    return (uniform / count + index / count) % 1


def discretise(t: Tensor, steps: int) -> Tensor:
    """Round times up to the grid 1/steps, 2/steps .. 1, as MDLM does with T > 0."""
    return (t * steps).floor() / steps + 1.0 / steps


def corrupt(x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """Tokens (B, L) with ``mask_id`` where ``masked`` (B, L) bool says so."""
    return x0.masked_fill(masked, mask_id)


def subs_log_probs(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    """Log-probabilities of the clean tokens: never the mask, and what is visible stays.

    Args:
        logits: (B, L, V).
        tokens: (B, L) int64, partly ``mask_id``.
        mask_id: index of the mask among the V.

    Returns:
        (B, L, V); impossible entries are about -1e6.

    Source: arXiv 2406.07524, section 3.2.3 (zero masking probabilities, carry-over unmasking).
    """
    logits = logits.clone()
    logits[..., mask_id] += NEVER
    log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    held = torch.full_like(log_probs, NEVER).scatter(-1, tokens.unsqueeze(-1), 0.0)
    return torch.where((tokens == mask_id).unsqueeze(-1), log_probs, held)


def flip_probability(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Probability that a token masked at time t is revealed at s < t, (alpha_s - alpha_t) / (1 - alpha_t)."""
    lost_t = schedule.lost(t)
    return (lost_t - schedule.lost(s)) / lost_t


def count_masks(uniform: Tensor, eligible: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw how many tokens are masked, which, and at what share lost, for a bound whose weights are bounded.

    In the bound, the integral of weight(t) E[sum over masked tokens] dt equals the sum over counts l = 1 .. n of
    E[sum over l masked tokens] / l, where the share lost is the l-th smallest of n uniform draws and the masked tokens
    are the l of them.

    Args:
        uniform: (B, L) float64 draws in [0, 1), one per token.
        eligible: (B, L) bool, tokens that can be masked, n per row.
        share: (B,) in [0, 1): l = 1 + floor(share n).

    Returns:
        masked (B, L) bool; lost (B,) float64, the share lost; weight (B,) = n / l, 0 for a row without eligible tokens.

    Source: the joint law of order statistics; for the sum over counts alone arXiv 2502.09992 (LLaDA), equation 6.
    """
    n = eligible.sum(dim=1)
    chosen = 1 + (share.double() * n).long()
    ordered = uniform.masked_fill(~eligible, 2.0).sort(dim=1).values
    last = ordered.gather(1, (chosen - 1).clamp(max=uniform.shape[1] - 1).unsqueeze(1))
    masked = eligible & (uniform <= last)
    lost = torch.where(n > 0, last.squeeze(1), torch.ones_like(last.squeeze(1)))
    return masked, lost, n / chosen


def _checked(eps: float) -> float:
    if not 0.0 <= eps < 1.0:
        raise ValueError(f"A masking schedule keeps eps={eps:g} at t = 1; expected 0 <= eps < 1, e.g. 1e-3.")
    return eps
