"""The best denoiser there is, for sequences so short that their joint distribution can be written down.

Used to check formulas and samplers without training, and as the ceiling of what training can reach.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightningmodules.cadd import process
from lightningmodules.cadd.process import Path


@dataclass(frozen=True)
class Oracle:
    """A known distribution over sequences and the latent of every token.

    Attributes:
        states: all sequences with positive probability, (S, n) int64.
        prob: their probabilities, (S,) float64.
        table: latents, (V, d) float64.
        path: of the latent.
    """

    states: Tensor
    prob: Tensor
    table: Tensor
    path: Path = "vp"

    @property
    def vocabulary(self) -> int:
        """Tokens V, mask left out; the mask is number V."""
        return len(self.table)

    def joint(self, tokens: Tensor, latent: Tensor | None, gamma: Tensor | None) -> Tensor:
        """Exact p(sequence | tokens, latent).

        Args:
            tokens: (B, n) int64, V where masked.
            latent: (B, n, d) float64, read at masked positions; None for plain masked diffusion.
            gamma: (B,) signal left.

        Returns:
            (B, S) float64.
        """
        masked = tokens == self.vocabulary
        agrees = (masked.unsqueeze(1) | (tokens.unsqueeze(1) == self.states)).all(dim=-1)  # (B, S)
        scores = torch.where(agrees, self.prob.log(), -torch.inf)
        if latent is not None and gamma is not None:
            signal, spread = process.signal_and_noise(gamma, self.path)
            distance = latent.unsqueeze(2) - signal.view(-1, 1, 1, 1) * self.table  # (B, n, V, d)
            logs = -0.5 * distance.square().sum(-1) / spread.square().clamp(min=1e-300).view(-1, 1, 1)
            logs = torch.where(masked.unsqueeze(-1), logs, torch.zeros_like(logs))
            index = self.states.t().expand(len(tokens), -1, -1)  # (B, n, S)
            scores = scores + logs.gather(2, index).sum(dim=1)
        return scores.softmax(dim=-1)

    def marginal(self, joint: Tensor) -> Tensor:
        """p(token at each position), (B, n, V), of a :meth:`joint`."""
        out = joint.new_zeros(len(joint), self.states.shape[1], self.vocabulary)
        index = self.states.t().expand(len(joint), -1, -1)
        return out.scatter_add(2, index, joint.unsqueeze(1).expand(-1, self.states.shape[1], -1))

    def log_probs(self, tokens: Tensor, latent: Tensor | None, gamma: Tensor | None) -> Tensor:
        """Exact log p(token at each position | tokens, latent), (B, n, V)."""
        return self.marginal(self.joint(tokens, latent, gamma)).clamp(min=1e-300).log()
