"""TarFlow written down the obvious way: the yardstick of ``bench.py`` and an independent opinion for the tests.

Nothing here is used to train or sample. It shares the parameters of a ``TarFlowNet`` and none of its code: patches by
unfolding, a float mask, all N tokens, a key-value cache grown by concatenation, one pass per prediction.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lightningmodules.tarflow.network import FlowBlock, TarFlowNet, TransformerLayer


@dataclass
class GrowingCache:
    """Keys and values of one layer in one pass.

    Attributes:
        pairwise: append to the concatenation of the step before; False keeps a list and concatenates all of it at every
            step, as apple/ml-tarflow does.
    """

    pairwise: bool = False
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token, (B, heads, 1, head_dim), and return all."""
        self.keys.append(k)
        self.values.append(v)
        k, v = torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)
        if self.pairwise:
            self.keys, self.values = [k], [v]
        return k, v


class Straightforward:
    """Both directions of the flow.

    Args:
        net: whose parameters to use.
        pairwise: see ``GrowingCache``.
    """

    def __init__(self, net: TarFlowNet, pairwise: bool = False) -> None:
        self.net, self.pairwise = net, pairwise

    def forward(self, image: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Images (B, C, H, W) to latent (B, N, D), block outputs, log-determinant per dimension (B,)."""
        p = self.net.patch_size
        x = F.unfold(image, p, stride=p).transpose(1, 2)
        ahead = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        mask = torch.zeros(x.shape[1], x.shape[1]).masked_fill(ahead, -torch.inf)
        logdet, outputs = torch.zeros(len(x)), []
        for block in self.net.steps:
            x = x.flip(1) if block.flipped else x
            pos = block.pos_embed.flip(0) if block.flipped else block.pos_embed
            h = block.proj_in(x) + pos + _class(block, y)
            for layer in block.layers:
                h = _layer(layer, h, mask, None, 1.0)
            out = block.proj_out(h)
            out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
            alpha, mu = out.chunk(2, dim=-1) if block.nvp else (torch.zeros_like(out), out)
            x = (x - mu) * torch.exp(-alpha)
            logdet = logdet - alpha.mean(dim=(1, 2))
            x = x.flip(1) if block.flipped else x
            outputs.append(x)
        return x, outputs, logdet

    @torch.no_grad()
    def reverse(
        self,
        z: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        *,
        attn_temp: float = 1.0,
        annealed: bool = False,
        what: str = "ab",
    ) -> list[Tensor]:
        """Noise (B, N, D) to the images after every inverted block; ``guidance`` is the authors' g, 0 for none."""
        x, images, p, size = z * self.net.var.sqrt(), [], self.net.patch_size, self.net.img_size
        for block in reversed(self.net.steps):
            x = x.flip(1) if block.flipped else x.clone()
            cond = [GrowingCache(self.pairwise) for _ in block.layers]
            null = [GrowingCache(self.pairwise) for _ in block.layers]
            last = x.shape[1] - 1
            for i in range(last):
                alpha, mu = _predict(block, x, i, y, cond, 1.0)
                if guidance > 0:
                    alpha_null, mu_null = _predict(block, x, i, None, null, attn_temp)
                    g = guidance * (i + 1) / last if annealed else guidance
                    alpha = alpha + g * (alpha - alpha_null) if "a" in what else alpha
                    mu = mu + g * (mu - mu_null) if "b" in what else mu
                x[:, i + 1] = x[:, i + 1] * torch.exp(alpha) + mu
            x = x.flip(1) if block.flipped else x
            images.append(F.fold(x.transpose(1, 2), size, p, stride=p))
        return images


def _class(block: FlowBlock, y: Tensor | None) -> Tensor | float:
    if block.class_embed is None:
        return 0.0
    mean = block.class_embed.mean(dim=0)
    if y is None:
        return mean
    return torch.stack([mean if int(label) < 0 else block.class_embed[int(label)] for label in y])


def _layer(
    layer: TransformerLayer, x: Tensor, mask: Tensor | None, cache: GrowingCache | None, temperature: float
) -> Tensor:
    attention, mlp = layer.attention, layer.mlp
    b, t, c = x.shape
    h = F.layer_norm(x, (c,), attention.norm.weight, attention.norm.bias)
    q, k, v = attention.qkv(h).reshape(b, t, -1, attention.head_dim).transpose(1, 2).chunk(3, dim=1)
    if cache is not None:
        k, v = cache.extend(k, v)
    scale = attention.head_dim**-0.5 / temperature
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    x = x + attention.proj(out.transpose(1, 2).reshape(b, t, c))
    return x + mlp.down(F.gelu(mlp.up(F.layer_norm(x, (c,), mlp.norm.weight, mlp.norm.bias))))


def _predict(
    block: FlowBlock, x: Tensor, i: int, y: Tensor | None, caches: list[GrowingCache], temperature: float
) -> tuple[Tensor, Tensor]:
    pos = block.pos_embed.flip(0) if block.flipped else block.pos_embed
    h = block.proj_in(x[:, i : i + 1]) + pos[i] + _class(block, y)
    for layer, cache in zip(block.layers, caches, strict=True):
        h = _layer(layer, h, None, cache, temperature)
    out = block.proj_out(h)[:, 0]
    if not block.nvp:
        return torch.zeros_like(out), out
    alpha, mu = out.chunk(2, dim=-1)
    return alpha, mu
