"""The formulas of STARFlow as plain functions: tensors in (noise included), tensors out."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT = 0.541324854612918  # softplus(UNIT) = 1, so a raw scale of 0 leaves volumes unchanged
THETA = 10000.0  # base of the rotary frequencies
TEXT_PAIRS = 8  # pairs of a head's features that turn with the position in the text
RATIOS = ("21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21")  # width:height
SMALLEST = -15.0  # below it softplus(x) = exp(x) to 1e-7, and its logarithm x


def patchify(image: Tensor, patch: int) -> Tensor:
    """Cut images into tokens.

    Args:
        image: (B, C, H, W), H and W multiples of ``patch``.
        patch: side of a patch in pixels.

    Returns:
        (B, N, D) with N = H W / patch^2 patches in row-major order and D = C patch^2; inside a token the index is
        (row patch + column) C + c, channel last, unlike TarFlow's.

    Source: apple/ml-starflow, Model.patchify.
    """
    b, c, h, w = image.shape
    x = image.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Put tokens back into images; the inverse of ``patchify``.

    Args:
        tokens: (B, N, D).
        patch: side of a patch in pixels.
        size: height and width of the image in patches.

    Returns:
        (B, C, H, W).
    """
    (h, w), b = size, len(tokens)
    x = tokens.reshape(b, h, w, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * patch, w * patch)


def spatial_pairs(pairs: int, *, with_text: bool) -> int:
    """How many of a head's pairs of features turn with the place in the image.

    Raises:
        ValueError: they cannot be shared out evenly between rows and columns.
    """
    spatial = pairs - TEXT_PAIRS * with_text
    if spatial < 2 or spatial % 2:
        raise ValueError(
            f"module.net.head_dim={2 * pairs}: rotary positions need an even number >= 2 of pairs of features for rows"
            f" and columns, but {spatial} are left"
            + (f" after {TEXT_PAIRS} for the text. Set it to 20, 24, 28, ..." if with_text else ". Set 4, 8, 12, ...")
        )
    return spatial


def rotary_angles(
    size: tuple[int, int], text: int, pairs: int, span: int, *, with_text: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """Angles by which pairs of features turn, for a text followed by an image.

    An axis of the image runs over 0 .. ``span`` (times height or width over their geometric mean), whatever the
    resolution, and so does the text on an axis of its own.

    Args:
        size: height and width of the image in tokens.
        text: tokens of text before the image, >= 0.
        pairs: pairs of features per head, half the head's size.
        span: extent of the coordinates, the side in tokens at which the model was first trained.
        with_text: whether ``TEXT_PAIRS`` pairs are set aside for the text's axis; image tokens do not turn there.
        device: where the table is made.

    Returns:
        (text + height width, pairs) float32 radians; pairs belong to rows first, then columns, then the text. A block
        that reads backwards uses the same table: the angle belongs to the place in the sequence, not to the pixel.

    Source: apple/ml-starflow, get_positions and VisionRotaryEmbeddingFast.
    """
    spatial, (h, w) = spatial_pairs(pairs, with_text=with_text), size
    scale = span / math.sqrt(h * w)
    frequencies = _frequencies(spatial // 2, device)
    rows = (torch.arange(h, device=device) * scale).repeat_interleave(w)
    columns = (torch.arange(w, device=device) * scale).repeat(h)
    table = torch.zeros(text + h * w, pairs, device=device)
    table[text:, :spatial] = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    if text and with_text:
        along = torch.arange(text, device=device) * (span / text)
        table[:text, spatial:] = along[:, None] * _frequencies(TEXT_PAIRS, device)
    return table


def line_angles(tokens: int, pairs: int, device: torch.device | str = "cpu") -> Tensor:
    """Angles of a language model: one axis, whole numbers; (tokens, pairs) float32 radians.

    Source: arXiv 2104.09864, equation 15; apple/ml-starflow for blocks that start from a language model.
    """
    return torch.arange(tokens, device=device)[:, None] * _frequencies(pairs, device)


def _frequencies(count: int, device: torch.device | str) -> Tensor:
    return THETA ** -(torch.arange(count, dtype=torch.float32, device=device) / count)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, half_split: bool) -> Tensor:
    """Turn pairs of features.

    Args:
        x: queries or keys, (..., tokens, head_dim).
        cos: cosines of the angles, (tokens, head_dim / 2) float32.
        sin: their sines.
        half_split: feature i is paired with i + head_dim / 2 (language models) instead of 2 i with 2 i + 1.

    Returns:
        (..., tokens, head_dim), dtype of ``x``, computed in float32.
    """
    wide = x.float()
    if half_split:
        a, b = wide.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    a, b = wide[..., 0::2], wide[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def soft_clip(x: Tensor, bound: float) -> Tensor:
    """Keep values within +-bound smoothly, bound tanh(x / bound); 0 switches it off."""
    return bound * torch.tanh(x / bound) if bound else x


def sigma_of(raw: Tensor, *, softplus: bool) -> Tensor:
    """Scale sigma > 0 of a raw output, softplus(r + UNIT) or exp(r); 1 at r = 0."""
    return F.softplus(raw + UNIT) if softplus else raw.exp()


def log_sigma_of(raw: Tensor, *, softplus: bool) -> Tensor:
    """Logarithm of ``sigma_of``, finite for every finite input."""
    if not softplus:
        return raw
    shifted = raw + UNIT
    floored = shifted.clamp(min=SMALLEST)
    return F.softplus(floored).log() + (shifted - floored)


def guide(
    mu: Tensor, sigma: Tensor, mu_null: Tensor, sigma_null: Tensor, omega: float, *, rule: str = "precision"
) -> tuple[Tensor, Tensor]:
    """Combine a conditional and an unconditional Gaussian.

    "precision" is p_c^(1+omega) p_u^(-omega), again a Gaussian, with the ratio of variances clipped at 1 so that it is
    never wider than p_c. "plain" moves the logarithm of the scale and the shift straight on, as TarFlow does.

    Args:
        mu: conditional mean, any shape.
        sigma: conditional standard deviation, > 0.
        mu_null: unconditional mean.
        sigma_null: unconditional standard deviation, > 0.
        omega: weight; 0 leaves the conditional Gaussian, -1 leads to the unconditional mean (and scale, if it is the
            wider one or the rule is "plain").
        rule: "precision" or "plain".

    Returns:
        Mean and standard deviation.

    Source: arXiv 2506.06276, equation 9; apple/ml-starflow, MetaBlock.guidance. Plain: arXiv 2412.06329.
    """
    if rule == "plain":
        return mu + omega * (mu - mu_null), sigma * (sigma / sigma_null) ** omega
    share = omega * (sigma / sigma_null).clamp(max=1.0).square()
    precision = 1.0 + omega - share
    return ((1.0 + omega) * mu - share * mu_null) / precision, sigma * precision.rsqrt()


def log_det(scales: Sequence[Tensor]) -> Tensor:
    """Log-determinant per dimension, (B,), from -log sigma of every block, (B, N, D) each."""
    return torch.stack([scale.mean(dim=(1, 2)) for scale in scales]).sum(dim=0)


def latent_norm(latents: Sequence[Tensor]) -> Tensor:
    """Sum of mean squares of the data and of every latent but the last, a scalar; a penalty against growing latents.

    Source: apple/ml-starflow, ``latent_norm_regularization``.
    """
    return torch.stack([latent.square().mean() for latent in latents]).sum()


def aspect_size(ratio: str, side: int, multiple: int) -> tuple[int, int]:
    """Height and width of a picture of some aspect ratio and about the area of a square.

    Args:
        ratio: "width:height", e.g. "16:9".
        side: of the square.
        multiple: height and width are multiples of it.

    Returns:
        Height and width.

    Raises:
        ValueError: ``ratio`` is not of that form.

    Source: apple/ml-starflow, aspect-ratio buckets: h = round(S / sqrt R), w = round(S sqrt R).
    """
    parts = ratio.split(":")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"sampling.aspect={ratio!r}: expected width:height, e.g. 16:9.")
    root = math.sqrt(int(parts[0]) / int(parts[1]))
    return tuple(max(1, round(length / multiple)) * multiple for length in (side / root, side * root))  # type: ignore[return-value]


def nearest_ratio(height: int, width: int) -> str:
    """Name of the aspect ratio among ``RATIOS`` that a picture comes nearest to, by the logarithm."""
    wanted = math.log(width / height)

    def distance(ratio: str) -> float:
        across, down = ratio.split(":")
        return abs(math.log(int(across) / int(down)) - wanted)

    return min(RATIOS, key=distance)
