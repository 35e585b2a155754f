"""The causal transformer inside a flow block of STARFlow, with all the options its checkpoints come in."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningmodules.shared.attention import LayerNorm
from lightningmodules.starflow import process

NORMS = ("layer_norm", "rms_norm", "none")
Rotation = tuple[Tensor, Tensor]  # cosines and sines, (tokens, head_dim / 2) float32 each


@dataclass(frozen=True)
class Shape:
    """What the blocks of a network are made of; a deep block may differ from the others.

    Attributes:
        channels: width of the transformer.
        head_dim: features per attention head.
        num_heads: query heads; None for channels / head_dim.
        num_kv_heads: heads of keys and values, each shared by neighbouring query heads; None for ``num_heads``.
        expansion: width of the perceptrons in units of ``channels``.
        norm_type: "layer_norm", "rms_norm" or "none", before attention and perceptron.
        use_bias: biases inside the transformer layers.
        use_qk_norm: normalise queries and keys head by head, before they turn.
        use_post_norm: normalise each branch before it is added.
        use_swiglu: gated perceptrons, tanh-GELU(gate) times up.
        use_final_norm: normalise the output of the last layer.
        rope: rotary positions; False for learnt ones.
        hf_style_rope: pair feature i with i + head_dim / 2.
        rope_1d: number text and image tokens through, as a language model does.
        project_text: map text features to the width; False if they have it already.
        dropout: dropout probability of every residual branch (the paper uses none).
    """

    channels: int
    head_dim: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    expansion: float = 4.0
    norm_type: str = "layer_norm"
    use_bias: bool = True
    use_qk_norm: bool = False
    use_post_norm: bool = False
    use_swiglu: bool = False
    use_final_norm: bool = False
    rope: bool = True
    hf_style_rope: bool = False
    rope_1d: bool = False
    project_text: bool = True
    dropout: float = 0.0

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.num_heads or self.channels // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.heads

    def check(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: names the setting.
        """
        for name in ("channels", "head_dim", "num_heads", "num_kv_heads", "expansion"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"module.net.{name}={value}: expected a number > 0.")
        if self.num_heads is None and self.channels % self.head_dim:
            raise ValueError(
                f"channels={self.channels} is not a multiple of head_dim={self.head_dim}. Set module.net.channels to"
                f" e.g. {max(1, self.channels // self.head_dim) * self.head_dim}, or module.net.head_dim, or num_heads."
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"module.net.num_kv_heads={self.kv_heads} does not divide the {self.heads} query heads"
                " (module.net.num_heads, or channels / head_dim). Set a divisor."
            )
        if self.norm_type not in NORMS:
            raise ValueError(f"module.net.norm_type={self.norm_type!r}: expected one of {', '.join(NORMS)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"module.net.dropout={self.dropout}: expected 0 <= dropout < 1. The paper uses 0.")


class RMSNorm(nn.Module):
    """Division by the root mean square, computed in float32; the weight is stored as its difference from 1.

    Source: apple/ml-starflow, RMSNorm (eps 1e-6).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype of ``x``."""
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), 1e-6).to(x.dtype)


def _norm(shape: Shape) -> nn.Module:
    if shape.norm_type == "none":
        return nn.Identity()
    return RMSNorm(shape.channels) if shape.norm_type == "rms_norm" else LayerNorm(shape.channels)


class Attention(nn.Module):
    """Pre-normalised causal attention over rotated queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.half_split = shape.hf_style_rope
        width = self.heads * self.head_dim
        self.norm = _norm(shape)
        # rows of qkv: all query heads, then all key heads, then all value heads
        self.qkv = nn.Linear(shape.channels, width + 2 * self.kv_heads * self.head_dim, bias=shape.use_bias)
        self.proj = nn.Linear(width, shape.channels, bias=shape.use_bias)
        self.query_norm = RMSNorm(self.head_dim) if shape.use_qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if shape.use_qk_norm else None
        self.post_norm = RMSNorm(shape.channels) if shape.use_post_norm else None
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Return the residual branch for a whole sequence, (rows, tokens, channels), shape of ``x``."""
        rows, tokens, _ = x.shape
        parts = self.qkv(self.norm(x)).view(rows, tokens, -1, self.head_dim).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # (rows, heads, tokens, head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q = process.rotate(q, *rotation, half_split=self.half_split)
            k = process.rotate(k, *rotation, half_split=self.half_split)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        out = self.proj(out.transpose(1, 2).reshape(rows, tokens, -1))
        return self.dropout(out if self.post_norm is None else self.post_norm(out))


class Mlp(nn.Module):
    """Pre-normalised perceptron, the second half of a transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = int(shape.channels * shape.expansion)
        self.norm = _norm(shape)
        self.post_norm = RMSNorm(shape.channels) if shape.use_post_norm else None
        self.gate_proj: nn.Linear | None = None
        if shape.use_swiglu:
            self.gate_proj = nn.Linear(shape.channels, hidden, bias=shape.use_bias)
            self.up_proj = nn.Linear(shape.channels, hidden, bias=shape.use_bias)
            self.down_proj = nn.Linear(hidden, shape.channels, bias=shape.use_bias)
        else:
            self.main = nn.Sequential(
                nn.Linear(shape.channels, hidden, bias=shape.use_bias),
                nn.GELU(),
                nn.Linear(hidden, shape.channels, bias=shape.use_bias),
            )
        self.dropout = nn.Dropout(shape.dropout)

    @property
    def up(self) -> nn.Linear:
        """The layer that widens."""
        return self.up_proj if self.gate_proj is not None else cast(nn.Linear, self.main[0])

    @property
    def down(self) -> nn.Linear:
        """The layer that narrows again."""
        return self.down_proj if self.gate_proj is not None else cast(nn.Linear, self.main[2])

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual branch, shape of ``x`` (..., channels)."""
        x = self.norm(x)
        if self.gate_proj is not None:
            x = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        else:
            x = self.main(x)
        return self.dropout(x if self.post_norm is None else self.post_norm(x))


class TransformerLayer(nn.Module):
    """Attention and perceptron, each added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """Transform a whole sequence, (rows, tokens, channels)."""
        x = x + self.attention(x, rotation)
        return x + self.mlp(x)
