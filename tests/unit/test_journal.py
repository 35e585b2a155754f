"""Which rank a process takes itself for before it has met the others, by who started it."""

import pytest

from datamodules import writer
from platform.journal import rank_of_process

VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME")
CASES = {
    "alone": ({}, 0),
    "torchrun": ({"RANK": "9", "LOCAL_RANK": "1"}, 9),
    "torchrun, by srun": ({"RANK": "9", "LOCAL_RANK": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 9),
    "srun": ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_JOB_NAME": "train"}, 9),
    "srun, local ranks exported": ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "LOCAL_RANK": "1"}, 9),
    "Lightning": ({"LOCAL_RANK": "1"}, 1),
    "Lightning, by a script of sbatch without --ntasks": ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, 1),
    "Lightning, in a shell of srun": (
        {"LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"},
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rank_is_that_of_whoever_starts_the_processes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, rank = CASES[case]
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_of_process() == rank
    assert writer._rank() == str(rank)
