"""From a configuration to live objects: room, data, callbacks, loggers and the Lightning trainer."""

import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig

from callbacks.checkpointing import Schedule
from callbacks.records import JsonlLogger
from lightningmodules.base import GenerativeModule
from platform import signals
from platform.cli import DISK_FULL
from platform.journal import rank_of_process
from platform.quantities import data_size
from platform.runs import BOARD, METRICS, Run
from platform.stopping import StopFlag
from platform.strategy import Sharded, shard
from platform.verbs import PROGRAM

log = logging.getLogger(__name__)

PRECISIONS = ("32", "bf16-mixed")
NEVER = 1 << 62  # micro-batches until Lightning would validate by itself; callbacks.checkpointing decides instead


def world_size(cfg: DictConfig) -> int:
    """Ranks the run will have."""
    return int(cfg.trainer.devices) * int(cfg.trainer.num_nodes)


def check_machine(cfg: DictConfig) -> None:
    """Refuse what this machine cannot do, before anything is built.

    Raises:
        ValueError: no such accelerator, too few devices, or a precision it lacks.
    """
    started = int(os.environ.get("WORLD_SIZE", 0)) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    if started and started != world_size(cfg):
        raise ValueError(
            f"torchrun started {started} processes, but trainer.devices={cfg.trainer.devices} on"
            f" trainer.num_nodes={cfg.trainer.num_nodes} machines wants {world_size(cfg)}. Give both the same number."
        )
    tasks, job = os.environ.get("SLURM_NTASKS", "1"), os.environ.get("SLURM_JOB_ID")
    if SLURMEnvironment.detect() and tasks != "1" and "SLURM_STEP_ID" not in os.environ:
        raise ValueError(
            f"Job {job} has {tasks} tasks, but this process was not started by srun and would wait for the others."
            f" Type srun {PROGRAM} fit ..."
        )
    wanted, devices, precision = cfg.trainer.accelerator, int(cfg.trainer.devices), str(cfg.trainer.precision)
    gpus = torch.cuda.device_count()
    if wanted in ("gpu", "cuda") and gpus < devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "not set" if visible is None else repr(visible)
        raise ValueError(
            f"trainer.accelerator={wanted} with trainer.devices={devices}: this machine shows {gpus} GPUs"
            f" (CUDA_VISIBLE_DEVICES is {shown}). On a machine without them: hardware=cpu, and --tiny for a miniature."
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={precision}: expected one of {', '.join(PRECISIONS)}. Weights and optimiser always stay"
            f" in float32; bf16-mixed computes the networks in bfloat16. Type trainer.precision=32."
        )
    on_gpu = wanted in ("gpu", "cuda") or (wanted == "auto" and gpus > 0)
    if precision == "bf16-mixed" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"trainer.precision=bf16-mixed: {torch.cuda.get_device_name()} has no bfloat16 units."
            f" Type trainer.precision=32."
        )


def check_averages(cfg: DictConfig) -> None:
    """Refuse averages that nothing would move: they would stay at the initial weights and be measured as ``ema``.

    Raises:
        ValueError: the module keeps averages, and the callback that moves them is off.
    """
    decays = cfg.module.get("ema_decays")
    if decays and cfg.callbacks.get("ema") is None:
        raise ValueError(
            f"callbacks.ema=null with module.ema_decays={list(decays)}: expected the callback, which moves the"
            " averages, or no averages; otherwise they stay at the untrained weights. Type module.ema_decays=[] as"
            " well, or leave callbacks.ema=null out."
        )


def data(cfg: DictConfig) -> Any:
    """The data module with its shards made and checked: everything that can be wrong with data shows here."""
    datamodule = hydra.utils.instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.accumulation_for(world_size(cfg))
    return datamodule


def module(cfg: DictConfig, flag: StopFlag) -> GenerativeModule:
    """The room, its networks not built yet."""
    room = hydra.utils.instantiate(cfg.module, _convert_="all")
    room.run_seed = int(cfg.seed)
    room.stop_requested = flag.poll

    def prepare(built: GenerativeModule) -> None:
        if cfg.trainer.compile:
            for unit in built.shard_units():
                unit.compile()  # in place, so that state-dict keys stay as they are
        shard(built)

    room.shard = prepare
    return room


def blueprint(cfg: DictConfig) -> GenerativeModule:
    """The room with its networks on the meta device: shapes and counts without memory.

    Raises:
        ValueError: a size or an optimiser's setting is out of range.
    """
    with torch.device("meta"):
        room: GenerativeModule = hydra.utils.instantiate(cfg.module, _convert_="all")
        room.start = None  # a plan has no values, and a run that goes on may have outlived the file
        room.build()
    try:
        room._optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    except ValueError as error:
        raise ValueError(
            f"module.optimizer={cfg.module.optimizer._target_}: {error}. Correct the number there."
        ) from error
    return room


def checkpoint_bytes(cfg: DictConfig, plan: GenerativeModule) -> int:
    """Bytes of one checkpoint: weights, one shadow per average, two Adam moments, all float32."""
    parameters = sum(parameter.numel() for parameter in plan.parameters())
    return 4 * parameters * (3 + len(plan.ema_decays))


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to start when not even two checkpoints fit (the old one is deleted only after the new one is whole).

    Raises:
        ValueError: the disk of ``folder`` has too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:
        raise ValueError(
            f"Two checkpoints need {data_size(2 * needed)}, {data_size(free)} are free on the disk of {folder}."
            f" Free some space, or type runs=FOLDER to write elsewhere."
        )


def callbacks(cfg: DictConfig) -> list[L.Callback]:
    """Callbacks of the configuration in its order; entries set to null are off."""
    return [hydra.utils.instantiate(entry, _convert_="all") for entry in cfg.callbacks.values() if entry is not None]


def loggers(run: Run, start: int, owed: bool, room: GenerativeModule) -> list[Logger]:
    """TensorBoard and metrics.jsonl; points of a killed attempt beyond ``start`` disappear.

    So do those of a validation of ``start`` that is owed. TensorBoard forgets whole steps only: what else belongs to
    ``start`` is written again.
    """
    purge = start if owed or not start else start + 1  # from 0: one was killed before its first checkpoint
    board = TensorBoardLogger(run.path / BOARD, name="", version="", purge_step=purge)
    if owed and rank_of_process() == 0:
        rows = [row for row in run.rows() if row["step"] == start and row["value"] is not None]
        board.log_metrics({row["tag"]: row["value"] for row in rows}, start)
    return [board, JsonlLogger(run.path / METRICS, lambda: room.samples_seen)]


def trainer(
    cfg: DictConfig,
    run: Run,
    flag: StopFlag,
    extra: list[L.Callback],
    loggers: list[Logger],
    *,
    accumulation: int,
    needed: int,
) -> L.Trainer:
    """Lightning's trainer, driven by optimiser updates and saving only where a run can be continued."""
    quiet()
    torch.set_flush_denormal(True)  # the first updates of a network that starts near zero are full of them, 10x slower
    milestones = frozenset(int(step) for step in cfg.checkpoints.milestones or ())
    keep = max(1, int(cfg.checkpoints.keep))
    built: list[L.Trainer] = []
    schedule = Schedule(
        run.checkpoints,
        save=lambda path: _save(built[0], run, path, needed),
        prune=lambda: run.prune(keep, milestones) if built[0].is_global_zero else None,
        should_stop=flag.update,
        val_every=int(cfg.trainer.val_every or 0),
        every=int(cfg.checkpoints.every or 0),
        every_minutes=cfg.checkpoints.every_minutes,
        milestones=sorted(milestones),
    )
    if cfg.trainer.threads:
        torch.set_num_threads(int(cfg.trainer.threads))
        os.environ["OMP_NUM_THREADS"] = str(cfg.trainer.threads)  # or Lightning's launcher sets its own number
    built.append(
        L.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=int(cfg.trainer.devices),
            num_nodes=int(cfg.trainer.num_nodes),
            strategy=Sharded(),
            plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
            precision=precision_of(cfg),
            max_steps=int(cfg.trainer.max_steps),
            max_epochs=-1,
            accumulate_grad_batches=accumulation,
            gradient_clip_val=cfg.trainer.gradient_clip,
            val_check_interval=NEVER,
            check_val_every_n_epoch=None,
            log_every_n_steps=int(cfg.trainer.log_every),
            deterministic=bool(cfg.trainer.deterministic),
            default_root_dir=run.path,
            logger=loggers,
            callbacks=[*extra, schedule],
            num_sanity_val_steps=0,
            inference_mode=False,  # score-based denoising differentiates while sampling
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    )
    _own_signals(built[0])
    return built[0]


def schedule_of(trainer: L.Trainer) -> Schedule:
    """The one callback that decides about validating, saving and stopping."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, Schedule))  # type: ignore[attr-defined]


def precision_of(cfg: DictConfig) -> Any:
    """The compute type of the networks in Lightning's words."""
    return "32-true" if str(cfg.trainer.precision) == "32" else str(cfg.trainer.precision)


def _save(trainer: L.Trainer, run: Run, path: Path, needed: int) -> bool:
    room = trainer.strategy.broadcast(shutil.disk_usage(run.path).free if trainer.is_global_zero else 0)
    if room < needed:
        kept = run.latest()
        if trainer.is_global_zero:
            log.warning(
                "Checkpoint of %s not written, %s are free on the disk of %s. Training goes on; the last good"
                " checkpoint is %s. Free some space or lower checkpoints.keep.",
                data_size(needed),
                data_size(room),
                run.path,
                kept.name if kept else "none",
            )
        return False
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()  # no checkpoint is ahead of its logs
    trainer.save_checkpoint(path)
    return True


def _own_signals(trainer: L.Trainer) -> None:
    """Switch off Lightning's signal handling, which saves inside the handler and broadcasts at every micro-batch."""
    places: list[tuple[Any, str, Callable[..., None]]] = [
        (trainer._signal_connector, "register_signal_handlers", lambda: None),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None),
    ]
    for owner, name, nothing in places:
        if not hasattr(owner, name):
            raise RuntimeError(
                f"lightning {L.__version__} has no {type(owner).__name__}.{name} any more; see platform/assemble.py."
            )
        setattr(owner, name, nothing)
    signals.install()


def _say_unless_disk_full(raised: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread; a full disk is told once, by the main thread."""
    if not (isinstance(raised.exc_value, OSError) and raised.exc_value.errno in DISK_FULL):
        threading.__excepthook__(raised)


def quiet() -> None:
    """Silence Lightning's notices about choices made here on purpose; warnings of ours and of torch stay."""
    threading.excepthook = _say_unless_disk_full
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*val_check_interval.*",
        ".*is not resumable.*",
        ".*isinstance.*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=text)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning\..*")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*|lightning\..*")
