"""CADD and its masked-diffusion baseline as a room of the house: draws noise, calls the formulas, reports terms."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from lightningmodules.base import GenerativeModule
from lightningmodules.cadd import process
from lightningmodules.cadd.adapted import Network
from lightningmodules.cadd.network import layout
from lightningmodules.cadd.process import Estimator, Path
from lightningmodules.cadd.sampler import Denoiser, Latent, asked, canvas, noise_level, nothing_guides
from lightningmodules.cadd.weights import load_start, translate
from lightningmodules.shared import masking
from lightningmodules.shared.codecs import Batch, PixelTokens, Tokens
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.masking import Bound, Schedule
from lightningmodules.shared.noise import Noise, SampleNoise
from lightningmodules.shared.samplers.masked import Counts, DraftBy, Grid, Order, Plan, Remask, Wino, reveal, wino
from lightningmodules.shared.sharding import whole
from lightningmodules.shared.token_transformer import LOGITS

SWITCH: dict[Any, Latent] = {True: "on", False: "off", "on": "on", "off": "off", "selfcond": "selfcond"}
CALLS = ("embed", "latents", "condition", "gated", "trunk", "logits", "cross_entropy")  # methods of the network
SELF_CONDITIONED = 0.5  # share of training rows that see their own first prediction


class Cadd(GenerativeModule):
    """Masked diffusion over tokens; with ``latent`` on, a Gaussian companion sharpens as the tokens are revealed.

    Args:
        net: builds the network from the size of the vocabulary: ``CaddNet`` or ``AdaptedNet`` with its other arguments.
        codec: rows of tokens; its vocabulary and mask are the network's.
        optimizer: takes the parameters, returns the optimiser.
        schedule: ``(step, total_steps) -> factor`` of the learning rate.
        ema_decays: one average of the weights per decay in (0, 1).
        latent: on; off, plain masked diffusion; or selfcond, the network's own previous prediction instead.
        latent_norm: "unit" scales the latent of every token to the norm ``latent_rho``, "none" takes the embedding.
        latent_rho: that norm; auto is sqrt(2 ln V), at which noise hides a token for half of the time.
        latent_gate: initial value of learnt factors on the latent; null for none. 0 continues a masked model exactly.
        latent_detach: let no gradient reach the embedding through the latent.
        latent_path: "vp", variance preserving, or "flow", a straight line.
        alpha: share of tokens kept over time; null is 1 - t.
        gamma: share of the latent's signal left over time; null is 1 - t.
        weight: of the cross-entropy: "elbo", -alpha' / (1 - alpha), or "uniform".
        mse_coef: weight of the squared error of the soft estimate, in units of the cross-entropy's; >= 0.
        time_conditioning: tell the network the noise level (an adapted one by a new path that starts at zero); auto:
            with a latent (by such a path if ``latent_gate`` is set), not without.
        discrete_steps: T of MDLM's discrete time; 0 for continuous time.
        time_eps: least time in training, in [0, 1).
        label_drop: probability with which a label is replaced by "no class" in training, 0..1.
        start: weights to begin with: a checkpoint of kuleshov-group/mdlm or exported weights; null for none.

    Source: arXiv 2510.01329 (CADD); arXiv 2406.07524, kuleshov-group/mdlm (masked diffusion).
    """

    likelihood = "bound"
    codec: Tokens | PixelTokens

    def __init__(
        self,
        *,
        net: Callable[..., Network],
        codec: Tokens | PixelTokens,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float] | None = None,
        ema_decays: Sequence[float] = (),
        latent: bool | Literal["on", "off", "selfcond"] = "on",
        latent_norm: Literal["unit", "none"] = "unit",
        latent_rho: float | Literal["auto"] = "auto",
        latent_gate: float | None = None,
        latent_detach: bool = False,
        latent_path: Path = "vp",
        alpha: Schedule | None = None,
        gamma: Schedule | None = None,
        weight: Literal["elbo", "uniform"] = "elbo",
        mse_coef: float = 0.0,
        time_conditioning: bool | Literal["auto"] = "auto",
        discrete_steps: int = 0,
        time_eps: float = 1e-3,
        label_drop: float = 0.1,
        start: str | None = None,
    ) -> None:
        super().__init__(codec=codec, optimizer=optimizer, schedule=schedule, ema_decays=ema_decays)
        if latent not in SWITCH:
            raise ValueError(f"module.latent={latent!r}: expected on, off or selfcond.")
        for name, value, high in (("label_drop", label_drop, 1.0), ("time_eps", time_eps, 0.999)):
            if not 0 <= value <= high:
                raise ValueError(f"module.{name}={value}: expected 0 to {high:g}.")
        if mse_coef < 0 or discrete_steps < 0:
            raise ValueError(f"module.mse_coef={mse_coef}, module.discrete_steps={discrete_steps}: expected >= 0.")
        if latent_rho != "auto" and latent_rho <= 0:
            raise ValueError(f"module.latent_rho={latent_rho}: expected > 0 or auto (sqrt(2 ln vocabulary)).")
        self.needs = frozenset({"image" if isinstance(codec, PixelTokens) else "tokens"})  # type: ignore[misc]
        self.latent: Latent = SWITCH[latent]
        self.latent_norm, self.latent_detach, self.latent_path = latent_norm, latent_detach, latent_path
        self.rho = process.latent_radius(codec.vocabulary, None if latent_rho == "auto" else float(latent_rho))
        self.latent_gate = None if self.latent == "off" else latent_gate
        self.alpha, self.gamma = alpha or masking.LogLinear(0.0), gamma or masking.LogLinear(0.0)
        self.weight, self.mse_coef, self.discrete_steps = weight, mse_coef, discrete_steps
        self.timed = self.latent == "on" if time_conditioning == "auto" else bool(time_conditioning)
        adds = time_conditioning == "auto" and self.latent_gate is not None
        self.added_time = self.timed and (adds or getattr(getattr(net, "func", net), "shifted", False))
        self.time_eps, self.label_drop, self.start = time_eps, label_drop, start
        self._net, given = net, getattr(net, "keywords", {})
        for name, ours in (("latent_gate", "latent_gate"), ("added_time", "time_conditioning")):
            asked = given.get(name)
            if asked is not None and asked is not False:  # these are the network's defaults
                raise ValueError(f"module.net.{name}={asked} would change nothing. Set module.{ours} instead.")
        self.num_classes = int(given.get("num_classes", 0))
        self.evaluations: Tensor | None = None  # network evaluations of every row of the last call of sample()
        self._film: list[Tensor] | None = None

    # ---- networks -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Create the network, and fill it with the weights to start from."""
        codec = self.codec
        rows = codec.vocabulary + (codec.mask_id >= codec.vocabulary)
        self.net = self._net(rows, latent_gate=self.latent_gate, added_time=self.added_time)
        if self.net.length < codec.shape[0]:
            raise ValueError(
                f"The network reads {self.net.length} tokens (module.net.length), the codec makes {codec.shape[0]}."
                " Set module.net.length from data.length."
            )
        self.num_classes = self.net.num_classes
        if self.start is not None:
            load_start(self.net, self.start)

    def setup(self, stage: str) -> None:
        """Before training: the vocabulary is that of the tokenizer, which the data has prepared by now."""
        if stage == "fit" and isinstance(self.codec, Tokens):
            self.codec.check()

    def configure_model(self) -> None:
        """As every room; then a sharded network gathers its own weights for each of the calls made of it here."""
        super().configure_model()
        for name in CALLS:
            register_fsdp_forward_method(self.net, name)  # does nothing unless the network is sharded

    def averaged(self) -> dict[str, nn.Module]:
        """The network."""
        return {"net": self.net}

    def shard_units(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.net.layers)

    @classmethod
    def translate(cls, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys of kuleshov-group/mdlm to ours, see ``weights.translate``."""
        return translate(official)

    def flops_per_sample(self) -> float:
        """Forward pass of one row, counted three times: the backward pass costs two."""
        return 3.0 * self.net.flops(self.codec.shape[0])

    def latent_rows(self, tokens: Tensor | None = None) -> Tensor:
        """Latents of tokens (N,), or of all tokens that can be predicted, in the order of the logits; float32."""
        last = self.codec.mask_id == self.net.vocabulary - 1
        rows = self.net.latents(tokens, self.net.vocabulary - last, self.rho if self.latent_norm == "unit" else None)
        return rows.detach() if self.latent_detach else rows

    # ---- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted cross-entropy of masked tokens, nats per token of the batch.

        Returns:
            ``loss``; ``cross_entropy``, its mean over masked tokens without weight (with a latent this is no bound on
            a likelihood: the latent gives the tokens away); ``squared_error`` if it is part of the loss.
        """
        x0 = self.codec.encode(batch)
        eligible = self._eligible(batch, x0)
        t = self._times(len(x0))
        masked = (torch.rand(x0.shape, device=x0.device) < self.alpha.lost(t).float().unsqueeze(1)) & eligible
        labels = self._labels(batch)
        if labels is not None and self.training and self.label_drop:
            labels = labels.masked_fill(torch.rand(labels.shape, device=labels.device) < self.label_drop, -1)
        at = masked.flatten().nonzero().squeeze(1)
        row, targets = at // x0.shape[1], x0.flatten()[at]
        hidden, condition, clean = self._encode(batch, x0, masked, at, t, labels, None)
        weight = self._weight(t).float()[row] / eligible.sum().clamp(min=1)
        if self.mse_coef:
            logits = self.net.logits(hidden, condition, at, self.codec.mask_id).float()
            ce = F.cross_entropy(logits, targets, reduction="none")
            clean = self.latent_rows(targets) if clean is None else clean
            guess = process.estimate(logits.log_softmax(dim=1), self.latent_rows(), "soft")
            squared = (clean - guess).square().sum(dim=1)
            mean = squared.detach().sum() / max(1, len(at))
            terms = {"loss": (weight * (ce + self.mse_coef * squared)).sum(), "squared_error": mean}
        else:
            ce = self.net.cross_entropy(hidden, condition, at, targets, self.codec.mask_id)
            terms = {"loss": (weight * ce).sum()}
        return {**terms, "cross_entropy": ce.detach().sum() / max(1, len(at))}

    def _encode(
        self,
        batch: Batch,
        x0: Tensor,
        masked: Tensor,
        at: Tensor,
        t: Tensor,
        labels: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states and condition of rows with masks; the clean latents (N, hidden) where there is a latent.

        ``noise`` (N, hidden) is that of the latent; None draws it.
        """
        tokens = masking.corrupt(x0, masked, self.codec.mask_id)
        condition = self.net.condition(noise_level(self.alpha, t) if self.timed else None, labels)
        where = layout(batch, self.net)
        embedded, clean = self.net.embed(tokens), None
        if self.latent == "on":
            clean = self.latent_rows(x0.flatten()[at])
            noise = torch.randn_like(clean) if noise is None else noise
            gamma = self.gamma.keep(t).float()[at // x0.shape[1]].unsqueeze(1)
            embedded = self.net.fuse(embedded, at, process.noisy_latent(clean, noise, gamma, self.latent_path))
        elif self.latent == "selfcond" and self.training:
            embedded = self._self_conditioned(embedded, condition, masked, where)
        return self.net.trunk(embedded, condition, **where), condition, clean

    def _self_conditioned(
        self, embedded: Tensor, condition: Tensor, masked: Tensor, where: dict[str, Tensor | None]
    ) -> Tensor:
        """Half of the rows see the mean latent of their own first prediction.

        Source: arXiv 2208.04202, self-conditioning.
        """
        chosen = torch.rand(len(embedded), 1, device=embedded.device) < SELF_CONDITIONED
        at = (masked & chosen).flatten().nonzero().squeeze(1)
        with torch.no_grad():
            hidden = self.net.trunk(embedded, condition, **where)
            logits = self.net.logits(hidden, condition, at, self.codec.mask_id).float()
            guess = process.estimate(logits.log_softmax(dim=1), self.latent_rows(), "soft")
        return self.net.fuse(embedded, at, guess)

    def _weight(self, t: Tensor) -> Tensor:
        if self.weight == "uniform":
            return torch.ones_like(t)
        if self.discrete_steps:
            return 1.0 / t.clamp(max=1.0 - 1e-4)
        return self.alpha.weight(t)

    def _times(self, rows: int) -> Tensor:
        """One time per row, (B,) float64, spread evenly over the global batch of an update."""
        world = getattr(self._trainer, "world_size", 1)
        parts = getattr(self._trainer, "accumulate_grad_batches", 1) if self.training else 1
        rank = getattr(self._trainer, "global_rank", 0)
        part = (self.micro_batches - 1) % parts
        row = torch.arange(rows, device=self.device, dtype=torch.float64)
        index = (row * parts + part) * world + rank  # dealt out in turn, so that all ranks have as much to do
        uniform = torch.rand(rows, dtype=torch.float64, device=self.device)
        u = masking.stratified(uniform, index, rows * world * parts)
        t = 1.0 - (1.0 - self.time_eps) * u  # in (time_eps, 1]
        return masking.discretise(t.clamp(max=1.0 - 1e-12), self.discrete_steps) if self.discrete_steps else t

    def _eligible(self, batch: Batch, x0: Tensor) -> Tensor:
        """Positions that may be masked: real tokens that are not given, and no mask already; (B, L) bool."""
        eligible: Tensor = (x0 != self.codec.mask_id) & batch.get("valid", torch.ones_like(x0, dtype=torch.bool))
        if "given" in batch:
            eligible = eligible & ~batch["given"]
        lossy = getattr(getattr(self._trainer, "datamodule", None), "max_bad_fraction", 0.0)
        if not lossy and not bool(eligible.any(dim=1).all()):  # else lost documents leave rows without a token
            row = int((~eligible.any(dim=1)).nonzero()[0])
            key = batch["key"][row] if "key" in batch else f"row {row}"
            raise ValueError(
                f"The row {key} has no token that could be masked: all of it is padding or given. Drop empty documents"
                " from the data, raise data.length, or let some go with data.max_bad_fraction=0.01."
            )
        return eligible

    def _labels(self, batch: Batch) -> Tensor | None:
        if not self.num_classes:
            return None
        if "label" not in batch:
            raise ValueError(
                f"A network of {self.num_classes} classes (module.net.num_classes) needs labels; the batch holds "
                f"{sorted(batch)}. Point data at labelled shards, or set module.net.num_classes=0."
            )
        self._check_labels(batch["label"])
        return cast(Tensor, batch["label"])

    def _check_labels(self, labels: Tensor) -> None:
        wrong = (labels < -1) | (labels >= max(1, self.num_classes))
        if bool(wrong.any()):
            raise ValueError(
                f"Label {int(labels[wrong][0])} came; the model has {self.num_classes} classes, 0 to"
                f" {self.num_classes - 1}, and -1 for none. Set module.net.num_classes or the labels."
            )

    # ---- likelihood -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, *, seeds: Sequence[int] | None = None, **settings: Any) -> Tensor:
        """Lower bound on the log-probability of rows, (B,) nats; see :meth:`bound`, whose arguments it takes."""
        return self.bound(batch, seeds=seeds, **settings).log_likelihood()

    @torch.no_grad()
    def bound(
        self,
        batch: Batch,
        *,
        seeds: Sequence[int] | None = None,
        conditional: bool = True,
        draws: int = 4,
        steps: int = 0,
    ) -> Bound:
        """The bound on -log p of rows: cross-entropy of the tokens plus squared error of the latent.

        Args:
            batch: as in training.
            seeds: one per row for masks, times and latents; None draws from the default generator.
            conditional: log p(row | label) where the network knows classes.
            draws: masked versions of every row, spread evenly over the number of masks, or over the steps.
            steps: of the sampler whose bound it is; 0 for continuous time.

        Returns:
            Unbiased draws of the bound. The estimate of the clean latent is the soft one. A network that conditions on
            its own predictions is taken without them.
        """
        x0 = self.codec.encode(batch)
        eligible = self._eligible(batch, x0)
        labels = self._labels(batch) if conditional else None
        if seeds is None:
            seeds = torch.randint(2**62, (len(x0),)).tolist()
        noise = SampleNoise(seeds, x0.device)
        parts = [self._bound_of(batch, x0, eligible, labels, noise, (k, draws, steps)) for k in range(draws)]
        t, ce, continuous = (torch.stack(values) for values in zip(*parts, strict=True))
        return Bound(t, ce, continuous, eligible.sum(dim=1))

    def _bound_of(
        self, batch: Batch, x0: Tensor, eligible: Tensor, labels: Tensor | None, noise: Noise, which: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One draw; ``which`` is its number, how many there are, and the steps of the sampler."""
        rows, length = x0.shape
        share = (noise.uniform(1, dtype=torch.float64).squeeze(1) + which[0]) / which[1]
        uniform = noise.uniform(length, dtype=torch.float64)
        draw = process.masks(uniform, eligible, share, which[2], self.alpha, self.gamma, self.latent_path)
        at = draw.masked.flatten().nonzero().squeeze(1)
        latent = noise.normal(length, self.net.hidden).flatten(0, 1)[at] if self.latent == "on" else None
        hidden, condition, clean = self._encode(batch, x0, draw.masked, at, draw.t, labels, latent)
        row, targets = at // length, x0.flatten()[at]
        nats = torch.zeros(len(at), dtype=torch.float64, device=x0.device)
        error, table = torch.zeros_like(nats), None if clean is None else self.latent_rows()
        for part in torch.arange(len(at), device=x0.device).split(max(1, LOGITS // self.net.vocabulary)):
            log_probs = self.net.logits(hidden, condition, at[part], self.codec.mask_id).float().log_softmax(dim=1)
            nats[part] = -log_probs.gather(1, targets[part].unsqueeze(1)).squeeze(1).double()
            if clean is not None and table is not None:
                error[part] = (clean[part] - process.estimate(log_probs, table, "soft")).square().sum(dim=1).double()
        zero = torch.zeros(rows, dtype=torch.float64, device=x0.device)
        total, squared = (zero.index_add(0, row, values) for values in (nats, error))
        return draw.t, draw.tokens * total, zero if clean is None else draw.latent * squared

    # ---- sampling -------------------------------------------------------------------------------------------------

    def null_condition(self, n: int) -> Condition:
        """No class, n rows."""
        return Condition(label=torch.full((n,), -1))

    def sample(
        self,
        seeds: Sequence[int],
        condition: Condition | None = None,
        *,
        guidance: float = 1.0,
        noise: Noise | None = None,
        steps: int = 128,
        order: Order = "ancestral",
        counts: Counts = "even",
        order_temperature: float = 0.0,
        block: int = 0,
        grid: Grid = "linear",
        cache: bool = True,
        temperature: float = 1.0,
        temperature_start: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        draws: Literal["float64", "float32"] = "float64",
        remask: Remask = "none",
        remask_strength: float = 0.0,
        draft: float = 0.6,
        verify: float = 0.9,
        draft_by: DraftBy = "drawn",
        estimator: Estimator = "hard",
        latent_temperature: float = 1.0,
        latent_top_k: int = 0,
        latents: int = 1,
        latent_strength: float = 1.0,
        eta: float = 1.0,
    ) -> Tensor:
        """Draw rows of tokens; ``evaluations`` then holds how often the network was called for each.

        Args:
            seeds: one per row.
            condition: labels, -1 for none; ``prompt`` (n, P) tokens that the row begins with, -1 where one is to be
                drawn, so that any part of a row can be given.
            guidance: weight w of uncond + w (cond - uncond) on log-probabilities of clean tokens, 1 is off; led by the
                class where the network knows classes, by the prompt otherwise.
            noise: where draws come from instead of the seeds.
            steps: of the reverse process (not for wino).
            order: which positions are revealed: ancestral, random, confidence, margin, entropy, or wino (draft wide,
                verify narrow).
            counts: how many, for orders from random to entropy: even, schedule, floor.
            order_temperature: noise on the order.
            block: positions per block, drawn one block after the other; 0 for all at once.
            grid: of times: linear or cosine.
            cache: skip evaluations that reveal nothing; only without a latent.
            temperature: of the tokens' probabilities; 0 takes the likeliest.
            temperature_start: temperature at the start, falling to ``temperature``; null for constant.
            top_k: likeliest tokens that may be drawn; 0 for all.
            top_p: share of probability that may be drawn.
            draws: float64, or float32, in which rare tokens vanish.
            remask: none, cap, rescale or corrector: revealed tokens may be masked again.
            remask_strength: how much.
            draft: wino: probability above which a token is revealed.
            verify: wino: probability below which it is taken back.
            draft_by: wino: the token whose probability that is: drawn, or likeliest.
            estimator: of the clean latent: hard, soft or sampled.
            latent_temperature: of the probabilities it is made from.
            latent_top_k: likeliest tokens it is made from; 0 for all.
            latents: latents per row whose predictions are averaged.
            latent_strength: factor on the latent; experimental.
            eta: fresh noise of the latent, 1 draws from the posterior, 0 is deterministic.

        Returns:
            (n, L) int64, each below the vocabulary; given tokens are as given.
        """
        settings = dict(locals())  # every argument by its name, as check_settings has them
        how, draw, motion = asked(self.alpha, self.latent_path, settings, shifted=self.net.shifted)
        tokens, free = canvas(self.codec, len(seeds), None if condition is None else condition.prompt, self.device)
        noise = noise or SampleNoise(seeds, self.device)
        labels = self._wanted(len(seeds), condition)
        with torch.no_grad():
            table = None if self.latent == "off" else self.latent_rows()
        model = Denoiser(
            self.net,
            mask_id=self.codec.mask_id,
            schedule=self.alpha,
            gamma=self.gamma,
            noise=noise,
            shape=(tokens.shape[0], tokens.shape[1]),
            latent=self.latent,
            motion=motion,
            table=table,
            timed=self.timed,
            labels=labels,
            guidance=guidance,
            prompt=~free if labels is None and not bool(free.all()) else None,
        )
        watch = None if self._film is None else self._film.append
        with whole(self.net):  # ranks need different numbers of calls
            if isinstance(how, Wino):
                found = wino(model, tokens, free, noise, how, draw, watch)
            else:
                found = reveal(model, tokens, free, noise, how, draw, watch)
        self.evaluations = found.evaluations
        return found.tokens

    def check_settings(self, settings: Mapping[str, Any], condition: Condition | None = None) -> None:
        """See the base."""
        defaults = {name: entry.default for name, entry in inspect.signature(self.sample).parameters.items()}
        known = {**defaults, **settings}
        shifted = getattr(getattr(self._net, "func", self._net), "shifted", False)
        how, *_ = asked(self.alpha, self.latent_path, known, shifted=shifted)
        if isinstance(how, Plan):
            how.windows(self.codec.shape[0])
        given = None if condition is None else condition.prompt
        _, free = canvas(self.codec, 1 if given is None else len(given), given, torch.device("cpu"))
        if known["guidance"] != 1.0 and not self.num_classes and bool(free.all()):
            raise nothing_guides(known["guidance"])

    def trajectory(self, seeds: Sequence[int], condition: Condition | None = None, **settings: Any) -> list[Tensor]:
        """The path of ``sample``, same arguments: the rows at the start and after every step, (n, L) int64 each.

        A position not drawn yet holds ``codec.mask_id``.
        """
        self._film = []
        try:
            self.sample(seeds, condition, **settings)
            return self._film
        finally:
            self._film = None

    def _wanted(self, rows: int, condition: Condition | None) -> Tensor | None:
        """Labels that are asked for, on the device; None where there are no classes."""
        labels = None if condition is None or not self.num_classes else condition.label
        if labels is None:
            return None
        if len(labels) != rows:
            raise ValueError(f"{rows} seeds but {len(labels)} labels came; give one label per seed.")
        self._check_labels(labels)
        return labels.to(self.device)
