"""``log.txt`` of a run folder: everything worth reading later, with the time; other ranks keep only their warnings."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("platform", "datamodules", "lightningmodules", "callbacks", "py.warnings")
FILE = "log.txt"

log = logging.getLogger("platform")


@contextmanager
def journal(folder: Path, rank: int) -> Iterator[None]:
    """Append messages of our packages, and Python's warnings, to the folder's log while the context is open.

    Warnings also go to standard error, as they would without a log.

    Args:
        folder: run folder.
        rank: 0 writes ``log.txt``; others write ``rank_<rank>.log``, and only if they have something to warn about.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / (FILE if rank == 0 else f"rank_{rank}.log"), delay=True)
    file.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    setattr(file, "handleError", lambda record: None)  # noqa: B010 - a full disk is told once, elsewhere
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(file)
        logger.addHandler(screen)
    try:
        yield
    except BaseException as error:
        log.removeHandler(screen)  # the command line says it there
        log.error("%s: %s", type(error).__name__, error)
        raise
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(file)
            logger.removeHandler(screen)
        file.close()


def rank_of_process() -> int:
    """Rank by the environment of whoever started this process, before any process group exists.

    SLURM's number counts where Lightning takes SLURM for the one who starts the processes. In a script of sbatch
    without ``--ntasks`` and in a shell of srun, Lightning starts them itself, and all of them inherit that number.
    """
    by_slurm = "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if by_slurm else ("RANK", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def say(lines: Sequence[str]) -> None:
    """Print lines and keep them in the log."""
    print("\n".join(lines), flush=True)
    for line in lines:
        log.info("%s", line)
