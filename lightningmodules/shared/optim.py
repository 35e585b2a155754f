"""Learning-rate curves, plain functions of the step that return a factor of the learning rate; and an optimiser."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that brings singular values near 1
ADAM_SIZE = 0.2  # root mean square of AdamW's usual update, in units of the learning rate


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


class Muon(torch.optim.Optimizer):
    """Muon for the matrices inside a network, AdamW for tables of tokens, last layers, vectors and all else.

    ``torch.optim.Muon`` takes matrices only, so a network needs two optimisers, and it rounds to bfloat16, which most
    CPUs are slow at; here CPUs work in float32, and matrices of one shape are handled together.

    Args:
        params: (name, parameter) pairs. Without names every matrix counts as one inside the network.
        lr: learning rate of matrices; their updates are as large as AdamW's would be at that rate.
        adam_lr: learning rate of all else; None for ``lr``.
        momentum: decay of the mean of gradients, with Nesterov's look ahead.
        weight_decay: of both, decoupled.
        betas: of AdamW.
        eps: of AdamW.
        ns_steps: iterations that bring the singular values of an update near 1.
        others: parts of names whose matrices AdamW takes: those of tables and last layers.

    Raises:
        ValueError: a setting is out of range.

    Source: Keller Jordan's Muon (kellerjordan.github.io/posts/muon); size of updates: arXiv 2502.16982, section 2.2.
    """

    takes_names: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        *,
        adam_lr: float | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ns_steps: int = 5,
        others: Sequence[str] = ("embed", "wte", "wpe", "output", "proj_out", "lm_head"),
    ) -> None:
        if lr < 0 or (adam_lr is not None and adam_lr < 0):
            raise ValueError(f"lr={lr}, adam_lr={adam_lr}: expected >= 0, e.g. 3e-3 and 1e-3")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: expected 0 <= momentum < 1, e.g. 0.95")
        if ns_steps < 1:
            raise ValueError(f"ns_steps={ns_steps}: expected at least one iteration, e.g. 5")
        named = [("", pair) if isinstance(pair, Tensor) else pair for pair in params]
        inner = [parameter.ndim == 2 and not any(part in name for part in others) for name, parameter in named]
        matrices, rest = ([p for (_, p), m in zip(named, inner, strict=True) if m is side] for side in (True, False))
        self._adam = torch.optim.AdamW(
            rest or [nn.Parameter(torch.zeros(1))],
            lr=lr if adam_lr is None else adam_lr,
            betas=(betas[0], betas[1]),
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )
        first: dict[str, Any] = {
            "params": matrices,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
        }
        super().__init__([first, *(self._adam.param_groups if rest else [])], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]
        alike: dict[torch.Size, list[Tensor]] = {}
        for parameter in first["params"]:
            if parameter.grad is not None:
                alike.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in alike.items():
            means = torch.stack([self._ahead(parameter, first["momentum"]) for parameter in parameters])
            updates = orthogonal(means, first["ns_steps"])
            torch._foreach_mul_(parameters, 1.0 - first["lr"] * first["weight_decay"])
            size = first["lr"] * ADAM_SIZE * math.sqrt(max(shape))
            for parameter, update in zip(parameters, updates.to(parameters[0].dtype).unbind(), strict=True):
                if isinstance(parameter, DTensor) and isinstance(update, DTensor):
                    update = update.redistribute(placements=parameter.placements)
                parameter.add_(update, alpha=-size)
        self._adam.state, self._adam.param_groups = self.state, self.param_groups[1:]  # anew: loading replaces them
        self._adam.step()
        return loss

    def _ahead(self, parameter: Tensor, momentum: float) -> Tensor:
        """The mean of gradients, moved on, and one look ahead."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean: Tensor = state["momentum_buffer"].lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(mean, momentum)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (n, a, b) with their singular vectors kept and their singular values near 1 (about 0.7 to 1.2).

    Returns:
        (n, a, b), float32 on CPUs, bfloat16 elsewhere.

    Source: Newton-Schulz iteration with the quintic of Keller Jordan's Muon.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
