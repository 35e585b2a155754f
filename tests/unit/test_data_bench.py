"""The data layer's measurement: what the table says about goals, and that every part of it runs."""

import time

import pytest

from datamodules.bench import main
from datamodules.bench.race import Contender, Report
from platform import cli


def busy(seconds: float, count: int) -> int:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return count


def test_goals_are_judged_by_the_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.race(
        [
            Contender("limit", lambda: busy(0.02, 100)),
            Contender("good", lambda: busy(0.02, 100), {"limit": 0.5, "wall:limit": 0.0}, floor=1),
            Contender("bad", lambda: busy(0.02, 10), {"limit": 0.5}, floor=1e9),
        ],
        repeats=3,
    )
    report.value("size", "7 bytes", "5", False)
    assert report.missed == ["bad", "bad against limit", "size"]
    shown = capsys.readouterr().out
    assert shown.count("MISSED") == 3
    assert shown.count("  ok") == 2


def test_settings_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "data", "--images", "3"]) == 2
    assert "--images 3: expected 256 to" in capsys.readouterr().err


@pytest.mark.perf
def test_every_part_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--images", "256", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    for part in ("images, decode and shrink", "latents of", "tokenised", "first batch", "memory", "shuffling"):
        assert part in shown
