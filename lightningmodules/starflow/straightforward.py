"""STARFlow written down the obvious way: the yardstick of ``bench.py`` and an independent opinion for the tests.

Nothing here is used to train or sample. It shares the parameters of a ``StarFlowNet`` and none of its code: tokens by
loops over patches, modules called token by token, at every step the whole cache rotated anew and a fresh mask for it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightningmodules.starflow.network import FlowBlock, StarFlowNet
from lightningmodules.starflow.transformer import RMSNorm, TransformerLayer

UNIT = math.log(math.e - 1.0)  # softplus of it is 1


class GrowingCache:
    """Keys before rotation, and values, of one layer in one pass: a list, concatenated anew at every step."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens, (B, heads, n, head_dim), and return all."""
        self.keys.append(k)
        self.values.append(v)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)


class ReservedCache:
    """The same, written into memory reserved beforehand.

    Args:
        length: longest sequence.
    """

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.store: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens, (B, heads, n, head_dim), and return all."""
        b, heads, n, d = k.shape
        if self.store is None:
            self.store = torch.zeros(2, b, heads, self.length, d)
        self.store[0, :, :, self.filled : self.filled + n] = k
        self.store[1, :, :, self.filled : self.filled + n] = v
        self.filled += n
        return self.store[0, :, :, : self.filled], self.store[1, :, :, : self.filled]


Cache = GrowingCache | ReservedCache


class Straightforward:
    """Both directions of the flow.

    Args:
        net: whose parameters to use.
        batched: reserve the caches, and run both predictions of guided sampling as one batch, as apple/ml-starflow
            does; False grows lists and runs one pass per prediction.
    """

    def __init__(self, net: StarFlowNet, batched: bool = False) -> None:
        self.net, self.batched = net, batched

    def forward(self, image: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Images (B, C, H, W) to latent (B, N, D), block outputs, and log sigma of every block in its order."""
        p = self.net.patch_size
        size = image.shape[2] // p, image.shape[3] // p
        x, outputs, scales = self.tokens(image), [], []
        for block in self.net.steps:
            if not block.layers:
                outputs.append(x)
                scales.append(torch.zeros_like(x))
                continue
            x = x.flip(1) if block.flipped else x
            known = x if block.sos_embed is None else torch.cat([block.sos_embed.expand(len(x), 1, -1), x[:, :-1]], 1)
            h = block.proj_in(known)
            if block.pos_embed is not None:
                h = h + (block.pos_embed.flip(0) if block.flipped else block.pos_embed)
            text = block.proj_txt(y) if block.text_dim else h[:, :0]
            h = torch.cat([text, h], dim=1)
            turns = _turns(block, size, text.shape[1])
            for layer in block.layers:
                h = _layer(layer, h, turns, None, 1.0)
            out = _head(block, h[:, text.shape[1] :])
            if block.sos_embed is None:
                out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
            mu, sigma = _gaussian(block, out)
            x = (x - mu) / sigma
            scales.append(sigma.log())
            x = x.flip(1) if block.flipped else x
            outputs.append(x)
        return x, outputs, scales

    @torch.no_grad()
    def reverse(
        self,
        z: Tensor,
        y: Tensor | None = None,
        null: Tensor | None = None,
        omega: float = 0.0,
        *,
        temperature: float = 1.0,
        rule: str = "precision",
        deep_only: bool = False,
        size: tuple[int, int] | None = None,
    ) -> list[Tensor]:
        """Noise (B, N, D) to the tokens after every inverted block; ``omega`` is the authors', 0 for no guidance."""
        size = size or (self.net.side, self.net.side)
        x, images = z, []
        for block in reversed(self.net.steps):
            guided = omega != 0 and block.text_dim > 0 and (block is self.net.steps[-1] or not deep_only)
            if block.layers:
                x = x.flip(1) if block.flipped else x
                x = self._invert(block, x, y, null if guided else None, omega, temperature, rule, size)
                x = x.flip(1) if block.flipped else x
            images.append(x)
        return images

    def _invert(
        self,
        block: FlowBlock,
        z: Tensor,
        y: Tensor | None,
        null: Tensor | None,
        omega: float,
        temperature: float,
        rule: str,
        size: tuple[int, int],
    ) -> Tensor:
        x, late = z.clone(), block.sos_embed is None
        told: list[Tensor | None] = [y] if null is None else [y, null]
        if self.batched and null is not None and y is not None:
            told = [torch.cat([y, null])]
        passes = [_Pass(self, block, text, x.shape[1], size, temperature) for text in told]
        for i in range(x.shape[1] - late):
            known = x[:, i : i + 1] if late else x[:, i - 1 : i]
            if block.sos_embed is not None and not i:
                known = block.sos_embed.expand(len(x), 1, -1)
            known = torch.cat([known, known]) if self.batched and null is not None else known
            predicted = [each.step(known, i) for each in passes]
            mu, sigma = (torch.cat(parts) for parts in zip(*predicted, strict=True))
            if null is not None:
                mu, sigma = _guided(mu, sigma, omega, rule)
            x[:, i + late] = z[:, i + late] * sigma + mu
        return x

    def tokens(self, image: Tensor) -> Tensor:
        """Patches one after the other, channels last inside a patch."""
        p, rows = self.net.patch_size, []
        for top in range(0, image.shape[2], p):
            for left in range(0, image.shape[3], p):
                rows.append(image[:, :, top : top + p, left : left + p].permute(0, 2, 3, 1).flatten(1))
        return torch.stack(rows, dim=1)


class _Pass:
    """One prediction, token by token, with caches of its own."""

    def __init__(
        self,
        plain: Straightforward,
        block: FlowBlock,
        text: Tensor | None,
        tokens: int,
        size: tuple[int, int],
        temperature: float,
    ) -> None:
        length = text.shape[1] if text is not None and block.text_dim else 0
        self.block, self.temperature, self.turns = block, temperature, _turns(block, size, length)
        self.caches: list[Cache] = [
            ReservedCache(length + tokens) if plain.batched else GrowingCache() for _ in block.layers
        ]
        if length:
            self._run(block.proj_txt(text))

    def step(self, known: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Mean and scale after reading ``known``, (B, 1, D), as the ``i``-th of the image."""
        h = self.block.proj_in(known)
        if self.block.pos_embed is not None:
            h = h + (self.block.pos_embed.flip(0) if self.block.flipped else self.block.pos_embed)[i]
        return _gaussian(self.block, _head(self.block, self._run(h))[:, 0])

    def _run(self, h: Tensor) -> Tensor:
        for layer, cache in zip(self.block.layers, self.caches, strict=True):
            h = _layer(layer, h, self.turns, cache, self.temperature)
        return h


def _turns(block: FlowBlock, size: tuple[int, int], text: int) -> Tensor | None:
    """Angle of every place in the sequence and pair of features, (tokens, head_dim / 2)."""
    if not block.shape.rope:
        return None
    half, (height, width) = block.shape.head_dim // 2, size
    rows = []
    if block.shape.rope_1d:
        rows = [[place * 10000 ** (-j / half) for j in range(half)] for place in range(text + height * width)]
    else:
        eight = 8 if block.text_axis else 0
        n = (half - eight) // 2
        for k in range(text):
            rows.append([0.0] * (2 * n) + [k * block.span / text * 10000 ** (-j / 8) for j in range(eight)])
        unit = block.span / math.sqrt(height * width)
        for r in range(height):
            for c in range(width):
                turn = [r * unit * 10000 ** (-2 * j / (2 * n)) for j in range(n)]
                rows.append(turn + [c * unit * 10000 ** (-2 * j / (2 * n)) for j in range(n)] + [0.0] * eight)
    return torch.tensor(rows)


def _turned(x: Tensor, turns: Tensor, half_split: bool) -> Tensor:
    if half_split:
        x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    angles = turns.repeat_interleave(2, dim=-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = x * angles.cos() + torch.stack((-odd, even), dim=-1).flatten(-2) * angles.sin()
    return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if half_split else turned


def _normed(norm: torch.nn.Module | None, x: Tensor) -> Tensor:
    if isinstance(norm, RMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)
    return x if norm is None else norm(x)


def _layer(layer: TransformerLayer, x: Tensor, turns: Tensor | None, cache: Cache | None, temperature: float) -> Tensor:
    attention, mlp, (b, t, _) = layer.attention, layer.mlp, x.shape
    heads, kv, d = attention.heads, attention.kv_heads, attention.head_dim
    qkv = attention.qkv(_normed(attention.norm, x))
    q = _normed(attention.query_norm, qkv[..., : heads * d].reshape(b, t, heads, d)).transpose(1, 2)
    k = _normed(attention.key_norm, qkv[..., heads * d : (heads + kv) * d].reshape(b, t, kv, d)).transpose(1, 2)
    v = qkv[..., (heads + kv) * d :].reshape(b, t, kv, d).transpose(1, 2)
    if cache is not None:
        k, v = cache.extend(k, v)
    before = k.shape[2] - t
    if turns is not None:
        q = _turned(q, turns[before : before + t], attention.half_split)
        k = _turned(k, turns[: before + t], attention.half_split)
    if heads != kv:
        k, v = k.repeat_interleave(heads // kv, dim=1), v.repeat_interleave(heads // kv, dim=1)
    seen = torch.ones(t, before + t).tril(before).bool()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=d**-0.5 / temperature)
    out = out.transpose(1, 2).reshape(b, t, heads * d)
    x = x + _normed(attention.post_norm, attention.proj(out))
    h = _normed(mlp.norm, x)
    gate = mlp.gate_proj
    h = F.gelu(mlp.up(h)) if gate is None else F.gelu(gate(h), approximate="tanh") * mlp.up(h)
    return x + _normed(mlp.post_norm, mlp.down(h))


def _head(block: FlowBlock, h: Tensor) -> Tensor:
    out = block.proj_out(_normed(block.final_norm, h))
    return block.soft_clip * torch.tanh(out / block.soft_clip) if block.soft_clip else out


def _gaussian(block: FlowBlock, out: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale; nothing predicted (zeros) is the standard normal."""
    raw, mu = out.chunk(2, dim=-1)
    return mu, torch.log1p(torch.exp(raw + UNIT)) if block.softplus else torch.exp(raw)


def _guided(mu: Tensor, sigma: Tensor, omega: float, rule: str) -> tuple[Tensor, Tensor]:
    (mu, mu_null), (sigma, sigma_null) = mu.chunk(2), sigma.chunk(2)
    if rule == "plain":
        return mu + omega * (mu - mu_null), sigma.log().add(omega * (sigma.log() - sigma_null.log())).exp()
    s = torch.minimum(sigma / sigma_null, torch.ones(())) ** 2
    precision = 1 + omega - omega * s
    return ((1 + omega) * mu - omega * s * mu_null) / precision, sigma / precision.sqrt()
