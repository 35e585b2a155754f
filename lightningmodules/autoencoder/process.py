"""The losses of an autoencoder as plain functions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of diagonal Gaussians from the standard normal, a scalar: mean over latent values, in nats.

    Source: arXiv 1312.6114, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures that span [-1, 1]."""
    return 10.0 * torch.log10(4.0 / mse)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a critic that should say > 1 about data and < -1 about reconstructions, a scalar.

    Source: arXiv 1705.02894 (geometric GAN); apple/ml-starflow, decoder fine-tuning.
    """
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def lecam(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Keep a critic's answers near the running mean of its answers about the other kind, a scalar.

    Args:
        real: answers about data.
        fake: answers about reconstructions.
        real_mean: running mean of ``real``, a scalar.
        fake_mean: running mean of ``fake``, a scalar.

    Source: arXiv 2104.03310, equation 5.
    """
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()
