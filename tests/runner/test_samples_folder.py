"""A folder of samples holds those of one request, however its run is called by."""

import json
from pathlib import Path
from typing import Any

import pytest

from platform import sample


def request(run: Path, **more: Any) -> dict[str, Any]:
    common = {"run": str(run.resolve()), "step": 2, "weights": "ema", "label": None, "settings": {}}
    return {**common, **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    return tmp_path / "runs" / "x"


def claim(out: Path, wanted: dict[str, Any]) -> None:
    sample._claim(out, wanted)
    (out / "seed_000000.txt").touch()


@pytest.mark.parametrize("key", ["prompt", "decoder", "gap"])
def test_what_is_asked_for_no_more_counts_too(run: Path, tmp_path: Path, key: str) -> None:
    claim(tmp_path / "out", request(run, **{key: "x"}))
    with pytest.raises(ValueError, match=f"made with {key}=x, now {key}=None. Type another --out"):
        claim(tmp_path / "out", request(run))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())[key] == "x"


def test_folder_written_with_the_run_as_it_was_typed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    claim(tmp_path / "out", request(run) | {"run": "runs/x/"})
    claim(tmp_path / "out", request(run))
    (tmp_path / "runs" / "y").mkdir()
    with pytest.raises(ValueError, match=r"made with run=.*/runs/x, now run=.*/runs/y"):
        claim(tmp_path / "out", request(tmp_path / "runs" / "y"))


def test_samples_move_with_their_run(run: Path, tmp_path: Path) -> None:
    claim(run / "sampled" / "ema", request(run))
    claim(tmp_path / "out", request(run))
    moved = run.rename(run.with_name("z"))
    claim(moved / "sampled" / "ema", request(moved))
    with pytest.raises(ValueError, match="made with run="):
        claim(tmp_path / "out", request(moved))


@pytest.mark.parametrize("settings", [None, "{"])
def test_samples_of_unknown_origin_are_left_alone(run: Path, tmp_path: Path, settings: str | None) -> None:
    (tmp_path / "seed_000000.txt").write_text("mine")
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    with pytest.raises(ValueError, match=r"holds samples, but no settings.json that says how they were made"):
        sample._claim(tmp_path, request(run))
    assert (tmp_path / "seed_000000.txt").read_text() == "mine"
