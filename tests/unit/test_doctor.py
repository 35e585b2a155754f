"""``doctor``: one line per prerequisite, with a way to put it right."""

import argparse
import re
import shutil
import subprocess
from collections import namedtuple

import pytest

from platform import doctor


@pytest.fixture
def _everything_present(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "CHECKS", tuple(c for c in doctor.CHECKS if c is not doctor.accelerator))


@pytest.mark.usefixtures("_everything_present")
def test_one_line_each_and_an_exit_code(capsys):
    assert doctor.run(argparse.Namespace()) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("ready")
    for line in lines:
        assert re.match(r"\S.{13} (ok  |fix:) \S", line), line
    names = [line[:14].strip() for line in lines]
    assert len(names) == len(set(names))
    assert {"python", "torch", "lightning", "hydra-core", "command", "disk", "slurm", "cache", "git"} <= set(names)


@pytest.mark.usefixtures("_everything_present")
def test_something_essential_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requirements", lambda: {"torch": "99.0", "not-a-package": "1.0"})
    assert doctor.run(argparse.Namespace()) == 1
    out = capsys.readouterr().out
    assert re.search(r"^torch +fix: .* is too old, >= 99.0 needed. pip install -e ", out, re.M)
    assert re.search(r"^not-a-package +fix: not installed \(>= 1.0 needed\). pip install -e ", out, re.M)
    assert out.splitlines()[-1] == "nothing will run before this is fixed: torch, not-a-package"


def test_requirements_are_those_of_the_project():
    wanted = doctor.requirements()
    assert {"torch", "lightning", "webdataset", "tensorboard"} <= set(wanted)
    assert "pytest" not in wanted


@pytest.mark.parametrize(
    ("found", "wanted", "enough"),
    [("2.13.0+cpu", "2.6", True), ("2.5.1", "2.6", False), ("2.6", "2.6.0", False), ("10.0", "9.1", True)],
)
def test_versions_compare_as_numbers(found, wanted, enough):
    assert (doctor.release(found) >= doctor.release(wanted)) is enough


def only(check) -> doctor.Finding:
    (finding,) = check
    return finding


def test_the_command_outside_the_checkout(monkeypatch):
    answers = iter(["", str(doctor.ROOT / "platform"), "/"])
    monkeypatch.setattr(
        subprocess, "run", lambda *words, **options: subprocess.CompletedProcess(words, 0, stdout=next(answers) + "\n")
    )
    bare, good, other = (only(doctor.command()) for _ in range(3))
    assert not bare.good
    assert f"pip install -e {doctor.ROOT}" in bare.text
    assert good.good
    assert not other.good


def test_low_disk_and_shared_memory(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 100 * doctor.MIB))
    assert "only 0.10 GiB free" in only(doctor.disk()).text
    assert "--shm-size" in only(doctor.shared_memory()).text


@pytest.mark.parametrize(
    ("environ", "good", "text"),
    [
        ({}, True, "not inside a job"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, True, "4 tasks, restarted 0 times"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, False, "Use srun."),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, True, "interactive"),
    ],
)
def test_scheduler(environ, good, text):
    finding = only(doctor.scheduler(environ))
    assert finding.good is good
    assert text in finding.text


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PLATFORM_CACHE", str(tmp_path / "file" / "cache"))
    finding = only(doctor.cache())
    assert not finding.good
    assert finding.hard
    assert "Set PLATFORM_CACHE" in finding.text
