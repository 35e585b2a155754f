"""The formulas of TarFlow as plain functions: tensors in (noise included), tensors out."""

import math

import torch
from torch import Tensor

PRIOR_RATE = 0.1  # weight of the newest batch in the prior variance of volume-preserving flows


def patchify(image: Tensor, patch: int) -> Tensor:
    """Cut images into tokens.

    Args:
        image: (B, C, H, W), H and W multiples of ``patch``.
        patch: side of a patch in pixels.

    Returns:
        (B, N, D) with N = H W / patch^2 patches in row-major order and D = C patch^2; inside a token the index is
        c patch^2 + row patch + column (channel first).

    Source: apple/ml-tarflow, Model (an unfold with stride = patch).
    """
    b, c, h, w = image.shape
    x = image.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """Put tokens back into square images; the inverse of ``patchify``.

    Args:
        tokens: (B, N, D), N a square number.
        patch: side of a patch in pixels.
        channels: image channels C.

    Returns:
        (B, C, H, W) with H = W = patch sqrt(N).
    """
    b, n, _ = tokens.shape
    side = math.isqrt(n)
    x = tokens.reshape(b, side, side, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, channels, side * patch, side * patch)


def to_latent(x: Tensor, alpha: Tensor | None, mu: Tensor) -> Tensor:
    """Map data to latent, z = (x - mu) exp(-alpha); without ``alpha`` z = x - mu.

    Source: arXiv 2412.06329; apple/ml-tarflow, MetaBlock.forward.
    """
    return x - mu if alpha is None else (x - mu) * torch.exp(-alpha)


def to_data(z: Tensor, alpha: Tensor | None, mu: Tensor) -> Tensor:
    """Map latent to data, x = z exp(alpha) + mu; the inverse of ``to_latent``.

    Source: arXiv 2412.06329; apple/ml-tarflow, MetaBlock.reverse.
    """
    return z + mu if alpha is None else torch.addcmul(mu, z, torch.exp(alpha))


def updated_variance(var: Tensor, second_moment: Tensor, rate: float = PRIOR_RATE) -> Tensor:
    """Move the prior variance towards the second moment of a batch, var + rate (E[z^2] - var).

    Args:
        var: variance of the prior, (N, D).
        second_moment: mean over the global batch of z^2, (N, D).
        rate: weight of the batch.

    Source: apple/ml-tarflow, prior of the volume-preserving model.
    """
    return torch.lerp(var, second_moment, rate)


def guidance_strengths(guidance: float, what: str, *, annealed: bool, tokens: int, dims: int, nvp: bool) -> Tensor:
    """Tabulate g in o + g (o - o_uncond) for every step and every output of a block.

    Args:
        guidance: weight w of the house, uncond + w (cond - uncond); g = w - 1, so 1 is off.
        what: "a" guides log-scales, "b" shifts, "ab" both.
        annealed: raise g linearly over the steps of a block, g_i = g (i + 1) / (tokens - 1).
        tokens: N.
        dims: D.
        nvp: whether a block predicts log-scales before the shifts.

    Returns:
        (N - 1, 2 D) if ``nvp`` else (N - 1, D), float32; row i belongs to the step that produces token i + 1.

    Source: apple/ml-tarflow, MetaBlock.reverse.
    Differs: theirs is called with g; and it knows g > 0 only, while w < 1 (towards unconditional) works here too.
    """
    g = torch.full((tokens - 1, 1), guidance - 1.0)
    if annealed:
        g = g * (torch.arange(1, tokens, dtype=torch.float32) / (tokens - 1)).unsqueeze(1)
    halves = [float("a" in what)] * dims * nvp + [float("b" in what)] * dims
    return g * torch.tensor(halves)


def guide(cond: Tensor, uncond: Tensor, strength: Tensor) -> Tensor:
    """Push predictions away from the unconditional ones, o + g (o - o_uncond)."""
    return torch.addcmul(cond, strength, cond - uncond)
