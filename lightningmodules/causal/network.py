"""GPT-2 as transformers builds it, reading rows of tokens."""

from typing import Any

import torch
from torch import Tensor, nn


class CausalNet(nn.Module):
    """Logits of every token given the ones before it.

    Token ``vocabulary`` stands before the first one, so that the first is predicted, too.

    Args:
        vocabulary: number of tokens.
        length: most tokens per row.
        channels: width, a multiple of ``heads``.
        layers: transformer blocks.
        heads: attention heads per block.
        dropout: probability, of embeddings, attention and residuals.

    Source: Radford et al., "Language models are unsupervised multitask learners" (2019); transformers' GPT2LMHeadModel.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        channels: int = 768,
        layers: int = 12,
        heads: int = 12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.vocabulary, self.length = vocabulary, length
        config = GPT2Config(
            vocab_size=vocabulary + 1,
            n_positions=length,
            n_embd=channels,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=vocabulary,
            eos_token_id=None,
        )
        config._attn_implementation = "sdpa"
        self.gpt = GPT2LMHeadModel(config)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.gpt.transformer.h)

    def flops(self) -> float:
        """Floating-point operations of one row forward: two per weight used and token, and attention's products."""
        embedded = self.gpt.transformer.wte.weight.numel() + self.gpt.transformer.wpe.weight.numel()
        weights = sum(parameter.numel() for parameter in self.gpt.parameters()) - embedded
        channels = self.gpt.config.n_embd
        attention = 4 * self.length * channels * len(self.blocks)
        return float(self.length * (2 * (weights + self.gpt.transformer.wte.weight.numel()) + attention))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens 0..T-1, each from the ones before it.

        Args:
            tokens: (B, T) int64, 0..vocabulary-1, T <= length.

        Returns:
            (B, T, vocabulary).
        """
        start = torch.full_like(tokens[:, :1], self.vocabulary)
        logits: Tensor = self.gpt(torch.cat([start, tokens[:, :-1]], dim=1), use_cache=False).logits
        return logits[..., : self.vocabulary]

    def step(self, tokens: Tensor | None, rows: int, cache: Any) -> tuple[Tensor, Any]:
        """Logits of the next token.

        Args:
            tokens: (B, k) int64, the ones since the last call; None at the beginning.
            rows: B.
            cache: what the last call returned, None at the beginning.

        Returns:
            (B, vocabulary) logits, and the cache for the next call.
        """
        device = self.gpt.lm_head.weight.device
        if cache is None:
            start = torch.full((rows, 1), self.vocabulary, device=device)
            tokens = start if tokens is None else torch.cat([start, tokens], dim=1)
        out = self.gpt(tokens, past_key_values=cache, use_cache=True)
        return out.logits[:, -1, : self.vocabulary], out.past_key_values
