"""What a sample is conditioned on: class labels, text features or prompts, one row per sample."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Rows of conditioning; every field is None or has one row per sample.

    Attributes:
        label: (B,) int64 class index; -1 means "no class".
        text: (B, L, D) float text features.
        text_mask: (B, L) bool, True where ``text`` is real.
        prompt: (B, P) int64 tokens that every sample starts with.
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    prompt: Tensor | None = None

    def _rows(self) -> dict[str, Tensor]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def __len__(self) -> int:
        return next((len(value) for value in self._rows().values()), 0)

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        return Condition(**{name: value[rows] for name, value in self._rows().items()})

    def to(self, device: torch.device | str) -> "Condition":
        """The same rows on ``device``."""
        return Condition(**{name: value.to(device) for name, value in self._rows().items()})

    @staticmethod
    def cat(parts: Sequence["Condition"]) -> "Condition":
        """Rows of all ``parts`` in order; the parts must carry the same fields."""
        names = parts[0]._rows().keys()
        if any(part._rows().keys() != names for part in parts):
            raise ValueError(
                "Condition.cat: the parts carry different fields; give every row the same kind of condition."
            )
        return Condition(**{name: torch.cat([part._rows()[name] for part in parts]) for name in names})
