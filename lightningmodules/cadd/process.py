"""The formulas of CADD: a Gaussian latent at every masked token, which sharpens as the tokens are revealed.

Plain functions, noise included in their arguments. ``gamma`` is the share of the latent's signal that is left: 1 for
clean, 0 for pure noise. Unmasked positions carry no noise and no latent; their embedding says all.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightningmodules.shared import masking
from lightningmodules.shared.masking import Schedule

Estimator = Literal["hard", "soft", "sampled"]
Path = Literal["vp", "flow"]
LEAST = 1e-12  # of the noise share that is divided by, in float64
PART, FEW_PARTS = 256, 4  # of a row in which one place is looked for, and how many make it worth while


class Step(NamedTuple):
    """One step of the latent at a position that stays masked: z_s = z0 * estimate + zt * z_t + std * noise.

    Attributes:
        z0: factor of the estimated clean latent.
        zt: factor of the latent so far.
        std: factor of fresh noise.
    """

    z0: Tensor
    zt: Tensor
    std: Tensor


def latent_radius(vocabulary: int, rho: float | None = None) -> float:
    """Norm of the latent table's rows at which the latent tells tokens apart for about half of the time.

    Args:
        vocabulary: tokens V that can be told apart.
        rho: a norm to use instead.

    Returns:
        sqrt(2 ln V) if ``rho`` is None.

    Source: Gaussian identification among V points; noise of N(0, I) hides the row until rho^2 SNR is about 2 ln V.
    """
    return math.sqrt(2.0 * math.log(max(2, vocabulary))) if rho is None else rho


def unit_rows(rows: Tensor, radius: float) -> Tensor:
    """Rows (..., d) scaled to a common norm, float32."""
    return radius * torch.nn.functional.normalize(rows.float(), dim=-1, eps=1e-12)


def signal_and_noise(gamma: Tensor, path: Path = "vp") -> tuple[Tensor, Tensor]:
    """Factors of the clean latent and of unit noise.

    Returns:
        sqrt(gamma) and sqrt(1 - gamma) for "vp"; gamma and 1 - gamma for "flow".
    """
    return (gamma, 1.0 - gamma) if path == "flow" else (gamma.sqrt(), (1.0 - gamma).sqrt())


def noisy_latent(clean: Tensor, noise: Tensor, gamma: Tensor, path: Path = "vp") -> Tensor:
    """The latent of masked positions at a time, whenever they were masked.

    Args:
        clean: rows of the latent table, (..., d).
        noise: standard normal, shape of ``clean``.
        gamma: signal left, broadcasting against ``clean``.
        path: see :func:`signal_and_noise`.

    Source: arXiv 2510.01329, the marginal q(z_t | x_t = mask, x_0).
    """
    signal, spread = signal_and_noise(gamma, path)
    return signal * clean + spread * noise


def reverse_step(gamma_t: Tensor, gamma_s: Tensor, *, path: Path = "vp", eta: float = 1.0) -> Step:
    """How the latent of a position that stays masked moves from time t to an earlier or equal time s.

    Args:
        gamma_t: signal left at t.
        gamma_s: signal left at s, >= ``gamma_t``.
        path: "flow" moves on a straight line without fresh noise.
        eta: for "vp", fresh noise in units of the posterior's: 1 draws from the posterior, 0 is deterministic.

    Source: arXiv 2510.01329, the posterior q(z_s | x_s = mask, z_t, x_0), which is that of arXiv 2006.11239; eta as in
        arXiv 2010.02502, equation 16.
    """
    spread_t, spread_s = (1.0 - gamma_t).clamp(min=LEAST), 1.0 - gamma_s
    if path == "flow":
        zt = spread_s / spread_t
        return Step(gamma_s - zt * gamma_t, zt, torch.zeros_like(zt))
    ratio = torch.where(gamma_s > gamma_t, gamma_t / gamma_s, torch.ones_like(gamma_t))
    variance = spread_s * (1.0 - ratio) / spread_t
    if eta == 1.0:
        return Step(gamma_s.sqrt() * (1.0 - ratio) / spread_t, ratio.sqrt() * spread_s / spread_t, variance.sqrt())
    variance = eta**2 * variance
    zt = (spread_s - variance).clamp(min=0.0).sqrt() / spread_t.sqrt()
    return Step(gamma_s.sqrt() - zt * gamma_t.sqrt(), zt, variance.sqrt())


def snr(gamma: Tensor, path: Path = "vp") -> Tensor:
    """Signal-to-noise ratio of the latent: squared ratio of the two factors; infinite at gamma = 1."""
    signal, spread = signal_and_noise(gamma, path)
    return (signal / spread).square()


def squared_error_weight(gamma_t: Tensor, gamma_s: Tensor, path: Path = "vp") -> Tensor:
    """Weight of ||clean - estimate||^2 in the bound of one step, (SNR_s - SNR_t) / 2; 0 where s is clean.

    Source: arXiv 2107.00630, equation 13; at s = 0 every token is revealed and nothing is left to weigh.
    """
    difference = 0.5 * (snr(gamma_s, path) - snr(gamma_t, path))
    return torch.where(gamma_s < 1.0, difference, torch.zeros_like(difference))


def squared_error_rate(gamma: Tensor, loss_rate: Tensor, path: Path = "vp") -> Tensor:
    """The same weight per unit of time in continuous time, -SNR' / 2.

    Args:
        gamma: signal left.
        loss_rate: -d gamma / dt.
        path: see :func:`signal_and_noise`.
    """
    spread = (1.0 - gamma).clamp(min=1e-300 if gamma.dtype == torch.float64 else 1e-30)
    if path == "flow":
        return loss_rate * gamma / spread.pow(3)
    return 0.5 * loss_rate / spread.square()


def estimate(
    log_probs: Tensor,
    table: Tensor,
    kind: Estimator = "hard",
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    uniform: Tensor | None = None,
) -> Tensor:
    """The clean latent that a prediction stands for.

    Args:
        log_probs: log-probabilities of tokens, normalised, (N, V).
        table: latent of every token, (V, d).
        kind: "hard", the latent of the likeliest token; "soft", the mean; "sampled", that of a token drawn.
        temperature: log-probabilities are divided by it, > 0.
        top_k: only so many likeliest tokens count; 0 for all.
        uniform: (N,) draws in [0, 1), for "sampled".

    Returns:
        (N, d) in the dtype of ``table``.

    Source: arXiv 2510.01329, hard and soft estimates; "sampled" is exact for a single token at any number of steps.
    """
    if kind == "hard":
        return table[likeliest(log_probs)]
    index = None
    if top_k and top_k < log_probs.shape[-1]:
        log_probs, index = log_probs.topk(top_k, dim=-1)
    shaped = index is not None or temperature != 1.0
    probs = (log_probs / temperature).softmax(dim=-1) if shaped else log_probs.exp()
    if kind == "soft":
        probs = probs.to(table.dtype)
        if index is not None:
            return F.embedding_bag(index, table, mode="sum", per_sample_weights=probs)
        with torch.autocast(table.device.type, enabled=False):
            return probs @ table
    assert uniform is not None, "a sampled estimate needs draws"
    drawn = drawn_at(probs, uniform)
    return table[drawn if index is None else index.gather(1, drawn.unsqueeze(1)).squeeze(1)]


def drawn_at(probs: Tensor, uniform: Tensor) -> Tensor:
    """Place in every row of weights ``probs`` (N, V) that a draw ``uniform`` (N,) in [0, 1) leads to, (N,).

    Never one of weight 0. Sums of parts are added up first, then the members of one part only: no float64 copy of all.
    """
    width = probs.shape[1]
    if width < FEW_PARTS * PART:
        return _reached(probs, uniform)[0]
    sums = probs[:, : width // PART * PART].unflatten(1, (-1, PART)).sum(dim=2)
    if width % PART:
        sums = torch.cat([sums, probs[:, width // PART * PART :].sum(dim=1, keepdim=True)], dim=1)
    part, within = _reached(sums, uniform)
    places = part.unsqueeze(1) * PART + torch.arange(PART, device=probs.device)
    members = probs.gather(1, places.clamp(max=width - 1)).masked_fill(places >= width, 0.0)
    return part * PART + _reached(members, within)[0]


def _reached(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Place (N,) in weights (N, K) that a draw (N,) leads to, and how far into it the draw goes, [0, 1) float64."""
    ends = weights.cumsum(dim=1, dtype=torch.float64)
    wanted = uniform.double().clamp(max=1.0 - 2.0**-52).unsqueeze(1) * ends[:, -1:]  # less than the end, rounded too
    place = torch.searchsorted(ends, wanted, right=True)
    size = weights.gather(1, place).double()
    within = (wanted - ends.gather(1, place) + size) / size
    return place.squeeze(1), within.squeeze(1).clamp(0.0, 1.0)


def likeliest(log_probs: Tensor) -> Tensor:
    """``argmax`` of every row, (N, V) to (N,): the first of the largest.

    On CPUs a maximum is found five times faster than its place, so that is looked for in one part of a row only.
    """
    rows, width = log_probs.shape
    parts = width // PART
    if log_probs.device.type != "cpu" or parts < FEW_PARTS or not rows:
        return log_probs.argmax(dim=1)
    blocks = log_probs[:, : parts * PART].unflatten(1, (parts, PART))
    most, part = blocks.amax(dim=2).max(dim=1)
    place = part * PART + blocks[torch.arange(rows), part].argmax(dim=1)
    if width > parts * PART:
        rest, behind = log_probs[:, parts * PART :].max(dim=1)
        place = torch.where(rest > most, parts * PART + behind, place)
    return place


def step_bound(flip: Tensor, keep: Tensor, weight: Tensor, cross_entropy: Tensor, squared_error: Tensor) -> Tensor:
    """Bound of one reverse step at masked positions, nats.

    Args:
        flip: probability that a masked token is revealed in the step.
        keep: 1 - ``flip``.
        weight: from :func:`squared_error_weight`.
        cross_entropy: -log p(x_0).
        squared_error: ||clean - estimate||^2.

    Source: arXiv 2510.01329, the discrete-time bound: revealing costs the cross-entropy, staying masked the divergence
        of two Gaussians.
    """
    return flip * cross_entropy + keep * weight * squared_error


class Masks(NamedTuple):
    """A draw of the bound: what is masked, and what the prediction's errors there count.

    Attributes:
        masked: (B, L) bool.
        t: time, (B,) float64.
        tokens: factor of the sum of cross-entropies, (B,).
        latent: factor of the sum of squared errors of the latent, (B,).
    """

    masked: Tensor
    t: Tensor
    tokens: Tensor
    latent: Tensor


def masks(
    uniform: Tensor,
    eligible: Tensor,
    share: Tensor,
    steps: int,
    alpha: Schedule,
    gamma: Schedule,
    path: Path = "vp",
) -> Masks:
    """Draw what is masked, for the bound in continuous time or for that of a sampler with even steps.

    Args:
        uniform: (B, L) float64 draws in [0, 1), one per token.
        eligible: (B, L) bool, tokens that can be masked.
        share: (B,) in [0, 1): which number of masks, see :func:`masking.count_masks`, or which step.
        steps: of the sampler, 0 for continuous time.
        alpha: share of tokens kept over time.
        gamma: share of the latent's signal left over time.
        path: see :func:`signal_and_noise`.

    Source: arXiv 2406.07524, equation 10, and with a latent the integral of -SNR' / 2 times the squared error besides;
        for steps :func:`step_bound`.
    """
    if not steps:
        masked, lost, weight = masking.count_masks(uniform, eligible, share)
        t = alpha.time_of(lost)
        rate = squared_error_rate(gamma.keep(t), gamma.rate(t), path)
        return Masks(masked, t, weight, weight * rate * lost / alpha.rate(t))
    place = (share.double() * steps).floor()
    t, s = (place + 1.0) / steps, place / steps
    lost, less = alpha.lost(t), alpha.lost(s)
    weight = squared_error_weight(gamma.keep(t), gamma.keep(s), path)
    masked = eligible & (uniform < lost.unsqueeze(1))
    return Masks(masked, t, steps * (lost - less) / lost, steps * less / lost * weight)
