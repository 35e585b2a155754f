"""The data layer's measurement: what the table says about goals, and that every part of it runs."""

import time
from pathlib import Path

import pytest

from datamodules.bench import main, packages, rivals, sets
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


def test_processes_count_while_they_live_and_the_end_of_a_turn_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    alone = Contender("alone", lambda: busy(0.05, 100), after=lambda: busy(0.3, 0))
    twice = Contender("twice", rivals.AtOnce(lambda: busy(0.05, 100), 2))
    Report().race([alone, twice], repeats=3)
    for contender in (alone, twice):
        assert 1000 < max(contender.core) < 2100  # 2000 but for what surrounds the work
    assert "twice" in capsys.readouterr().out


@pytest.mark.parametrize("package", packages.PACKAGES, ids=[package.name for package in packages.PACKAGES])
def test_other_packages_deliver_every_image(
    package: packages.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(package.module, exc_type=ImportError)
    monkeypatch.setenv("PLATFORM_CACHE", str(tmp_path))
    folder, _ = sets.images(256, 48)
    expected = sorted(int(rivals.Fast(48)(blob).sum()) for blob in rivals.blobs(sets.files(folder), "jpg"))
    loader = package.loader(module, folder, 48, 0)
    for _ in range(2):
        batches = [images for images, _ in loader]
        assert [tuple(images.shape) for images in batches] == [(64, 48, 48, 3)] * 4
        found = sorted(int(image.sum()) for images in batches for image in images)
        # Energon's stream has no end, and its shuffle buffer reaches beyond what counts as an epoch here
        assert found == expected or (package.module == "megatron.energon" and set(found) < set(expected))


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(packages, "PACKAGES", [packages.Package("Nothing", "nothing", "no-thing", lambda *_: None)])
    assert packages.installed() == {}
    assert capsys.readouterr().out == "not measured: Nothing (No module named 'nothing'); pip install no-thing\n"


def test_settings_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "data", "--images", "3"]) == 2
    assert "--images 3: expected 256 to" in capsys.readouterr().err


@pytest.mark.perf
def test_every_part_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--images", "256", "--repeats", "1", "--rivals", "all"]) == 0
    shown = capsys.readouterr().out
    for part in ("images, decode and shrink", "latents of", "tokenised", "first batch", "memory", "shuffling"):
        assert part in shown
