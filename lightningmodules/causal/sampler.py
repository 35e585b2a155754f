"""Token by token, with cached keys and values."""

import torch
from torch import Tensor

from lightningmodules.causal.network import CausalNet


@torch.no_grad()
def generate(net: CausalNet, uniform: Tensor, prompt: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """Draw rows of tokens.

    Args:
        net: the model.
        uniform: (B, T) float64 in [0, 1), one draw per token; those of the prompt are not used.
        prompt: (B, P) int64 tokens that come first, or None.
        temperature: > 0, divides the logits.
        top_p: only the most likely tokens with this much probability together are drawn, (0, 1].

    Returns:
        (B, T) int64.
    """
    rows, length = uniform.shape
    tokens = torch.empty(rows, length, dtype=torch.int64, device=uniform.device)
    begin = 0 if prompt is None else prompt.shape[1]
    if prompt is not None:
        tokens[:, :begin] = prompt
    new, cache = prompt, None
    for at in range(begin, length):
        logits, cache = net.step(new, rows, cache)
        tokens[:, at] = choose(logits, uniform[:, at], temperature, top_p)
        new = tokens[:, at : at + 1]
    return tokens


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Invert the distribution function of each row, in float64.

    Args:
        logits: (B, V).
        uniform: (B,) float64 in [0, 1).
        temperature: > 0.
        top_p: (0, 1]; arXiv 1904.09751.

    Returns:
        (B,) int64.
    """
    share, order = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = share.cumsum(-1) - share
    share = share.masked_fill(before >= top_p, 0.0)
    total = share.cumsum(-1)
    picked = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True).clamp(max=share.shape[1] - 1)
    return order.gather(1, picked)[:, 0]
