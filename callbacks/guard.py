"""What happens when a loss or a gradient is not finite."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from callbacks.records import scalar, warn_once
from lightningmodules.base import GenerativeModule
from lightningmodules.shared.noise import fold_seed

HEALTH_FOLDER = "health"
HISTORY = 20
KEYS_SHOWN = 8


@dataclass
class _Micro:
    """A micro-batch of the update being made, its number and, once known, its loss."""

    number: int
    batch: Mapping[str, Any]
    loss: Tensor | None = None


class Guard(L.Callback):
    """Checks every update before it is applied, and logs ``train/grad_norm`` (before clipping).

    With ``policy="stop"`` an update that is not finite ends the run with a message naming step, rank, batch keys, the
    first bad module and the recent gradient norms; the batch is saved to ``<run>/health``. With ``policy="skip"`` the
    update is left out, counted in ``health/skipped_steps`` and its batch saved all the same. All ranks decide alike.
    The check waits for the gradients once per update.

    Args:
        policy: ``stop`` or ``skip``.
        most_in_a_row: updates skipped one after the other before the run stops anyway.

    Raises:
        ValueError: unknown policy.
    """

    def __init__(self, policy: str = "stop", most_in_a_row: int = 10) -> None:
        if policy not in ("stop", "skip"):
            raise ValueError(
                f"callbacks.guard.policy={policy!r}: expected stop or skip. Type callbacks.guard.policy=stop."
            )
        self.policy, self.most_in_a_row = policy, most_in_a_row
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.skipped = 0
        self._in_a_row = 0
        self._micros: list[_Micro] = []

    def state_dict(self) -> dict[str, Any]:
        """Counters of skipped updates."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch until its update is judged; runs before the module counts it."""
        assert isinstance(pl_module, GenerativeModule)
        if pl_module.micro_batches % trainer.accumulate_grad_batches == 0:
            self._micros.clear()
        self._micros.append(_Micro(pl_module.micro_batches, batch))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the loss, without looking at it yet: that would make the device wait."""
        if self._micros:
            self._micros[-1].loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the update before it is clipped and applied."""
        assert isinstance(pl_module, GenerativeModule)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = gradient_norm(parameters).to(pl_module.device)
        losses = [micro.loss for micro in self._micros if micro.loss is not None]
        bad_losses = (~torch.stack(losses).isfinite()).sum() if losses else norm.new_zeros(())
        if trainer.world_size > 1:  # the norm is already the same everywhere; the losses are each rank's own
            bad_losses = trainer.strategy.reduce(bad_losses.float(), reduce_op="sum")
        value, bad = torch.stack([norm.float(), bad_losses.float()]).tolist()
        if math.isfinite(value) and not bad:
            self._good(trainer, pl_module, value)
        else:
            self._bad(trainer, pl_module, parameters, value, blamed=bad > 0)

    def _good(self, trainer: L.Trainer, module: GenerativeModule, norm: float) -> None:
        self.norms.append(norm)
        self._in_a_row = 0
        if module.updates % module.log_every == 0:
            scalar(trainer, "train/grad_norm", norm)

    def _bad(
        self,
        trainer: L.Trainer,
        module: GenerativeModule,
        parameters: Sequence[nn.Parameter],
        norm: float,
        blamed: bool,
    ) -> None:
        self._in_a_row += 1
        micro = next((m for m in self._micros if m.loss is not None and not m.loss.isfinite()), self._micros[-1])
        stop = self.policy == "stop" or self._in_a_row > self.most_in_a_row
        findings = _from_all_ranks(self._finding(trainer, module, micro, stop, blamed))
        files = ", ".join(str(finding.file) for finding in findings)
        if not stop:
            for parameter in parameters:
                parameter.grad = None  # an optimiser leaves alone what has no gradient, moments included
            self.skipped += 1
            scalar(trainer, "health/skipped_steps", self.skipped)
            warn_once("skipped", f"Update {module.updates} is not finite and was skipped; its batch is in {files}.")
            return
        lines = [f"Update {module.updates} is not finite: gradient norm {norm:g}."]
        lines += [line for finding in findings for line in finding.lines()]
        norms = ", ".join(f"{value:.3g}" for value in self.norms)
        advice = "Often a lower module.optimizer.lr helps" + (
            "; callbacks.guard.policy=skip leaves such updates out." if self.policy == "stop" else "."
        )
        lines += [
            f"Gradient norms of the last {len(self.norms)} updates: {norms or 'none'}.",
            f"The batch is saved in {files}. The weights were not touched, nor was any checkpoint. {advice}",
        ]
        raise RuntimeError("\n".join(lines))

    def _finding(
        self, trainer: L.Trainer, module: GenerativeModule, micro: _Micro, search: bool, blamed: bool
    ) -> "_Finding":
        folder = Path(trainer.default_root_dir) / HEALTH_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"_rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = folder / f"nan_{module.updates:07d}{rank}.pt"
        loss = math.nan if micro.loss is None else float(micro.loss) * trainer.accumulate_grad_batches
        if not math.isfinite(loss) or not blamed:  # otherwise the culprit is another rank's batch
            batch = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in micro.batch.items()}
            torch.save({"batch": batch, "micro_batch": micro.number, "update": module.updates}, file)
        parameters = module.named_parameters()
        gradient = next((name for name, p in parameters if p.grad is not None and not _finite(p.grad)), None)
        culprit = first_bad_module(module, micro.batch, micro.number) if search else None
        if search and hasattr(module, "explain"):  # the room knows its own parts better than a list of modules
            told = _told(module, micro.batch)
            culprit = f"{culprit}; {told}" if culprit and told else culprit or told
        return _Finding(trainer.global_rank, loss, _keys(micro.batch), gradient, culprit, file)


@dataclass(frozen=True)
class _Finding:
    """What one rank knows about an update that is not finite."""

    rank: int
    loss: float
    keys: str
    gradient: str | None
    module: str | None
    file: Path

    def lines(self) -> list[str]:
        return [
            f"Rank {self.rank}: loss {self.loss:g}. Samples: {self.keys}.",
            f"First gradient that is not finite: {self.gradient or 'none on this rank'}.",
            f"First module whose output is not finite: {self.module or 'none'}.",
        ]


def _from_all_ranks(finding: _Finding) -> list[_Finding]:
    """Findings of the ranks whose loss is not finite; of all ranks when every loss is."""
    if not dist.is_initialized():
        return [finding]
    gathered: list[_Finding] = [finding] * dist.get_world_size()
    dist.all_gather_object(gathered, finding)
    return [found for found in gathered if not math.isfinite(found.loss)] or gathered


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """2-norm over all gradients of all ranks, a scalar tensor; 0 when there is no gradient.

    Args:
        parameters: plain, sharded, or both.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = []
    if sharded:
        total = get_total_norm(sharded)
        norms.append(total.full_tensor() if isinstance(total, DTensor) else total)
    if plain:
        norms.append(get_total_norm(plain))
    return torch.stack(norms).norm() if norms else torch.zeros(())


def first_bad_module(module: GenerativeModule, batch: Mapping[str, Any], number: int) -> str | None:
    """Repeat the loss of a micro-batch and find where it first goes wrong.

    Args:
        module: the room; every rank must call this together when it is sharded.
        batch: the micro-batch, on the module's device.
        number: its number in the run, which seeds its noise.

    Returns:
        Name of the first module whose output is not finite, or None.
    """
    found: list[str] = []
    hooks = [part.register_forward_hook(_watch(name, found)) for name, part in module.named_modules() if name]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
            torch.manual_seed(fold_seed(module.run_seed, module.global_rank, number))
            module.loss(batch)
    except Exception as error:  # the message about the run matters more than this search
        warn_once("search", f"The search for the first bad module failed ({type(error).__name__}: {error}).")
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _told(module: GenerativeModule, batch: Mapping[str, Any]) -> str | None:
    explain: Callable[[Mapping[str, Any]], str | None] = getattr(module, "explain")  # noqa: B009 - rooms may lack it
    try:
        return explain(batch)
    except Exception as error:  # the message about the run matters more than this search
        warn_once("explain", f"The room could not explain the batch ({type(error).__name__}: {error}).")
        return None


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def look(part: nn.Module, inputs: Any, output: Any) -> None:
        values = output if isinstance(output, (tuple, list)) else [output]
        if not found and any(isinstance(v, Tensor) and v.is_floating_point() and not _finite(v) for v in values):
            found.append(name)

    return look


def _keys(batch: Mapping[str, Any]) -> str:
    keys = [str(key) for key in batch.get("key", [])]
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return (", ".join(keys[:KEYS_SHOWN]) or "no keys in the batch") + more


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.isfinite().all())
