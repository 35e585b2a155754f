"""Next-token prediction: exact likelihoods to compare bounds with, and a scorer of generated text."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningmodules.base import GenerativeModule
from lightningmodules.causal.network import CausalNet
from lightningmodules.causal.sampler import generate
from lightningmodules.causal.weights import translate
from lightningmodules.shared.codecs import Batch, PixelTokens, Tokens
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import Noise, SampleNoise


class Causal(GenerativeModule):
    """Maximum likelihood of tokens, left to right.

    Args:
        net: builds the network, ``CausalNet`` with its arguments.
        codec: rows of tokens.
        optimizer: takes the parameters, returns the optimiser.
        schedule: ``(step, total_steps) -> factor`` of the learning rate.
        ema_decays: one average of the weights per decay in (0, 1).
    """

    needs: ClassVar[frozenset[str]] = frozenset()  # whatever the codec reads
    likelihood = "exact"
    codec: Tokens | PixelTokens

    def __init__(
        self,
        *,
        net: Callable[[], CausalNet],
        codec: Any,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float] | None = None,
        ema_decays: Sequence[float] = (),
    ) -> None:
        super().__init__(codec=codec, optimizer=optimizer, schedule=schedule, ema_decays=ema_decays)
        self._net = net

    def build(self) -> None:
        """Create the network."""
        self.net = self._net()
        (length,) = self.codec.shape
        if length > self.net.length:
            raise ValueError(
                f"The network reads rows of at most {self.net.length} tokens (module.net.length), the codec makes"
                f" {length} (data.length). Set both alike."
            )
        if self.net.vocabulary != self.codec.vocabulary:
            raise ValueError(
                f"module.net.vocabulary={self.net.vocabulary}, but data.tokenizer has {self.codec.vocabulary} tokens."
                f" Set module.net.vocabulary={self.codec.vocabulary}."
            )

    def setup(self, stage: str) -> None:
        """Before training: the vocabulary is that of the tokenizer, which the data has prepared by now."""
        if stage == "fit" and isinstance(self.codec, Tokens):
            self.codec.check()

    def averaged(self) -> dict[str, nn.Module]:
        """The network."""
        return {"net": self.net}

    def shard_units(self) -> list[nn.Module]:
        """The transformer blocks."""
        return self.net.blocks

    @classmethod
    def translate(cls, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys of transformers' GPT2LMHeadModel to ours."""
        return translate(official)

    def flops_per_sample(self) -> float:
        """Forward pass of one row, counted three times: the backward pass costs two."""
        return 3.0 * self.net.flops()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Mean negative log-likelihood.

        Returns:
            ``loss``, nats per token; ``bits_per_token``.
        """
        tokens = self.codec.encode(batch)
        nats = self._nats(tokens)
        valid = _valid(batch, tokens)
        loss = (nats * valid).sum() / valid.sum().clamp(min=1)
        return {"loss": loss, "bits_per_token": loss.detach() / math.log(2)}

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, *, seeds: Sequence[int] | None = None, conditional: bool = True) -> Tensor:
        """Log-probability of every row, (B,) nats; nothing is drawn."""
        tokens = self.codec.encode(batch)
        return -(self._nats(tokens) * _valid(batch, tokens)).sum(1)

    def sample(
        self,
        seeds: Sequence[int],
        condition: Condition | None = None,
        *,
        guidance: float = 1.0,
        noise: Noise | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """Draw one row per seed.

        Args:
            seeds: one per sample.
            condition: ``prompt`` (n, P), or None.
            guidance: must be 1; there is no condition to guide with.
            noise: replaces the draws of the seeds.
            temperature: > 0.
            top_p: (0, 1].

        Returns:
            (n, *codec.shape) int64.
        """
        prompt = None if condition is None else condition.prompt
        _check(guidance, temperature, top_p, prompt)
        uniform = (noise or SampleNoise(seeds, self.device)).uniform(*self.codec.shape, dtype=torch.float64)
        training = self.training
        self.eval()
        try:
            return generate(self.net, uniform, prompt, temperature, top_p)
        finally:
            self.train(training)

    def check_settings(self, settings: Mapping[str, Any], condition: Condition | None = None) -> None:
        """See the base."""
        _check(
            settings.get("guidance", 1.0),
            settings.get("temperature", 1.0),
            settings.get("top_p", 1.0),
            None if condition is None else condition.prompt,
        )

    def null_condition(self, n: int) -> Condition:
        """Nothing."""
        return Condition()

    def _nats(self, tokens: Tensor) -> Tensor:
        logits = self.net(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view(tokens.shape)


def _valid(batch: Batch, tokens: Tensor) -> Tensor:
    valid = batch["valid"] if "valid" in batch else torch.ones_like(tokens, dtype=torch.bool)
    return (valid & ~batch["given"] if "given" in batch else valid).to(tokens.device)


def _check(guidance: float, temperature: float, top_p: float, prompt: Tensor | None) -> None:
    if not (guidance == 1.0 and temperature > 0 and 0 < top_p <= 1):
        raise ValueError(
            f"sampling: guidance={guidance} (a causal model knows only 1), temperature={temperature} (> 0) or"
            f" top_p={top_p} (0 to 1) is out of range. Type e.g. guidance=1 temperature=0.9 top_p=0.95"
        )
    if prompt is not None and bool((prompt < 0).any()):
        raise ValueError(
            "The prompt has holes, but a causal model writes from left to right. Leave <mask> out, or sample from a"
            " masked model (mdlm_..., cadd_...)."
        )
