"""Recorded numbers of the feature metrics, for ``verify``."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from callbacks.features.fd_lite import SEED, FdLite, whiten
from callbacks.features.frechet import Moments, Stats, frechet_distance

METHODS: tuple[str, ...] = ("metrics_fd_lite",)
INPUTS = ("images", "ref_features", "gen_features")
SELF_ROWS = 150  # ``fd_lite_self`` compares the reference with this many of its own rows


def references(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names that have to be checked: everything that is not an input."""
    return {name for name in tensors if not name.startswith(INPUTS)}


def check(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Iterable[tuple[str, float, float]]:
    """Compare this implementation with recorded numbers.

    Args:
        tensors: content of the file.
        metadata: ``numpy_randomstate_seed`` names the stream of the random weights.
        path: of the file; unused, everything is inside.

    Yields:
        (name, largest absolute error, absolute tolerance).
    """
    net = FdLite(int(metadata.get("numpy_randomstate_seed", SEED)))
    for name in sorted(tensors):
        if name.startswith("images"):
            target = name.replace("images", "features", 1)
            if target in tensors:
                yield _compare(target, net(tensors[name]).values, tensors[target], 1e-4)
    weights = [*net.convolutions, net.projection]
    ours = {
        "weights_first8": lambda: torch.stack([weight.flatten()[:8] for weight in net.convolutions]),
        "weights_sum_abs": lambda: torch.stack([weight.double().abs().sum() for weight in weights]),
    }
    if "ref_features" in tensors:
        reference, itself = _stats(tensors["ref_features"]), _stats(tensors["ref_features"][:SELF_ROWS])
        ours["trace_white_ref"] = lambda: whiten(reference, reference).cov.trace()[None]
        ours["fd_lite_self"] = lambda: torch.tensor([net.distance(reference, itself)], dtype=torch.float64)
        if "gen_features" in tensors:
            samples = _stats(tensors["gen_features"])
            ours["fd_lite"] = lambda: torch.tensor([net.distance(reference, samples)], dtype=torch.float64)
            ours["plain_fd"] = lambda: torch.tensor([frechet_distance(reference, samples)], dtype=torch.float64)
    for name, value in ours.items():
        if name in tensors:
            yield _compare(name, value(), tensors[name], 1e-5 if name.startswith("weights") else 1e-3)


def _stats(features: Tensor) -> Stats:
    moments = Moments()
    moments.update(features)
    return moments.finalize()


def _compare(name: str, ours: Tensor, theirs: Tensor, relative: float) -> tuple[str, float, float]:
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return name, float("inf"), 0.0
    error = float((ours.double() - theirs.double()).abs().max())
    return name, error, relative * float(theirs.double().abs().max())
