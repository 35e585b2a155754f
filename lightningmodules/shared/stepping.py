"""A transformer as plain tensors: for a single token, calling modules costs as much as computing."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = tuple[Tensor | None, Tensor]  # bias, transposed weight: what ``addmm`` takes
Norm = Callable[[Tensor], Tensor]
Attend = Callable[[int, Tensor], Tensor]  # (layer, queries-keys-values) to attended values


class Layer(NamedTuple):
    """One pre-norm transformer layer.

    Attributes:
        norm_attention: before attention.
        qkv: to queries, keys and values.
        proj: back from attended values.
        norm_mlp: before the perceptron.
        up: its widening layer.
        down: its narrowing layer.
        gate: for a gated perceptron, tanh-GELU(gate) * up; None for erf-GELU(up).
        post_attention: on the attention branch before it is added.
        post_mlp: on the perceptron branch before it is added.
    """

    norm_attention: Norm
    qkv: Linear
    proj: Linear
    norm_mlp: Norm
    up: Linear
    down: Linear
    gate: Linear | None = None
    post_attention: Norm | None = None
    post_mlp: Norm | None = None


def transform(layers: Sequence[Layer], h: Tensor, attend: Attend) -> Tensor:
    """Run the layers over rows of tokens.

    Args:
        layers: the transformer.
        h: residual stream, (rows, channels) float32; overwritten.
        attend: attention over whatever these rows see, (rows, qkv width) to (rows, heads head_dim).

    Returns:
        ``h``.
    """
    low = layers[0].qkv[1].dtype if layers[0].qkv[1].dtype != h.dtype else None
    for index, layer in enumerate(layers):
        normed = layer.norm_attention(h)
        qkv = linear(normed if low is None else normed.to(low), layer.qkv)  # even a void ``to`` costs 3 % of a step
        _add(h, attend(index, qkv), layer.proj, layer.post_attention)
        normed = layer.norm_mlp(h)
        normed = normed if low is None else normed.to(low)
        if layer.gate is None:
            hidden = F.gelu(linear(normed, layer.up))
        else:
            hidden = F.gelu(linear(normed, layer.gate), approximate="tanh") * linear(normed, layer.up)
        _add(h, hidden, layer.down, layer.post_mlp)
    return h


def linear(x: Tensor, weights: Linear) -> Tensor:
    """Affine map of rows, (rows, in) to (rows, out)."""
    bias, weight = weights
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def cast(module: nn.Linear, dtype: torch.dtype) -> Linear:
    """Bias and transposed weight of a layer in ``dtype``."""
    return None if module.bias is None else module.bias.to(dtype), module.weight.to(dtype).t()


def layer_norm(norm: nn.LayerNorm) -> Norm:
    """A layer normalisation with its parameters bound, computing in float32."""
    shape, weight, bias, eps = list(norm.normalized_shape), norm.weight.float(), norm.bias.float(), norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _add(h: Tensor, x: Tensor, weights: Linear, post: Norm | None) -> None:
    """Add a linear map of ``x`` to ``h`` in place; in the residual stream's own dtype, without a copy."""
    bias, weight = weights
    if post is not None:
        h.add_(post(linear(x, weights).to(h.dtype)))
    elif weight.dtype == h.dtype:
        h.addmm_(x, weight)
        if bias is not None:
            h.add_(bias)
    else:
        h.add_(linear(x, weights))
