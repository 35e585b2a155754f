"""Masked diffusion written down the obvious way: the yardstick of ``bench.py``, an independent opinion for the tests.

Nothing here is used to train or sample. It shares the parameters of a ``CaddNet`` and none of its code: every position
is projected to the vocabulary, the whole SUBS tensor is made, all positions are drawn at every step with Gumbel noise,
and a prediction is kept only while no token of the whole batch changed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningmodules.cadd.network import CaddNet
from lightningmodules.shared.token_transformer import Block

LAST = 1e-5  # time at which the sampler ends


class Straightforward:
    """Network, loss and sampler.

    Args:
        net: whose parameters to use.
        mask_id: the mask, last of the vocabulary.
    """

    def __init__(self, net: CaddNet, mask_id: int) -> None:
        self.net, self.mask_id = net, mask_id

    def logits(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Tokens (B, L) and noise levels (B,) to logits (B, L, V)."""
        net, head = self.net, self.net.output_layer
        freqs = torch.exp(-math.log(1e4) * torch.arange(128) / 128)
        angles = sigma[:, None] * freqs
        c = F.silu(net.sigma_map.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)))
        x = net.vocab_embed.embedding[tokens]
        for block in net.layers:
            x = self._block(block, x, c)
        shift, scale = head.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return F.linear(_norm(head.norm_final, x) * (1 + scale) + shift, head.linear.weight, head.linear.bias)

    def _block(self, block: Block, x: Tensor, c: Tensor) -> Tensor:
        b, length, d = x.shape
        parts = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        h = _norm(block.norm1, x) * (1 + parts[1]) + parts[0]
        q, k, v = block.attn_qkv(h).view(b, length, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self._rotate(q), self._rotate(k)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        x = x + parts[2] * block.attn_out((weights @ v).transpose(1, 2).reshape(b, length, d))
        h = _norm(block.norm2, x) * (1 + parts[4]) + parts[3]
        return x + parts[5] * block.mlp(h)

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        freqs = 1e4 ** (-torch.arange(half) / half)
        angles = torch.arange(x.shape[-2])[:, None] * freqs
        cos, sin = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    def log_probs(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """SUBS log-probabilities (B, L, V)."""
        logits = self.logits(tokens, sigma)
        logits[:, :, self.mask_id] += -1e6
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        shown = tokens != self.mask_id
        logits[shown] = -1e6
        logits[shown, tokens[shown]] = 0.0
        return logits

    def loss(self, x0: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        """Cross-entropy with weight 1 / t of tokens (B, L) masked where ``masked`` says so at times t (B,)."""
        tokens = torch.where(masked, self.mask_id, x0)
        log_p = self.log_probs(tokens, torch.zeros_like(t)).gather(-1, x0[:, :, None])[:, :, 0]
        return -(log_p / t[:, None]).mean()

    @torch.no_grad()
    def sample(self, rows: int, length: int, steps: int) -> tuple[Tensor, int]:
        """Tokens (rows, length) and the number of evaluations of the network on the whole batch."""
        x = torch.full((rows, length), self.mask_id)
        kept, evaluations, dt = None, 0, (1 - LAST) / steps
        for k in range(steps):
            t = 1 - k * dt
            if kept is None:
                kept = self.log_probs(x, torch.zeros(rows)).double().exp()
                evaluations += 1
            q = kept * dt
            q[:, :, self.mask_id] = t - dt
            drawn = (q / -torch.rand(q.shape, dtype=torch.float64).log()).argmax(dim=-1)
            after = torch.where(x == self.mask_id, drawn, x)
            if not torch.equal(after, x):
                kept = None
            x = after
        return self.log_probs(x, torch.zeros(rows)).argmax(dim=-1), evaluations + 1


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],)) * norm.weight
