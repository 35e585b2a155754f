"""What a feature extractor offers, and where reference statistics come from."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from callbacks.features.frechet import Stats


@dataclass(frozen=True)
class Features:
    """What an extractor sees in a batch of pictures.

    Attributes:
        values: (B, D) float, the features whose Gaussians are compared.
        hidden: (B, H) float features for nearest-neighbour measures, or None to leave those out.
        predicted: (B,) int64 classes, or None when the extractor knows no classes.
    """

    values: Tensor
    hidden: Tensor | None = None
    predicted: Tensor | None = None


class Extractor(Protocol):
    """Pictures to features, with everything needed to name the resulting number.

    Attributes:
        name: tag of the distance, ``metrics/<name>``. Only the Inception network of 2015-12-05 may be called fid.
        digest: sha256 over weights and definition.
    """

    name: str
    digest: str

    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 pictures (B, C, H, W)."""
        ...

    def to(self, device: torch.device) -> "Extractor":
        """The same extractor computing on ``device``."""
        ...

    def reference(self) -> Stats | None:
        """Statistics shipped with the extractor, or None when they are made from the training pictures."""
        ...

    def distance(self, reference: Stats, samples: Stats) -> float:
        """The number that is logged."""
        ...
