"""The network of CADD: the masked-diffusion transformer, and how a latent is added to its input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningmodules.cadd.process import unit_rows
from lightningmodules.shared.codecs import Batch
from lightningmodules.shared.token_transformer import FREQUENCIES, TokenTransformer, document_mask, sinusoids


class Fused:
    """How a latent enters a network of tokens.

    Attributes:
        latent_gate: learnt factors on the latent's features, (hidden,); None for plain addition.
        shifted: the prediction of a token comes from the position before it.
    """

    latent_gate: nn.Parameter | None
    shifted = False

    @property
    def table(self) -> Tensor:
        """Embedding of every token, (rows, hidden)."""
        raise TypeError(f"{type(self).__name__} must define table.")

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedded tokens (B, L, hidden)."""
        return F.embedding(tokens, self.table)

    def latents(self, tokens: Tensor | None, rows: int, radius: float | None) -> Tensor:
        """Latents of tokens.

        Args:
            tokens: (N,); None for the first ``rows`` of the vocabulary.
            rows: see there.
            radius: norm to which every row is scaled; None takes the embedding as it is.

        Returns:
            (N, hidden) or (rows, hidden), float32.
        """
        found = self.table[:rows] if tokens is None else self.embed(tokens)
        return found.float().clone() if radius is None else unit_rows(found, radius)

    def fuse(self, embedded: Tensor, at: Tensor, latent: Tensor) -> Tensor:
        """Add a latent to embedded tokens.

        Args:
            embedded: (B, L, hidden).
            at: (N,) masked positions in the flattened (B L).
            latent: (N, hidden).

        Returns:
            (B, L, hidden).

        Source: arXiv 2510.01329, fusion by addition.
        Differs: added at masked positions only. At others the latent would be the token's embedding once more.
        """
        latent = latent.to(embedded.dtype)
        if self.latent_gate is not None:
            latent = self.gated(latent)
        return embedded.flatten(0, 1).index_add(0, at, latent).view_as(embedded)

    def gated(self, latent: Tensor) -> Tensor:
        """Features (N, hidden) times their learnt factors."""
        assert self.latent_gate is not None
        return latent * self.latent_gate


class CaddNet(Fused, TokenTransformer):
    """``TokenTransformer`` with what a latent may need. Without the two options it is exactly that, key by key.

    Args:
        vocabulary: see ``TokenTransformer``, as all up to ``learned_positions``.
        hidden: width of the residual stream.
        blocks: transformer blocks.
        heads: attention heads.
        cond_dim: width of the condition vector.
        length: longest sequence.
        expansion: width of the perceptron in units of ``hidden``.
        dropout: dropout probability of branches.
        num_classes: classes; 0 for none.
        gate_init: initial gates of the branches.
        embedding_std: initial standard deviation of the tokens' rows.
        learned_positions: a learnt row per position.
        latent_gate: initial value of learnt factors on the latent's features; None for plain addition. With 0 a
            network trained without a latent is continued exactly where it was.
        added_time: the noise level enters through a new path that starts at zero, beside the old one held at sigma = 0.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int = 768,
        blocks: int = 12,
        heads: int = 12,
        cond_dim: int = 128,
        *,
        length: int = 1024,
        expansion: int = 4,
        dropout: float = 0.1,
        num_classes: int = 0,
        gate_init: float = 0.0,
        embedding_std: float | None = None,
        learned_positions: bool = False,
        latent_gate: float | None = None,
        added_time: bool = False,
    ) -> None:
        super().__init__(
            vocabulary,
            hidden,
            blocks,
            heads,
            cond_dim,
            length=length,
            expansion=expansion,
            dropout=dropout,
            num_classes=num_classes,
            gate_init=gate_init,
            embedding_std=embedding_std,
            learned_positions=learned_positions,
        )
        self.latent_gate = None if latent_gate is None else nn.Parameter(torch.full((hidden,), float(latent_gate)))
        self.time_map = nn.Linear(FREQUENCIES, cond_dim) if added_time else None
        if self.time_map is not None:
            nn.init.zeros_(self.time_map.weight)
            nn.init.zeros_(self.time_map.bias)

    @property
    def table(self) -> Tensor:
        """Embedding of every token, (vocabulary, hidden)."""
        return self.vocab_embed.embedding

    def condition(self, sigma: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """See ``TokenTransformer.condition``; with ``added_time`` sigma goes through the new path only."""
        if self.time_map is None or sigma is None:
            return super().condition(sigma, labels)
        added: Tensor = self.time_map(sinusoids(sigma).to(self.time_map.weight.dtype))
        return super().condition(None, labels) + added


def layout(batch: Batch, net: Fused) -> dict[str, Tensor | None]:
    """Keywords of ``TokenTransformer.trunk`` for rows that hold several documents, or padding.

    Args:
        batch: ``document`` (B, L) int and ``position`` (B, L), or ``valid`` (B, L) bool; all optional.
        net: the network that will read them.

    Raises:
        ValueError: the network cannot read rows of several documents.
    """
    if "document" in batch:
        if net.shifted or getattr(net, "position_embed", None) is not None:
            why = (
                "a network adapted from a causal model predicts a token at the position before it, which at the start"
                " of a document is another's"
                if net.shifted
                else "a row per position (module.net.learned_positions) is learnt for places in a row, and places in a"
                " document may lie beyond it"
            )
            raise ValueError(
                f"The rows keep their documents apart (data.documents, or data.mode=pack), and {why}. Type"
                " data.documents=false."
            )
        return {"positions": batch.get("position"), "mask": document_mask(batch["document"])}
    valid = batch.get("valid")
    if valid is None or bool(valid.all()):
        return {"positions": None, "mask": None}
    return {"positions": None, "mask": document_mask(valid.int())}
