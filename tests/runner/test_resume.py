"""Real processes, real signals, random moments: a run killed again and again ends like one never touched."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.checkpointing import Schedule
from callbacks.samples import Samples
from platform import cli, signals
from platform.runs import METRICS, Run

STEPS = 60
SETTINGS = (
    "module.net.dropout=0.1 module.label_drop=0.1 data.micro_batch=4 data.batch_size=8 data.workers=2"
    f" trainer.max_steps={STEPS} trainer.val_every=20 trainer.log_every=1 checkpoints.every=7 checkpoints.keep=2"
).split()
CLOCKED = ("speed/", "data/wait_share", "data/samples_per_s")  # tags whose values depend on the machine
ENDINGS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 75}


def start(folder: Path, devices: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "platform", "fit", "quickstart", "--tiny", *SETTINGS]
    command += [f"runs={folder}", f"trainer.devices={devices}"]
    # a session of its own, so that a signal meant for the run cannot reach the test
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def last_step(run: Run) -> int:
    file = run.path / METRICS
    if not file.is_file():
        return 0
    lines = file.read_text().splitlines()
    try:
        return json.loads(lines[-1])["step"]
    except (IndexError, ValueError):
        return 0


def interrupt(process: "subprocess.Popen[str]", run: Run, after: int, number: int) -> None:
    """Send a signal at some moment after ``after`` more updates."""
    target = last_step(run) + after
    limit = time.monotonic() + 120
    while last_step(run) < target:
        assert process.poll() is None, f"ended before the signal:\n{process.communicate()[0]}"
        assert time.monotonic() < limit
        time.sleep(0.002)
    time.sleep(random.random() * 0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == ENDINGS[signal.Signals(number)], output


def finish(folder: Path, devices: int) -> str:
    process = start(folder, devices)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds: weights, averages, optimiser moments."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder)
    return state


def logged(run: Run) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()]
    return [
        tuple(sorted((k, str(v)) for k, v in row.items() if k != "time"))
        for row in rows
        if not row["tag"].startswith(CLOCKED)
    ]


def shown(run: Run) -> dict[str, list[Any]]:
    """What TensorBoard shows: steps and values of every scalar, steps and bytes of every picture."""
    board = EventAccumulator(str(run.path / "board"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    tags = board.Tags()
    scalars = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"]}
    pictures = {tag: [(e.step, e.encoded_image_string) for e in board.Images(tag)] for tag in tags["images"]}
    return {tag: seen for tag, seen in {**scalars, **pictures}.items() if not tag.startswith(CLOCKED)}


def same(killed: Run, whole: Run) -> None:
    first, second = (tensors(run.checkpoint(STEPS)) for run in (killed, whole))
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer_0.state") for name in first)
    assert any("shadows" in name for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert logged(killed) == logged(whole)
    curves, expected = shown(killed), shown(whole)
    assert curves.keys() == expected.keys()
    for tag, points in expected.items():
        assert curves[tag] == points, tag
    pictures = sorted(file.relative_to(whole.path) for file in (whole.path / "samples").rglob("*.png"))
    assert len(pictures) > 3
    for name in pictures:
        assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[int, Run] = {}

    def get(devices: int) -> Run:
        if devices not in done:
            folder = tmp_path_factory.mktemp(f"whole{devices}")
            finish(folder, devices)
            done[devices] = Run(folder / "quickstart-tiny")
        return done[devices]

    return get


KILL, TERM, USR1, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
QUICK = [(1, [KILL, KILL, KILL]), (1, [TERM, USR1, INT]), (2, [KILL, TERM, USR1])]
EACH = [(devices, [number] * 3) for devices in (1, 2) for number in (TERM, USR1, INT, KILL)]


@pytest.mark.parametrize(
    ("devices", "signals"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in EACH if case not in QUICK)],
    ids=lambda value: value if isinstance(value, int) else "+".join(signal.Signals(number).name for number in value),
)
def test_killed_run_ends_like_whole_run(whole_runs: Any, tmp_path: Path, devices: int, signals: list[int]) -> None:
    whole = whole_runs(devices)
    run = Run(tmp_path / "quickstart-tiny")
    for number in signals:
        interrupt(start(tmp_path, devices), run, random.randint(3, 15), number)
    output = finish(tmp_path, devices)
    assert "continuing at step" in output
    same(run, whole)


def test_validation_cut_short_twice_leaves_no_trace(
    whole_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop in the middle of a validation; then a crash between the validation made up for and the next save."""
    whole = whole_runs(1)
    command = ["fit", "quickstart", "--tiny", *SETTINGS, f"runs={tmp_path}", "trainer.devices=1"]
    draw, save, requested = Samples._classes, Schedule._checkpoint, signals.requested

    def interrupted(self: Samples, trainer: Any, module: Any) -> None:
        if module.updates == 20:
            monkeypatch.setattr(signals, "requested", lambda: signal.SIGTERM)
        draw(self, trainer, module)

    monkeypatch.setattr(Samples, "_classes", interrupted)
    assert cli.main(command) == 75
    monkeypatch.setattr(Samples, "_classes", draw)
    monkeypatch.setattr(signals, "requested", requested)

    def crash(self: Schedule, step: int, needed: bool) -> None:
        raise OSError("the machine is gone")

    monkeypatch.setattr(Schedule, "_checkpoint", crash)
    assert cli.main(command) == 1
    monkeypatch.setattr(Schedule, "_checkpoint", save)
    assert cli.main(command) == 0
    same(Run(tmp_path / "quickstart-tiny"), whole)


def test_checkpoint_being_replaced_is_found(tmp_path: Path) -> None:
    """A kill between the two renames that put a newer checkpoint of the same step in place of the older."""
    run = Run(tmp_path)
    (run.checkpoints / "step-00000007").mkdir(parents=True)
    (run.checkpoints / "step-00000009.old").mkdir()
    assert run.steps() == [7, 9]
    assert run.checkpoint(9).name == "step-00000009.old"
    assert run.checkpoint(7).name == "step-00000007"
