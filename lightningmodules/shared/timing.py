"""Timing two ways of computing the same thing, for the benches of the rooms."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

LONG = 5.0  # seconds; what takes longer is timed twice at most


class InTurn:
    """Times calls in turn, so that whatever else the machine does hits them alike; the best of each counts.

    Args:
        clock: seconds, such as ``time.process_time``.
        repeats: timings of each.
    """

    def __init__(self, clock: Callable[[], float], repeats: int) -> None:
        self.clock, self.repeats = clock, repeats

    def __call__(self, *calls: Callable[[], Tensor]) -> tuple[list[float], list[Tensor]]:
        """Best seconds and last results of all; the last call is the one that is expected to take longest."""
        best = [math.inf] * len(calls)
        results: list[Tensor] = []
        for round_ in range(self.repeats):
            results = []
            for which, call in enumerate(calls):
                begin = self.clock()
                results.append(call())
                best[which] = min(best[which], self.clock() - begin)
            if best[-1] > LONG and round_:
                break
        return best, results


def training_step(net: nn.Module, loss: Callable[[], Tensor], *, fused: bool) -> Callable[[], Tensor]:
    """Forward, backward and AdamW; the learning rate is 0 so that every step starts from the same weights.

    Args:
        net: its parameters are updated.
        loss: computes the scalar to minimise.
        fused: one kernel for all weights.

    Returns:
        Call without arguments that makes one step and returns the loss.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, betas=(0.9, 0.95), fused=fused)

    def step() -> Tensor:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return step
