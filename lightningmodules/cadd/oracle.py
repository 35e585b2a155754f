"""The best denoiser there is, for sequences so short that their joint distribution can be written down.

Used to check formulas and samplers without training, and as the ceiling of what training can reach.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightningmodules.cadd import process
from lightningmodules.cadd.process import Path
from lightningmodules.cadd.sampler import Denoiser, LatentMotion
from lightningmodules.shared.masking import LogLinear
from lightningmodules.shared.noise import Noise


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


def copy_task(vocabulary: int = 8, width: int = 48) -> Oracle:
    """Two equal tokens, drawn evenly: one of the independent pairs that a row of the copy task consists of.

    Args:
        vocabulary: V.
        width: of the latents, whose directions are random and whose norm is the usual one.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(vocabulary, width, generator=generator)
    table = process.unit_rows(directions, process.latent_radius(vocabulary)).double()
    states = torch.arange(vocabulary).unsqueeze(1).expand(vocabulary, 2)
    return Oracle(states, torch.full((vocabulary,), 1.0 / vocabulary, dtype=torch.float64), table)


def one_token() -> Oracle:
    """A single token of five unequal ones; latents of width 4 with random directions and the usual norm."""
    prob = torch.tensor([0.4, 0.25, 0.15, 0.12, 0.08], dtype=torch.float64)
    directions = torch.randn(len(prob), 4, generator=torch.Generator().manual_seed(0))
    table = process.unit_rows(directions, process.latent_radius(len(prob))).double()
    return Oracle(torch.arange(len(prob)).unsqueeze(1), prob, table)


class ExactDenoiser(Denoiser):
    """An oracle in the place of a trained network.

    Of equally likely tokens a random one is the likeliest. A row may consist of g independent parts of n tokens:
    token k of part j stands at position k g + j.

    Args:
        oracle: knows one part.
        noise: one source of draws per row.
        shape: (rows, length), a length of g n.
        motion: of the latent; None for plain masked diffusion.
    """

    def __init__(self, oracle: Oracle, noise: Noise, shape: tuple[int, int], motion: LatentMotion | None) -> None:
        network: Any = SimpleNamespace(table=oracle.table, hidden=oracle.table.shape[1])  # all that is asked of it
        super().__init__(
            network,
            mask_id=oracle.vocabulary,
            schedule=LogLinear(),
            gamma=LogLinear(),
            noise=noise,
            shape=shape,
            latent="off" if motion is None else "on",
            motion=motion,
            table=oracle.table.float(),
        )
        self.oracle = oracle
        # At t = 1 all tokens may be equally likely, and the likeliest would be the first one in every row.
        self._ties = 1e-9 * noise.uniform(shape[1], oracle.vocabulary, dtype=torch.float64)

    def predict(self, tokens: Tensor, where: Tensor, t: Tensor) -> Tensor:
        """See ``Predictor.predict``; float64."""
        rows, length = tokens.shape
        size = self.oracle.states.shape[1]
        latent = None if self.latent == "off" else _parts(self.z[0].unflatten(0, (rows, length)).double(), size)
        gamma = self.gamma.keep(t).repeat_interleave(length // size)
        found = self.oracle.log_probs(_parts(tokens, size), latent, gamma)  # (rows g, n, V)
        return (found.unflatten(0, (rows, -1)).transpose(1, 2).flatten(1, 2) + self._ties)[where]


def _parts(x: Tensor, size: int) -> Tensor:
    """Rows (B, n g, ..) as independent parts (B g, n, ..)."""
    return x.unflatten(1, (size, -1)).transpose(1, 2).flatten(0, 1)
