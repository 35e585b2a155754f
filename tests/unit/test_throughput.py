"""Loader health in the logs, and the warning that names what keeps training waiting."""

import time

import pytest

from callbacks import throughput
from callbacks.records import _warned
from callbacks.throughput import Throughput, _bottleneck, _Streak
from tests.unit.bells import DigitData, fit


class SlowData(DigitData):
    workers = 0

    def __init__(self) -> None:
        super().__init__()
        self.busy = 0.0

    def _batch(self, rows: slice) -> dict:
        time.sleep(0.05)
        self.busy += 0.05
        return super()._batch(rows)

    def spent(self) -> dict[str, float]:
        return {"busy": self.busy, "reading": 0.0}

    def health(self) -> dict[str, float]:
        return {"data/epoch": 0.5, "data/bad_samples": 2.0}


def test_waiting_is_logged_and_explained_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(throughput, "MANY_UPDATES", 5)
    _warned.discard("data wait")
    room = fit(tmp_path, Throughput(), data=SlowData(), max_steps=18, val_check_interval=100)
    assert 0.3 < room.latest["data/wait_share"] <= 1
    assert room.latest["data/samples_per_s"] == room.latest["speed/samples_per_sec"] < 64 / 0.05
    assert (room.latest["data/epoch"], room.latest["data/bad_samples"]) == (0.5, 2)
    warnings = [record.message for record in caplog.records if "waited for data" in record.message]
    assert len(warnings) == 1
    assert "over the last 5 updates. It reads in the training thread: set data.workers=2." in warnings[0]


def test_an_interval_holds_all_its_waiting_however_long_the_one_before_took_to_log(tmp_path, monkeypatch):
    shares = []

    def slow(trainer, values):
        shares.append(values["data/wait_share"])
        time.sleep(0.3)

    monkeypatch.setattr(throughput, "scalars", slow)
    fit(tmp_path, Throughput(), data=SlowData(), max_steps=18, val_check_interval=100)
    assert len(shares) > 2
    assert max(shares) <= 1


@pytest.mark.parametrize(
    ("busy", "reading", "told"),
    [
        (19.0, 2.0, "The bottleneck is decoding: 89% of the reader threads' time."),
        (19.0, 15.0, "The bottleneck is reading: 79% of the reader threads' time. Put the shards on a faster disk, or "
         "read with more threads: data.workers=4."),
        (4.0, 2.0, "The 2 reader threads were idle 80% of it, so the bottleneck is the transfer"),
        (0.0, 0.0, "The data module does not say why."),
    ],
)  # fmt: skip
def test_the_bottleneck_has_a_name(busy, reading, told):
    streak = _Streak(busy=1.0, reading=1.0, updates=100, seconds=10.0, waited=4.0)
    text = _bottleneck(streak, {"busy": 1.0 + busy, "reading": 1.0 + reading}, workers=2)
    assert text.startswith("Training waited for data 40% of the time over the last 100 updates.")
    assert told in text
    if busy > 10:
        text = _bottleneck(streak, {"busy": 1.0 + busy}, workers=2)
        assert text.endswith("The bottleneck is reading and preparing batches. Set data.workers=4.")
