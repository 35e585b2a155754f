"""Sampling by revealing masked tokens: in random order, surest first, block by block, with second thoughts.

A sampler decides which masked positions are revealed at a step; a model says what may stand there and moves whatever
it carries beside the tokens. Positions that are not free are never changed. A row's draws depend on that row alone.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightningmodules.shared.masking import Schedule
from lightningmodules.shared.noise import Noise

Order = Literal["ancestral", "random", "confidence", "margin", "entropy", "wino"]
Counts = Literal["even", "schedule", "floor"]
Remask = Literal["none", "cap", "rescale", "corrector"]
Grid = Literal["linear", "cosine"]
DraftBy = Literal["drawn", "likeliest"]
Watch = Callable[[Tensor], None]
SURE = 1e-300  # least probability whose logarithm is taken
MANY = 1 << 26  # log-probabilities that are handled at a time, as what is made of them takes several times their memory
LAST = 1e-3  # time at which the grid of Dream's decoder ends


class Predictor(Protocol):
    """A model of masked sequences.

    Attributes:
        mask_id: the token that stands for "not known yet".
        carries: it carries a state beside the tokens, which moves at every step; then every masked position is
            predicted at every step.
        cost: network evaluations per call and sequence.
    """

    mask_id: int
    carries: bool
    cost: int

    def predict(self, tokens: Tensor, where: Tensor, t: Tensor) -> Tensor:
        """Normalised log-probabilities (N, V) float32 of the N positions ``where`` (n, L) bool holds, row by row.

        Args:
            tokens: (n, L) int64; only rows with a position in ``where`` cost anything.
            where: masked positions.
            t: (n,) float64 time of every row.
        """
        ...

    def advance(self, before: Tensor, after: Tensor, log_probs: Tensor, where: Tensor, t: Tensor, s: Tensor) -> None:
        """Move the carried state from t to s, both (n,), given tokens at both and the prediction at t."""
        ...


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from log-probabilities.

    Attributes:
        temperature: log-probabilities are divided by it; 0 takes the likeliest token.
        temperature_start: temperature at t = 1, falling to ``temperature`` at t = 0 along a sine; None for constant.
        top_k: only so many likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1]; 1 for all.
        dtype: in which probabilities are summed and compared with draws. float32 lets rare tokens vanish.
    """

    temperature: float = 1.0
    temperature_start: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if self.temperature < 0 or (self.temperature_start is not None and self.temperature_start < 0):
            raise ValueError(
                f"sampling.temperature={self.temperature} (start {self.temperature_start}): expected >= 0; 1 leaves the"
                " model's probabilities, 0 takes the likeliest token."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: expected a probability in (0, 1]; 1 is off.")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k={self.top_k}: expected a number of tokens >= 0; 0 is off.")

    def shape(self, log_probs: Tensor, t: Tensor) -> Tensor:
        """Normalised log-probabilities (N, V) after temperature and cuts; ``t`` (N,) is the time of each."""
        return in_parts(self._shaped, log_probs, t)

    def _shaped(self, log_probs: Tensor, t: Tensor) -> Tensor:
        given = log_probs
        if self.temperature_start is not None:
            height = torch.sin(0.5 * math.pi * t)
            tau = self.temperature + (self.temperature_start - self.temperature) * height
            log_probs = log_probs / tau.clamp(min=1e-6).unsqueeze(1).to(log_probs.dtype)
        elif self.temperature not in (0.0, 1.0):
            log_probs = log_probs / self.temperature
        if self.top_k and self.top_k < log_probs.shape[1]:
            least = log_probs.topk(self.top_k, dim=1).values[:, -1:]
            log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
        if self.top_p < 1.0:
            ordered, index = log_probs.log_softmax(dim=1).sort(dim=1, descending=True)
            before = ordered.exp().cumsum(dim=1) - ordered.exp()
            cut = (before >= self.top_p).scatter(1, index, before >= self.top_p)
            log_probs = log_probs.masked_fill(cut, -torch.inf)
        return given if log_probs is given else log_probs.log_softmax(dim=1)

    def tokens(self, log_probs: Tensor, uniform: Tensor) -> Tensor:
        """One token per row of shaped log-probabilities (N, V), from (N,) draws in [0, 1)."""
        if self.temperature == 0.0 and self.temperature_start is None:
            return log_probs.argmax(dim=1)
        return in_parts(self._drawn, log_probs, uniform)

    def _drawn(self, log_probs: Tensor, uniform: Tensor) -> Tensor:
        cumulative = log_probs.to(self.dtype).exp().cumsum(dim=1)
        total = cumulative[:, -1:]
        wanted = uniform.to(self.dtype).unsqueeze(1) * total
        wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, wanted, right=True).squeeze(1)


def in_parts(function: Callable[..., Tensor], log_probs: Tensor, *others: Tensor) -> Tensor:
    """A function of rows, (N, V) and others (N,), applied to as many at a time as fit into ``MANY`` numbers."""
    rows = max(1, MANY // max(1, log_probs.shape[1]))
    if len(log_probs) <= rows:
        return function(log_probs, *others)
    found: Tensor | None = None
    for at in range(0, len(log_probs), rows):
        values = function(*(tensor[at : at + rows] for tensor in (log_probs, *others)))
        found = values.new_empty(len(log_probs), *values.shape[1:]) if found is None else found
        found[at : at + len(values)] = values
    assert found is not None
    return found


class Drawn(NamedTuple):
    """What a sampler returns.

    Attributes:
        tokens: (n, L) int64.
        evaluations: network evaluations that each row took, (n,) int64.
    """

    tokens: Tensor
    evaluations: Tensor


def _check_block(block: int) -> None:
    if block < 0:
        raise ValueError(f"sampling.block={block}: expected positions per block, or 0 for all at once.")


@dataclass(frozen=True)
class Plan:
    """When and which positions are revealed.

    Attributes:
        schedule: of the masking; it says how many positions are masked at a time.
        steps: time steps altogether, >= 1, split evenly over the blocks, those that are wholly given included: rows of
            a batch may be given different parts, and each is drawn as if it were alone.
        order: "ancestral" flips every position by itself, as the reverse process does; the others reveal a fixed number
            per step: at random, or by the largest probability, the largest margin between the two largest, or the least
            entropy.
        counts: how many: "even" spreads them, "schedule" leaves the expected number masked (rounded), "floor" takes
            floor(masked (1 - s / t)) with times that end at 1e-3 (HKUNLP/Dream, its decoder's).
        order_temperature: scores are divided by it and Gumbel noise is added; 0 for none.
        block: positions per block, revealed one block after the other; 0 for all at once.
        remask: let revealed tokens be masked again: with probability min(strength, most) ("cap"), strength x most
            ("rescale"), or by a corrector flow of rate 12 t^2 (1 - t)^2 x strength ("corrector").
        remask_strength: see there, >= 0.
        grid: times, evenly spaced or cos(pi k / 2T).
        cache: evaluate a row only at steps that reveal something in it, which changes no result.
    """

    schedule: Schedule
    steps: int
    order: Order = "ancestral"
    counts: Counts = "even"
    order_temperature: float = 0.0
    block: int = 0
    remask: Remask = "none"
    remask_strength: float = 0.0
    grid: Grid = "linear"
    cache: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling.steps={self.steps}: expected at least one step, e.g. sampling.steps=32.")
        _check_block(self.block)
        if self.remask != "none" and self.order != "ancestral":
            raise ValueError(
                f"sampling.remask={self.remask} goes with sampling.order=ancestral, not {self.order}: only there is it"
                " known how many tokens must be revealed in exchange."
            )
        if self.remask != "none" and self.remask_strength == 0:
            raise ValueError(
                f"sampling.remask={self.remask} masks nothing again with sampling.remask_strength=0. Set a strength,"
                " e.g. 0.05 (for corrector 1), or leave remask out."
            )
        if self.order_temperature < 0:
            raise ValueError(f"sampling.order_temperature={self.order_temperature}: expected >= 0; 0 is off.")
        if self.remask_strength < 0 or (self.remask == "rescale" and self.remask_strength > 1):
            raise ValueError(f"sampling.remask_strength={self.remask_strength}: expected >= 0 (0..1 for rescale).")

    def windows(self, length: int) -> list[tuple[int, int, int]]:
        """First position, end and number of steps of every block."""
        width = self.block or length
        starts = list(range(0, length, width))
        if self.steps < len(starts):
            raise ValueError(
                f"sampling.steps={self.steps} is fewer than one per block: {length} positions in blocks of {width} are"
                f" {len(starts)} blocks. Set sampling.steps={len(starts)} or more, or a longer sampling.block."
            )
        base, extra = divmod(self.steps, len(starts))
        return [(start, min(start + width, length), base + (i < extra)) for i, start in enumerate(starts)]

    def times(self, steps: int) -> list[float]:
        """Times from 1 to 0, one more than steps."""
        if self.grid == "cosine":
            return [math.cos(0.5 * math.pi * k / steps) for k in range(steps)] + [0.0]
        return [1.0 - k / steps for k in range(steps)] + [0.0]

    def chances(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities that a masked position is revealed, and that a revealed one is masked again, from t to s.

        Source: arXiv 2503.00307 (ReMDM) for "cap" and "rescale"; arXiv 2407.15595, corrector of the discrete flow.
        """
        zero = torch.zeros_like(t)
        if float(s) <= 0.0:
            return torch.ones_like(t), zero
        lost_t, lost_s = self.schedule.lost(t), self.schedule.lost(s)
        if self.remask == "none":
            return (lost_t - lost_s) / lost_t, zero
        kept_t = self.schedule.keep(t)
        if self.remask == "corrector":
            pace = 12.0 * (t * (1.0 - t)).square() * self.remask_strength
            rate = self.schedule.rate(t) * (t - s)
            back = -torch.expm1(-rate * pace / kept_t.clamp(min=1e-12))
            return -torch.expm1(-rate * (1.0 + pace) / lost_t), back
        most = (lost_s / kept_t.clamp(min=1e-12)).clamp(max=1.0)
        back = self.remask_strength * most if self.remask == "rescale" else most.clamp(max=self.remask_strength)
        return ((1.0 - lost_s) - (1.0 - back) * kept_t) / lost_t, back


@torch.no_grad()
def reveal(
    model: Predictor,
    tokens: Tensor,
    free: Tensor,
    noise: Noise,
    plan: Plan,
    draw: Draw,
    watch: Watch | None = None,
) -> Drawn:
    """Fill all masked free positions in ``plan.steps`` steps.

    Args:
        model: predicts, and carries what it must.
        tokens: (n, L) int64, mask where something is to be drawn.
        free: (n, L) bool, positions that may change.
        noise: one source of draws per row.
        plan: which positions when.
        draw: which tokens.
        watch: called with the tokens at the beginning and after every step.

    Returns:
        Tokens without masks at free positions, and evaluations per row.
    """
    n, length = tokens.shape
    evaluations = torch.zeros(n, dtype=torch.int64, device=tokens.device)
    if watch is not None:
        watch(tokens)
    for begin, end, steps in plan.windows(length):
        window = torch.zeros(length, dtype=torch.bool, device=tokens.device)
        window[begin:end] = True
        times = plan.times(steps)
        for k in range(steps):
            t, s = (torch.tensor(value, dtype=torch.float64, device=tokens.device) for value in times[k : k + 2])
            uniform = noise.uniform(2, length, dtype=draw.dtype).to(tokens.device)
            masked = (tokens == model.mask_id) & free
            if plan.remask == "none" and not masked.any():
                return Drawn(tokens, evaluations)
            open_ = masked & window
            chance, back = plan.chances(t, s)
            if plan.order == "ancestral":
                flip, number = open_ & (uniform[:, 0] < chance), None
                where = masked if model.carries else flip if plan.cache else open_
            else:
                flip, number = None, _numbers(plan, open_, (free & window).sum(dim=1), t, s, steps - k)
                where = masked if model.carries else open_ & (number > 0).unsqueeze(1)
            t_model, s_model = (_overall(plan, value, begin, end, length).expand(n) for value in (t, s))
            evaluations += where.any(dim=1) * model.cost
            log_probs = model.predict(tokens, where, t_model)
            log_probs = draw.shape(log_probs, t_model[0].expand(len(log_probs)))
            if flip is None:
                assert number is not None
                flip = _chosen(plan, log_probs, where, open_, number, noise)
            after = tokens.clone()
            after[flip] = draw.tokens(log_probs[flip[where]], uniform[:, 1][flip])
            if plan.remask != "none":
                again = ~masked & free & window & (uniform[:, 0] < back)
                after[again] = model.mask_id
            model.advance(tokens, after, log_probs, where, t_model, s_model)
            tokens = after
            if watch is not None:
                watch(tokens)
    return Drawn(tokens, evaluations)


def _overall(plan: Plan, t: Tensor, begin: int, end: int, length: int) -> Tensor:
    """Time of the whole sequence when the block from ``begin`` to ``end`` is at its time ``t``."""
    if end - begin == length:
        return t
    lost = (length - end + plan.schedule.lost(t) * (end - begin)) / length
    return plan.schedule.time_of(lost)


def _numbers(plan: Plan, open_: Tensor, free: Tensor, t: Tensor, s: Tensor, left: int) -> Tensor:
    """Positions to reveal now in every row, (n,) int64."""
    count = open_.sum(dim=1)
    if left == 1:
        return count
    if plan.counts == "even":
        return (count + left - 1) // left
    if plan.counts == "floor":
        t, s = (LAST + (1.0 - LAST) * time for time in (t, s))
        return (count * (1.0 - s / t)).floor().long()
    return (count - (free * plan.schedule.lost(s)).round().long()).clamp(min=0)


def _chosen(plan: Plan, log_probs: Tensor, where: Tensor, open_: Tensor, number: Tensor, noise: Noise) -> Tensor:
    """The ``number`` (n,) best open positions of every row, (n, L) bool."""
    scores = torch.full(where.shape, -torch.inf, dtype=torch.float64, device=where.device)
    if plan.order == "random":
        return best(noise.uniform(where.shape[1], dtype=torch.float64).to(where.device), open_, number)
    scores[where] = in_parts(functools.partial(_score, plan.order), log_probs)
    if plan.order_temperature > 0:
        uniform = noise.uniform(where.shape[1], dtype=torch.float64).to(where.device)
        scores = scores / plan.order_temperature - torch.log(-torch.log(uniform.clamp(min=SURE)))
    return best(scores, open_, number)


def _score(order: Order, log_probs: Tensor) -> Tensor:
    """How sure a prediction (N, V) is, (N,) float64; larger is surer."""
    if order == "entropy":
        probs = log_probs.double().exp()
        return torch.special.xlogy(probs, probs).sum(dim=1)
    two = log_probs.double().topk(min(2, log_probs.shape[1]), dim=1).values.exp()
    return two[:, 0] if order == "confidence" or two.shape[1] == 1 else two[:, 0] - two[:, 1]


def best(scores: Tensor, eligible: Tensor, number: Tensor) -> Tensor:
    """Mark the largest scores of every row.

    Args:
        scores: (n, L).
        eligible: (n, L) bool.
        number: how many, (n,); fewer where fewer are eligible.

    Returns:
        (n, L) bool; of equal scores the first ones.
    """
    keys = torch.where(eligible, scores.clamp(min=torch.finfo(scores.dtype).min), -torch.inf)  # these come last
    ranks = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return eligible & (ranks < number.unsqueeze(1))


class Drafter(Predictor, Protocol):
    """A model that can also look at tokens from outside: for every slot of a block, a twin that does not see it."""

    def predict_twice(
        self, tokens: Tensor, where: Tensor, start: Tensor, held: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict masked positions, and revealed ones from all others.

        Args:
            tokens: (n, L) int64.
            where: (n, L) bool, masked positions to predict.
            start: (n,) first position of every row's block.
            held: (n, W) bool, slots of the block whose own token is hidden from its prediction; only rows that have a
                position in ``where`` may have any.
            t: (n,) times.

        Returns:
            Log-probabilities (N, V) for ``where`` and (M, V) for ``held``, row by row.
        """
        ...


@dataclass(frozen=True)
class Wino:
    """Draft wide, verify narrow: reveal many tokens, and take back those that the others make unlikely.

    An evaluation reads the row and a twin of every slot of its block, L + W positions instead of L.

    Attributes:
        schedule: of the masking; the time of a row is read from its masked share.
        block: slots that are worked on at a time, 0 for all.
        draft: reveal every masked slot that is surer than this probability, in [0, 1].
        verify: mask revealed slots again whose token has less than this probability given all others, in [0, 1].
        draft_by: how sure a slot is: by the probability of the token "drawn" there, as published, or of its
            "likeliest". The same at temperature 0. Above it, the first prefers slots where a likely token happened to
            be drawn, so likely tokens become more frequent than the model has them; the second does not, and only what
            is taken back makes them so.

    Source: arXiv 2507.18578; Feng-Hong/WINO-DLLM.
    Differs: every row of a batch has its own block, limits and masks, so a row's sample is that of a batch of one.
    """

    schedule: Schedule
    block: int = 0
    draft: float = 0.6
    verify: float = 0.9
    draft_by: DraftBy = "drawn"

    def __post_init__(self) -> None:
        _check_block(self.block)
        for name in ("draft", "verify"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"sampling.{name}={value}: expected a probability, 0..1, e.g. 0.6 and 0.9.")


FIRST_LIMIT = 30  # revealed slots below which the first verification of a block stays
MOST_SHARE, LEAST_CAP, MOST_CAP = 0.7, 5, 20  # of the masked slots, and of any, that one step reveals


@torch.no_grad()
def wino(
    model: Drafter, tokens: Tensor, free: Tensor, noise: Noise, how: Wino, draw: Draw, watch: Watch | None = None
) -> Drawn:
    """Fill all masked free positions by drafting and verifying; see ``reveal`` for the arguments.

    It ends for every model: what a step takes back is less than what the step before revealed.
    """
    n, length = tokens.shape
    width, device = min(how.block or length, length), tokens.device
    evaluations = torch.zeros(n, dtype=torch.int64, device=device)
    start, limit = torch.zeros_like(evaluations), torch.full_like(evaluations, FIRST_LIMIT)
    count = free.sum(dim=1).clamp(min=1)
    place = torch.arange(length, device=device)
    t = torch.ones(n, dtype=torch.float64, device=device)
    if watch is not None:
        watch(tokens)
    while True:
        masked = (tokens == model.mask_id) & free
        if not masked.any():
            return Drawn(tokens, evaluations)
        first = torch.where(masked.any(dim=1), masked.float().argmax(dim=1), length - 1) // width * width
        limit = torch.where(first > start, FIRST_LIMIT, limit)
        start = torch.maximum(start, first)
        window = (place >= start.unsqueeze(1)) & (place < start.unsqueeze(1) + width)
        open_, shown = masked & window, ~masked & free & window & masked.any(dim=1, keepdim=True)
        uniform = noise.uniform(length, dtype=draw.dtype).to(device)
        slots = (start.unsqueeze(1) + torch.arange(width, device=device)).clamp(max=length - 1)
        inside = start.unsqueeze(1) + torch.arange(width, device=device) < length
        held = shown.gather(1, slots) & inside
        where = masked if model.carries else open_
        evaluations += where.any(dim=1) * model.cost
        log_probs, outside = model.predict_twice(tokens, where, start, held, t)
        log_probs = draw.shape(log_probs, t.unsqueeze(1).expand_as(where)[where])
        drawn = draw.tokens(log_probs, uniform[where])
        sure = torch.zeros(n, length, dtype=torch.float64, device=device)
        by_drawn = how.draft_by == "drawn"
        judged = log_probs.gather(1, drawn.unsqueeze(1)).squeeze(1) if by_drawn else log_probs.amax(dim=1)
        sure[where] = judged.double().exp()
        accept = _drafted(sure, open_, how.draft)
        accepted = accept.sum(dim=1)
        doubt = torch.full((n, width), -torch.inf, dtype=torch.float64, device=device)
        own = tokens.gather(1, slots)[held]
        doubt[held] = -outside.double().log_softmax(dim=1).gather(1, own.unsqueeze(1)).squeeze(1)
        bad = _doubted(doubt, held, how.verify, accepted, limit)
        after = tokens.clone()
        after[accept] = drawn[accept[where]]
        after[torch.zeros_like(tokens).scatter_add_(1, slots, bad.long()) > 0] = model.mask_id
        limit = torch.where(accepted > 0, accepted, limit)
        share = ((after == model.mask_id) & free).sum(dim=1) / count
        s = torch.minimum(t, how.schedule.time_of(share.double()))  # the carried state never goes back in time
        model.advance(tokens, after, log_probs, where, t, s)
        tokens, t = after, s
        if watch is not None:
            watch(tokens)


def _drafted(sure: Tensor, open_: Tensor, threshold: float) -> Tensor:
    """Slots to reveal: those surer than the threshold up to a cap, or else the surest one."""
    wanted = open_ & (sure > threshold)
    cap = (MOST_SHARE * open_.sum(dim=1)).long().clamp(LEAST_CAP, MOST_CAP)
    number = torch.minimum(wanted.sum(dim=1), cap).clamp(min=1)
    return best(sure, open_, number)


def _doubted(doubt: Tensor, held: Tensor, threshold: float, accepted: Tensor, limit: Tensor) -> Tensor:
    """Slots to mask again: those less likely than the threshold, fewer than were revealed the step before."""
    bad = held & (doubt > (-math.log(threshold) if threshold > 0 else math.inf)) & (accepted > 1).unsqueeze(1)
    number = torch.where(bad.sum(dim=1) >= limit, limit - 1, bad.sum(dim=1))
    return best(doubt, bad, number)
