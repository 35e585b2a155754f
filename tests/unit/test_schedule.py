"""Validating, saving, stopping and continuing between updates, on the toy room in one process."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.validations import AtValidations
from lightningmodules.base import GenerativeModule
from platform.strategy import what_is_wrong
from tests import toy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[toy.Toy, list]:
    room, _, logged = toy.fit(tmp_path_factory.mktemp("whole"), accumulation=2)
    return room, logged


@pytest.mark.parametrize(
    "stop_at", [3, 5, 8, 12], ids=["between", "at a validation", "at a save", "at the last update"]
)
def test_interrupted_run_ends_like_whole_run(whole: tuple[toy.Toy, list], tmp_path: Path, stop_at: int) -> None:
    room, logged = whole
    first, plan, before = toy.fit(tmp_path, accumulation=2, stop_at=stop_at)
    assert plan.interrupted
    assert first.updates == stop_at
    second, plan, after = toy.fit(tmp_path, accumulation=2)
    assert not plan.interrupted
    assert before + after == logged
    expected = toy.state(room)
    for name, value in toy.state(second).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("polls", [2, 3, 5], ids=["at its first batch", "at its second", "after its last"])
def test_stop_during_validation_leaves_no_trace(whole: tuple[toy.Toy, list], tmp_path: Path, polls: int) -> None:
    _, logged = whole
    _, plan, before = toy.fit(tmp_path, accumulation=2, stop_at=5, polls=polls)
    assert plan.interrupted
    assert [entry for entry in before if entry[0] == "val"] == []
    _, _, after = toy.fit(tmp_path, accumulation=2)
    assert before + after == logged


def test_validation_cut_short_is_repeated_and_its_step_saved(tmp_path: Path) -> None:
    _, _, logged = toy.fit(tmp_path, stop_at=5)
    assert [entry[:2] for entry in logged if entry[0] == "val"] == []
    _, _, logged = toy.fit(tmp_path, steps=6)
    assert [entry[:2] for entry in logged] == [("val", 5), ("train", 6), ("val", 6)]


@pytest.mark.parametrize("stop_at", [5, 12], ids=["in the middle", "at the last update"])
def test_owed_validation_cut_short_is_owed_still(whole: tuple[toy.Toy, list], tmp_path: Path, stop_at: int) -> None:
    _, logged = whole
    _, _, before = toy.fit(tmp_path, accumulation=2, stop_at=stop_at)
    room, plan, between = toy.fit(tmp_path, accumulation=2, stop_at=stop_at, polls=2)
    assert plan.interrupted
    assert (room.updates, between) == (stop_at, [])
    _, plan, after = toy.fit(tmp_path, accumulation=2)
    assert not plan.interrupted
    assert before + after == logged


class Count(AtValidations):
    """Notes at which validation, of which step, it worked, and whether work of every fifth validation was due."""

    def __init__(self) -> None:
        super().__init__()
        self.worked: list[tuple[int, int, bool]] = []

    def at_validation(self, trainer: L.Trainer, module: GenerativeModule) -> bool:
        self.worked.append((self._shown, module.updates, self.due(trainer, module, 5)))
        return True


def test_stop_during_validation_repeats_what_callbacks_had_finished(tmp_path: Path) -> None:
    """Its rows are dropped when the run continues, so nobody else would write them again."""
    first, second = Count(), Count()
    toy.fit(tmp_path, first, stop_at=10, polls=5)
    assert [entry[:2] for entry in first.worked] == [(0, 5), (1, 10)]
    toy.fit(tmp_path, second)
    assert [entry[:2] for entry in second.worked] == [(1, 10), (2, 12)]


def test_owed_last_validation_measures_as_the_last(tmp_path: Path) -> None:
    whole, owed = Count(), Count()
    toy.fit(tmp_path / "whole", whole)
    assert whole.worked == [(0, 5, True), (1, 10, False), (2, 12, True)]
    toy.fit(tmp_path / "cut", Count(), stop_at=12)
    room, plan, _ = toy.fit(tmp_path / "cut", owed)
    assert owed.worked == whole.worked[-1:]
    assert not plan.interrupted
    assert room.trainer.max_steps == room.updates == 12


def test_continuing_with_other_accumulation_uses_the_same_samples(tmp_path: Path) -> None:
    toy.fit(tmp_path, steps=4, accumulation=2)
    room, _, _ = toy.fit(tmp_path, steps=8, accumulation=4)
    assert (room.updates, room.samples_seen, room.trainer.global_step) == (8, 64, 8)


def test_run_made_longer_is_on_the_longer_curve_from_its_first_update(tmp_path: Path) -> None:
    class Rates(L.Callback):
        def __init__(self) -> None:
            self.used: list[float] = []

        def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
            self.used.append(trainer.optimizers[0].param_groups[0]["lr"])

    whole, longer = Rates(), Rates()
    toy.fit(tmp_path / "whole", whole, steps=8)
    toy.fit(tmp_path / "made longer", steps=4)
    toy.fit(tmp_path / "made longer", longer, steps=8)
    assert longer.used == whole.used[4:]


def test_checkpoints_at_interval_milestone_and_end(tmp_path: Path) -> None:
    toy.fit(tmp_path, steps=10, every=4, milestones=[7])
    assert sorted(folder.name for folder in tmp_path.glob("step-*")) == [f"step-{n:08d}" for n in (4, 7, 8, 10)]
    assert all(what_is_wrong(folder) is None for folder in tmp_path.glob("step-*"))


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "unfinished"])
def test_damage_is_noticed(tmp_path: Path, harm: str) -> None:
    toy.fit(tmp_path, steps=2, val_every=0)
    folder = tmp_path / "step-00000002"
    victim = next(folder.glob("*.distcp"))
    if harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif harm == "remove":
        victim.unlink()
    else:
        (folder / "complete.json").unlink()
    assert what_is_wrong(folder)


def test_other_shape_is_refused(tmp_path: Path) -> None:
    toy.fit(tmp_path, steps=2, val_every=0)
    small = toy.Toy(ema_decays=(0.9,))
    small.configure_model()
    from platform.strategy import load_tensors

    with pytest.raises(ValueError, match=r"shadows\.ema0/99\.net/inner/bias: \(32,\) in the file, absent in the model"):
        load_tensors(small, tmp_path / "step-00000002")
    shutil.rmtree(tmp_path)
