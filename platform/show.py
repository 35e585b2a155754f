"""``show``: which experiments there are, or one of them in full with what it needs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from platform import config
from platform.origins import EXPERIMENTS, experiments, read
from platform.quantities import count, data_size
from platform.verbs import PROGRAM

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from platform.estimate import Estimate

PIPE_WIDTH = 400  # a pipe has no width: neither wrap nor cut there


def run(args: argparse.Namespace) -> int:
    """Entry of the verb.

    Args:
        args: ``experiment`` (or None), ``overrides`` (``key=value`` words), ``tiny``.

    Returns:
        0.
    """
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=PIPE_WIDTH, highlight=False)
    if args.experiment is None:
        _list(console)
        return 0
    from omegaconf import OmegaConf
    from rich.syntax import Syntax

    cfg = config.compose(args.experiment, args.overrides, tiny=args.tiny)
    text = OmegaConf.to_yaml(cfg)
    console.print(Syntax(text, "yaml", background_color="default") if console.is_terminal else text, soft_wrap=True)
    from platform.estimate import estimate

    for label, fact in needs(cfg, estimate(cfg)):
        console.print(f"[bold]{label:<12}[/bold] {fact}", soft_wrap=True)
    return 0


def catalogue(folder: Path = EXPERIMENTS) -> list[tuple[str, str, str]]:
    """Name, ``about`` line and paper of every experiment, read without composing; sorted by name."""
    rows = []
    for name in experiments(folder):
        content = read(folder / f"{name}.yaml").content
        source = content.get("source") or {}
        rows.append((name, str(content.get("about") or ""), str(source.get("paper") or "")))
    return rows


def needs(cfg: "DictConfig", guess: "Estimate") -> list[tuple[str, str]]:
    """Size and cost of a run, as labelled lines.

    Args:
        cfg: composed configuration.
        guess: what was worked out for it.
    """
    ranks = int(cfg.trainer.devices) * int(cfg.trainer.num_nodes)
    batch, steps = int(cfg.data.get("batch_size") or 1), int(cfg.trainer.max_steps)
    micro = min(int(cfg.data.get("micro_batch") or batch), max(1, batch // ranks))
    frozen = f", {count(guess.frozen)} frozen" if guess.frozen else ""
    flops = f"{count(guess.flops)}FLOP per training sample, forward and backward" if guess.flops else "unknown"
    run = f"; {count(guess.flops * batch * steps)}FLOP for the run" if guess.flops else ""
    parts = guess.state_bytes(ranks)
    if guess.activation_bytes is not None:
        parts[f"activations of {micro} samples"] = guess.activation_bytes * micro
    listed = " + ".join(f"{name} {data_size(value)}" for name, value in parts.items() if value)
    unknown = "" if guess.activation_bytes is not None else " + activations (unknown)"
    return [
        ("parameters", f"{guess.trainable:,} trainable{frozen}, {guess.averages} averaged copies"),
        ("arithmetic", f"{flops}{run}"),
        ("batch", f"{batch} samples per step = {micro} x {batch / (micro * ranks):g} micro-batches x {ranks} ranks"),
        ("length", f"{steps:,} steps, {steps * batch:,} samples"),
        ("memory", f"about {data_size(sum(parts.values()))} per device (estimate) = {listed}{unknown}"),
    ]


def _list(console: "Console") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("experiment", "what it trains", "paper"):
        table.add_column(title, no_wrap=title == "experiment")
    for row in catalogue():
        table.add_row(*row)
    console.print(table)
    console.print(f"\nOne in full: {PROGRAM} show EXPERIMENT   Train it: {PROGRAM} fit EXPERIMENT")
