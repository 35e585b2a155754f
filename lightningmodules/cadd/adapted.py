"""A causal language model adapted to masked diffusion: Qwen2.5's network without its causal mask, as Dream uses it.

Parameter names are those of transformers' Qwen2 behind its prefix ``model.``, so such weights load by their names.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightningmodules.cadd.network import CaddNet, Fused
from lightningmodules.shared.token_transformer import FREQUENCIES, LOGITS, cross_entropy, rotate, sinusoids, without

Rotation = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Attention in which neighbouring query heads share keys and values."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.dim, self.shared = hidden // heads, heads != kv_heads
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, kv_heads * self.dim)
        self.v_proj = nn.Linear(hidden, kv_heads * self.dim)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """(B, L, hidden) to the same; ``mask`` is True where a query sees a key."""
        q, k, v = (part(x).unflatten(-1, (-1, self.dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, *rotation), rotate(k, *rotation), v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.shared)
        return cast(Tensor, self.o_proj(out.transpose(1, 2).flatten(2)))


class Gated(nn.Module):
    """SwiGLU perceptron."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., hidden)."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """Attention and perceptron, each normalised before and added."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        self.self_attn = Attention(hidden, heads, kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=1e-6)
        self.mlp = Gated(hidden, inner)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """Transform a whole sequence, (B, L, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + cast(Tensor, self.mlp(self.post_attention_layernorm(x)))


class AdaptedNet(Fused, nn.Module):
    """Tokens in, one distribution over the vocabulary per position out; every position sees every other.

    The prediction of a token is read one position before it, as the causal model learnt it; that of the first token
    at the first position itself.

    Args:
        vocabulary: tokens, mask included; the others of ``rows`` are never predicted.
        hidden: width of the residual stream.
        blocks: transformer layers.
        heads: query heads; ``hidden / heads`` is even.
        kv_heads: heads of keys and values, a divisor of ``heads``.
        inner: width of the perceptron.
        rows: rows of embedding and output in the files, which are rounded up; None for ``vocabulary``.
        length: longest sequence; nothing is stored per position.
        rope_base: of the rotary angles.
        latent_gate: see ``CaddNet``.
        added_time: the noise level is added to the embedded tokens by a path that starts at zero; without it the
            network does not know the time.
        recompute: compute every layer again in the backward pass instead of keeping it.

    Raises:
        ValueError: the heads do not fit, or there are fewer rows than tokens.

    Source: transformers, Qwen2; the shift and the missing mask as in Dream (DreamLM) and arXiv 2506.20639 (DiffuCoder).
    """

    shifted = True
    num_classes = 0

    def __init__(
        self,
        vocabulary: int,
        hidden: int = 3584,
        blocks: int = 28,
        heads: int = 28,
        kv_heads: int = 4,
        inner: int = 18944,
        *,
        rows: int | None = None,
        length: int = 2048,
        rope_base: float = 1e6,
        latent_gate: float | None = None,
        added_time: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        rows = rows or vocabulary
        if hidden % heads or hidden // heads % 2 or heads % kv_heads:
            raise ValueError(
                f"module.net: hidden={hidden}, heads={heads} and kv_heads={kv_heads} do not fit: expected hidden /"
                " heads even and kv_heads a divisor of heads, e.g. 3584, 28 and 4."
            )
        if rows < vocabulary:
            raise ValueError(
                f"module.net.rows={rows} is less than the {vocabulary} tokens of the tokenizer, mask included. Set it"
                " to the vocab_size in config.json of the weights."
            )
        self.vocabulary, self.hidden, self.length, self.recompute = vocabulary, hidden, length, recompute
        self.dim, self.rope_base = hidden // heads, rope_base
        self.embed_tokens = nn.Embedding(rows, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, kv_heads, inner) for _ in range(blocks))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.lm_head = nn.Linear(hidden, rows, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.latent_gate = None if latent_gate is None else nn.Parameter(torch.full((hidden,), float(latent_gate)))
        self.time_map = nn.Linear(FREQUENCIES, hidden, bias=False) if added_time else None
        if self.time_map is not None:
            nn.init.zeros_(self.time_map.weight)

    @property
    def table(self) -> Tensor:
        """Embedding of every token, (rows, hidden)."""
        return self.embed_tokens.weight

    def condition(self, sigma: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """What is added to every embedded token, (B, hidden), of noise levels (B,); zeros (1, hidden) without."""
        if self.time_map is None or sigma is None:
            return self.table.new_zeros(1, self.hidden)
        return cast(Tensor, self.time_map(sinusoids(sigma).to(self.time_map.weight.dtype)))

    def trunk(
        self, x: Tensor, condition: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Run the layers; see ``TokenTransformer.trunk``."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        half = torch.arange(0, self.dim, 2, device=x.device).float() / self.dim
        angles = positions.unsqueeze(-1).float() * torch.exp(-math.log(self.rope_base) * half)
        rotation = (angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2))
        if mask is not None and mask.ndim == 3:
            mask = mask.unsqueeze(1)
        x = x + condition.unsqueeze(1)
        for layer in self.layers:
            if self.recompute and self.training:
                x = cast(Tensor, checkpoint(layer, x, rotation, mask, use_reentrant=False))
            else:
                x = layer(x, rotation, mask)
        return x

    def logits(self, hidden: Tensor, condition: Tensor, at: Tensor | None = None, mask_id: int | None = None) -> Tensor:
        """Logits (B, L, V), or (N, V) at flattened positions; see ``TokenTransformer.logits``."""
        rows, length, _ = hidden.shape
        wanted = torch.arange(rows * length, device=hidden.device) if at is None else at
        before = wanted - (wanted % length > 0).long()
        last = self.vocabulary - (mask_id == self.vocabulary - 1)
        found = F.linear(self.norm(hidden.flatten(0, 1)[before]), self.lm_head.weight[:last])
        found = found if mask_id is None or mask_id == last else without(found, mask_id)
        return found.unflatten(0, (rows, length)) if at is None else found

    def forward(self, tokens: Tensor, sigma: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of every position, (B, L, vocabulary), from tokens (B, L) int64."""
        condition = self.condition(sigma, labels)
        return self.logits(self.trunk(self.embed(tokens), condition), condition)

    def cross_entropy(self, hidden: Tensor, condition: Tensor, at: Tensor, targets: Tensor, mask_id: int) -> Tensor:
        """Cross-entropy at some positions, (N,) nats; see ``TokenTransformer.cross_entropy``."""
        part = LOGITS // self.vocabulary
        return cross_entropy(lambda rows: self.logits(hidden, condition, rows, mask_id), at, targets, part)

    def flops(self, length: int | None = None) -> float:
        """Operations of one forward pass of one sequence: 2 per weight and token, and the attention products."""
        length = length or self.length
        weights = sum(parameter.numel() for parameter in self.layers.parameters()) + self.lm_head.weight.numel()
        return 2.0 * length * (weights + 2.0 * len(self.layers) * length * self.hidden)


Network = CaddNet | AdaptedNet
