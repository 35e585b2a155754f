"""Bidirectional transformer over tokens with adaptive layer normalisation, as used for masked diffusion.

Parameter names are those of kuleshov-group/mdlm, so its checkpoints load without renaming.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FREQUENCIES = 256  # width of the sinusoidal features of the noise level
LOGITS = 1 << 26  # most logits of the loss held at a time; more are computed in parts and again in the backward pass


class Norm(nn.LayerNorm):
    """Layer normalisation without bias, computed in float32 and returned in the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``, (..., channels)."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), None, self.eps).to(x.dtype)


class Embedding(nn.Module):
    """One row per token.

    Args:
        rows: vocabulary, mask included.
        channels: width.
        std: standard deviation of the initial numbers; None draws them uniformly from +-1 / sqrt(channels).
    """

    def __init__(self, rows: int, channels: int, std: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, channels))
        if std is None:
            nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))
        else:
            nn.init.normal_(self.embedding, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows of ``tokens`` (...), (..., channels)."""
        return F.embedding(tokens, self.embedding)


class NoiseLevel(nn.Module):
    """Features of the noise level sigma.

    Args:
        channels: width of the result.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, sigma: Tensor) -> Tensor:
        """Features (B, channels) of ``sigma`` (B,)."""
        return cast(Tensor, self.mlp(sinusoids(sigma).to(next(self.mlp.parameters()).dtype)))


class Rotary(nn.Module):
    """Rotation angles of positions.

    Args:
        head_dim: features per head, even.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (torch.arange(0, head_dim, 2).float() / head_dim))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (..., head_dim / 2) float32, of positions (...)."""
        angles = positions.unsqueeze(-1).float() * self.inv_freq.float()
        return angles.cos(), angles.sin()


class ClassEmbedding(nn.Module):
    """One row per class and a last one for "no class"."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, channels)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """Rows of ``labels`` (B,), where -1 is "no class"."""
        return cast(
            Tensor, self.embedding_table(torch.where(labels < 0, self.embedding_table.num_embeddings - 1, labels))
        )


class Block(nn.Module):
    """Attention and perceptron, each shifted, scaled and gated by the condition."""

    def __init__(self, channels: int, heads: int, cond_dim: int, expansion: int, dropout: float, gate: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = Norm(channels)
        self.attn_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.attn_out = nn.Linear(channels, channels, bias=False)
        self.norm2 = Norm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, expansion * channels),
            nn.GELU(approximate="tanh"),
            nn.Linear(expansion * channels, channels),
        )
        self.adaLN_modulation = _zeroed(nn.Linear(cond_dim, 6 * channels))
        with torch.no_grad():
            for part in (2, 5):
                self.adaLN_modulation.bias[part * channels : (part + 1) * channels] = gate

    def forward(self, x: Tensor, condition: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Transform a whole sequence, (B, L, channels); see :meth:`TokenTransformer.trunk`."""
        parts = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        branch = self._attend(modulated(self.norm1(x), shift, scale), rotation, mask)
        x = x + gate * F.dropout(branch, self.dropout, self.training)
        branch = self.mlp(modulated(self.norm2(x), shift_mlp, scale_mlp))
        return x + gate_mlp * F.dropout(branch, self.dropout, self.training)

    def _attend(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        rows, length, channels = x.shape
        qkv = self.attn_qkv(x).view(rows, length, 3, self.heads, channels // self.heads)
        turned = rotate(qkv[:, :, :2], *rotation)
        q, k, v = (part.transpose(1, 2) for part in (turned[:, :, 0], turned[:, :, 1], qkv[:, :, 2]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return cast(Tensor, self.attn_out(out.transpose(1, 2).reshape(rows, length, channels)))


class Head(nn.Module):
    """From the residual stream to one logit per token of the vocabulary."""

    def __init__(self, channels: int, rows: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = Norm(channels)
        self.linear = _zeroed(nn.Linear(channels, rows))
        self.adaLN_modulation = _zeroed(nn.Linear(cond_dim, 2 * channels))

    def forward(self, hidden: Tensor, condition: Tensor, rows: int | None = None) -> Tensor:
        """Logits (..., rows) of hidden states (..., channels), of the first rows; ``condition`` broadcasts."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        x = modulated(self.norm_final(hidden), shift, scale)
        return F.linear(x, self.linear.weight[:rows], self.linear.bias[:rows])


class TokenTransformer(nn.Module):
    """Tokens in, one distribution over the vocabulary per position out.

    Args:
        vocabulary: rows of the embedding and of the output, mask included.
        hidden: width of the residual stream.
        blocks: transformer blocks.
        heads: attention heads; ``hidden / heads`` is even.
        cond_dim: width of the condition vector.
        length: longest sequence.
        expansion: width of the perceptron in units of ``hidden``.
        dropout: probability with which branches are dropped in training, 0..1.
        num_classes: classes that can be asked for; 0 for none.
        gate_init: initial value of the gates of all branches; 0 makes every block the identity, as in the paper.
        embedding_std: initial standard deviation of the tokens' rows; None is the paper's, rows of norm 0.58.
        learned_positions: add a learnt row per position, zeros at first. Rotations tell distances only, and where
            everything is masked nothing else says which pixel of a picture a position is.

    Raises:
        ValueError: the heads do not divide the width into even parts.

    Source: kuleshov-group/mdlm, models/dit.py; class rows as in kuleshov-group/discrete-diffusion-guidance.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int = 768,
        blocks: int = 12,
        heads: int = 12,
        cond_dim: int = 128,
        *,
        length: int = 1024,
        expansion: int = 4,
        dropout: float = 0.1,
        num_classes: int = 0,
        gate_init: float = 0.0,
        embedding_std: float | None = None,
        learned_positions: bool = False,
    ) -> None:
        super().__init__()
        if hidden % heads or hidden // heads % 2:
            raise ValueError(
                f"hidden={hidden} does not split into {heads} heads of an even number of features "
                f"({hidden / heads:g} each). Set module.net.hidden to e.g. {heads * 2 * max(1, hidden // heads // 2)}, "
                "or module.net.heads."
            )
        self.vocabulary, self.hidden, self.length, self.num_classes = vocabulary, hidden, length, num_classes
        self.vocab_embed = Embedding(vocabulary, hidden, embedding_std)
        self.position_embed = nn.Parameter(torch.zeros(length, hidden)) if learned_positions else None
        self.sigma_map = NoiseLevel(cond_dim)
        self.cond_map = ClassEmbedding(num_classes, cond_dim) if num_classes else None
        self.rotary_emb = Rotary(hidden // heads)
        self.blocks = nn.ModuleList(
            Block(hidden, heads, cond_dim, expansion, dropout, gate_init) for _ in range(blocks)
        )
        self.output_layer = Head(hidden, vocabulary, cond_dim)

    def condition(self, sigma: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """The vector that steers every block.

        Args:
            sigma: (B,) total noise; None means 0 for every row.
            labels: (B,) classes, -1 for none; None means none for every row.

        Returns:
            (B, cond_dim), or (1, cond_dim) where all rows agree.
        """
        if sigma is None:
            sigma = torch.zeros(1, device=self.vocab_embed.embedding.device)
        vector = F.silu(self.sigma_map(sigma))
        if self.cond_map is not None:
            if labels is None:
                labels = torch.full((1,), -1, device=vector.device)
            vector = vector + F.silu(self.cond_map(labels))
        return vector

    def trunk(
        self, x: Tensor, condition: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Run the blocks.

        Args:
            x: embedded tokens, (B, L, hidden).
            condition: from :meth:`condition`.
            positions: (L,) or (B, L) numbers of the positions; None counts from 0.
            mask: bool, True where a query (rows) sees a key (columns), (L, L) or (B, L, L); None sees everything.

        Returns:
            Hidden states, (B, L, hidden).
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        if self.position_embed is not None:
            x = x + self.position_embed[positions]
        cos, sin = self.rotary_emb(positions)
        rotation = (cos[..., None, None, :], sin[..., None, None, :])  # over (queries and keys, heads)
        if mask is not None and mask.ndim == 3:
            mask = mask.unsqueeze(1)
        for block in self.blocks:
            x = block(x, condition, rotation, mask)
        return x

    def logits(self, hidden: Tensor, condition: Tensor, at: Tensor | None = None, mask_id: int | None = None) -> Tensor:
        """Logits of all positions, or only of those that are needed.

        Args:
            hidden: (B, L, hidden) from :meth:`trunk`.
            condition: from :meth:`condition`.
            at: (N,) positions in the flattened (B L); None for all.
            mask_id: token that is never predicted: left out if it is the last one, at -inf otherwise; None for none.

        Returns:
            (B, L, V), or (N, V), where V is ``vocabulary`` without what is left out.
        """
        rows = self.vocabulary - (mask_id == self.vocabulary - 1)  # cut off later, all of them would be copied
        if at is None:
            found = self.output_layer(hidden, condition.unsqueeze(1), rows)
        else:
            where = condition[at // hidden.shape[1]] if len(condition) > 1 else condition
            found = self.output_layer(hidden.flatten(0, 1)[at], where, rows)
        return cast(Tensor, found if mask_id is None or mask_id == rows else without(found, mask_id))

    def forward(self, tokens: Tensor, sigma: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of every position, (B, L, vocabulary), from tokens (B, L) int64; see :meth:`condition`."""
        condition = self.condition(sigma, labels)
        return self.logits(self.trunk(self.vocab_embed(tokens), condition), condition)

    def cross_entropy(self, hidden: Tensor, condition: Tensor, at: Tensor, targets: Tensor, mask_id: int) -> Tensor:
        """Cross-entropy at some positions, in float32, over all tokens but the mask.

        Where the logits of all of them would be large they are made in parts, and again in the backward pass.

        Args:
            hidden: (B, L, hidden) from :meth:`trunk`.
            condition: from :meth:`condition`.
            at: (N,) positions in the flattened (B L).
            targets: (N,) clean tokens.
            mask_id: token that is never predicted.

        Returns:
            (N,) nats.
        """
        return cross_entropy(
            lambda rows: self.logits(hidden, condition, rows, mask_id), at, targets, LOGITS // self.vocabulary
        )

    def flops(self, length: int | None = None) -> float:
        """Operations of one forward pass of one sequence: 2 per weight and token, and the attention products."""
        length = length or self.length
        width = self.hidden
        per_token = sum(block.attn_qkv.weight.numel() + block.attn_out.weight.numel() for block in self.layers)
        per_token += sum(cast(nn.Linear, block.mlp[i]).weight.numel() for block in self.layers for i in (0, 2))
        per_token += self.output_layer.linear.weight.numel()
        return 2.0 * length * (per_token + 2.0 * len(self.blocks) * length * width)

    @property
    def layers(self) -> Sequence[Block]:
        """The blocks."""
        return cast(Sequence[Block], list(self.blocks))


def cross_entropy(logits: Callable[[Tensor], Tensor], at: Tensor, targets: Tensor, part: int) -> Tensor:
    """See :meth:`TokenTransformer.cross_entropy`.

    Args:
        logits: of positions (N,), (N, V).
        at: (N,) positions.
        targets: (N,) clean tokens.
        part: most positions whose logits are held at a time.

    Returns:
        (N,) nats.
    """

    def piece(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits(rows).float(), wanted, reduction="none")

    if len(at) <= max(1, part):
        return piece(at, targets)
    pieces = zip(at.split(max(1, part)), targets.split(max(1, part)), strict=True)
    return torch.cat([checkpoint(piece, *pair, use_reentrant=False) for pair in pieces])


def sinusoids(sigma: Tensor) -> Tensor:
    """Cos and sin of sigma at 128 frequencies from 1 down to nearly 1e-4, (B, 256) float32."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=sigma.device).float() / half)
    angles = sigma.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift: x (1 + scale) + shift, rounded after the product as well, as the authors' code is."""
    return x * (1.0 + scale) + shift


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of the last dimension by an angle: (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def without(logits: Tensor, token: int) -> Tensor:
    """Logits (..., V) in which one token is impossible: cut off if it is the last one, at -inf otherwise."""
    if token == logits.shape[-1] - 1:
        return logits[..., :-1]
    index = torch.tensor([token], device=logits.device)
    return logits.index_fill(-1, index, -torch.inf)


def document_mask(document: Tensor) -> Tensor:
    """Who sees whom where a row holds several documents: positions of one document, (B, L) int -> (B, L, L) bool."""
    return document.unsqueeze(2) == document.unsqueeze(1)


def _zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
