"""Precision and recall of a set of samples by balls around nearest neighbours."""

import torch
from torch import Tensor


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, block: int = 2048) -> tuple[float, float]:
    """Share of each set that lies inside the manifold of the other.

    The manifold of a set is the union of closed balls around its points that reach to the k-th nearest other point.

    Args:
        real: (N, D) float features of the data.
        generated: (M, D) float features of samples.
        k: neighbour that sets the radius, 1 <= k < min(N, M).
        block: rows per block of the distance matrix; bounds memory, never changes the result.

    Returns:
        (precision, recall): share of ``generated`` inside balls around ``real``, and the other way round.

    Raises:
        ValueError: too few points for k.

    Source: arXiv 1904.06991, equations 1 and 2.
    """
    real, generated = real.double(), generated.double()
    precision = _inside(generated, real, knn_radii(real, k, block), block)
    recall = _inside(real, generated, knn_radii(generated, k, block), block)
    return precision, recall


def knn_radii(points: Tensor, k: int, block: int = 2048) -> Tensor:
    """Distance of every point to its k-th nearest other point, (N,), dtype of ``points``.

    Raises:
        ValueError: ``k`` is not in 1..N-1.
    """
    if not 1 <= k < len(points):
        raise ValueError(
            f"k={k} neighbours of {len(points)} points: k must lie in 1..{len(points) - 1}. Give more samples."
        )
    # The point itself is its own nearest, at distance 0; hence k + 1.
    return torch.cat([torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(block)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    hits = sum(int((torch.cdist(rows, centres) <= radii).any(1).sum()) for rows in points.split(block))
    return hits / len(points)
