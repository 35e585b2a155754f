"""STARFlow as a room of the house: draws noise, calls the formulas, reports terms, samples and likelihoods."""

import inspect
import math
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningmodules.base import GenerativeModule
from lightningmodules.shared import flow
from lightningmodules.shared.codecs import Batch, Latents, Pixels
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import Noise, SampleNoise
from lightningmodules.shared.text_encoders import TextEncoder
from lightningmodules.starflow import process
from lightningmodules.starflow.conditions import Captions, Classes, empty_caption
from lightningmodules.starflow.network import FlowOutput, StarFlowNet
from lightningmodules.starflow.sampler import Plan, inpaint, invert, plan
from lightningmodules.starflow.weights import fill, read_start, translate


class StarFlow(GenerativeModule):
    """Exact maximum likelihood of noisy latents (or pixels) under a deep-shallow autoregressive flow.

    Args:
        net: builds the network, ``StarFlowNet`` with its arguments.
        codec: latents of an autoencoder, or pixels in [-1, 1].
        optimizer: takes the parameters, returns the optimiser.
        schedule: ``(step, total_steps) -> factor`` of the learning rate.
        ema_decays: one average of the weights per decay in (0, 1).
        noise_std: standard deviation sigma of the noise added to what the codec gives; >= 0.
        noise_type: "gaussian" adds sigma noise, for samples; "uniform" spreads every pixel value over its bin, for
            likelihoods of pixels (sigma is then not used and samples are not denoised).
        condition: "label" for one-hot classes, "text" for text features, "none".
        label_drop: probability with which a class or caption is replaced by "nothing" in training, 0..1.
        latent_norm: weight of the penalty on mean squares of the data and of latents between blocks, >= 0.
        text_encoder: builds what turns captions into features; None if features come with the data.
        class_names: caption of every class, for data that has classes and no captions.
        null_caption: the caption that means "nothing"; ``{ratio}`` in it becomes the picture's aspect ratio.
        start: weights to begin with, e.g. of a lower resolution, see ``weights.read_start``; None for random ones.

    Source: arXiv 2506.06276; apple/ml-starflow.
    """

    codec: Latents | Pixels

    def __init__(
        self,
        *,
        net: Callable[[], StarFlowNet],
        codec: Latents | Pixels,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float] | None = None,
        ema_decays: Sequence[float] = (),
        noise_std: float = 0.3,
        noise_type: Literal["gaussian", "uniform"] = "gaussian",
        condition: Literal["none", "label", "text"] = "none",
        label_drop: float = 0.1,
        latent_norm: float = 1e-4,
        text_encoder: Callable[[], TextEncoder] | None = None,
        class_names: Sequence[str] = (),
        null_caption: str = "",
        start: str | None = None,
    ) -> None:
        super().__init__(codec=codec, optimizer=optimizer, schedule=schedule, ema_decays=ema_decays)
        _check(noise_std, noise_type, condition, label_drop, latent_norm)
        if noise_type == "uniform" and not isinstance(codec, Pixels):
            raise ValueError("module.noise_type=uniform spreads pixel values; with latents set it to gaussian.")
        self.likelihood = "exact"
        self._net, self.noise_std, self.noise_type = net, noise_std, noise_type
        self._condition, self.label_drop, self.latent_norm = condition, label_drop, latent_norm
        self._encoder, self._names, self._nothing = text_encoder, class_names, null_caption
        self.start = start
        self._nothing_of_data: Tensor | None = None
        self.told: Classes | Captions | None = None
        self.needs = frozenset({"image"} if isinstance(codec, Pixels) else ())  # type: ignore[misc]
        sizes = getattr(net, "keywords", {})
        if condition == "label":
            self.num_classes = max(0, int(sizes.get("txt_dim", 0)) - 1)
        elif condition == "text":
            self.num_classes = len(class_names)
        self.redrawn = 0  # samples that were not finite and were drawn again, since the program started

    # ---- networks -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the codec with the card of stored latents, and look up what the data stores for the empty caption."""
        data: Any = getattr(self.trainer, "datamodule", None)
        source = data.source_of("train") if hasattr(data, "source_of") else None
        if isinstance(self.codec, Latents) and source is not None:
            card = source.described(getattr(data, "latents", None) or "lat")
            if card:
                self.codec.check(card)
        if source is not None and getattr(data, "features", None):
            self._nothing_of_data = empty_caption(source.described, data.features)
            self._keep_nothing()

    def build(self) -> None:
        """Create the network, and fill it with the weights to start from."""
        state = None if self.start is None else read_start(self.start)
        self.net = self._net()
        made = (self.net.in_channels, self.net.img_size, self.net.img_size)
        if made != tuple(self.codec.shape):
            raise ValueError(
                f"The network reads {made} (module.net.in_channels, img_size), the codec makes"
                f" {tuple(self.codec.shape)} (module.codec). Set both alike."
            )
        told = self.net.txt_dim
        if bool(told) != (self._condition != "none"):
            raise ValueError(
                f"module.condition={self._condition} and module.net.txt_dim={told} do not fit: 0 goes with none, the"
                " number of classes + 1 with label, the width of text features with text."
            )
        if self._condition == "label":
            self.told = Classes(told - 1)
        elif self._condition == "text":
            self.told = Captions(self.net.txt_size, told, self._encoder, self._names, self._nothing)
            self._keep_nothing()
        if state is not None:
            fill(self.net, state, str(self.start))
        self.num_classes = self.told.num_classes if self.told is not None else 0

    def _keep_nothing(self) -> None:
        if isinstance(self.told, Captions) and self._nothing_of_data is not None:
            self.told.keep(self._nothing_of_data)

    def averaged(self) -> dict[str, nn.Module]:
        """The network."""
        return {"net": self.net}

    def shard_units(self) -> list[nn.Module]:
        """The flow blocks."""
        return list(self.net.steps)

    @classmethod
    def translate(cls, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys of apple/ml-starflow to ours, see ``weights.translate``."""
        return translate(official)

    def flops_per_sample(self) -> float:
        """Forward pass of one sample, counted three times: the backward pass costs two."""
        return 3.0 * self.net.flops()

    # ---- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Negative log-likelihood of noisy data, in nats per dimension without the constant 0.5 ln(2 pi).

        Returns:
            ``loss``, with the latent-norm penalty; ``nll``; ``logdet``, the mean of log |det dz/dx| / (N D);
            ``z2``, the mean square of the noise, 1 when it is standard normal; ``sigma_min_block<k>`` and
            ``sigma_max_block<k>``, the range of scales in every block.
        """
        x = self._noisy(batch)
        y = self._told(batch, True)
        if y is not None and self.told is not None and self.training and self.label_drop:
            dropped = torch.rand(len(y), device=y.device) < self.label_drop
            ratio = process.nearest_ratio(*x.shape[-2:])
            y = torch.where(dropped.view(-1, 1, 1), self.told.null(len(y), y.device, ratio), y)
        out = self.net(x, y)
        logdet = process.log_det(out.scales)
        nll = flow.nll(out.z, logdet).mean()
        loss = nll + self.latent_norm * process.latent_norm(out.inputs) if self.latent_norm else nll
        terms = {"loss": loss, "nll": nll, "logdet": logdet.mean(), "z2": out.z.square().mean()}
        with torch.no_grad():
            for k, scale in enumerate(out.scales):
                low, high = torch.aminmax(scale)
                terms |= {f"sigma_min_block{k}": torch.exp(-high), f"sigma_max_block{k}": torch.exp(-low)}
        return terms

    def _noisy(self, batch: Batch, noise: SampleNoise | None = None) -> Tensor:
        """The data as it is trained on; the noise from seeds, or from the default generators."""

        def draw(like: Tensor) -> Tensor:
            return torch.randn_like(like) if noise is None else noise.normal(*like.shape[1:]).to(like.device)

        if isinstance(self.codec, Latents):
            mean, logvar = self.codec.distribution(batch)
            x = (mean + torch.exp(0.5 * logvar) * draw(mean) - self.codec.shift) * self.codec.scale
        elif self.noise_type == "uniform":
            shape, device = batch["image"].shape, batch["image"].device
            uniform = torch.rand(shape, device=device) if noise is None else noise.uniform(*shape[1:]).to(device)
            return self.codec.dequantize(batch, uniform)
        else:
            x = self.codec.encode(batch)
        return x + self.noise_std * draw(x)

    def explain(self, batch: Batch) -> str | None:
        """Where a batch first leaves the finite numbers, for messages: block and token; None if it does not."""
        with torch.no_grad():
            return self.net.overflow(self._noisy(batch), self._told(batch, True))

    # ---- likelihood -----------------------------------------------------------------------------------------------

    @property
    def likelihood_space(self) -> str:
        """What ``log_likelihood`` is the density of: "pixels" (dequantised) or "noisy latents"."""
        return "pixels" if isinstance(self.codec, Pixels) else "noisy latents"

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, *, seeds: Sequence[int] | None = None, conditional: bool = True) -> Tensor:
        """Log-probability of pixels under uniform dequantisation, or log-density of noisy latents.

        In pixel space it is a lower bound for discrete pixels, and low only after training with uniform noise. In
        latent space it is the density of a drawn latent with the training noise, per unit of the scaled latent: nats
        to compare models of the same latents with, never bits of a picture.

        Args:
            batch: data, and what it is conditioned on if ``conditional``.
            seeds: one per sample for its noise; None draws from the default generator.
            conditional: log p(x | class or caption); False gives log p(x | nothing).

        Returns:
            (B,) nats per sample; in pixel space density per unit of one pixel level.
        """
        rows = _rows(batch)
        noise = SampleNoise([secrets.randbits(62) for _ in range(rows)] if seeds is None else seeds, self.device)
        if isinstance(self.codec, Pixels):
            x = self.codec.dequantize(batch, noise.uniform(*self.codec.shape))
        else:
            x = self._noisy(batch, noise)
        per_dim, dims = self._nll(x, self._told(batch, conditional)), x[0].numel()
        if isinstance(self.codec, Pixels):
            return flow.log_prob_per_dim(per_dim, self.codec.levels) * dims
        return -(per_dim + 0.5 * math.log(2 * math.pi)) * dims

    @torch.no_grad()
    def classify(
        self, batch: Batch, *, draws: int = 1, noise_scale: float = 1.0, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Most likely class under a uniform prior over classes.

        Args:
            batch: data.
            draws: noise draws; their log-likelihoods are averaged, >= 1.
            noise_scale: Gaussian noise in units of the training noise, >= 0.
            seeds: one per sample for its noise, the same for all classes; None means 0, 1, 2, ...

        Returns:
            (B,) int64, argmax over classes c of the mean of log p(x + noise | c).
        """
        if self.told is None or self.num_classes < 2:
            raise ValueError("Only a model that knows classes, or their names, can classify; see module.condition.")
        count, kinds = _rows(batch), self.num_classes
        noise = SampleNoise(range(count) if seeds is None else seeds, self.device)
        told = self.told.of_request(Condition(label=torch.arange(kinds)), kinds, self.device)
        total = torch.zeros(count * kinds, device=self.device)
        before = self.noise_std
        try:
            self.noise_std = before * noise_scale
            for _ in range(draws):
                x = self._noisy(batch, noise)
                parts = [
                    self._nll(x[rows // kinds], told[rows % kinds])
                    for rows in flow.chunks(self.net, len(total), flow.FORWARD_ROWS, self.device)
                ]
                total -= torch.cat(parts)[: len(total)]
        finally:
            self.noise_std = before
        return total.view(count, kinds).argmax(dim=1)

    def _told(self, batch: Batch, conditional: bool) -> Tensor | None:
        if self.told is None:
            return None
        if conditional:
            return self.told.of_batch(batch)
        return self.told.null(_rows(batch), self.device)

    def _nll(self, x: Tensor, y: Tensor | None) -> Tensor:
        out: FlowOutput = self.net(x, y)
        return flow.nll(out.z, process.log_det(out.scales))

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noisy data, and what comes back from the flow, (B, *codec.shape) each; they differ by rounding only."""
        x = self._noisy(batch, SampleNoise(range(_rows(batch))))  # training draws go on as if nothing had been shown
        y, size = self._told(batch, True), self.net.grid(x)
        return x, self.net.unpatchify(invert(self.net, self.net(x, y).z, y, size=size)[-1], size)

    # ---- sampling -------------------------------------------------------------------------------------------------

    def null_condition(self, n: int) -> Condition:
        """No class, or the empty caption, n rows."""
        return Condition(label=torch.full((n,), -1)) if self.told is None else self.told.null_condition(n)

    def sample(
        self,
        seeds: Sequence[int],
        condition: Condition | None = None,
        *,
        guidance: float = 1.0,
        noise: Noise | None = None,
        guidance_rule: str = "precision",
        guide_blocks: str = "all",
        attention_temperature: float = 1.0,
        denoise: float = 1.0,
        jacobi_window: int = 0,
        jacobi_tolerance: float = 1e-4,
        jacobi_blocks: str = "shallow",
        aspect: str = "1:1",
    ) -> Tensor:
        """Draw latents (or pixels): invert the flow on prior noise, then remove the training noise in one step.

        A sample that is infinite or not a number is drawn again, alone, from a seed derived from its own, up to three
        times, with a warning that says how many (``redrawn`` counts them); if that fails too it becomes 0.

        Args:
            seeds: one per sample.
            condition: labels (-1 for none) or text features; None for no class, or the empty caption.
            guidance: weight w >= 0 in blocks that see the condition; 1 is off, the authors' omega is w - 1.
            noise: where prior noise (N, D) comes from instead of the seeds; nothing is then drawn again.
            guidance_rule: "precision" multiplies powers of the two Gaussians, "plain" moves shift and log-scale on.
            guide_blocks: "all" blocks that see the condition, or only the "deep" one.
            attention_temperature: attention logits are divided by it, in every block, > 0.
            denoise: factor on the denoising step; 1 is Tweedie's formula, 0 leaves the noise in, for a decoder that was
                trained on noisy latents.
            jacobi_window: tokens of a window that are computed in parallel; 0 goes token by token.
            jacobi_tolerance: largest change in the last pass over a window, relative to 1 + its largest value.
            jacobi_blocks: "shallow" blocks go window by window, or "all".
            aspect: width:height of the pictures, e.g. "16:9", at about the area of the square; captions should say it
                in the words of the training data.

        Returns:
            (n, *codec.shape) float32, of another height and width if ``aspect`` says so; pixels are clipped to [-1, 1].
        """
        how = plan(
            guidance, guidance_rule, guide_blocks, attention_temperature, denoise,
            jacobi_window, jacobi_tolerance, jacobi_blocks, aspect,
        )  # fmt: skip
        y = self._request(len(seeds), condition, how)

        def draw(fresh: Sequence[int], rows: list[int] | None, source: Noise | None = None) -> Tensor:
            told = y if rows is None or y is None else y[rows]
            return self._path(source or SampleNoise(fresh, self.device), told, how)[-1]

        x = draw(seeds, None, noise)
        if noise is None:
            x, again = flow.drawn_again(x, seeds, self.net, draw)
            self.redrawn += again
        return x.clamp(-1.0, 1.0) if isinstance(self.codec, Pixels) else x

    def trajectory(
        self, seeds: Sequence[int], condition: Condition | None = None, *, noise: Noise | None = None, **settings: Any
    ) -> list[Tensor]:
        """The path of ``sample``, same arguments: prior noise, the output of every inverted block, the denoised end.

        Returns:
            ``num_blocks`` + 2 tensors, (n, *codec.shape) each, not clipped; one fewer when nothing is denoised.
        """
        how = plan(**self._defaults() | settings)
        y = self._request(len(seeds), condition, how)
        return self._path(noise or SampleNoise(seeds, self.device), y, how)

    def _defaults(self) -> dict[str, Any]:
        """Settings of ``sample`` as its signature has them."""
        known = inspect.signature(self.sample).parameters.values()
        return {each.name: each.default for each in known if each.kind is each.KEYWORD_ONLY and each.name != "noise"}

    def _path(self, noise: Noise, y: Tensor | None, how: Plan) -> list[Tensor]:
        size = self._size(how.aspect)
        z, null = self._prior(noise, size), self._null(y, how)
        path = invert(self.net, z, y, null, how.guide, size=size, temperature=how.temperature, windows=how.windows)
        images = [self.net.unpatchify(tokens, size) for tokens in (z, *path)]
        return [*images, self._denoised(images[-1], y, how.denoise)] if how.denoise * self._sigma else images

    def inpaint(
        self,
        batch: Batch,
        missing: Tensor,
        seeds: Sequence[int],
        condition: Condition | None = None,
        *,
        iterations: int = 20,
        denoise: float = 1.0,
        jacobi_window: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Fill in a region of data by Metropolis-Hastings, see ``sampler.inpaint``.

        Args:
            batch: data; what it holds in the missing region does not matter.
            missing: (B, 1, H, W) bool, True where to fill in, at the size of the pictures or of their latents. A latent
                value is missing if any of its pixels is.
            seeds: one per row, for the proposals.
            condition: as in ``sample``.
            iterations: proposals, >= 1; the paper uses 20.
            denoise: as in ``sample``; known values are put back afterwards.
            jacobi_window: as in ``sample``.

        Returns:
            (B, *codec.shape) float32, and the share of proposals accepted, (B,).
        """
        side, given = tuple(self.codec.shape[1:]), tuple(missing.shape[2:])
        fits = len(given) == 2 and not (given[0] % side[0] or given[1] % side[1])
        if iterations < 1:
            raise ValueError(f"iterations={iterations}: expected at least 1; the paper uses 20. Type iterations=20.")
        if missing.dtype != torch.bool or not fits:
            raise ValueError(
                f"The mask is {missing.dtype} of {tuple(missing.shape)}; expected bool (B, 1, h, w), h and w multiples"
                f" of {side}."
            )
        if given != side:
            missing = F.adaptive_max_pool2d(missing.float(), side) > 0
        how = plan(**self._defaults() | {"denoise": denoise, "jacobi_window": jacobi_window})
        y = self._request(len(seeds), condition, how)
        clean, noise = self.codec.encode(batch), SampleNoise(seeds, self.device)
        known = clean + self._sigma * noise.normal(*self.codec.shape)
        noises = [self._prior(noise, self._size("1:1")) for _ in range(iterations)]
        uniforms = [noise.uniform() for _ in range(iterations)]
        x, accepted = inpaint(self.net, known, missing, noises, uniforms, y, windows=how.windows)
        if denoise * self._sigma:
            x = self._denoised(x, y, denoise)
        return torch.where(missing, x, clean), accepted

    @property
    def _sigma(self) -> float:
        return self.noise_std if self.noise_type == "gaussian" else 0.0

    def _size(self, aspect: str) -> tuple[int, int]:
        """Height and width in tokens."""
        size = process.aspect_size(aspect, self.net.side, 1)
        if size != (self.net.side, self.net.side) and any(block.pos_embed is not None for block in self.net.steps):
            raise ValueError(
                f"sampling.aspect={aspect} needs rotary positions; this network has learnt ones: 1:1 only."
            )
        return size

    def _prior(self, noise: Noise, size: tuple[int, int]) -> Tensor:
        return noise.normal(size[0] * size[1], self.net.dims).to(self.device)

    def _null(self, y: Tensor | None, how: Plan) -> Tensor | None:
        """What guidance pushes away from; None where it is off."""
        if self.told is None or y is None or how.guide.weight == 1.0:
            return None
        return self.told.null(len(y), y.device, how.aspect)

    def _denoised(self, x: Tensor, y: Tensor | None, strength: float) -> Tensor:
        """Tweedie's step under the same condition."""

        def nll_of(noisy: Tensor, rows: Tensor) -> Tensor:
            return self._nll(noisy, None if y is None else y[rows].clone())

        rows = flow.chunks(self.net, len(x), self._gradient_rows(), self.device)
        return flow.denoised(x, rows, nll_of, self._sigma, strength)

    def caption(self, captions: Sequence[str], aspect: str = "1:1") -> Condition:
        """The condition that stands for captions, one per sample, with the words of the aspect ratio if it has any.

        Raises:
            ValueError: this model is told no captions, or has no text encoder.
        """
        if not isinstance(self.told, Captions):
            raise ValueError(f"This model is told {self._condition}, not captions. Leave the caption out.")
        suffix = self._nothing.replace("{ratio}", aspect) if "{ratio}" in self._nothing else ""
        return Condition(text=self.told.encode([caption + suffix for caption in captions], self.device))

    def _gradient_rows(self) -> int:
        """Samples whose activations fit the budget: about 24 numbers per token, channel and layer are kept."""
        widths = sum(len(block.layers) * block.shape.channels for block in self.net.steps)
        return max(1, flow.GRADIENT_BYTES // (24 * 4 * widths * self.net.tokens))

    def _request(self, count: int, condition: Condition | None, how: Plan) -> Tensor | None:
        """Check what is asked for; returns text tokens on the device."""
        if condition is not None and len(condition) not in (0, count):
            raise ValueError(f"{count} seeds but {len(condition)} conditions came; give one per seed.")
        if self.told is None:
            if how.guide.weight != 1.0:
                warnings.warn(
                    f"sampling.guidance={how.guide.weight} has nothing to act on: module.condition is none.",
                    stacklevel=3,
                )
            return None
        return self.told.of_request(condition, count, self.device, how.aspect)


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _check(noise_std: float, noise_type: str, condition: str, label_drop: float, latent_norm: float) -> None:
    if noise_type not in ("gaussian", "uniform"):
        raise ValueError(f"module.noise_type={noise_type!r}: expected gaussian (samples) or uniform (likelihoods).")
    if condition not in ("none", "label", "text"):
        raise ValueError(f"module.condition={condition!r}: expected none, label or text.")
    if noise_std < 0 or latent_norm < 0:
        raise ValueError(
            f"module.noise_std={noise_std} and module.latent_norm={latent_norm}: expected values >= 0."
            " Type e.g. module.noise_std=0.3 module.latent_norm=1e-4, the paper's."
        )
    if not 0 <= label_drop <= 1:
        raise ValueError(
            f"module.label_drop={label_drop}: expected a probability, 0..1."
            " Type e.g. module.label_drop=0.1, the paper's value."
        )
