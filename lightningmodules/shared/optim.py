"""Learning-rate curves: plain functions of the step, returning a factor of the optimiser's learning rate."""

import math


def warmup_cosine(step: int, total_steps: int, *, warmup_steps: int = 0, start: float = 0.0, end: float = 0.0) -> float:
    """Straight line up, half a cosine down, then level.

    Args:
        step: updates made so far, >= 0; the update about to be made uses the returned factor.
        total_steps: length of the run in updates, > 0.
        warmup_steps: updates until the factor reaches 1.
        start: factor of the very first update.
        end: factor from ``total_steps`` on; a run that is continued past its end stays there.

    Returns:
        Factor in [min(start, end), 1].

    Source: arXiv 1608.03983, equation 5, one period; linear warm-up as in arXiv 1706.02677.
    """
    if step < warmup_steps:
        return start + (1.0 - start) * step / warmup_steps
    position = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * position))
