"""What replaying files of reference numbers has in common, whatever the method."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

LOOSE = (
    1e-4  # of flows: samples and gradients, relative to 1 + max |reference|: rounding grows along the token recursion
)
TIGHT = 1e-5  # everything else, likewise
TRAIN = 1e-3  # losses of five optimiser steps, absolute


def distance(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinite for another shape or a value that is not finite."""
    if ours.shape != reference.shape:
        return math.inf
    error = float((ours.detach().double() - reference.double()).abs().max()) if ours.numel() else 0.0
    return error if math.isfinite(error) else math.inf


def read_json(metadata: Mapping[str, str], key: str, path: Path, default: Any = None) -> Any:
    """Value of a metadata key that holds JSON.

    Args:
        metadata: of the file.
        key: which.
        path: the file, for messages.
        default: for a key that is not there; None if it must be.

    Raises:
        ValueError: the key is missing without a default, or is not JSON.
    """
    text = metadata.get(key)
    if text is None:
        if default is None:
            raise ValueError(f"{path}: the metadata key {key!r} is missing.")
        return default
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the metadata key {key!r} is not JSON: {error}.") from None


def flow_tolerance(name: str, reference: Tensor) -> float:
    """Absolute tolerance for a quantity of an autoregressive flow; the constants above say why they differ."""
    if name == "out/train_losses":
        return TRAIN
    loose = name.startswith(("out/sample", "out/denoised", "out/grad_norms"))
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    return (LOOSE if loose else TIGHT) * (1.0 + largest)
