"""The list of experiments, and what a run is said to need."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from platform import cli, show
from platform.estimate import Estimate, _activation_bytes, estimate
from tests.toy import Toy
from tests.unit import config_rooms as rooms

ROOT = Path(__file__).resolve().parents[2]


def counted(optimizer: dict[str, object], precision: str = "32") -> DictConfig:
    module = {"_target_": "tests.unit.test_show.Counted", "optimizer": optimizer}
    return OmegaConf.create({"module": module, "trainer": {"precision": precision}})


def test_list_names_every_experiment_without_torch() -> None:
    program = "import sys; from platform import cli; cli.main(['show']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["experiment", "what", "it", "trains", "paper"]
    assert any(line.startswith("quickstart ") and "TarFlow" in line and "2412.06329" in line for line in lines)
    assert "\x1b" not in result.stdout


def test_catalogue_reads_without_composing(tmp_path: Path) -> None:
    folder = rooms.write(tmp_path, bare="trainer: {}\n")
    assert show.catalogue(folder) == [("bare", "", ""), ("toy", "a toy", "none")]


def test_estimate_counts_without_memory() -> None:
    optimizer = {"_target_": "torch.optim.AdamW", "_partial_": True}
    guess = estimate(counted(optimizer))
    assert guess.trainable == 64 * 32 + 32 + 32 * 64 + 64
    assert (guess.frozen, guess.averages, guess.moments) == (0, 2, 2.0)
    assert guess.activation_bytes == _activation_bytes(counted_room())  # the same count on real tensors
    half = estimate(counted(optimizer, "bf16-mixed")).activation_bytes
    assert half is not None
    assert half < guess.activation_bytes


def test_optimiser_moments_follow_the_optimiser() -> None:
    def moments(**settings: object) -> float:
        optimizer = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, **settings}
        return estimate(counted(optimizer)).moments

    assert moments() == 0.0
    assert moments(momentum=0.9) == 1.0


def test_needs_are_divided_over_ranks() -> None:
    guess = Estimate(trainable=2**20, frozen=0, averages=1, flops=1e6, moments=2.0, activation_bytes=2.0**19)
    cfg = OmegaConf.create(
        {
            "trainer": {"devices": 2, "num_nodes": 2, "max_steps": 1000, "precision": "bf16-mixed"},
            "data": {"batch_size": 64, "micro_batch": 8},
        }
    )
    assert show.needs(cfg, guess) == [
        ("parameters", "1,048,576 trainable, 1 averaged copies"),
        ("arithmetic", "1 MFLOP per training sample, forward and backward; 64 GFLOP for the run"),
        ("batch", "64 samples per step = 8 x 2 micro-batches x 4 ranks"),
        ("length", "1,000 steps, 64,000 samples"),
        (
            "memory",
            "about 9 MiB per device (estimate) = weights 1 MiB + gradients 1 MiB + optimiser 2 MiB + averages 1 MiB"
            " + activations of 8 samples 4 MiB",
        ),
    ]


def test_detail_prints_configuration_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "quickstart", "module.net.channels=32", "module.net.head_dim=32"]) == 0
    shown = capsys.readouterr().out
    text, _, facts = shown.partition("\nparameters ")
    cfg = OmegaConf.create(text)
    assert cfg.module.net.channels == 32
    assert " trainable" in facts
    assert "FLOP per training sample" in facts
    assert "(estimate)" in facts
    assert "activations of 32 samples" in facts


class Counted(Toy):
    """The toy room, configured; its loss reads a value on the way, as checks of labels do."""

    def __init__(self, optimizer: object = None) -> None:
        super().__init__()

    def loss(self, batch: Any) -> dict[str, torch.Tensor]:
        assert not bool((batch["label"] > 9).any())
        return super().loss(batch)


def counted_room() -> Toy:
    room = Counted()
    room.build()
    return room
