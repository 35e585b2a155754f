"""What a person reads when a run starts and when it ends."""

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
from omegaconf import DictConfig

from lightningmodules.base import GenerativeModule
from platform.journal import say
from platform.runs import Run
from platform.verbs import PROGRAM


class StartScreen(L.Callback):
    """A dozen lines before the first update.

    Args:
        cfg: the run's configuration.
        run: its folder.
        facts: ``datamodule.describe()``.
        start: updates of the checkpoint continued from, 0 for a new run.
    """

    def __init__(self, cfg: DictConfig, run: Run, facts: dict[str, Any], start: int) -> None:
        self.cfg, self.run, self.facts, self.start = cfg, run, facts, start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print once, on rank 0."""
        assert isinstance(pl_module, GenerativeModule)
        if trainer.is_global_zero:
            say(self.lines(trainer, pl_module))

    def lines(self, trainer: L.Trainer, module: GenerativeModule) -> list[str]:
        """The screen, a line each."""
        cfg, facts = self.cfg, self.facts
        followed = sum(value.numel() for _, value in module._followed)
        trained = sum(value.numel() for value in module.parameters() if value.requires_grad)
        accumulation, world = trainer.accumulate_grad_batches, trainer.world_size
        batch = int(cfg.data.batch_size)
        steps = int(cfg.trainer.max_steps)  # that of Lightning is one more where only a validation is left
        dtype = "bfloat16" if "bf16" in str(cfg.trainer.precision) else "float32"
        frozen = sum(
            value.numel()
            for name, value in module.named_parameters()
            if not value.requires_grad and not name.startswith("shadows.")
        )
        per_epoch = facts.get("rows") or facts.get("samples")  # text is trained on in rows of several documents
        epochs = f", {steps * batch / per_epoch:.3g} epochs" if per_epoch else ""
        averages = ", ".join(f"{decay:g}" for decay in module.ema_decays) or "none"
        begin = "fresh" if not self.start else f"continuing at step {self.start} ({module.samples_seen} samples)"
        begin += f", next sample {trainer.datamodule.next_key}"  # type: ignore[attr-defined]
        every = int(cfg.checkpoints.every or 0) or steps
        paper = (cfg.get("source") or {}).get("paper")
        rows = [
            (
                "experiment",
                f"{cfg.experiment}{' (tiny)' if cfg.tiny_run else ''}: {cfg.about}{f' [{paper}]' if paper else ''}",
            ),
            (
                "parameters",
                f"{trained:,} trainable, {frozen:,} frozen, {followed:,} followed by averages with decay {averages}",
            ),
            (
                "data",
                ", ".join(
                    f"{value} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in facts.items()
                ),
            ),
            ("batch", f"{batch} = {batch // (accumulation * world)} x {accumulation} micro-batches x {world} ranks"),
            ("length", f"{steps:,} steps, {steps * batch:,} samples{epochs}"),
            (
                "dtypes",
                f"weights, gradients, their sum over ranks, optimiser, averages float32; networks compute in {dtype}",
            ),
            ("devices", f"{world} x {module.device} on {socket.gethostname()}, {os.cpu_count()} CPU cores"),
            ("strategy", "FSDP2, one shard per rank" if world > 1 else "one process, unsharded"),
            ("run folder", str(self.run.path)),
            ("start", begin),
            ("checkpoint", f"next at step {min(steps, (self.start // every + 1) * every)}"),
            ("watch", f"{PROGRAM} board {shlex.quote(str(self.run.path.parent))}"),
        ]
        return [f"{name:<11} {text}" for name, text in rows]


def best(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of the lowest value of every distance, bits per dimension and validation loss, by tag."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        tag, value = row["tag"], row["value"]
        if value is None or not tag.startswith(("metrics/f", "metrics/bpd", "val/loss")):
            continue
        if tag not in found or value <= found[tag]["value"]:
            found[tag] = row
    return found


def number(value: float | None) -> str:
    """A metric for people; rows hold null for what is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def end_lines(cfg: DictConfig, run: Run, reason: str, step: int) -> list[str]:
    """The last screen: numbers reached, where things are, what to type next."""
    rows = run.rows()
    newest = {row["tag"]: row for row in rows}
    numbers = [row for tag, row in newest.items() if tag.startswith("metrics/") or tag == "val/loss"]
    lowest = best(rows)
    folder = shlex.quote(str(run.path))
    lines = ["", f"{reason} at step {step} of {int(cfg.trainer.max_steps)}"]
    for row in numbers:
        low = lowest.get(row["tag"], row)
        earlier = f"; best {number(low['value'])} at step {low['step']}" if low["step"] != row["step"] else ""
        lines.append(f"  {row['tag']:<34} {number(row['value'])}   (step {row['step']}{earlier})")
    pictures = sorted((run.path / "samples").glob("step_*"))
    if pictures:
        lines.append(f"pictures     {pictures[-1]}")
    lines.append(f"checkpoint   {run.checkpoint(run.steps()[-1]) if run.steps() else 'none'}")
    if step < int(cfg.trainer.max_steps):
        words = [word for word in sys.argv[1:] if not word.startswith("fresh=")]  # there is a checkpoint to go on from
        same = "the same command" if words == sys.argv[1:] else "without fresh it"
        lines += ["next:", f"  {PROGRAM} {shlex.join(words)}    # {same} continues"]
    else:
        lines.append("next:")
    lines += [
        f"  {PROGRAM} board {shlex.quote(str(run.path.parent))}",
        f"  {PROGRAM} sample {folder} --seeds 0-63",
        f"  {PROGRAM} evaluate {folder}",
    ]
    return lines
