"""Between data space (uint8 pictures, text) and model space (the tensor a network sees). Never trained, never saved."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = Mapping[str, Any]


class Codec(Protocol):
    """Model space <-> data space."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example in model space."""
        ...

    def encode(self, batch: Batch) -> Tensor:
        """A batch in model space, (B, *shape)."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Model space back to data space."""
        ...


class Pixels:
    """Pixels as they are: uint8 in a file, [-1, 1] in the model.

    A picture has ``levels`` grey values per channel, stored as ``value * white / (levels - 1)``. Photographs have 256
    levels up to 255; the 8x8 digits have 17 levels stored in steps of 15 up to 240.

    Args:
        size: height and width in pixels.
        channels: 1 or 3.
        levels: number of distinct values, >= 2.
        white: stored value of the highest level, 1..255, a multiple of ``levels - 1``.

    Raises:
        ValueError: ``white`` is not a multiple of ``levels - 1``.
    """

    def __init__(self, size: int, channels: int = 3, levels: int = 256, white: int = 255) -> None:
        if not 2 <= levels <= white + 1 <= 256 or white % (levels - 1):
            raise ValueError(
                f"codec.levels={levels} and codec.white={white} do not fit: the stored white (1..255) must be a"
                f" multiple of levels - 1. Photographs: levels=256 white=255. Digits: levels=17 white=240."
            )
        self.size, self.channels, self.levels, self.white = size, channels, levels, white

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, size)."""
        return (self.channels, self.size, self.size)

    def _pixels(self, batch: Batch) -> Tensor:
        pixels = batch["image"]
        if tuple(pixels.shape[1:]) != self.shape:
            raise ValueError(
                f"The batch holds pictures of shape {tuple(pixels.shape[1:])}, module.codec expects {self.shape}."
                f" Set data.size / data.channels, or module.codec.size / module.codec.channels, so that they agree."
            )
        return pixels.to(torch.float32)

    def encode(self, batch: Batch) -> Tensor:
        """Pictures in model space.

        Args:
            batch: ``batch["image"]`` is (B, channels, size, size) uint8, 0..white.

        Returns:
            (B, channels, size, size) float32, 0 -> -1 and white -> 1.
        """
        return self._pixels(batch) * (2.0 / self.white) - 1.0

    def decode(self, x: Tensor) -> Tensor:
        """Nearest level of every pixel.

        Args:
            x: (B, channels, size, size) float, clipped to [-1, 1].

        Returns:
            (B, channels, size, size) uint8, 0..white in steps of ``white / (levels - 1)``.
        """
        level = ((x.float() + 1.0) * (0.5 * (self.levels - 1))).round().clamp(0, self.levels - 1)
        return (level * (self.white // (self.levels - 1))).to(torch.uint8)

    def dequantize(self, batch: Batch, uniform: Tensor) -> Tensor:
        """Spread every level over its bin, so that a density on the result bounds the probability of the picture.

        Args:
            batch: as in :meth:`encode`.
            uniform: (B, channels, size, size) draws in [0, 1).

        Returns:
            (B, channels, size, size) float32 in [-1, 1): ``2 * (level + uniform) / levels - 1``; one bin is 2 / levels.

        Source: arXiv 2412.06329 (TarFlow) likelihood experiments; uniform dequantisation of arXiv 1511.01844.
        """
        level = self._pixels(batch) * ((self.levels - 1) / self.white)
        return (level.round() + uniform) * (2.0 / self.levels) - 1.0
