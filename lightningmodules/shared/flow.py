"""What normalising flows share: likelihood per dimension, denoising by the score, and calls in equal chunks."""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightningmodules.shared.noise import fold_seed

REDRAWS = 3  # further attempts at a sample that came out infinite or not a number
GRADIENT_BYTES = 2 << 30  # activations held at a time when differentiating samples
FORWARD_ROWS = 1024  # most images per call without gradients


def nll(z: Tensor, logdet: Tensor, var: Tensor | None = None) -> Tensor:
    """Negative log-likelihood per dimension, without the constant 0.5 ln(2 pi).

    Args:
        z: latent, (B, N, D).
        logdet: log |det dz/dx| / (N D) per image, (B,).
        var: variance of the prior per latent dimension, (N, D); None means 1 everywhere, as in the training loss.

    Returns:
        0.5 mean(z^2 / var + ln var) - logdet, (B,), nats per dimension.

    Source: apple/ml-tarflow, training loss (the case var = None).
    """
    square = z.square() if var is None else z.square() / var + var.log()
    return 0.5 * square.mean(dim=(1, 2)) - logdet


def log_prob_per_dim(nll_per_dim: Tensor, levels: int) -> Tensor:
    """Log-probability of dequantised pixels, per dimension.

    Args:
        nll_per_dim: result of ``nll`` for pixels scaled to [-1, 1], (B,).
        levels: number of pixel values L; [-1, 1] spans L bins, so one bin is 2 / L wide.

    Returns:
        -(nll + 0.5 ln(2 pi) + ln(L / 2)), (B,), nats per dimension, density per unit of one pixel value.

    Source: apple/ml-tarflow, bits-per-dimension script (L = 256).
    """
    return -(nll_per_dim + 0.5 * math.log(2 * math.pi) + math.log(levels / 2))


def bits_per_dim(nll_per_dim: Tensor, levels: int) -> Tensor:
    """Turn ``nll`` into bits per dimension of the pixels, (B,); 2.99 at 256 levels is an nll of -3.698."""
    return -log_prob_per_dim(nll_per_dim, levels) / math.log(2)


def tweedie(noisy: Tensor, nll_grad: Tensor, sigma: float, strength: float = 1.0) -> Tensor:
    """Remove Gaussian noise in one step, E[x | y] = y + sigma^2 d log p(y) / dy.

    Args:
        noisy: images y = x + sigma noise, (B, ...).
        nll_grad: gradient of the *sum over images* of ``nll`` at ``noisy``, shape of ``noisy``.
        sigma: standard deviation of the noise.
        strength: factor on the correction; 1 is Tweedie's formula.

    Returns:
        Denoised images, shape of ``noisy``.

    Source: arXiv 2412.06329; apple/ml-tarflow, evaluate_fid (``self_denoising_lr``).
    Differs: theirs takes the gradient of the mean over a chunk and multiplies by the chunk's size; the same number.
    """
    dims = noisy[0].numel()  # ``nll`` is per dimension: the score is -dims times its gradient
    return noisy - strength * sigma**2 * dims * nll_grad


def denoised(
    x: Tensor,
    rows: Sequence[Tensor],
    nll_of: Callable[[Tensor, Tensor], Tensor],
    sigma: float,
    strength: float = 1.0,
) -> Tensor:
    """Tweedie's step for many images, in chunks that bound memory; images do not influence one another.

    Args:
        x: noisy images, (B, ...).
        rows: from ``chunks``; indices into ``x``, which they cover in order.
        nll_of: (images, their indices) to ``nll`` of each, differentiable.
        sigma: standard deviation of the noise.
        strength: see ``tweedie``.

    Returns:
        Denoised images, shape of ``x``.
    """
    parts = []
    with torch.inference_mode(False), torch.enable_grad():
        for chunk in rows:
            noisy = x[chunk].clone().requires_grad_()
            (grad,) = torch.autograd.grad(nll_of(noisy, chunk).sum(), noisy)
            parts.append(tweedie(noisy.detach(), grad, sigma, strength))
    return torch.cat(parts)[: len(x)]


def drawn_again(
    x: Tensor, seeds: Sequence[int], net: nn.Module, draw: Callable[[list[int], list[int]], Tensor]
) -> tuple[Tensor, int]:
    """Replace samples that are infinite or not a number, each from a seed derived from its own; warns how many.

    Args:
        x: samples, (B, ...); changed in place.
        seeds: one per sample.
        net: the network that ``draw`` calls; if it is sharded all ranks try together.
        draw: (seeds, their rows) to samples.

    Returns:
        ``x``, where what stays bad after ``REDRAWS`` attempts is 0, and how many samples were drawn again.
    """
    count = 0
    bad = ~x.isfinite().flatten(1).all(dim=1)
    for attempt in range(1, REDRAWS + 1):
        if not largest(net, int(bad.any()), x.device):
            break
        rows = bad.nonzero().flatten().tolist() or [0]  # a rank without bad samples keeps the others company
        again = draw([fold_seed(seeds[row], attempt) for row in rows], rows)
        if bad.any():
            warnings.warn(f"{len(rows)} of {len(seeds)} samples were not finite; drawn again.", stacklevel=3)
            count += len(rows)
            x[rows] = again
            bad = ~x.isfinite().flatten(1).all(dim=1)
    if bad.any():
        warnings.warn(f"{int(bad.sum())} of {len(seeds)} samples stay not finite; shown grey.", stacklevel=3)
        x[bad] = 0.0
    return x, count


def chunks(net: nn.Module, count: int, most: int, device: torch.device) -> list[Tensor]:
    """Rows 0 .. count - 1, ``most`` at a time; the last again if ``net`` is sharded and another rank has more."""
    parts = list(torch.arange(count, device=device).split(most))
    return parts + parts[-1:] * (largest(net, len(parts), device) - len(parts))


def largest(net: nn.Module, number: int, device: torch.device) -> int:
    """Maximum over ranks where ``net`` is sharded, since they must call it together."""
    if not any(isinstance(parameter, DTensor) for parameter in net.parameters()):
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def eager() -> AbstractContextManager[object]:
    """Keep compiled blocks eager while sampling: the compiler would unroll the token loop."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
