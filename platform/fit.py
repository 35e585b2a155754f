"""``fit``: begin a run, or continue it where the same command left off."""

import argparse
import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from platform import config as configs
from platform import signals
from platform.journal import journal, rank_of_process, say

log = logging.getLogger(__name__)

INTERRUPTED = 75  # EX_TEMPFAIL: the same command continues


def run(args: argparse.Namespace) -> int:
    """Entry of the verb.

    Args:
        args: ``experiment``, ``overrides`` (``key=value`` words), ``tiny``.

    Returns:
        0 when the run is complete, 75 when it was interrupted and can be continued.
    """
    signals.install()
    cfg = configs.compose(args.experiment, args.overrides, tiny=args.tiny)
    return fit(cfg)


def fit(cfg: DictConfig) -> int:
    """Train under a composed configuration; see :func:`run`."""
    from platform import assemble
    from platform.runs import Run
    from platform.stopping import leave_with_parent

    assemble.check_machine(cfg)
    assemble.check_averages(cfg)
    run = Run(Path(cfg.runs) / configs.run_name(cfg, cfg.experiment))
    rank = rank_of_process()
    writer = rank == 0
    if not writer:
        leave_with_parent()
    datamodule = assemble.data(cfg)
    plan = assemble.blueprint(cfg)
    needed = assemble.checkpoint_bytes(cfg, plan)
    with run.locked() if writer else contextlib.nullcontext(), journal(run.path, rank):
        start, checkpoint = _where(run, cfg, writer)
        owed = checkpoint is not None and _owed(checkpoint)
        if checkpoint is not None and start >= int(cfg.trainer.max_steps) and not owed:
            _report(cfg, run, "already complete", start, writer)
            return 0
        if writer:
            if not cfg.data.get("val", True):
                log.warning(
                    "data.val is null: without validation data no grids, metrics or tables are made. To have them, set"
                    " data.val to shards or a folder."
                )
            run.tidy(start)
            assemble.check_disk(run.path, needed)
            _prepare_folder(run, cfg, start, owed, datamodule.describe())
        return _train(cfg, run, datamodule, start, checkpoint, owed, needed, writer)


def _train(
    cfg: DictConfig,
    run: Any,
    datamodule: Any,
    start: int,
    checkpoint: Path | None,
    owed: bool,
    needed: int,
    writer: bool,
) -> int:
    from platform import assemble, screens
    from platform.stopping import StopFlag

    flag = StopFlag(lambda: signals.requested() != 0)
    room = assemble.module(cfg, flag)
    if checkpoint is not None:
        room.start = None  # the weights it began with are in the checkpoint, changed
    extra = [screens.StartScreen(cfg, run, datamodule.describe(), start), *assemble.callbacks(cfg)]
    accumulation = datamodule.accumulation_for(assemble.world_size(cfg))
    loggers = assemble.loggers(run, start, owed, room)
    trainer = assemble.trainer(cfg, run, flag, extra, loggers, accumulation=accumulation, needed=needed)
    try:
        trainer.fit(room, datamodule=datamodule, ckpt_path=checkpoint, weights_only=False)
    except BaseException as raised:
        # SystemExit is how Lightning leaves after a second Ctrl-C
        error = KeyboardInterrupt() if isinstance(raised, SystemExit) and trainer.interrupted else raised
        if writer:
            code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ValueError) else 1
            with contextlib.suppress(OSError):  # a full disk has no room for it
                run.finish(f"{type(error).__name__}: {error}", code, max(start, room.updates))
        if error is not raised:
            raise error from None
        raise
    schedule = assemble.schedule_of(trainer)
    code = INTERRUPTED if schedule.interrupted else 0
    reason = "interrupted" if schedule.interrupted else "complete"
    if writer:
        run.finish(reason, code, room.updates)
    _report(cfg, run, reason, room.updates, writer)
    return code


def _where(run: Any, cfg: DictConfig, writer: bool) -> tuple[int, Path | None]:
    """Updates done so far and the checkpoint holding them; (0, None) for a new run.

    Raises:
        ValueError: the folder holds another run, a good one that ``fresh`` must not touch, or only damaged checkpoints.
    """
    from platform.runs import CONFIG, step_of

    if not (run.path / CONFIG).is_file() or not run.steps():
        if writer and (run.steps() or run.has_history(cfg)):  # nothing to continue from, but numbers to keep
            run.set_aside()
        return 0, None
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    run.check_config(cfg)
    if writer:
        _announce(configs.load(run.path / CONFIG), cfg)
    checkpoint = run.latest()
    if checkpoint is not None:
        if cfg.fresh and not requeued:
            raise ValueError(
                f"fresh=true, but {run.path} holds a run at step {step_of(checkpoint)}, which is not overwritten."
                f" Continue it: leave fresh=true out. Another run beside it: add tag=NAME."
            )
        return step_of(checkpoint), checkpoint
    if run.steps() and not cfg.fresh:
        raise ValueError(
            f"{run.path} has checkpoints of steps {', '.join(map(str, run.steps()))}, but none can be read, so the run"
            f" would begin again at step 0. Restore one of them, or type fresh=true to begin again;"
            f" the old folder is kept."
        )
    if run.steps() and writer:
        run.set_aside()
    return 0, None


def _announce(old: DictConfig, new: DictConfig) -> None:
    """Say what a continued run may change and still is the same run, where it changes numbers."""
    noise = "every update sees the same samples; noise and dropout are drawn anew"
    notes = {
        "trainer.max_steps": "a learning-rate curve follows the new length",
        "trainer.devices": noise,
        "trainer.num_nodes": noise,
        "data.micro_batch": noise,
    }
    for key, note in notes.items():
        before, now = OmegaConf.select(old, key), OmegaConf.select(new, key)
        if before != now:
            say([f"{key} was {before}, is {now}: {note}."])


def _owed(checkpoint: Path) -> bool:
    import torch

    from platform.strategy import META

    meta = torch.load(checkpoint / META, weights_only=False)  # written by this program into its own run folder
    return any(isinstance(state, dict) and state.get("validation_owed") for state in meta["callbacks"].values())


def _prepare_folder(run: Any, cfg: DictConfig, start: int, owed: bool, data: dict[str, Any]) -> None:
    from platform.assemble import world_size
    from platform.runs import CONFIG, provenance

    configs.save(cfg, run.path / CONFIG)  # a continued run may differ in what does not shape its result
    run.truncate_metrics(start, validated=not owed)
    run.record_attempt(provenance(start, world_size(cfg), data))


def _report(cfg: DictConfig, run: Any, reason: str, step: int, writer: bool) -> None:
    from platform import screens

    if writer:
        say(screens.end_lines(cfg, run, reason, step))
