"""Loader health in the logs, and the warning that names what keeps training waiting."""

import pytest

from callbacks import throughput
from callbacks.records import _warned
from callbacks.samples import Samples
from callbacks.throughput import Throughput, _bottleneck, _Streak
from tests.unit.bells import Bells, DigitData, fit


class Clock:
    """A clock that stands still but for what a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


class SlowData(DigitData):
    """A batch takes 50 ms."""

    workers = 0

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.busy = clock, 0.0

    def _batch(self, rows: slice) -> dict:
        self.clock.now += 0.05
        self.busy += 0.05
        return super()._batch(rows)

    def spent(self) -> dict[str, float]:
        return {"busy": self.busy, "reading": 0.0}

    def health(self) -> dict[str, float]:
        return {"data/epoch": 0.5, "data/bad_samples": 2.0}


class SlowBells(Bells):
    """A loss takes 20 ms."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def loss(self, batch):
        self.clock.now += 0.02
        return super().loss(batch)


def test_waiting_is_logged_and_explained_once(tmp_path, monkeypatch, caplog, clock):
    monkeypatch.setattr(throughput, "MANY_UPDATES", 5)
    _warned.discard("data wait")
    room = fit(
        tmp_path, Throughput(), room=SlowBells(clock), data=SlowData(clock), max_steps=18, val_check_interval=100
    )
    assert room.latest["data/wait_share"] == pytest.approx(5 / 7)
    assert room.latest["speed/data_wait_percent"] == pytest.approx(500 / 7)
    assert room.latest["data/samples_per_s"] == room.latest["speed/samples_per_sec"] == pytest.approx(64 / 0.07)
    assert (room.latest["data/epoch"], room.latest["data/bad_samples"]) == (0.5, 2)
    warnings = [record.message for record in caplog.records if "waited for data" in record.message]
    assert len(warnings) == 1
    assert (
        "71% of the time over the last 5 updates. It reads in the training thread: set data.workers=2." in warnings[0]
    )


def test_an_interval_holds_all_its_waiting_however_long_the_one_before_took_to_log(tmp_path, monkeypatch, clock):
    shares = []

    def slow(trainer, values):
        shares.append(values["data/wait_share"])
        clock.now += 0.3

    monkeypatch.setattr(throughput, "scalars", slow)
    fit(tmp_path, Throughput(), data=SlowData(clock), max_steps=18, val_check_interval=100)
    assert len(shares) > 2
    assert max(shares) <= 1


def test_validation_is_neither_training_nor_waiting(tmp_path, clock):
    class Slow(Samples):
        def on_validation_epoch_end(self, trainer, module):
            clock.now += 100.0

    # Of the last five updates, one waits behind the validation: four waits of .05 s and five losses of .02 s are left.
    room = fit(tmp_path, Throughput(), Slow(), room=SlowBells(clock), data=SlowData(clock), val_check_interval=18)
    assert room.latest["speed/data_wait_percent"] == pytest.approx(100 * 0.2 / 0.3)
    assert room.latest["speed/samples_per_sec"] == pytest.approx(5 * 64 / 0.3)
    assert "speed/mfu_percent" not in room.latest  # no peak is known for a CPU
    assert room.latest["speed/samples_seen"] == 20 * 64


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
