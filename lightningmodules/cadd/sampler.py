"""What CADD says to the samplers of masked sequences: its predictions, and the latent that travels with the tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightningmodules.cadd import process
from lightningmodules.cadd.adapted import Network
from lightningmodules.cadd.process import Estimator, Path
from lightningmodules.shared.codecs import PixelTokens, Tokens
from lightningmodules.shared.masking import Schedule
from lightningmodules.shared.noise import Noise
from lightningmodules.shared.samplers.masked import Draw, Plan, Wino

Latent = Literal["off", "on", "selfcond"]
HOLE = -1  # in a prompt: to be drawn


@dataclass(frozen=True)
class LatentMotion:
    """How the latent moves while sampling.

    Attributes:
        estimator: of the clean latent: "hard", "soft" or "sampled".
        temperature: of the estimate's probabilities, > 0.
        top_k: likeliest tokens that count in the estimate; 0 for all.
        particles: latents per sequence, >= 1; the probabilities they lead to are averaged.
        strength: factor on the latent in the network's input; experimental, 1 is the model as trained.
        eta: fresh noise in units of the posterior's, 0..1.
        path: "vp" or "flow", as in training.
    """

    estimator: Estimator = "hard"
    temperature: float = 1.0
    top_k: int = 0
    particles: int = 1
    strength: float = 1.0
    eta: float = 1.0
    path: Path = "vp"

    def __post_init__(self) -> None:
        if self.estimator not in ("hard", "soft", "sampled"):
            raise ValueError(f"sampling.estimator={self.estimator!r}: expected hard, soft or sampled.")
        if self.temperature <= 0:
            raise ValueError(f"sampling.latent_temperature={self.temperature}: expected > 0; 1 is the model's own.")
        if self.top_k < 0:
            raise ValueError(f"sampling.latent_top_k={self.top_k}: expected a number of tokens >= 0; 0 is off.")
        if self.particles < 1:
            raise ValueError(f"sampling.latents={self.particles}: expected at least one latent per sequence.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampling.eta={self.eta}: expected 0 (no fresh noise) to 1 (the posterior's).")


def asked(
    alpha: Schedule, path: Path, settings: Mapping[str, Any], *, shifted: bool
) -> tuple[Plan | Wino, Draw, LatentMotion]:
    """What the settings of ``Cadd.sample`` mean.

    Args:
        alpha: share of tokens kept over time.
        path: of the latent, as in training.
        settings: every argument of ``sample`` by its name.
        shifted: the network predicts a token at the position before it.

    Raises:
        ValueError: settings are out of range, or do not go together.
    """
    get = settings.__getitem__
    draw = Draw(get("temperature"), get("temperature_start"), get("top_k"), get("top_p"), getattr(torch, get("draws")))
    motion = LatentMotion(
        estimator=get("estimator"),
        temperature=get("latent_temperature"),
        top_k=get("latent_top_k"),
        particles=get("latents"),
        strength=get("latent_strength"),
        eta=get("eta"),
        path=path,
    )
    if get("order") != "wino":
        names = ("steps", "order", "counts", "order_temperature", "block", "remask", "remask_strength", "grid", "cache")
        return Plan(alpha, **{name: get(name) for name in names}), draw, motion
    if shifted:
        raise ValueError(
            "sampling.order=wino needs predictions at the tokens' own positions; those of a network adapted from a"
            " causal model come from the position before. Set sampling.order=entropy, for example."
        )
    if get("remask") != "none":
        raise ValueError(f"sampling.remask={get('remask')}: order=wino masks again by its own rule. Leave remask out.")
    return Wino(alpha, get("block"), get("draft"), get("verify"), get("draft_by")), draw, motion


def nothing_guides(guidance: float) -> ValueError:
    """The error for guidance without anything to be guided by."""
    return ValueError(
        f"sampling.guidance={guidance:g}: there is neither a class nor a prompt that could guide. Give one, or leave"
        " guidance out."
    )


class Denoiser:
    """The network as a ``Predictor``: guided, averaged over latents, gathered at the positions that matter.

    Args:
        net: the network.
        mask_id: token that stands for "not known yet".
        schedule: of the masking.
        gamma: schedule of the latent's signal.
        noise: one source of draws per row.
        shape: (n, L) of the sequences.
        latent: "off" for plain masked diffusion, "on", or "selfcond" for the previous soft prediction instead.
        motion: of the latent.
        table: latent of every token, (V, hidden) float32; None for "off".
        timed: give the network the noise level.
        labels: (n,) classes; None for none.
        guidance: weight w of uncond + w (cond - uncond) on log-probabilities; 1 is off.
        prompt: (n, L) bool, positions hidden from the unconditional prediction where it is the prompt that guides;
            None where the class does.

    Raises:
        ValueError: nothing is there that could guide.
    """

    def __init__(
        self,
        net: Network,
        *,
        mask_id: int,
        schedule: Schedule,
        gamma: Schedule,
        noise: Noise,
        shape: tuple[int, int],
        latent: Latent = "off",
        motion: LatentMotion | None = None,
        table: Tensor | None = None,
        timed: bool = False,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        prompt: Tensor | None = None,
    ) -> None:
        if guidance != 1.0 and labels is None and prompt is None:
            raise nothing_guides(guidance)
        self.net, self.mask_id, self.schedule, self.gamma, self.noise = net, mask_id, schedule, gamma, noise
        self.latent, self.motion, self.timed = latent, motion or LatentMotion(), timed
        self.labels, self.guidance, self.prompt = labels, guidance, prompt
        self.length, self.carries = shape[1], latent != "off"
        self.particles = self.motion.particles if latent == "on" else 1
        self.cost = self.particles * (1 if guidance in (0.0, 1.0) else 2)
        self.table = table
        self.device = net.table.device
        if latent == "on":  # (particles, n L, hidden), as every position is read and written by its place alone
            everywhere = torch.ones(shape, dtype=torch.bool, device=self.device)
            self.z = self._normal(everywhere).contiguous()
        elif latent == "selfcond":
            self.z = torch.zeros(1, shape[0] * shape[1], net.hidden, device=self.device)

    # ---- predictions ----------------------------------------------------------------------------------------------

    def predict(self, tokens: Tensor, where: Tensor, t: Tensor) -> Tensor:
        """See ``Predictor.predict``."""
        return self._predict(tokens, where, t, None, None)[0]

    def predict_twice(
        self, tokens: Tensor, where: Tensor, start: Tensor, held: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Drafter.predict_twice``.

        Source: arXiv 2507.18578: a block of masks is appended; nobody sees it but itself, and each of its slots sees
            all tokens except the one whose place it takes.
        """
        return self._predict(tokens, where, t, start, held)

    def _predict(
        self, tokens: Tensor, where: Tensor, t: Tensor, start: Tensor | None, held: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        shadows = self._shadow_noise(held, t) if held is not None else None
        rows = where.any(dim=1).nonzero().squeeze(1)
        if not len(rows):
            empty = torch.zeros(0, self._columns(), device=self.device)
            return empty, empty
        x, wanted, positions, mask = tokens[rows], where[rows], None, None
        if start is not None and held is not None:
            width = held.shape[1]
            x = torch.nn.functional.pad(x, (0, width), value=self.mask_id)
            wanted = torch.cat([wanted, held[rows]], dim=1)
            positions, mask = shadow_layout(tokens.shape[1], width, start[rows])
        log_probs = self._log_probs(x, wanted, t[rows], rows, 0, shadows, positions, mask)
        for which in range(1, self.particles):
            other = self._log_probs(x, wanted, t[rows], rows, which, shadows, positions, mask)
            log_probs = torch.logaddexp(log_probs, other, out=log_probs)
        log_probs = log_probs if self.particles == 1 else log_probs - _log(self.particles)
        if held is None:
            return log_probs, log_probs[:0]
        real = torch.zeros_like(wanted)
        real[:, : tokens.shape[1]] = True
        own = real[wanted]
        return log_probs[own], log_probs[~own]

    def _log_probs(
        self,
        x: Tensor,
        wanted: Tensor,
        t: Tensor,
        rows: Tensor,
        which: int,
        shadows: Tensor | None,
        positions: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Guided log-probabilities at ``wanted`` (R, S) under one latent."""
        labels = None if self.labels is None else self.labels[rows]
        inputs, given = [x], [labels]
        if self.guidance != 1.0:
            hidden = x
            if self.prompt is not None:
                hidden = x.clone()
                hidden[:, : self.prompt.shape[1]][self.prompt[rows]] = self.mask_id
            elif labels is not None:
                labels = torch.full_like(labels, -1)
            inputs, given = ([hidden], [labels]) if self.guidance == 0.0 else ([x, hidden], [given[0], labels])
        branches = len(inputs)
        embedded = self.net.embed(torch.cat(inputs))
        if self.carries:
            embedded = self._fused(embedded, x, rows, which, branches, shadows)
        sigma = noise_level(self.schedule, t).repeat(branches) if self.timed else None
        classes = None if given[0] is None else torch.cat([value for value in given if value is not None])
        condition = self.net.condition(sigma, classes)
        if mask is not None:
            mask = mask.repeat(branches, 1, 1)
        if positions is not None:
            positions = positions.repeat(branches, 1)
        hidden_states = self.net.trunk(embedded, condition, positions=positions, mask=mask)
        at = wanted.repeat(branches, 1).flatten().nonzero().squeeze(1)
        log_probs = self.net.logits(hidden_states, condition, at, self.mask_id).float().log_softmax(dim=1)
        if branches == 1:
            return log_probs
        conditional, unconditional = log_probs.chunk(2)
        return guided(conditional, unconditional, self.guidance)

    def _fused(
        self, embedded: Tensor, x: Tensor, rows: Tensor, which: int, branches: int, shadows: Tensor | None
    ) -> Tensor:
        at = (x == self.mask_id).flatten().nonzero().squeeze(1)
        row, place = rows[at // x.shape[1]], at % x.shape[1]
        z = self.z[which]
        if shadows is None:
            z = z.index_select(0, row * self.length + place)
        else:
            z = torch.cat([z.view(-1, self.length, z.shape[1]), shadows], dim=1)[row, place]
        if self.motion.strength != 1.0:
            z = z * self.motion.strength
        if branches > 1:
            at, z = torch.cat([at, at + x.numel()]), z.repeat(2, 1)
        return self.net.fuse(embedded, at, z)

    # ---- the latent -----------------------------------------------------------------------------------------------

    def advance(self, before: Tensor, after: Tensor, log_probs: Tensor, where: Tensor, t: Tensor, s: Tensor) -> None:
        """See ``Predictor.advance``; latents of positions that are not masked are left as they are, and not read."""
        if not self.carries:
            return
        assert self.table is not None
        masked = after == self.mask_id
        staying, anew = masked & where, masked & (before != self.mask_id)
        kept, at = staying[where], staying.flatten().nonzero().squeeze(1)
        again = anew.flatten().nonzero().squeeze(1)
        if self.latent == "selfcond":
            self.z.index_copy_(1, at, process.estimate(log_probs[kept], self.table, "soft").unsqueeze(0))
            self.z.index_fill_(1, again, 0.0)
            return
        clean = self._estimate(log_probs, kept, at)
        gamma_t, gamma_s = self.gamma.keep(t), self.gamma.keep(s)
        step = process.reverse_step(gamma_t, gamma_s, path=self.motion.path, eta=self.motion.eta)
        z0, zt, std = torch.stack(step).float()[:, at // self.length].unsqueeze(2)
        z = self.z.index_select(1, at).mul_(zt).addcmul_(z0, clean)
        if self.motion.path == "vp" and self.motion.eta > 0:
            z.addcmul_(std, self._normal(staying))
        self.z.index_copy_(1, at, z)
        if len(again):  # as if just masked: around the token that was there
            around = self.table[before.flatten()[again]]
            gamma = gamma_s.float()[again // self.length].unsqueeze(1)
            z = process.noisy_latent(around, self._normal(anew), gamma, self.motion.path)
            self.z.index_copy_(1, again, z)

    def _estimate(self, log_probs: Tensor, kept: Tensor, at: Tensor) -> Tensor:
        """Clean latents of the positions ``at`` that stay masked, which are the ``kept`` of the predicted ones."""
        assert self.table is not None
        motion = self.motion
        if motion.estimator == "hard":  # the likeliest of all that were predicted: cheaper than a copy of some
            return self.table.index_select(0, process.likeliest(log_probs)[kept])
        uniform = None
        if motion.estimator == "sampled":
            uniform = self.noise.uniform(self.length, dtype=torch.float64).to(self.device).flatten()[at]
        return process.estimate(
            log_probs[kept],
            self.table,
            motion.estimator,
            temperature=motion.temperature,
            top_k=motion.top_k,
            uniform=uniform,
        )

    def _normal(self, where: Tensor) -> Tensor:
        """Draws for the N positions of ``where`` (n, L) bool, (particles, N, hidden)."""
        return self.noise.normal_at(where, self.particles, self.net.hidden).to(self.device).transpose(0, 1)

    def _shadow_noise(self, held: Tensor, t: Tensor) -> Tensor | None:
        """Latents of slots that stand for no token: noise of the current strength around nothing."""
        if not self.carries:
            return None
        if self.latent == "selfcond":
            return torch.zeros(*held.shape, self.net.hidden, device=self.device)
        _, spread = process.signal_and_noise(self.gamma.keep(t), self.motion.path)
        noise = self.noise.normal(held.shape[1], self.net.hidden).to(self.device)
        return spread.float().view(-1, 1, 1) * noise

    def _columns(self) -> int:
        last = self.mask_id == self.net.vocabulary - 1
        return self.net.vocabulary - last


def canvas(codec: Tokens | PixelTokens, rows: int, given: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of masks with what is given.

    Args:
        codec: says how long rows are and what their tokens are.
        rows: n.
        given: (n, P) tokens that rows begin with, -1 where one is to be drawn; None for nothing.
        device: of the result.

    Returns:
        tokens (n, L) int64; free (n, L) bool, True where something is to be drawn.

    Raises:
        ValueError: what is given is too long, holds unknown tokens, or leaves nothing to draw.
    """
    length = codec.shape[0]
    tokens = torch.full((rows, length), codec.mask_id, dtype=torch.int64, device=device)
    free = torch.ones_like(tokens, dtype=torch.bool)
    if given is None:
        return tokens, free
    if len(given) != rows:
        raise ValueError(f"{rows} seeds but {len(given)} prompts came; give one prompt per seed.")
    if given.shape[1] > length:
        raise ValueError(
            f"The prompt has {given.shape[1]} tokens, the model writes {length} altogether. Shorten it, or train with a"
            " larger data.length."
        )
    given = given.to(device)
    known = given != HOLE
    outside = known & ((given < 0) | (given >= codec.vocabulary) | (given == codec.mask_id))
    if bool(outside.any()):
        raise ValueError(
            f"The prompt holds the token {int(given[outside][0])}; the tokenizer has {codec.vocabulary} (0 to"
            f" {codec.vocabulary - 1}), and {HOLE} stands for one to be drawn."
        )
    tokens[:, : given.shape[1]] = torch.where(known, given, codec.mask_id)
    free[:, : given.shape[1]] = ~known
    if not bool(free.any(dim=1).all()):
        raise ValueError(f"The prompt gives all {length} tokens of a row, so there is nothing to draw. Leave some out.")
    return tokens, free


def guided(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Log-probabilities (N, V) led by uncond + weight (cond - uncond), normalised.

    Source: arXiv 2412.10193, D-CFG for absorbing noise, on the prediction of the clean token.
    """
    never = conditional == -torch.inf  # the mask, which neither predicts; a difference of infinities is not a number
    return torch.lerp(unconditional, conditional, weight).masked_fill(never, -torch.inf).log_softmax(dim=-1)


def noise_level(schedule: Schedule, t: Tensor) -> Tensor:
    """Total noise that the network is told, (B,) float32; that of 0.1 % kept where less is kept, so it is finite."""
    return schedule.total_noise(t.double()).clamp(max=_log(1000)).float()


def shadow_layout(length: int, width: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and visibility of a sequence followed by twins of the slots of a block.

    Args:
        length: L.
        width: slots W of the block.
        start: (R,) first slot of every row.

    Returns:
        positions (R, L + W); mask (R, L + W, L + W) bool, True where the first sees the second. A slot beyond the end
        of the sequence sees as others do and is seen by none.
    """
    device = start.device
    place = torch.arange(length, device=device)
    slots = start.unsqueeze(1) + torch.arange(width, device=device)  # (R, W)
    positions = torch.cat([place.expand(len(start), -1), slots.clamp(max=length - 1)], dim=1)
    mask = torch.zeros(len(start), length + width, length + width, dtype=torch.bool, device=device)
    mask[:, :, :length] = True
    mask[:, length:, :length] &= slots.unsqueeze(2) != place
    mask[:, length:, length:] = (slots < length).unsqueeze(1)
    return positions, mask


def _log(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float64).log())
