"""TarFlow as a room of the house: draws noise, calls the formulas, reports terms, samples and likelihoods."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightningmodules.base import GenerativeModule
from lightningmodules.shared import flow
from lightningmodules.shared.codecs import Batch, Pixels
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import Noise, SampleNoise
from lightningmodules.tarflow import process
from lightningmodules.tarflow.network import DROPPED, TarFlowNet
from lightningmodules.tarflow.sampler import Guidance, invert
from lightningmodules.tarflow.weights import translate


class TarFlow(GenerativeModule):
    """Exact maximum likelihood of noisy pixels under a transformer autoregressive flow.

    Args:
        net: builds the network, ``TarFlowNet`` with its arguments.
        codec: pixels in [-1, 1].
        optimizer: takes the parameters, returns the optimiser.
        schedule: ``(step, total_steps) -> factor`` of the learning rate.
        ema_decays: one average of the weights per decay in (0, 1).
        noise_std: standard deviation sigma of Gaussian noise, in units where pixels span [-1, 1]; >= 0.
        noise_type: "gaussian" adds sigma noise, for samples; "uniform" spreads every pixel value over its bin, for
            likelihoods (sigma is then not used and samples are not denoised).
        label_drop: probability with which a label is replaced by "no class" in training, 0..1.

    Source: arXiv 2412.06329; apple/ml-tarflow.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    likelihood = "exact"
    codec: Pixels

    def __init__(
        self,
        *,
        net: Callable[[], TarFlowNet],
        codec: Pixels,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float] | None = None,
        ema_decays: Sequence[float] = (),
        noise_std: float = 0.05,
        noise_type: Literal["gaussian", "uniform"] = "gaussian",
        label_drop: float = 0.1,
    ) -> None:
        super().__init__(codec=codec, optimizer=optimizer, schedule=schedule, ema_decays=ema_decays)
        if noise_type not in ("gaussian", "uniform"):
            raise ValueError(f"module.noise_type={noise_type!r}: expected gaussian (samples) or uniform (likelihoods).")
        if noise_std < 0:
            raise ValueError(
                f"module.noise_std={noise_std}: expected >= 0, in units where pixels span -1..1."
                " Type e.g. module.noise_std=0.05, the paper's value for 64 pixels."
            )
        if not 0 <= label_drop <= 1:
            raise ValueError(
                f"module.label_drop={label_drop}: expected a probability, 0..1."
                " Type e.g. module.label_drop=0.1, the paper's value."
            )
        self._net, self.noise_std, self.noise_type, self.label_drop = net, noise_std, noise_type, label_drop
        self.num_classes = int(getattr(net, "keywords", {}).get("num_classes", 0))
        self.redrawn = 0  # samples that were not finite and were drawn again, since the program started
        self._moments: list[Tensor] = []  # E[z^2] of this update's micro-batches, if volumes are preserved

    # ---- networks -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Create the network."""
        self.net = self._net()
        made = (self.net.in_channels, self.net.img_size, self.net.img_size)
        if made != tuple(self.codec.shape):
            raise ValueError(
                f"The network reads images of shape {made} (module.net.in_channels, img_size), the codec makes "
                f"{tuple(self.codec.shape)} (module.codec.channels, size). Set both from data.channels and data.size."
            )
        self.num_classes = self.net.num_classes

    def averaged(self) -> dict[str, nn.Module]:
        """The network."""
        return {"net": self.net}

    def shard_units(self) -> list[nn.Module]:
        """The flow blocks."""
        return list(self.net.steps)

    @classmethod
    def translate(cls, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys of apple/ml-tarflow to ours, see ``weights.translate``."""
        return translate(official)

    def flops_per_sample(self) -> float:
        """Forward pass of one image, counted three times: the backward pass costs two."""
        return 3.0 * self.net.flops()

    # ---- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Negative log-likelihood of noisy images, in nats per dimension without the constant 0.5 ln(2 pi).

        Returns:
            ``loss``; ``logdet``, the mean of log |det dz/dx| / (N D); ``z2_block<k>``, the mean square of the output of
            every block, 1 after the last one when the latent is standard normal.
        """
        image = batch["image"]
        draw = torch.rand if self.noise_type == "uniform" else torch.randn
        x = self._noisy(batch, draw(image.shape, device=image.device))
        y = self._labels(batch)
        if y is not None and self.training and self.label_drop:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.label_drop, DROPPED)
        out = self.net(x, y)
        terms = {"loss": flow.nll(out.z, out.logdet).mean(), "logdet": out.logdet.mean()}
        with torch.no_grad():
            terms |= {f"z2_block{k}": z.square().mean() for k, z in enumerate(out.blocks)}
            if self.training and not self.net.nvp:
                self._moments.append(out.z.square().mean(dim=0))
        return terms

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Update the weights, and with them the prior's variance where volumes are preserved.

        It happens here, inside the update, so that a checkpoint of the update holds both.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._moments:
            moment = torch.stack(self._moments).mean(dim=0)
            self._moments.clear()
            moment = self.trainer.strategy.reduce(moment, reduce_op="mean")
            updated = process.updated_variance(self.net.var, moment)
            self.net.var.copy_(torch.where(moment.isfinite(), updated, self.net.var))  # not a skipped update

    def _noisy(self, batch: Batch, draw: Tensor) -> Tensor:
        if self.noise_type == "uniform":
            return self.codec.dequantize(batch, draw)
        return self.codec.encode(batch) + self.noise_std * draw

    def _labels(self, batch: Batch) -> Tensor | None:
        if not self.num_classes:
            return None
        if "label" not in batch:
            raise ValueError(
                f"A network of {self.num_classes} classes (module.net.num_classes) needs labels; the batch holds "
                f"{sorted(batch)}. Point data at labelled shards, or set module.net.num_classes=0."
            )
        y: Tensor = batch["label"]
        if y.device.type == "cpu":  # elsewhere reading the values would make the device wait
            self.net.check_labels(y)
        return y

    # ---- likelihood -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, *, seeds: Sequence[int] | None = None, conditional: bool = True) -> Tensor:
        """Log-probability of images under uniform dequantisation, a lower bound for the discrete pixels.

        It describes the density that ``sample`` draws from before denoising, whatever noise the training used; low
        values are to be expected only after training with uniform noise.

        Args:
            batch: images, and labels if ``conditional``.
            seeds: one per image for its dequantisation noise; None draws from the default generator.
            conditional: log p(x | label) where the network knows classes; False gives the class-free call (mean of the
                class embeddings), which is what the paper's script reports.

        Returns:
            (B,) nats per image, density per unit of one pixel level.
        """
        shape = batch["image"].shape
        if seeds is None:
            uniform = torch.rand(shape, device=batch["image"].device)
        else:
            uniform = SampleNoise(seeds, batch["image"].device).uniform(*shape[1:])
        x = self.codec.dequantize(batch, uniform)
        per_dim = self._nll(x, self._labels(batch) if conditional else None)
        return flow.log_prob_per_dim(per_dim, self.codec.levels) * math.prod(shape[1:])

    def bits_per_dim(self, batch: Batch, *, seeds: Sequence[int] | None = None, conditional: bool = True) -> Tensor:
        """``log_likelihood`` as bits per dimension, (B,)."""
        nats = self.log_likelihood(batch, seeds=seeds, conditional=conditional)
        return -nats / (math.prod(batch["image"].shape[1:]) * math.log(2))

    @torch.no_grad()
    def classify(
        self, batch: Batch, *, draws: int = 1, noise_scale: float = 1.0, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Most likely class of images under a uniform prior over classes.

        Args:
            batch: images.
            draws: noise draws, of the kind used in training; their log-likelihoods are averaged, >= 1.
            noise_scale: Gaussian noise in units of the training noise, >= 0; with 0 the pixels are taken as they are.
            seeds: one per image for its noise, the same for all classes; None means 0, 1, 2, ...

        Returns:
            (B,) int64, argmax over classes c of the mean of log p(x + noise | c).

        Source: apple/ml-tarflow, the MNIST notebook.
        Differs: theirs forgets the noise at test time.
        """
        if not self.num_classes:
            raise ValueError("Only a network that knows classes can classify; module.net.num_classes is 0.")
        image = batch["image"]
        count, classes = len(image), torch.arange(self.num_classes, device=image.device)
        noise = SampleNoise(range(count) if seeds is None else seeds, image.device)
        draw = noise.uniform if self.noise_type == "uniform" else noise.normal
        total = torch.zeros(count * self.num_classes, device=image.device)
        for _ in range(draws):
            noise_of_draw = draw(*image.shape[1:])
            x = self._noisy(batch, noise_of_draw if self.noise_type == "uniform" else noise_scale * noise_of_draw)
            parts = [
                self._nll(x[rows // self.num_classes], classes[rows % self.num_classes])
                for rows in flow.chunks(self.net, len(total), flow.FORWARD_ROWS, self.device)
            ]
            total -= torch.cat(parts)[: len(total)]
        return total.view(count, self.num_classes).argmax(dim=1)

    def _nll(self, x: Tensor, y: Tensor | None) -> Tensor:
        out = self.net(x, y)
        return flow.nll(out.z, out.logdet, None if self.net.nvp else self.net.var)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noisy images, and what comes back from the flow, (B, C, H, W) each; they differ by rounding only."""
        image = batch["image"]
        noise = SampleNoise(range(len(image)), image.device)  # training draws go on as if nothing had been shown
        draw = noise.uniform if self.noise_type == "uniform" else noise.normal
        x, y = self._noisy(batch, draw(*image.shape[1:])), self._labels(batch)
        z = self.net(x, y).z / self.net.var.sqrt()  # the inversion starts from a standard normal prior
        return x, self.net.unpatchify(invert(self.net, z, y)[-1])

    # ---- sampling -------------------------------------------------------------------------------------------------

    def null_condition(self, n: int) -> Condition:
        """No class, n rows."""
        return Condition(label=torch.full((n,), DROPPED))

    def sample(
        self,
        seeds: Sequence[int],
        condition: Condition | None = None,
        *,
        guidance: float = 1.0,
        noise: Noise | None = None,
        attention_temperature: float = 1.0,
        annealed: bool = True,
        guide_what: str = "ab",
        denoise: float = 1.0,
    ) -> Tensor:
        """Draw images: invert the flow on prior noise, then remove the training noise in one step.

        A sample that is infinite or not a number is drawn again, alone, from a seed derived from its own, up to three
        times, with a warning that says how many (``redrawn`` counts them); if that fails too it becomes grey.

        Args:
            seeds: one per sample.
            condition: labels, -1 for no class; None for no class at all.
            guidance: weight w of uncond + w (cond - uncond) on log-scales and shifts in every block; 1 is off, the
                authors' knob is w - 1. Without a class it needs an ``attention_temperature`` to act on.
            noise: where prior noise (N, D) comes from instead of the seeds; nothing is then drawn again.
            attention_temperature: attention logits of the unconditional prediction are divided by it, > 0.
            annealed: raise the guidance linearly from the first to the last token of a block.
            guide_what: "a" guides log-scales, "b" shifts, "ab" both.
            denoise: factor on the denoising step; 1 is Tweedie's formula, 0 leaves the noise in.

        Returns:
            (n, C, H, W) float32, clipped to [-1, 1].
        """
        guide = Guidance(guidance, attention_temperature, annealed, guide_what)
        y = self._request(len(seeds), condition, denoise, guide)
        z = self._prior(noise or SampleNoise(seeds, self.device))
        x = self._finish(z, y, denoise, guide)
        if noise is None:

            def draw(fresh: list[int], rows: list[int]) -> Tensor:
                z = self._prior(SampleNoise(fresh, self.device))
                return self._finish(z, None if y is None else y[rows], denoise, guide)

            x, again = flow.drawn_again(x, seeds, self.net, draw)
            self.redrawn += again
        return x.clamp(-1.0, 1.0)

    def trajectory(
        self,
        seeds: Sequence[int],
        condition: Condition | None = None,
        *,
        guidance: float = 1.0,
        noise: Noise | None = None,
        attention_temperature: float = 1.0,
        annealed: bool = True,
        guide_what: str = "ab",
        denoise: float = 1.0,
    ) -> list[Tensor]:
        """The path of ``sample``, same arguments: prior noise, the output of every inverted block, the denoised image.

        Returns:
            ``num_blocks`` + 2 tensors, (n, C, H, W) each, not clipped; one fewer when nothing is denoised.
        """
        guide = Guidance(guidance, attention_temperature, annealed, guide_what)
        y = self._request(len(seeds), condition, denoise, guide)
        z = self._prior(noise or SampleNoise(seeds, self.device))
        images = [self.net.unpatchify(tokens) for tokens in (z, *invert(self.net, z, y, guide))]
        return [*images, self._denoised(images[-1], y, denoise)] if denoise * self._sigma else images

    @property
    def _sigma(self) -> float:
        return self.noise_std if self.noise_type == "gaussian" else 0.0

    def _prior(self, noise: Noise) -> Tensor:
        return noise.normal(self.net.tokens, self.net.dims).to(self.device)

    def _finish(self, z: Tensor, y: Tensor | None, denoise: float, guide: Guidance) -> Tensor:
        x = self.net.unpatchify(invert(self.net, z, y, guide)[-1])
        return self._denoised(x, y, denoise) if denoise * self._sigma else x

    def _denoised(self, x: Tensor, y: Tensor | None, strength: float) -> Tensor:
        """Tweedie's step at the same labels."""

        def nll_of(noisy: Tensor, rows: Tensor) -> Tensor:
            out = self.net(noisy, None if y is None else y[rows].clone())
            return flow.nll(out.z, out.logdet)

        rows = flow.chunks(self.net, len(x), self._gradient_rows(), self.device)
        return flow.denoised(x, rows, nll_of, self._sigma, strength)

    def _gradient_rows(self) -> int:
        """Images whose activations fit the budget: about 24 numbers per token, channel and layer are kept."""
        layers = sum(len(block.layers) for block in self.net.steps)
        per_image = 24 * 4 * layers * self.net.steps[0].pos_embed.numel()
        return max(1, flow.GRADIENT_BYTES // per_image)

    def _request(self, count: int, condition: Condition | None, denoise: float, guide: Guidance) -> Tensor | None:
        """Check what is asked for; returns the labels on the device."""
        if denoise < 0:
            raise ValueError(f"sampling.denoise={denoise}: expected >= 0; 1 is Tweedie's formula, 0 is off.")
        y = None if condition is None else condition.label
        if y is not None and len(y) != count:
            raise ValueError(f"{count} seeds but {len(y)} labels came; give one label per seed.")
        if y is not None:
            self.net.check_labels(y)
        if guide.weight != 1.0 and guide.temperature == 1.0 and (y is None or not self.num_classes):
            warnings.warn(
                f"sampling.guidance={guide.weight} has nothing to act on without classes; set "
                "sampling.attention_temperature, e.g. 0.5.",
                stacklevel=3,
            )
        return y.to(self.device) if y is not None and self.num_classes else None
