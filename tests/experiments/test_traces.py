"""Every miniature learns exactly as it did: twenty losses of a fixed seed, in ``tests/traces/``.

A change that moves them on purpose refreshes the files: ``REFRESH_TRACES=1 pytest tests/experiments/test_traces.py``.
"""

import json
import math
import os
from pathlib import Path

import pytest

from platform import cli, config
from platform.origins import experiments
from platform.runs import METRICS, PROVENANCE

TRACES = Path(__file__).resolve().parents[1] / "traces"
STEPS = 20
TOLERANCE = 2e-3  # kernels of other processors round otherwise, and training amplifies it
QUIET = ["trainer.val_every=0", "trainer.log_every=1", "checkpoints.every=0", "hardware=cpu"]


@pytest.mark.parametrize("name", experiments())
def test_losses_are_those_of_the_trace(name: str, tmp_path: Path) -> None:
    cfg = config.compose(name, [], tiny=True)
    off = [f"callbacks.{key}=null" for key, entry in cfg.callbacks.items() if entry is not None and key != "ema"]
    words = ["fit", name, "--tiny", *QUIET, *off, f"trainer.max_steps={STEPS}", f"runs={tmp_path}"]
    assert cli.main(words) == 0
    (file,) = tmp_path.glob(f"*/{METRICS}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    losses = [row["value"] for row in rows if row["tag"] == "train/loss"]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    (run,) = tmp_path.glob(f"*/{PROVENANCE}")
    data = json.loads(run.read_text())[-1]["data"]["fingerprint"]
    trace = TRACES / f"{name}.json"
    if os.environ.get("REFRESH_TRACES"):
        trace.parent.mkdir(exist_ok=True)
        rounded = [float(f"{loss:.6g}") for loss in losses]
        trace.write_text(json.dumps({"data": data, "losses": rounded}) + "\n")
    recorded = json.loads(trace.read_text())
    if (cfg.data.source or {}).get("_target_", "").startswith("datamodules.corpora.") and data != recorded["data"]:
        pytest.skip("the text comes from the interpreter, and the trace was made with another one")
    assert losses == pytest.approx(recorded["losses"], abs=TOLERANCE)


def test_no_trace_is_left_behind() -> None:
    assert sorted(file.stem for file in TRACES.glob("*.json")) == sorted(experiments())
