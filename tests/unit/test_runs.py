"""The run folder: who may write to it, what a killed attempt leaves, which checkpoint counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from platform import config
from platform.runs import CONFIG, METRICS, Run
from platform.screens import best, end_lines
from tests import toy


def rows(run: Run) -> list[tuple[int, str]]:
    return [(row["step"], row["tag"]) for row in map(json.loads, (run.path / METRICS).read_text().splitlines())]


@pytest.fixture
def logged(tmp_path: Path) -> Run:
    entries = [(4, "train/loss"), (5, "train/loss"), (5, "val/loss"), (5, "metrics/bpd"), (6, "train/loss")]
    entries[2:2] = [(5, "health/skipped_steps"), (5, "health/clipped_fraction")]
    measured = ("health/clipped_fraction", "metrics/bpd")
    lines = [
        json.dumps({"step": step, "tag": tag, "value": 1.0} | ({"validation": True} if tag in measured else {}))
        for step, tag in entries
    ]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 7, "ta')  # killed while writing the last row
    return Run(tmp_path)


def test_rows_after_the_checkpoint_go(logged: Run) -> None:
    logged.truncate_metrics(5, validated=True)
    assert rows(logged)[-2:] == [(5, "val/loss"), (5, "metrics/bpd")]
    assert len(rows(logged)) == 6


def test_rows_of_an_owed_validation_go_too(logged: Run) -> None:
    logged.truncate_metrics(5, validated=False)
    assert rows(logged) == [(4, "train/loss"), (5, "train/loss"), (5, "health/skipped_steps")]


def test_a_run_that_begins_again_keeps_no_row(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 0, "tag": "health/reconstruction_error", "value": 0.0}\n')
    Run(tmp_path).truncate_metrics(0, validated=True)
    assert rows(Run(tmp_path)) == []


def test_best_value_of_a_distance_is_its_lowest(tmp_path: Path) -> None:
    points = [("metrics/fd_digits", step, value) for step, value in ((2, 0.4), (4, 0.2), (6, 0.3), (8, None))]
    points += [("metrics/recall_digits", 2, 0.5)]
    lines = [json.dumps({"step": step, "tag": tag, "value": value}) for tag, step, value in points]
    (tmp_path / METRICS).write_text("\n".join(lines))
    lowest = best(Run(tmp_path).rows())
    assert {tag: (row["step"], row["value"]) for tag, row in lowest.items()} == {"metrics/fd_digits": (4, 0.2)}


def test_second_writer_is_refused_and_the_lock_released(tmp_path: Path) -> None:
    run = Run(tmp_path)
    program = "import sys, time; from platform.runs import Run; from pathlib import Path\n"
    program += "with Run(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"is being written by process {holder.pid} on .*tag=NAME"), run.locked():
            pass
    finally:
        holder.kill()
        holder.wait()
    with run.locked():  # its owner is dead
        pass


def test_newest_damaged_checkpoint_is_skipped_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path)
    toy.fit(run.checkpoints, steps=4, every=2, val_every=0)
    next(run.checkpoint(4).glob("*.distcp")).write_bytes(b"")
    (run.checkpoints / "step-00000006.tmp").mkdir()  # killed while writing
    assert run.steps() == [2, 4]
    assert run.latest() == run.checkpoint(2)
    assert "step-00000004 is damaged" in capsys.readouterr().err
    run.prune(1, frozenset({2}))
    assert run.steps() == [2, 4]
    run.prune(1, frozenset())
    assert run.steps() == [4]


def test_run_that_goes_on_before_a_damaged_checkpoint_keeps_the_next_good_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name in ("02", "04", "06", "06.old", "05.tmp", "06.damaged1"):
        (run.checkpoints / f"step-000000{name}").mkdir(parents=True)
    run.tidy(2)
    left = ["02", "04.damaged1", "06.damaged1", "06.damaged2", "06.old.damaged1"]
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == [f"step-000000{name}" for name in left]
    run.checkpoint(3).mkdir()
    run.prune(1, frozenset())
    assert run.steps() == [3]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("exit.json", '{"reason": "complete", "step": 9}', True),
        ("exit.json", '{"reason": "OSError: the machine is gone", "step": 0}', False),
        ("provenance.json", '[{"start_step": 0}, {"start_step": 7}]', True),
        ("provenance.json", '[{"start_step": 0}, {"step": 7}]', False),
        (METRICS, '{"step": 0, "tag": "a"}\n{"step": 1, "tag": "b"}\n{"st', True),
        (METRICS, '{"step": 0, "tag": "health/reconstruction_error"}\n', False),
        ("log.txt", "a line", False),
    ],
)
def test_what_makes_a_run_without_checkpoints_worth_keeping(
    tmp_path: Path, file: str, content: str, expected: bool
) -> None:
    cfg, other = (OmegaConf.create({"experiment": "a", "module": {"width": width}}) for width in (1, 2))
    assert not Run(tmp_path / "x").has_history(cfg)
    (tmp_path / file).write_text(content)
    assert Run(tmp_path).has_history(cfg) is expected
    config.save(other, tmp_path / CONFIG)
    assert Run(tmp_path).has_history(cfg) is expected
    config.save(cfg, tmp_path / CONFIG)  # the same run, killed before its first checkpoint, logs the same again
    assert Run(tmp_path).has_history(cfg) is (expected and file != METRICS)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("fit quickstart tag=a", "fit quickstart tag=a    # the same command continues"),
        ("fit quickstart fresh=true tag=a", "fit quickstart tag=a    # without fresh it continues"),
    ],
)
def test_command_that_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, shown: str) -> None:
    monkeypatch.setattr("sys.argv", ["platform", *typed.split()])
    cfg = OmegaConf.create({"trainer": {"max_steps": 9}})
    assert f"  python -m platform {shown}" in end_lines(cfg, Run(tmp_path), "interrupted", 4)


def test_setting_aside_deletes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "x")
    for text in ("first", "second"):
        run.path.mkdir(exist_ok=True)
        (run.path / METRICS).write_text(text)
        run.set_aside()
    assert [(tmp_path / f"x.old{n}" / METRICS).read_text() for n in (1, 2)] == ["first", "second"]
