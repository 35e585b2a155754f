"""``fd_lite``: a distance between sets of pictures that needs no weights file.

It ranks corruption and knows nothing about objects: good for a quick start, regressions and the question whether
training broke; not for papers, and not for comparing data sets or sizes.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, interpolate, pad

from callbacks.features.extractor import Features
from callbacks.features.frechet import Stats, frechet_distance

SEED = 20251120
WIDTHS = ((3, 32), (32, 64), (64, 64))  # input and output channels of the three random convolutions
MIN_SIDE = 32
BLUR = (1.0, 4.0, 6.0, 4.0, 1.0)


class FdLite(nn.Module):
    """48 statistics of a Laplacian pyramid and 64 random projections of random convolutions, whitened.

    Args:
        seed: of ``numpy.random.RandomState``, whose streams never change; another seed is another metric.
    """

    name = "fd_lite"
    projection: Tensor
    blur: Tensor

    def __init__(self, seed: int = SEED) -> None:
        super().__init__()
        stream = np.random.RandomState(seed)
        for index, (inner, outer) in enumerate(WIDTHS):
            weight = stream.randn(outer, inner, 3, 3) * math.sqrt(2 / (9 * inner))
            self.register_buffer(f"conv{index}", torch.from_numpy(weight.astype(np.float32)))
        width = 4 * sum(outer for _, outer in WIDTHS)
        self.register_buffer("projection", torch.from_numpy(stream.randn(width, 64) / math.sqrt(width)))
        kernel = torch.tensor(BLUR)
        self.register_buffer("blur", (torch.outer(kernel, kernel) / 256).expand(3, 1, 5, 5).contiguous())
        blob = b"".join(tensor.numpy().tobytes() for tensor in (*self.convolutions, self.projection))
        self.digest = hashlib.sha256(b"fd_lite" + blob).hexdigest()

    @property
    def convolutions(self) -> list[Tensor]:
        """Weights of the three convolutions, (out, in, 3, 3) float32."""
        return [self.get_buffer(f"conv{index}") for index in range(len(WIDTHS))]

    def forward(self, images: Tensor) -> Features:
        """Features of pictures.

        Args:
            images: (B, 1 or 3, H, W) uint8; enlarged to 32x32 when a side is shorter.

        Returns:
            values (B, 112) float64: 48 pyramid statistics, then 64 projections.

        Raises:
            ValueError: the number of channels is not 1 or 3.
        """
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"fd_lite takes pictures with 1 or 3 channels, shape {tuple(images.shape)} came.")
        x = (images.float() / 255).expand(-1, 3, -1, -1)
        if min(x.shape[-2:]) < MIN_SIDE:
            x = interpolate(x, size=(MIN_SIDE, MIN_SIDE), mode="bilinear", align_corners=False)
        return Features(torch.cat([self._pyramid(x).double(), self._random(2 * x - 1)], 1))

    def _pyramid(self, x: Tensor) -> Tensor:
        parts = []
        for _ in range(3):
            low = conv2d(pad(x, (2, 2, 2, 2), mode="reflect"), self.blur, groups=3)
            parts.append(torch.log(adaptive_avg_pool2d((x - low).abs(), 2) + 1e-3).flatten(1))
            x = avg_pool2d(low, 2)
        return torch.cat([*parts, 4 * adaptive_avg_pool2d(x, 2).flatten(1)], 1)

    def _random(self, y: Tensor) -> Tensor:
        parts = []
        for weight in self.convolutions:
            y = conv2d(y, weight, padding=1).relu()
            parts.append(adaptive_avg_pool2d(y, 2).flatten(1))
            y = avg_pool2d(y, 2)
        return torch.cat(parts, 1).double() @ self.projection

    def reference(self) -> None:
        """None: the statistics depend on the data set."""
        return None

    def distance(self, reference: Stats, samples: Stats) -> float:
        """100 times the Frechet distance after whitening by the reference, per unit of whitened variance."""
        white, other = whiten(reference, reference), whiten(reference, samples)
        return 100.0 * frechet_distance(white, other) / float(white.cov.trace())


def whiten(reference: Stats, other: Stats) -> Stats:
    """``other`` in coordinates where the reference has (nearly) unit covariance.

    ``z = (f - m_ref) Q (w + 1e-3 mean w)^(-1/2)`` with ``C_ref = Q diag(w) Q^T``; the added term keeps directions
    without variance from deciding the distance.
    """
    values, vectors = torch.linalg.eigh(reference.cov)
    transform = vectors / (values.clamp_min(0.0) + 1e-3 * values.mean()).sqrt()
    return Stats((other.mean - reference.mean) @ transform, transform.T @ other.cov @ transform, other.n)
