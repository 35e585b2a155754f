"""``evaluate`` measures as training did, or says why it cannot."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.likelihood import Likelihood
from platform import cli, evaluate
from platform.runs import load_module

QUICK = ["trainer.max_steps=2", "callbacks.samples=null", "callbacks.fid=null", "callbacks.progress=null"]


def test_without_validation_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "quickstart", "--tiny", *QUICK, "data.val=null", f"runs={tmp_path}"]) == 0
    assert "data.val is null: without validation data no grids, metrics or tables are made." in capsys.readouterr().err
    run = tmp_path / "quickstart-tiny"
    assert cli.main(["evaluate", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"{run} has no validation data (data.val is null in its config.yaml), and metrics are measured in a pass over"
        " it. Set data.val there to shards or a folder.\n"
    )


class Spy(L.Callback):
    """Notes how many samples come at a time, and whether callbacks compute in bfloat16."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.autocast: list[bool] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.sizes.append(len(batch["key"]))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.autocast.append(torch.is_autocast_enabled("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    words = [*QUICK, "callbacks.likelihood=null", "trainer.val_every=0", f"runs={folder}"]
    assert cli.main(["fit", "quickstart", "--tiny", *words]) == 0
    return folder / "quickstart-tiny"


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at autocast of the CPU")
def test_precision_and_batches_are_those_of_training(finished: Path, tmp_path: Path) -> None:
    module, cfg = load_module(finished)
    cfg.trainer.precision, cfg.trainer.devices, cfg.data.batch_size = "bf16-mixed", 4, 32
    spy, likelihood = Spy(), Likelihood(max_batches=3)
    evaluate.measure(module, cfg, [spy, likelihood], tmp_path / "metrics.jsonl")
    assert max(spy.sizes) == 8  # of one device
    assert spy.autocast == [True]
    assert likelihood.max_batches == 12
    cfg.trainer.precision, cfg.data.val_batch_size = "32", 100
    spy = Spy()
    evaluate.measure(module, cfg, [spy], tmp_path / "metrics.jsonl")
    assert max(spy.sizes) in (24, 25)
    assert spy.autocast == [False]
