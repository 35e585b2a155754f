"""Where randomness comes from: one seed per sample, or recorded tensors played back.

A sample is a function of its seed alone, never of the batch it happens to sit in, so work can be split over ranks and
resumed seed by seed.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor


def fold_seed(*parts: int) -> int:
    """Fold integers into one seed.

    Args:
        parts: any Python integers, for example ``(run_seed, rank, micro_batch_index)``. Order matters.

    Returns:
        An integer in [0, 2**63), equal for equal parts on every machine.
    """
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Noise(Protocol):
    """Source of independent draws for a fixed set of n samples."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws, (n, *shape)."""
        ...

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws in [0, 1), (n, *shape)."""
        ...

    def normal_at(self, where: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws for the N positions that ``where`` (n, L) bool holds, row by row, (N, *shape)."""
        ...


class SampleNoise:
    """One generator per sample: draws do not depend on batch size, rank or call order of other samples.

    Args:
        seeds: n integers, one per sample.
        device: where the draws are returned. They are always made on the CPU, so a seed gives the same noise on every
            kind of device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = [int(seed) for seed in seeds]
        self.device = torch.device(device)
        self._generators = [torch.Generator().manual_seed(fold_seed(seed)) for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws, (n, *shape)."""
        draws = torch.empty(len(self), *shape, dtype=dtype)
        for row, generator in zip(draws, self._generators, strict=True):
            row.normal_(generator=generator)
        return draws.to(self.device)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws in [0, 1), (n, *shape)."""
        draws = torch.empty(len(self), *shape, dtype=dtype)
        for row, generator in zip(draws, self._generators, strict=True):
            row.uniform_(generator=generator)
        return draws.to(self.device)

    def normal_at(self, where: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws for the N positions that ``where`` (n, L) bool holds, row by row, (N, *shape)."""
        counts = where.sum(dim=1).tolist()
        draws = torch.empty(sum(counts), *shape, dtype=dtype)
        for row, generator in zip(draws.split(counts), self._generators, strict=True):
            row.normal_(generator=generator)
        return draws.to(self.device)


class ReplayNoise:
    """Recorded draws, returned in turn; for comparing with numbers computed elsewhere.

    Args:
        tensors: the draws, each (n, *shape), in the order in which they will be asked for.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)

    def _next(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self._tensors:
            raise ValueError(
                f"ReplayNoise: a draw of shape (n, {shape}) was asked for, but every recorded one is used."
            )
        draw = self._tensors.pop(0)
        if tuple(draw.shape[1:]) != shape:
            raise ValueError(f"ReplayNoise: the next recorded draw is {tuple(draw.shape)}, wanted (n, {shape}).")
        return draw.to(dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The next recorded tensor, (n, *shape)."""
        return self._next(shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The next recorded tensor, (n, *shape)."""
        return self._next(shape, dtype)

    def normal_at(self, where: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of the next recorded tensor, (n, L, *shape), the positions that ``where`` (n, L) bool holds, (N, *shape)."""
        return self._next((where.shape[1], *shape), dtype)[where]
