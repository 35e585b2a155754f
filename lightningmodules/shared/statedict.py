"""Comparing state dicts: nothing missing, nothing unexpected, every shape the same."""

from collections.abc import Mapping

from torch import Tensor


def match(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Insist that two state dicts have the same keys and shapes.

    Args:
        given: what came, already translated.
        expected: ``state_dict()`` of the network it should fill.

    Raises:
        ValueError: names the missing and unexpected keys and every tensor of another shape, with both shapes.
    """
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    shapes = [
        f"{key}: {tuple(given[key].shape)} in the file, {tuple(expected[key].shape)} in the network"
        for key in sorted(given.keys() & expected.keys())
        if given[key].shape != expected[key].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"The weights do not fit the network: {_some('missing', missing)}; {_some('unexpected', unexpected)}; "
            f"{_some('of another shape', shapes)}."
        )


def _some(what: str, items: list[str]) -> str:
    return f"{len(items)} {what}" + (f" ({', '.join(items[:5])}{', ...' if len(items) > 5 else ''})" if items else "")
