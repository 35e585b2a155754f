"""Causal self-attention, and the key-value cache that lets it read a sequence token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32 whatever the input, and returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension.

        Args:
            x: features, (..., channels), any floating dtype.

        Returns:
            Normalised features, shape and dtype of ``x``.
        """
        out = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return out.to(x.dtype)


class KVCache:
    """Keys and values of the tokens read so far, for every layer, in one tensor allocated once.

    The cache is an argument of the call that uses it, never state of a module, so two samplers may share one network.
    It keeps no position of its own: the caller says where a token goes, and starting again at position 0 reuses it.

    Args:
        layers: number of attention layers that write to it.
        rows: sequences read side by side.
        heads: attention heads.
        head_dim: features per head.
        length: longest sequence, in tokens.
        dtype: dtype of the stored keys and values; it must be the one attention computes in.
        device: where the cache lives.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        head_dim: int,
        length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        store = torch.empty(layers, 2, rows, heads, length, head_dim, dtype=dtype, device=device)
        # Views made once and ``narrow`` instead of slices: indexing costs as much as a small matrix product.
        self._layers = [(both, *both.unbind(0)) for both in store.unbind(0)]

    def attend(self, layer: int, position: int, qkv: Tensor, scale: float | None = None) -> Tensor:
        """Add one token to a layer's cache and let it attend to itself and to the tokens before it.

        Args:
            layer: which attention layer is reading.
            position: index of the token; tokens 0 .. position - 1 are in the cache.
            qkv: (rows, width) in the cache's dtype: queries, keys, values, each head by head. There may be several
                times as many query heads as the cache has heads; neighbours then share keys and values.
            scale: factor on the logits; None for head_dim^-0.5.

        Returns:
            Attended values, (rows, query heads * head_dim), heads side by side.
        """
        rows, width = qkv.shape
        both, keys, values = self._layers[layer]
        seen, dim, heads = position + 1, keys.shape[-1], keys.shape[1]
        if width == 3 * heads * dim:
            new = qkv.view(rows, 3, heads, 1, dim).transpose(0, 1)  # (3, rows, heads, 1, head_dim)
            both.narrow(3, position, 1).copy_(new.narrow(0, 1, 2))
            queries = new[0]
        else:  # the query heads that share keys stand in for query tokens
            parts = qkv.view(rows, -1, dim)
            group = parts.shape[1] // heads - 2
            queries = parts.narrow(1, 0, group * heads).view(rows, heads, group, dim)
            new = parts.narrow(1, group * heads, 2 * heads).view(rows, 2, heads, 1, dim).transpose(0, 1)
            both.narrow(3, position, 1).copy_(new)
        out = F.scaled_dot_product_attention(queries, keys.narrow(2, 0, seen), values.narrow(2, 0, seen), scale=scale)
        return out.reshape(rows, width - 2 * heads * dim)

    def attend_window(
        self, layer: int, position: int, qkv: Tensor, scale: float | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Add several tokens at once; each attends to itself and to all before it.

        Args:
            layer: which attention layer is reading.
            position: index of the first of the tokens; whatever stood there and behind is replaced.
            qkv: (rows, tokens, width), else as in ``attend``.
            scale: factor on the logits; None for head_dim^-0.5.
            mask: from ``window_mask``, where it is at hand.

        Returns:
            Attended values, (rows, tokens, query heads * head_dim).
        """
        rows, tokens, width = qkv.shape
        both, keys, values = self._layers[layer]
        seen, dim, heads = position + tokens, keys.shape[-1], keys.shape[1]
        parts = qkv.view(rows, tokens, -1, dim).transpose(1, 2)  # (rows, all heads, tokens, head_dim)
        queries, new = parts.split([parts.shape[1] - 2 * heads, 2 * heads], dim=1)
        both.narrow(3, position, tokens).copy_(new.unflatten(1, (2, heads)).transpose(0, 1))
        if mask is None and position:
            mask = window_mask(position, tokens, qkv.device)
        out = F.scaled_dot_product_attention(
            queries,
            keys.narrow(2, 0, seen),
            values.narrow(2, 0, seen),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=queries.shape[1] != heads,
        )
        return out.transpose(1, 2).reshape(rows, tokens, width - 2 * heads * dim)


def window_mask(position: int, tokens: int, device: torch.device) -> Tensor | None:
    """What the tokens of a window may see, (tokens, position + tokens) bool; None at position 0: plainly causal."""
    if not position:
        return None
    return torch.ones(tokens, position + tokens, dtype=torch.bool, device=device).tril(position)


class CausalAttention(nn.Module):
    """Pre-normalised multi-head self-attention in which a token sees itself and the tokens before it.

    Args:
        channels: width of the residual stream.
        head_dim: features per head; ``channels`` must be a multiple of it.
        dropout: probability with which outputs are dropped in training.
    """

    def __init__(self, channels: int, head_dim: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        if channels % head_dim:
            raise ValueError(
                f"channels={channels} is not a multiple of head_dim={head_dim} ({channels / head_dim:g} heads). "
                f"Set module.net.channels to e.g. {max(1, channels // head_dim) * head_dim}, or module.net.head_dim."
            )
        self.heads, self.head_dim = channels // head_dim, head_dim
        self.norm = LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)  # rows: all query heads, then all key heads, then all value heads
        self.proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual branch for a whole sequence, (rows, tokens, channels), shape of ``x``."""
        rows, tokens, channels = x.shape
        qkv = self.qkv(self.norm(x)).view(rows, tokens, 3, self.heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (rows, heads, tokens, head_dim)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.proj(out.transpose(1, 2).reshape(rows, tokens, channels)))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products with this weight are computed here: autocast's, or the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
