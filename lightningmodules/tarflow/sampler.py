"""Inverting the flow: from prior noise to tokens, block by block, each token by token over a key-value cache."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningmodules.shared.attention import KVCache, compute_dtype
from lightningmodules.tarflow.network import FlowBlock, TarFlowNet
from lightningmodules.tarflow.process import guidance_strengths, guide, to_data


class Guidance(NamedTuple):
    """How the conditional prediction is pushed away from the unconditional one.

    Attributes:
        strengths: g for every step and output, see ``process.guidance_strengths``.
        temperature: what the attention logits of the unconditional prediction are divided by.
    """

    strengths: Tensor
    temperature: float


class _Normed(NamedTuple):
    """A layer norm and the matrix product after it, weights taken out of their modules once per block."""

    norm: tuple[list[int], Tensor, Tensor, float]
    weight: Tensor
    bias: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        return F.linear(F.layer_norm(h, *self.norm).to(self.weight.dtype), self.weight, self.bias)


class _Layer(NamedTuple):
    """One transformer layer as plain tensors."""

    qkv: _Normed
    proj: tuple[Tensor, Tensor]
    up: _Normed
    down: tuple[Tensor, Tensor]


@torch.no_grad()
def invert(
    net: TarFlowNet,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    guidance: float = 1.0,
    attention_temperature: float = 1.0,
    annealed: bool = True,
    guide_what: str = "ab",
) -> list[Tensor]:
    """Map prior noise to tokens, the inverse of ``TarFlowNet.forward`` on patches.

    With guidance the unconditional prediction (class mean, attention temperature) runs as a second half of the batch and
    reads the same guided tokens. Matrix products run in the dtype of the weights, or autocast's; everything else in float32.

    Args:
        net: the network; dropout is not applied.
        noise: standard normal, (B, N, D) float32. The prior's variance is applied here.
        y: labels, (B,) int64, -1 for no class; None for no class at all.
        guidance: weight w of uncond + w (cond - uncond); 1 is off.
        attention_temperature: attention logits of the unconditional prediction are divided by it, > 0. Unless it differs
            from 1, guidance has nothing to act on where there is no class.
        annealed: raise w - 1 linearly from the second token of a block to its last.
        guide_what: "a" guides log-scales, "b" shifts, "ab" both.

    Returns:
        The tokens after every inverted block, (B, N, D) each; the last block of the network comes first, the image last.

    Source: apple/ml-tarflow, Model.reverse; arXiv 2412.06329, guidance.
    Differs: one cache for all blocks instead of growing lists, one batch for both predictions; the same numbers.
    """
    told_apart = attention_temperature != 1.0 or (y is not None and net.num_classes > 0)
    guided: Guidance | None = None
    if guidance != 1.0 and guide_what and told_apart:
        strengths = guidance_strengths(
            guidance, guide_what, annealed=annealed, tokens=net.tokens, dims=net.dims, nvp=net.nvp
        )
        guided = Guidance(strengths.to(noise.device), attention_temperature)

    def run() -> list[Tensor]:
        x, images, cache = noise.float() * net.var.sqrt(), [], None
        for block in reversed(net.blocks):
            if cache is None:  # one cache serves all blocks: they are alike and run one after the other
                cache = _cache_for(block, len(x) * (2 if guided else 1))
            x = block(x, within=lambda b=block, x=x, c=cache: invert_block(b, x, y, c, guided))
            images.append(x)
        return images

    with _eager():
        return net(noise, within=run)


def invert_block(
    block: FlowBlock, z: Tensor, y: Tensor | None, cache: KVCache, guided: Guidance | None = None
) -> Tensor:
    """Invert one block; call it from inside the block's ``forward`` (``within``).

    Args:
        block: the block.
        z: its output, (B, N, D) float32, row-major patch order.
        y: labels as in ``invert``.
        cache: of B rows, or of 2 B when guided (conditional half first).
        guided: None for no guidance.

    Returns:
        Its input, shape of ``z``.

    Source: apple/ml-tarflow, MetaBlock.reverse.
    """
    rows, dtype = len(z), compute_dtype(block.proj_in.weight)
    tokens = list(block.order(z).unbind(1))  # (B, D) each, replaced one after the other
    offsets = (block.order(block.pos_embed).float() + block.proj_in.bias.float()).unbind(0)
    strengths = guided.strengths.unbind(0) if guided else ()
    class_rows, query_scale = _doubled(block, y, rows, guided)
    enter, (leave, constant) = block.proj_in.weight.float().t(), _cast(block.proj_out, torch.float32)
    layers = [_take(layer, dtype) for layer in block.attn_blocks]
    with torch.autocast(z.device.type, enabled=False):
        for i in range(len(tokens) - 1):
            h = torch.addmm(offsets[i], tokens[i], enter)
            if guided:
                h = torch.cat((h, h))
            if class_rows is not None:
                h = h + class_rows
            out = F.linear(_transform(layers, h, cache, i, query_scale), leave, constant)
            if guided:
                out = guide(out[:rows], out[rows:], strengths[i])
            alpha, mu = out.chunk(2, dim=-1) if block.nvp else (None, out)
            tokens[i + 1] = to_data(tokens[i + 1], alpha, mu)
    return block.order(torch.stack(tokens, dim=1))


def _transform(layers: list[_Layer], h: Tensor, cache: KVCache, position: int, query_scale: Tensor | None) -> Tensor:
    """The transformer for one token, (rows, channels) float32; ``FlowBlock.forward`` does the same for whole sequences."""
    for index, layer in enumerate(layers):
        qkv = layer.qkv(h)
        if query_scale is not None:
            qkv[:, : h.shape[1]] *= query_scale
        h = h + F.linear(cache.attend(index, position, qkv), *layer.proj)
        h = h + F.linear(F.gelu(layer.up(h)), *layer.down)
    return h


def _doubled(
    block: FlowBlock, y: Tensor | None, rows: int, guided: Guidance | None
) -> tuple[Tensor | None, Tensor | None]:
    """What each row adds for its class, (rows, channels), and the factor on its queries, (rows, 1)."""
    class_rows = block.class_rows(y)
    if class_rows is not None:
        class_rows = class_rows.squeeze(1).float()
    if guided is None:
        return class_rows, None
    if class_rows is not None:
        null_rows = block.class_rows(None).squeeze(1).float()
        class_rows = torch.cat([class_rows.expand(rows, -1), null_rows.expand(rows, -1)])
    if guided.temperature == 1.0:
        return class_rows, None
    query_scale = torch.ones(2 * rows, 1, device=block.pos_embed.device)
    query_scale[rows:] /= guided.temperature
    return class_rows, query_scale


def _take(layer: nn.Module, dtype: torch.dtype) -> _Layer:
    attention, mlp = layer.attention, layer.mlp
    return _Layer(
        _Normed(_norm(attention.norm), *_cast(attention.qkv, dtype)),
        _cast(attention.proj, dtype),
        _Normed(_norm(mlp.norm), *_cast(mlp.main[0], dtype)),
        _cast(mlp.main[2], dtype),
    )


def _norm(norm: nn.LayerNorm) -> tuple[list[int], Tensor, Tensor, float]:
    return list(norm.normalized_shape), norm.weight.float(), norm.bias.float(), norm.eps


def _cast(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return linear.weight.to(dtype), linear.bias.to(dtype)


def _cache_for(block: FlowBlock, rows: int) -> KVCache:
    attention, weight = block.attn_blocks[0].attention, block.proj_in.weight
    return KVCache(
        len(block.attn_blocks),
        rows,
        attention.heads,
        attention.head_dim,
        len(block.pos_embed),
        dtype=compute_dtype(weight),
        device=weight.device,
    )


def _eager() -> AbstractContextManager[object]:
    """Keep compiled blocks eager while sampling: the compiler would unroll the token loop."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
