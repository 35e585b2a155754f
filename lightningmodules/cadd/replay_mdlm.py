"""One file of reference numbers of masked diffusion: its network, its inputs, and how each quantity is computed."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightningmodules.cadd.network import CaddNet
from lightningmodules.cadd.weights import infer, match, translate
from lightningmodules.shared import masking
from lightningmodules.shared.masking import Schedule

LAST = 1e-5  # time at which the authors' sampler ends
LEAST_TIME = 1e-3  # of the grid whose times of importance are recorded
LARGEST_TIME = 1.0 - 1e-4  # of the weight 1 / t in discrete time
TRUE = ("true", "1", "yes")


class MdlmReplay:
    """Quantities of one file.

    Args:
        tensors: of the file.
        metadata: mask_index, T, sampling_eps, noise, time_conditioning; sizes are read from the weights.
        path: the file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
        self.tensors, self.metadata = tensors, metadata
        state = {name[6:]: value for name, value in tensors.items() if name.startswith("state/")}
        if not state:
            raise ValueError(f"{path} holds no weights (state/...).")
        state = translate(state)
        heads = metadata.get("n_heads")
        arguments = infer(state, heads=int(heads) if heads else None)
        with torch.random.fork_rng(devices=[]):
            self.net = CaddNet(len(state["vocab_embed.embedding"]), **arguments).eval()
        own = self.net.state_dict()
        state = {"rotary_emb.inv_freq": own["rotary_emb.inv_freq"], **state}
        match(state, own)
        self.net.load_state_dict(state)
        self.mask_id = int(metadata.get("mask_index", self.net.vocabulary - 1))
        self.steps = int(float(metadata.get("T", 0)))
        self.eps = float(metadata.get("sampling_eps", 1e-3))
        self.timed = metadata.get("time_conditioning", "False").lower() in TRUE
        self.stratified = metadata.get("antithetic_sampling", "True").lower() in TRUE
        self.schedule = schedule_of(metadata.get("noise", "loglinear"), path)

    def recipes(self) -> dict[str, Callable[[], Tensor]]:
        """What computes each quantity."""
        one = functools.partial
        return {
            "fwd.logits_sigma0": lambda: self._logits(self.tensors["fwd.xt"], torch.zeros(len(self.tensors["fwd.xt"]))),
            "fwd.logits_sigma": lambda: self._logits(self.tensors["fwd.xt"], self.tensors["fwd.sigma"]),
            "fwd.subs_logprobs": lambda: self._subs(self.tensors["fwd.xt"], self.tensors["fwd.sigma"]),
            "sched.sigma": lambda: total_noise(self.schedule, self.tensors["sched.t"]),
            "sched.dsigma": lambda: noise_rate(self.schedule, self.tensors["sched.t"]),
            "sched.importance_t": lambda: importance_time(
                self.schedule, (1.0 - LEAST_TIME) * self.tensors["sched.t"] + LEAST_TIME
            ),
            "loss.t": self._times,
            "loss.sigma": lambda: total_noise(self.schedule, self._times()),
            "loss.dsigma": lambda: noise_rate(self.schedule, self._times()),
            "loss.move_chance": self._move_chance,
            "loss.xt": self._noisy,
            "loss.nlls": self._nlls,
            "loss.loss": self._loss,
            "step.p_x0": self._prediction,
            "step.q_xs_cache": one(self._reverse, True),
            "step.q_xs_ddpm": one(self._reverse, False),
            "step.x_s_cache": lambda: self._drawn(self.tensors["step.xt"], self._reverse(True), self.tensors["step.u"]),
            "step.x_s_ddpm": lambda: self._drawn(self.tensors["step.xt"], self._reverse(False), self.tensors["step.u"]),
            "traj.x": lambda: self._path()[0],
            "traj.final": lambda: self._path()[1],
            "traj.nfe": lambda: self._path()[2],
            "genppl.weight": lambda: text_weights(self.tensors["genppl.chunk"], eos=0),
        }

    @torch.no_grad()
    def _logits(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        return self.net(tokens, sigma)

    def _subs(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        # a zero per row, as one for all takes another product of matrices, which rounds otherwise
        sigma = sigma.flatten() if self.timed else torch.zeros(len(tokens))
        logits = self._logits(tokens, sigma)
        return masking.subs_log_probs(logits, tokens, self.mask_id)

    def _times(self) -> Tensor:
        u = self.tensors["loss.u_t"]
        if self.stratified:
            u = masking.stratified(u, torch.arange(len(u)), len(u))
        t = (1.0 - self.eps) * u + self.eps
        return masking.discretise(t, self.steps) if self.steps else t

    def _move_chance(self) -> Tensor:
        return (1.0 - torch.exp(-total_noise(self.schedule, self._times()))).unsqueeze(1)

    def _noisy(self) -> Tensor:
        return masking.corrupt(self.tensors["x0"], self.tensors["loss.u_x"] < self._move_chance(), self.mask_id)

    def _nlls(self) -> Tensor:
        t, tokens, x0 = self._times(), self._noisy(), self.tensors["x0"]
        sigma = total_noise(self.schedule, t)
        log_p = self._subs(tokens, sigma).gather(-1, x0.unsqueeze(-1)).squeeze(-1)
        if self.steps:
            t = t.clamp(max=LARGEST_TIME).unsqueeze(1)
            weighted = -log_p / t * (tokens == self.mask_id)
            # 0 log(0 / 0) in the first step: not a number in their code, whatever the token
            weighted = weighted.masked_fill(t - 1.0 / self.steps == 0.0, torch.nan)
        else:
            weighted = -log_p * (noise_rate(self.schedule, t) / torch.expm1(sigma)).unsqueeze(1)
        return weighted * self.tensors["loss.attention_mask"]

    def _loss(self) -> Tensor:
        mask = self.tensors["loss.attention_mask"]
        return (self._nlls().sum() / mask.sum()).view_as(self.tensors["loss.loss"])

    def _prediction(self) -> Tensor:
        return self._subs(self.tensors["step.xt"], total_noise(self.schedule, self.tensors["step.t"])).exp()

    def _reverse(self, cached: bool) -> Tensor:
        """Unnormalised law of the next tokens; ``cached``: the sampler that takes t itself for the masking chance."""
        t = self.tensors["step.t"]
        return self._law(self._prediction(), t, t - self.tensors["step.dt"], cached)

    def _law(self, p_x0: Tensor, t: Tensor, s: Tensor, cached: bool) -> Tensor:
        if not cached:
            t, s = (1.0 - torch.exp(-total_noise(self.schedule, time)) for time in (t, s))
        q = p_x0 * (t - s).view(-1, 1, 1)
        q[:, :, self.mask_id] = s.view(-1, 1)
        return q

    def _drawn(self, tokens: Tensor, q: Tensor, u: Tensor) -> Tensor:
        noise = 1e-10 - (u + 1e-10).log()
        return torch.where(tokens == self.mask_id, (q / noise).argmax(dim=-1), tokens)

    @functools.cache  # noqa: B019 - lives as long as the file is compared
    def _path(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole sampler: states, the last clean-up, network evaluations (shared by the batch, as theirs)."""
        u = self.tensors["traj.u"]
        cached = isinstance(self.schedule, masking.LogLinear) or "step.q_xs_cache" in self.tensors
        grid, dt = torch.linspace(1.0, LAST, len(u) + 1), (1.0 - LAST) / len(u)
        x = torch.full(u.shape[1:3], self.mask_id)
        states, evaluations, p_x0 = [], 0, None
        for index, draws in enumerate(u):
            t = grid[index] * torch.ones(len(x), 1)
            if p_x0 is None:
                p_x0 = self._subs(x, total_noise(self.schedule, t)).exp()
                evaluations += 1
            after = self._drawn(x, self._law(p_x0, t, t - dt, cached), draws)
            if self.timed or not cached or not torch.equal(after, x):
                p_x0 = None
            x = after
            states.append(x)
        sigma = total_noise(self.schedule, grid[-1] * torch.ones(len(x), 1))
        return torch.stack(states), self._subs(x, sigma).argmax(dim=-1), torch.tensor([evaluations + 1])


def schedule_of(text: str, path: Path) -> Schedule:
    """A masking schedule from words such as ``loglinear eps=1e-3`` or ``cosinesqr``.

    Raises:
        ValueError: no known schedule.
    """
    head = re.split(r"[,(]|eps|sigma", text.lower().strip())[0]
    name = re.sub(r"[^a-z0-9]", "", head.split()[0] if head.split() else "")
    numbers = {key: float(value) for key, value in re.findall(r"(\w+)\s*[=:]\s*([-+.\deE]+)", text)}
    eps = numbers.get("eps", 1e-3)
    if name in ("loglinear", "log"):
        return masking.LogLinear(eps)
    if name == "cosine" and not re.search(r"sq|2", head):
        return masking.Cosine(eps)
    if name.startswith("cos"):
        return masking.CosineSquared(eps)
    if name == "linear":
        return masking.Exponential(numbers.get("sigma_min", 0.0), numbers.get("sigma_max", 10.0))
    if name == "geometric":
        return masking.Geometric(numbers.get("sigma_min", 1e-3), numbers.get("sigma_max", 1.0))
    raise ValueError(
        f"{path}: noise={text!r} in the metadata is no known schedule: loglinear, cosine, cosinesqr,"
        " linear or geometric."
    )


def total_noise(schedule: Schedule, t: Tensor) -> Tensor:
    """Sigma with the roundings of the authors' float32, which the weights of the loss multiply near t = 0 and 1.

    Source: kuleshov-group/mdlm, noise_schedule.py, ``total_noise``.
    """
    if isinstance(schedule, masking.LogLinear):
        return -torch.log1p(-(1.0 - schedule.eps) * t)
    if isinstance(schedule, masking.Cosine | masking.CosineSquared):
        return -torch.log(schedule.eps + (1.0 - schedule.eps) * _wave(schedule, t))
    return schedule.total_noise(t)


def noise_rate(schedule: Schedule, t: Tensor) -> Tensor:
    """D sigma / dt, as :func:`total_noise`.

    Source: kuleshov-group/mdlm, noise_schedule.py, ``rate_noise``.
    """
    if isinstance(schedule, masking.LogLinear):
        return (1.0 - schedule.eps) / (1.0 - (1.0 - schedule.eps) * t)
    if isinstance(schedule, masking.Cosine | masking.CosineSquared):
        angle = t * math.pi if isinstance(schedule, masking.CosineSquared) else t * math.pi / 2.0
        slope = 0.5 * math.pi * ((1.0 - schedule.eps) * torch.sin(angle))
        return slope / ((1.0 - schedule.eps) * _wave(schedule, t) + schedule.eps)
    return schedule.noise_rate(t)


def _wave(schedule: Schedule, t: Tensor) -> Tensor:
    wave = torch.cos(t * math.pi / 2.0)
    return wave.square() if isinstance(schedule, masking.CosineSquared) else wave


def importance_time(schedule: Schedule, t: Tensor) -> Tensor:
    """Times at which the weight of the loss is constant.

    Source: kuleshov-group/mdlm, noise_schedule.py, ``importance_sampling_transformation``.
    """
    zero, one = torch.zeros(()), torch.ones(())
    least = schedule.total_noise(zero) + (schedule.eps if isinstance(schedule, masking.LogLinear) else 0.0)
    first, last = (torch.log1p(-torch.exp(-sigma)) for sigma in (least, schedule.total_noise(one)))
    sigma = -torch.log1p(-torch.exp(t * last + (1.0 - t) * first))
    return schedule.time_of(-torch.expm1(-sigma))


def text_weights(chunk: Tensor, eos: int) -> Tensor:
    """Weights of the targets 1.. of a chunk in generative perplexity: all but the second and later ends of text."""
    end = chunk == eos
    return (~end | (end.cumsum(dim=-1) == 1))[..., 1:].float()
