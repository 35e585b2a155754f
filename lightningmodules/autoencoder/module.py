"""The autoencoder as a room of the house: reconstruction, a prior on latents, and a critic."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from lightningmodules.autoencoder import process
from lightningmodules.autoencoder.weights import translate
from lightningmodules.base import GenerativeModule
from lightningmodules.shared.autoencoder import AutoencoderKL, load
from lightningmodules.shared.codecs import Batch, Pixels
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import Noise, SampleNoise


class Autoencoder(GenerativeModule):
    """Trains pictures -> latents -> pictures, or only the way back, from noisy latents.

    With ``trained="decoder"`` the encoder stays as it is and Gaussian noise is added to the scaled latents: a decoder
    that cleans what a flow of noisy latents draws.

    Args:
        net: builds the network, ``AutoencoderKL`` with its arguments.
        codec: pixels in [-1, 1].
        optimizer: takes the parameters, returns the optimiser. One step serves autoencoder and critic.
        schedule: ``(step, total_steps) -> factor`` of the learning rate.
        ema_decays: one average of the weights per decay in (0, 1).
        trained: "all", or only the "decoder".
        weights: folder or file to start from, see ``shared.autoencoder.load``; None starts from random weights.
        latent_noise: standard deviation of noise added to latents times ``net.scaling_factor``, >= 0.
        reconstruction: "mse" or "l1", on pictures that span [0, 1].
        kl_weight: weight of the divergence from the standard normal, per latent value, >= 0.
        perceptual: builds a network that compares pictures: ``Lpips``, ``ConvNext``, several as ``Together``, or
            ``RandomFeatures``; None for none.
        perceptual_weight: its weight, >= 0.
        critic: builds a network that judges patches, ``PatchCritic``; None for none.
        critic_weight: weight of its judgement, >= 0.
        critic_start: updates before its judgement counts.
        lecam_weight: weight of the penalty that keeps a critic from overfitting, >= 0.
        lecam_decay: of the running means of its answers, 0..1.

    Source: arXiv 2112.10752 (autoencoder); arXiv 2506.06276, appendix, and apple/ml-starflow (decoder on noisy
    latents: mean square, perceptual distances, hinge critic with LeCam from the first update).
    Differs: one optimiser serves both networks; pictures reach LPIPS and the critic as [-1, 1], theirs as [0, 1].
    """

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    codec: Pixels

    def __init__(
        self,
        *,
        net: Callable[[], AutoencoderKL],
        codec: Pixels,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float] | None = None,
        ema_decays: Sequence[float] = (),
        trained: Literal["all", "decoder"] = "all",
        weights: str | None = None,
        latent_noise: float = 0.0,
        reconstruction: Literal["mse", "l1"] = "mse",
        kl_weight: float = 1e-6,
        perceptual: Callable[[], nn.Module] | None = None,
        perceptual_weight: float = 1.0,
        critic: Callable[[], nn.Module] | None = None,
        critic_weight: float = 0.1,
        critic_start: int = 0,
        lecam_weight: float = 1e-3,
        lecam_decay: float = 0.999,
    ) -> None:
        super().__init__(codec=codec, optimizer=optimizer, schedule=schedule, ema_decays=ema_decays)
        if trained not in ("all", "decoder") or reconstruction not in ("mse", "l1"):
            raise ValueError(
                f"module.trained={trained!r} must be all or decoder, module.reconstruction={reconstruction!r} mse"
                " or l1."
            )
        numbers = {"latent_noise": latent_noise, "kl_weight": kl_weight, "perceptual_weight": perceptual_weight}
        numbers |= {"critic_weight": critic_weight, "lecam_weight": lecam_weight, "critic_start": critic_start}
        for name, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"module.{name}={value}: expected a number >= 0; 0 is off.")
        if not 0 <= lecam_decay <= 1:
            raise ValueError(f"module.lecam_decay={lecam_decay}: expected 0..1. Type e.g. module.lecam_decay=0.999.")
        self._net, self.trained, self.start, self.latent_noise = net, trained, weights, latent_noise
        self.reconstruction, self.kl_weight = reconstruction, kl_weight
        self._perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self._critic, self.critic_weight, self.critic_start = critic, critic_weight, critic_start
        self.lecam_weight, self.lecam_decay = lecam_weight, lecam_decay
        self.critic: nn.Module | None = None
        self._judge: list[nn.Module] = []  # a list, so that what is never trained is never saved either
        self.register_buffer("answers", torch.zeros(2))  # running means of the critic's answers: data, reconstructions

    answers: Tensor

    # ---- networks -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Create the networks."""
        self.net = self._net()
        if self.start is not None:
            self.net.load_state_dict(load(self.start, self._net).state_dict())
        if self.net.in_channels != self.codec.channels or self.codec.size % self.net.factor:
            raise ValueError(
                f"The autoencoder reads {self.net.in_channels} channels and halves to 1/{self.net.factor}; the codec"
                f" makes {self.codec.shape}. Set module.net.in_channels, out_channels and block_out_channels to fit."
            )
        if self.trained == "decoder":
            for part in (self.net.encoder, self.net.quant_conv):
                if part is not None:
                    part.requires_grad_(False)
        if self._critic is not None:
            self.critic = self._critic()

    def configure_model(self) -> None:
        """As every room; then a sharded autoencoder gathers its own weights for both ways."""
        super().configure_model()
        for name in ("encode", "decode"):
            register_fsdp_forward_method(self.net, name)  # does nothing unless the network is sharded

    def averaged(self) -> dict[str, nn.Module]:
        """The autoencoder, without critic."""
        return {"net": self.net}

    def shard_units(self) -> list[nn.Module]:
        """The critic: it is trained on all ranks' pictures, too."""
        return [] if self.critic is None else [self.critic]

    @classmethod
    def translate(cls, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys of diffusers to ours, see ``shared.autoencoder.translate``."""
        return translate(official)

    # ---- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruction, divergence, and what the judges say.

        Autoencoder and critic are trained by one sum: each term reaches one of them only.

        Returns:
            ``loss``; ``mse`` and ``psnr`` of the reconstruction; ``kl`` in nats per latent value; ``scale``, the
            factor that would bring latents to unit variance; and the terms that are switched on.
        """
        x = self.codec.encode(batch)
        mean, logvar = self._moments(x)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        noisy = z + self.latent_noise / self.net.scaling_factor * torch.randn_like(z) if self.latent_noise else z
        again = self.net.decode(noisy).float()
        mse = F.mse_loss(again, x)
        terms = {"mse": mse, "psnr": process.psnr(mse.detach()), "kl": process.kl(mean, logvar)}
        terms["scale"] = 1.0 / z.detach().std()
        loss = 0.25 * mse if self.reconstruction == "mse" else 0.5 * F.l1_loss(again, x)
        if self.trained == "all":
            loss = loss + self.kl_weight * terms["kl"]
        with torch.autocast(x.device.type, enabled=False):  # the judges are float32, as in the authors' code
            if self._perceptual is not None:
                terms["perceptual"] = self._judge_on(self._perceptual, x.device)(again, x)
                loss = loss + self.perceptual_weight * terms["perceptual"]
            if self.critic is not None:
                judged, extra = self._judged(self.critic, x, again)
                loss, terms = loss + judged, {**terms, **extra}
        return {"loss": loss, **terms}

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.trained == "all":
            return self.net.encode(x)
        with torch.no_grad():
            return self.net.encode(x)

    def _judged(self, critic: nn.Module, x: Tensor, again: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the critic adds to the loss of the autoencoder, and its own loss."""
        shown = again.detach().requires_grad_(torch.is_grad_enabled())
        verdict = -critic(shown).mean()
        moves = verdict.detach()
        if torch.is_grad_enabled():  # the slope at the picture, and nothing for the critic's own weights
            (slope,) = torch.autograd.grad(verdict, shown)
            moves = moves + ((again - shown.detach()) * slope).sum()
        real, fake = critic(x), critic(again.detach())
        own = process.discriminator_loss(real, fake)
        if self.training:
            now = torch.stack([real.detach().mean(), fake.detach().mean()]).float()
            if dist.is_initialized():  # the same means on every rank
                dist.all_reduce(now)
                now /= dist.get_world_size()
            self.answers.lerp_(now, 1.0 - self.lecam_decay)
        keep = process.lecam(real, fake, *self.answers)
        counts = float(self.updates >= self.critic_start)
        loss = counts * self.critic_weight * moves + own + self.lecam_weight * keep
        return loss, {"gan": moves, "critic": own, "lecam": keep}

    def _judge_on(self, make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
        """The network that compares pictures, made when it is first needed."""
        if not self._judge:
            self._judge.append(make().eval().requires_grad_(False))
        return self._judge[0].to(device)

    # ---- use ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pictures, and what comes back from the means of their latents, (B, C, H, W) in [-1, 1] each.

        A decoder of noisy latents gets them with noise, the same at every call.
        """
        x = self.codec.encode(batch)
        z = self.net.encode(x)[0]
        if self.latent_noise:
            noise = SampleNoise(range(len(z)), z.device).normal(*z.shape[1:])
            z = z + self.latent_noise / self.net.scaling_factor * noise
        return x, self.net.decode(z).clamp(-1.0, 1.0)

    def null_condition(self, n: int) -> Condition:
        """An autoencoder is told nothing."""
        return Condition(label=torch.full((n,), -1))

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        condition: Condition | None = None,
        *,
        guidance: float = 1.0,
        noise: Noise | None = None,
    ) -> Tensor:
        """Decode standard normal latents over ``net.scaling_factor``; pictures only as far as latents are normal.

        Args:
            seeds: one per picture.
            condition: not used.
            guidance: not used.
            noise: where latents come from instead of the seeds.

        Returns:
            (n, C, H, W) float32, clipped to [-1, 1].
        """
        side = self.codec.size // self.net.factor
        draw = noise or SampleNoise(seeds, self.device)
        z = draw.normal(self.net.latent_channels, side, side).to(self.device) / self.net.scaling_factor
        return self.net.decode(z).float().clamp(-1.0, 1.0)
