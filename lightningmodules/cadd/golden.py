"""Replays reference numbers of masked diffusion (kuleshov-group/mdlm) and of the exact CADD oracle."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lightningmodules.cadd.replay_cadd import CaddReplay
from lightningmodules.cadd.replay_mdlm import MdlmReplay
from lightningmodules.shared.replay import distance

METHODS: tuple[str, ...] = ("mdlm", "cadd")
INPUTS = frozenset(
    {
        *("x0", "fwd.xt", "fwd.sigma", "sched.t", "loss.u_t", "loss.u_x", "loss.attention_mask"),
        *("step.xt", "step.t", "step.dt", "step.u", "traj.u", "genppl.chunk"),
        *("emb", "prob", "states", "batch.k", "batch.u_mask", "batch.x0", "batch.eps", "step.eps"),
        *("elbo1d.p", "elbo1d.w", "elbo1d.T"),
    }
)
TIGHT, EXACT = 1e-5, 1e-10  # absolute; networks in float32, the oracle in float64
QUADRATURE = 1e-8
FAR, IMPOSSIBLE = -1e5, -9e5  # log-probabilities above the first are compared, the others lie below the second


def references(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the quantities that a file asks to be checked: all but inputs and weights."""
    return {name for name in tensors if name not in INPUTS and not name.startswith("state/")}


def check(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Iterator[tuple[str, float, float]]:
    """Compute every reference quantity that this room knows.

    Args:
        tensors: of the file; any subset of the references may be there.
        metadata: ``method`` and the configuration.
        path: the file, for messages.

    Yields:
        Name, largest absolute difference (infinite for another shape or a value that is not finite), tolerance.

    Raises:
        ValueError: the configuration or the weights are missing or do not fit one another.
    """
    exact = metadata.get("method") == "cadd"
    replay = CaddReplay(tensors, metadata, path) if exact else MdlmReplay(tensors, metadata, path)
    recipes: Mapping[str, Callable[[], Tensor]] = replay.recipes()
    for name in sorted(references(tensors)):
        compute = recipes.get(name)
        if compute is None:
            continue  # the caller reports it as not checked
        try:
            error = _error(name, compute(), tensors[name])
        except (KeyError, RuntimeError):  # an input of it is missing, or a tensor of a shape that cannot be right
            error = math.inf
        yield name, error, _tolerance(name, tensors[name], exact)


def _error(name: str, ours: Tensor, reference: Tensor) -> float:
    if ours.shape == reference.shape and name.endswith("logprobs"):
        near = reference > FAR
        if bool((ours[~near] > IMPOSSIBLE).any()):
            return math.inf
        ours, reference = ours[near], reference[near]
    elif ours.shape == reference.shape and reference.is_floating_point():
        both = ours.isnan() & reference.isnan()  # their loss is not a number in the first of T steps
        ours, reference = ours.masked_fill(both, 0.0), reference.masked_fill(both, 0.0)
    return distance(ours, reference)


def _tolerance(name: str, reference: Tensor, exact: bool) -> float:
    if not reference.is_floating_point():
        return 0.0
    if name.startswith("elbo1d"):
        return QUADRATURE
    return EXACT if exact else TIGHT
