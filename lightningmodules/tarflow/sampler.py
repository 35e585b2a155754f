"""Inverting the flow: from prior noise to tokens, block by block, each token by token over a key-value cache."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightningmodules.shared.attention import KVCache, compute_dtype
from lightningmodules.shared.flow import eager
from lightningmodules.shared.stepping import Layer, cast, layer_norm, linear, transform
from lightningmodules.tarflow.network import FlowBlock, TarFlowNet, TransformerLayer
from lightningmodules.tarflow.process import guidance_strengths, guide, to_data


@dataclass(frozen=True)
class Guidance:
    """How predictions are pushed away from unconditional ones, in every block.

    Attributes:
        weight: w of uncond + w (cond - uncond); 1 is off. The authors' knob is w - 1.
        temperature: attention logits of the unconditional prediction are divided by it, > 0. Unless it differs from 1,
            there is nothing to act on where there is no class.
        annealed: raise w - 1 linearly from the second token of a block to its last.
        what: "a" guides log-scales, "b" shifts, "ab" both.

    Raises:
        ValueError: a value out of range.
    """

    weight: float = 1.0
    temperature: float = 1.0
    annealed: bool = True
    what: str = "ab"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.temperature > 0 and set(self.what) <= set("ab")):
            raise ValueError(
                f"sampling.guidance={self.weight} must be finite (1 is off), sampling.attention_temperature="
                f"{self.temperature} > 0 and sampling.guide_what={self.what!r} one of a, b, ab."
            )


class _Push(NamedTuple):
    """Guidance made ready for one network: g per step and output, and the temperature."""

    strengths: Tensor
    temperature: float


@torch.no_grad()
def invert(net: TarFlowNet, noise: Tensor, y: Tensor | None = None, guide: Guidance | None = None) -> list[Tensor]:
    """Map prior noise to tokens, the inverse of ``TarFlowNet.forward`` on patches.

    With guidance the unconditional prediction (class mean, attention temperature) runs as a second half of the batch
    and reads the same guided tokens. Transformers compute in the dtype of the weights, or autocast's; tokens, affine
    maps and residual streams are float32. Dropout is not applied.

    Args:
        net: the network.
        noise: standard normal, (B, N, D) float32. The prior's variance is applied here.
        y: labels, (B,) int64, -1 for no class; None for no class at all.
        guide: None for no guidance.

    Returns:
        The tokens after every inverted block, (B, N, D) each; the network's last block comes first, the image last.

    Source: apple/ml-tarflow, Model.reverse; arXiv 2412.06329, guidance.
    Differs: one cache for all blocks instead of growing lists, one batch for both predictions; the same numbers.
    """
    push = _push(net, y, guide, noise.device)

    def run() -> list[Tensor]:
        x = noise.float() * net.var.sqrt()
        images: list[Tensor] = []
        caches: list[KVCache] = []
        for block in reversed(net.steps):
            x = block(x, within=partial(_invert_block, block, x, y, caches, push))
            images.append(x)
        return images

    with eager():
        images: list[Tensor] = net(noise, within=run)
    return images


def _push(net: TarFlowNet, y: Tensor | None, guide: Guidance | None, device: torch.device) -> _Push | None:
    """None where guidance would change nothing."""
    if guide is None or guide.weight == 1.0 or not guide.what:
        return None
    if guide.temperature == 1.0 and (y is None or not net.num_classes):
        return None
    strengths = guidance_strengths(
        guide.weight, guide.what, annealed=guide.annealed, tokens=net.tokens, dims=net.dims, nvp=net.nvp
    )
    return _Push(strengths.to(device), guide.temperature)


def _invert_block(block: FlowBlock, z: Tensor, y: Tensor | None, caches: list[KVCache], push: _Push | None) -> Tensor:
    """Invert one block, from inside its ``forward``: (B, N, D) to (B, N, D), both in row-major patch order.

    One cache serves all blocks: they are alike and run one after the other. The first block makes it, since only inside
    ``forward`` a sharded block shows the dtype it computes in.

    Source: apple/ml-tarflow, MetaBlock.reverse.
    """
    rows, dtype = len(z), compute_dtype(block.proj_in.weight)
    tokens = list(block.order(z).unbind(1))  # (B, D) each, replaced one after the other
    offsets = (block.order(block.pos_embed).float() + block.proj_in.bias.float()).unbind(0)
    strengths = push.strengths.unbind(0) if push else ()
    if not caches:
        caches.append(_cache_for(block, rows * (2 if push else 1), dtype, z.device))
    cache = caches[0]
    class_rows, query_scale = _doubled(block, y, rows, push)
    enter, leave = block.proj_in.weight.float().t(), cast(block.proj_out, torch.float32)
    layers = [_take(layer, dtype) for layer in block.layers]
    width = block.proj_in.out_features

    def attend(position: int, layer: int, qkv: Tensor) -> Tensor:
        if query_scale is not None:
            qkv[:, :width] *= query_scale
        return cache.attend(layer, position, qkv)

    with torch.autocast(z.device.type, enabled=False), torch.inference_mode():  # a tenth faster than no_grad
        for i in range(len(tokens) - 1):
            h = torch.addmm(offsets[i], tokens[i], enter)
            if push:
                h = torch.cat((h, h))
            if class_rows is not None:
                h = h + class_rows
            out = linear(transform(layers, h, partial(attend, i)), leave)
            if push:
                out = guide(out[:rows], out[rows:], strengths[i])
            alpha, mu = out.chunk(2, dim=-1) if block.nvp else (None, out)
            tokens[i + 1] = to_data(tokens[i + 1], alpha, mu)
        x = torch.stack(tokens, dim=1)
    return block.order(x.clone())  # an ordinary tensor again, that may be changed in place and differentiated


def _doubled(block: FlowBlock, y: Tensor | None, rows: int, push: _Push | None) -> tuple[Tensor | None, Tensor | None]:
    """What each row adds for its class, (rows, channels), and the factor on its queries, (rows, 1)."""
    class_rows = block.class_rows(y)
    if class_rows is not None:
        class_rows = class_rows.squeeze(1).float()
    if push is None:
        return class_rows, None
    null_rows = block.class_rows(None)
    if class_rows is not None and null_rows is not None:
        class_rows = torch.cat([class_rows.expand(rows, -1), null_rows.squeeze(1).float().expand(rows, -1)])
    if push.temperature == 1.0:
        return class_rows, None
    query_scale = torch.ones(2 * rows, 1, device=block.pos_embed.device)
    query_scale[rows:] /= push.temperature
    return class_rows, query_scale


def _take(layer: TransformerLayer, dtype: torch.dtype) -> Layer:
    attention, mlp = layer.attention, layer.mlp
    return Layer(
        norm_attention=layer_norm(attention.norm),
        qkv=cast(attention.qkv, dtype),
        proj=cast(attention.proj, dtype),
        norm_mlp=layer_norm(mlp.norm),
        up=cast(mlp.up, dtype),
        down=cast(mlp.down, dtype),
    )


def _cache_for(block: FlowBlock, rows: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    attention, length = block.layers[0].attention, len(block.pos_embed) - 1  # the last token is never read
    return KVCache(len(block.layers), rows, attention.heads, attention.head_dim, length, dtype=dtype, device=device)
