"""What replaying files of reference numbers has in common, whatever the method."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


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
