"""Mistakes of a user: exit code 2, one clear message, nothing built, nothing already written lost.

Mistakes in configuration files and in data have tests of their own beside this one; here are those around a run.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from platform import cli
from platform.runs import Run

QUICK = [
    "trainer.max_steps=2",
    "trainer.val_every=0",
    "checkpoints.every=1",
    "callbacks.samples=null",
    "callbacks.fid=null",
]
QUICK += ["callbacks.likelihood=null", "callbacks.progress=null"]


class Answer(NamedTuple):
    code: int
    message: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(["fit", "quickstart", "--tiny", *QUICK, f"runs={folder}"]) == 0
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A folder with one finished run in it, to be spoilt."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def contents(folder: Path) -> dict[str, str]:
    """Every file but the log, to which the refusal itself is added, and the lock."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in ("log.txt", "lock")]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> "Ask":
    return Ask(capsys)


class Ask:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> Answer:
        self.capsys.readouterr()
        code = cli.main(list(words))
        message = self.capsys.readouterr().err
        assert "Traceback" not in message
        return Answer(code, message)

    def fit(self, runs: Path, *words: str) -> Answer:
        return self("fit", "quickstart", "--tiny", *QUICK, f"runs={runs}", *words)


def test_other_settings(runs: Path, answer: Ask) -> None:
    before = contents(runs)
    assert answer.fit(runs, "module.noise_std=0.25", "trainer.max_steps=9") == (
        2,
        f"{runs}/quickstart-tiny holds a run with other settings:\n"
        f"  module.noise_std: 0.15 in {runs}/quickstart-tiny/config.yaml, now 0.25\n"
        "The same run: leave module.noise_std at 0.15. Another run beside it: add tag=NAME.\n",
    )
    assert contents(runs) == before


def test_fresh_does_not_overwrite(runs: Path, answer: Ask) -> None:
    before = contents(runs)
    assert answer.fit(runs, "fresh=true") == (
        2,
        f"fresh=true, but {runs}/quickstart-tiny holds a run at step 2, which is not overwritten. Continue it: leave"
        " fresh=true out. Another run beside it: add tag=NAME.\n",
    )
    assert contents(runs) == before


def test_fresh_is_needed_when_no_checkpoint_can_be_read(runs: Path, answer: Ask) -> None:
    run = Run(runs / "quickstart-tiny")
    for step in run.steps():
        (run.checkpoint(step) / "complete.json").unlink()
    before = contents(runs)
    damaged = "".join(
        f"{run.checkpoint(step)} is damaged (complete.json is missing or unreadable, so it was never finished); trying"
        " the one before.\n"
        for step in (2, 1)
    )
    assert answer.fit(runs) == (
        2,
        f"{damaged}{run.path} has checkpoints of steps 1, 2, but none can be read, so the run would begin again at step"
        " 0. Restore one of them, or type fresh=true to begin again; the old folder is kept.\n",
    )
    assert contents(runs) == before
    assert answer.fit(runs, "fresh=true") == (0, f"{damaged}What was in {run.path} is now in {run.path}.old1.\n")
    assert (runs / "quickstart-tiny.old1" / "checkpoints" / "step-00000002" / "meta.pt").is_file()


def test_damaged_newest_checkpoint_takes_no_place_of_a_good_one(runs: Path, answer: Ask) -> None:
    """Step 5 is reached from 1, and the first of the new checkpoints is below the damaged one."""
    run = Run(runs / "quickstart-tiny")
    run.checkpoint(2).rename(run.checkpoint(9))
    (run.checkpoint(9) / "complete.json").unlink()
    (run.checkpoints / "step-00000007.tmp").mkdir()
    code, message = answer.fit(runs, "trainer.max_steps=5", "checkpoints.keep=1")
    assert (code, run.steps()) == (0, [5])
    assert message.endswith(f"{run.checkpoint(9)} is now step-00000009.damaged1.\n")
    assert not list(run.checkpoints.glob("*.tmp"))


def test_checkpoint_of_another_shape(runs: Path, tmp_path: Path, answer: Ask) -> None:
    assert answer.fit(tmp_path / "wide", "module.net.channels=64", "module.net.head_dim=32").code == 0
    run, other = Run(runs / "quickstart-tiny"), Run(tmp_path / "wide" / "quickstart-tiny")
    shutil.rmtree(run.checkpoint(2))
    shutil.copytree(other.checkpoint(2), run.checkpoint(2))
    before = contents(run.checkpoints)
    layer = "net.blocks.0.attn_blocks.0.attention"
    assert answer.fit(runs, "trainer.max_steps=3") == (
        2,
        f"{run.checkpoint(2)} was written by a model of another shape; 68 tensors differ, first:\n"
        f"  {layer}.norm.bias: (64,) in the file, (32,) in the model\n"
        f"  {layer}.norm.weight: (64,) in the file, (32,) in the model\n"
        f"  {layer}.proj.bias: (64,) in the file, (32,) in the model\n"
        f"  {layer}.proj.weight: (64, 64) in the file, (32, 32) in the model\n"
        f"  {layer}.qkv.bias: (192,) in the file, (96,) in the model\n"
        "The same run: restore the settings in its config.yaml. Another run beside it: add tag=NAME.\n",
    )
    assert contents(run.checkpoints) == before


def test_same_run_twice(runs: Path, answer: Ask) -> None:
    with Run(runs / "quickstart-tiny").locked():
        before = contents(runs)
        code, message = answer.fit(runs, "trainer.max_steps=3")
        assert (code, re.sub(r"started \d+ s", "started N s", message)) == (
            2,
            f"{runs}/quickstart-tiny is being written by process {os.getpid()} on {socket.gethostname()}, started N s"
            f" ago; it holds {runs}/quickstart-tiny/lock. One run folder takes one writer. Wait for it, stop it, or"
            " start another run with tag=NAME.\n",
        )
        assert contents(runs) == before


@pytest.mark.usefixtures("finished")  # the first run makes the data set, and says so
def test_disk_full_at_the_last_step(tmp_path: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, asked = shutil.disk_usage(tmp_path), []

    def shrinking(path: Path) -> object:
        asked.append(path)
        return usage._replace(free=10**12 if len(asked) < 3 else 1000)  # room at the start and for step 1

    monkeypatch.setattr(shutil, "disk_usage", shrinking)
    folder = tmp_path / "quickstart-tiny"
    assert answer.fit(tmp_path) == (
        2,
        f"Checkpoint of 436 KiB not written, 1000 B are free on the disk of {folder}. Training goes on; the last good"
        " checkpoint is step-00000001. Free some space or lower checkpoints.keep.\n"
        f"Step 2 could not be saved: the disk of {folder}/checkpoints is full. The run stops at the checkpoint before;"
        " free some space and type the same command to continue from there.\n",
    )
    run = Run(tmp_path / "quickstart-tiny")
    assert run.steps() == [1]
    ending = run.ending()
    assert ending is not None
    assert (ending["code"], ending["step"]) == (2, 2)


def test_samples_of_a_run_that_went_on_are_drawn_anew(runs: Path, answer: Ask) -> None:
    folder = runs / "quickstart-tiny"
    assert answer("sample", str(folder), "--seeds", "0-3", "--no-grid").code == 0
    assert answer.fit(runs, "trainer.max_steps=4").code == 0
    assert answer("sample", str(folder), "--seeds", "0-3", "--no-grid").code == 0
    assert len(list(folder.glob("sampled/step_*/*/seed_000003.png"))) == 2


def test_disk_nearly_full(tmp_path: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert answer.fit(tmp_path) == (
        2,
        f"Two checkpoints need 872 KiB, 1000 B are free on the disk of {tmp_path}/quickstart-tiny. Free some space, or"
        " type runs=FOLDER to write elsewhere.\n",
    )


def test_no_gpu_here(tmp_path: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert answer.fit(tmp_path, "trainer.accelerator=gpu", "trainer.devices=8") == (
        2,
        "trainer.accelerator=gpu with trainer.devices=8: this machine shows 0 GPUs (CUDA_VISIBLE_DEVICES is '')."
        " On a machine without them: hardware=cpu, and --tiny for a miniature.\n",
    )


def test_torchrun_with_other_devices(tmp_path: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert answer.fit(tmp_path, "trainer.devices=2") == (
        2,
        "torchrun started 4 processes, but trainer.devices=2 on trainer.num_nodes=1 machines wants 2."
        " Give both the same number.\n",
    )


def test_precision_the_machine_lacks(tmp_path: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert answer.fit(tmp_path, "trainer.accelerator=gpu", "trainer.precision=bf16-mixed") == (
        2,
        "trainer.precision=bf16-mixed: Tesla T4 has no bfloat16 units. Type trainer.precision=32.\n",
    )


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_no_such_weights(finished: Path, tmp_path: Path, answer: Ask, verb: str) -> None:
    assert answer(verb, str(finished / "quickstart-tini")) == (
        2,
        f"{finished}/quickstart-tini: no config.yaml there, so it is neither a run folder nor a weights folder. Runs"
        f" beside it: {finished}/quickstart-tiny. Train one with: python -m platform fit\n",
    )


def test_metrics_the_run_does_not_have(runs: Path, answer: Ask) -> None:
    run = runs / "quickstart-tiny"
    shutil.rmtree(run / "checkpoints")  # the request is judged before weights are looked for
    assert answer("evaluate", str(run), "--metrics", "quality") == (
        2,
        "--metrics quality: quickstart measures fid, likelihood. Type some of these.\n",
    )
    assert answer("evaluate", str(run), "--scorer", "gpt2").message.startswith("--scorer judges texts")


def test_metrics_the_run_was_trained_without(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``callbacks.fid=null`` saves time while training; the experiment still says how its distance is measured."""
    assert cli.main(["evaluate", str(runs / "quickstart-tiny"), "--metrics", "fid", "--n", "8"]) == 0
    assert "metrics/fd_digits" in capsys.readouterr().out


def test_weights_the_run_does_not_have(finished: Path, answer: Ask) -> None:
    assert answer("sample", str(finished / "quickstart-tiny"), "--weights", "ema0.5") == (
        2,
        "weights='ema0.5': this run has ema, raw, ema0.998. Type one of them.\n",
    )


def test_samples_of_another_request_are_not_mixed(finished: Path, tmp_path: Path, answer: Ask) -> None:
    words = ["sample", str(finished / "quickstart-tiny"), "--out", str(tmp_path), "--seeds", "0-3"]
    assert answer(*words).code == 0
    before = contents(tmp_path)
    assert answer(*words, "guidance=2.0") == (
        2,
        f"{tmp_path} holds samples made with settings={{'guidance': 1.0}}, now settings={{'guidance': 2.0}}. Type"
        " another --out FOLDER.\n",
    )
    assert contents(tmp_path) == before
    words[1] += "/"
    assert answer(*words).code == 0


def test_label_beyond_the_classes(finished: Path, answer: Ask) -> None:
    assert answer("sample", str(finished / "quickstart-tiny"), "--label", "10") == (
        2,
        "--label 10: the model has 10 classes. Type 0 to 9, or -1 for none.\n",
    )


def test_finished_run_without_checkpoints_is_kept(runs: Path, answer: Ask) -> None:
    run = Run(runs / "quickstart-tiny")
    shutil.rmtree(run.checkpoints)
    before = contents(run.path)
    assert answer.fit(runs, "seed=5") == (0, f"What was in {run.path} is now in {run.path}.old1.\n")
    kept = contents(runs / "quickstart-tiny.old1")
    assert sorted(kept.values()) == sorted(before.values())
    assert run.steps() == [1, 2]


def test_complete_run_is_left_alone(runs: Path, answer: Ask) -> None:
    before = contents(runs)
    assert answer.fit(runs).code == 0
    assert contents(runs) == before


def test_failed_first_attempt_does_not_hold_the_folder(tmp_path: Path, answer: Ask) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("the machine is gone")

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("platform.strategy.Sharded.save_checkpoint", lost)
        assert cli.main(["fit", "quickstart", "--tiny", *QUICK, f"runs={tmp_path}", "module.noise_std=0.3"]) == 1
    assert (tmp_path / "quickstart-tiny" / "config.yaml").is_file()
    assert answer.fit(tmp_path).code == 0


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("module.net.channels=-32", "module.net.channels=-32: expected a whole number >= 1.\n"),
        ("module.net.num_blocks=0", "module.net.num_blocks=0: expected a whole number >= 1.\n"),
        ("module.net.num_classes=-1", "module.net.num_classes=-1: expected >= 0; 0 is a model without classes.\n"),
        ("module.net.dropout=2", "module.net.dropout=2.0: expected 0 <= dropout < 1. The paper uses 0.\n"),
        (
            "module.label_drop=1.5",
            "module.label_drop=1.5: expected a probability, 0..1. Type e.g. module.label_drop=0.1, the paper's"
            " value.\n",
        ),
        (
            "module.optimizer.lr=-1",
            "module.optimizer=torch.optim.AdamW: Invalid learning rate: -1.0. Correct the number there.\n",
        ),
    ],
)
def test_values_out_of_range(tmp_path: Path, answer: Ask, typed: str, message: str) -> None:
    assert answer.fit(tmp_path, typed) == (2, message)
    assert not list(tmp_path.iterdir())


def test_averages_that_nothing_moves(tmp_path: Path, answer: Ask) -> None:
    assert answer.fit(tmp_path, "callbacks.ema=null") == (
        2,
        "callbacks.ema=null with module.ema_decays=[0.998]: expected the callback, which moves the averages, or no"
        " averages; otherwise they stay at the untrained weights. Type module.ema_decays=[] as well, or leave"
        " callbacks.ema=null out.\n",
    )
    assert not list(tmp_path.iterdir())
    assert answer.fit(tmp_path, "callbacks.ema=null", "module.ema_decays=[]").code == 0


def test_disk_full_while_writing_logs(tmp_path: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("callbacks.records.JsonlLogger.write", full)
    assert answer.fit(tmp_path, "trainer.log_every=1") == (
        2,
        "The disk is full. What was complete is kept: a checkpoint appears under its name only when whole. Free some"
        " space and type the same command again.\n",
    )


def test_disk_full_while_saving(tmp_path: Path, answer: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells it: an exception of all ranks, holding its own complaint, holding the system's."""
    complaint = RuntimeError("unexpected pos 704 vs 598")
    complaint.__context__ = OSError(errno.ENOSPC, "No space left on device")

    def full(*_: object, **__: object) -> None:
        raise CheckpointException("write", {1: (complaint, traceback.extract_stack())})

    monkeypatch.setattr("platform.strategy.dcp.save", full)
    assert answer.fit(tmp_path) == (
        2,
        "The disk is full. What was complete is kept: a checkpoint appears under its name only when whole. Free some"
        " space and type the same command again.\n",
    )
    complaint.__context__ = None
    assert cli.main(["fit", "quickstart", "--tiny", *QUICK, f"runs={tmp_path}"]) == 1  # a bug, told as one


def test_folders_that_cannot_be_made(finished: Path, tmp_path: Path, answer: Ask) -> None:
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / "x"
    assert answer.fit(place) == (
        2,
        f"runs={place}: {place}/quickstart-tiny cannot be written (Not a directory). Type runs=FOLDER with a folder of"
        " yours.\n",
    )
    refused = (2, f"--out {place} cannot be made (Not a directory). Type another --out FOLDER.\n")
    assert answer("sample", str(finished / "quickstart-tiny"), "--out", str(place)) == refused
    assert answer("weights", "export", str(finished / "quickstart-tiny"), "--out", str(place)) == refused
    assert (tmp_path / "file").read_text() == "mine"


def test_refused_samples_do_not_hold_their_folder(finished: Path, tmp_path: Path, answer: Ask) -> None:
    words = ["sample", str(finished / "quickstart-tiny"), "--seeds", "0-1", "--out", str(tmp_path)]
    assert answer(*words, "guide_what=c").code == 2
    assert answer(*words, "guide_what=a").code == 0


def test_exported_weights_say_what_they_are(finished: Path, tmp_path: Path, answer: Ask) -> None:
    out = tmp_path / "w"
    assert answer("weights", "export", str(finished / "quickstart-tiny"), "--out", str(out)).code == 0
    assert answer("sample", str(out), "--seeds", "0").code == 0
    made = [str(folder.relative_to(out)) for folder in out.glob("sampled/*/*") if folder.is_dir()]
    assert made == ["sampled/step_000000002/ema0.998_guidance-1.0"]
    assert answer("sample", str(out), "--weights", "raw") == (
        2,
        "weights='raw': this run has ema, ema0.998. Type one of them.\n",
    )
