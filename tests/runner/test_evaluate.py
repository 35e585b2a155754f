"""``evaluate`` measures as training did, or says why it cannot."""

from pathlib import Path

import pytest

from platform import cli

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
