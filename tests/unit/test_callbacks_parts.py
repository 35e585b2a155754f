"""Each callback alone: what it does in the cases a good run never meets."""

import io
import json
import re
from functools import partial

import pytest
import torch
from rich.console import Console

from callbacks import records
from callbacks.ema import EMA
from callbacks.fid import FrechetDistance
from callbacks.guard import Guard, first_bad_module, gradient_norm
from callbacks.likelihood import Likelihood, seeds_of
from callbacks.progress import Progress, duration
from callbacks.records import JsonlLogger
from callbacks.samples import Samples
from callbacks.sampling import shares
from callbacks.throughput import Throughput
from tests.unit.bells import Bells, DigitData, fit


class Breaks(Bells):
    """Loss that is not finite in one micro-batch."""

    def __init__(self, at: int, value: float = float("nan")) -> None:
        super().__init__()
        self.at, self.value = at, value

    def loss(self, batch):
        terms = super().loss(batch)
        return {"loss": terms["loss"] * self.value} if self.micro_batches == self.at else terms


def weights(room: Bells) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(room.net.parameters()).detach().clone()


# ---- records


def test_rows_hold_numbers_that_json_lacks(tmp_path):
    logger = JsonlLogger(tmp_path / "deep" / "run" / "metrics.jsonl", lambda: 640)
    logger.log_metrics({"train/loss": float("nan"), "train/lr": 0.5}, step=3)
    logger.write({"metrics/x": 1.0}, 4, {"n": 5})
    first, second, third = map(json.loads, logger.path.read_text().splitlines())
    assert (first["value"], first["nonfinite"], first["step"], first["samples_seen"]) == (None, "nan", 3, 640)
    assert (second["tag"], second["value"]) == ("train/lr", 0.5)
    assert (third["tag"], third["n"], third["step"]) == ("metrics/x", 5, 4)


# ---- averages


class Watch(EMA):
    def __init__(self) -> None:
        super().__init__()
        self.updates, self.inside = 0, []

    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        original = module.update_ema

        def counted():
            self.updates += 1
            original()

        module.update_ema = counted

    def on_validation_epoch_end(self, trainer, module):
        self.inside.append((module.active_weights, weights(module)))


def test_averages_move_once_per_update_and_stand_in_during_validation(tmp_path):
    watch = Watch()
    room = fit(tmp_path, watch, max_steps=4, accumulate_grad_batches=3, val_check_interval=6)
    assert watch.updates == 4
    kinds, seen = zip(*watch.inside, strict=True)
    assert set(kinds) == {"ema0.9"}
    assert room.active_weights == "raw"
    with room.use_weights("ema"):
        assert torch.equal(weights(room), seen[-1])
    assert not torch.equal(weights(room), seen[-1])


class Fails(Watch):
    def on_validation_epoch_end(self, trainer, module):
        raise KeyError("on purpose")


def test_an_error_during_validation_leaves_the_trained_weights(tmp_path):
    room = Bells()
    with pytest.raises(KeyError, match="on purpose"):
        fit(tmp_path, Fails(), room=room)
    assert room.active_weights == "raw"


def test_unknown_weights_are_refused_before_training(tmp_path):
    room = Bells()
    for callback in (
        EMA("ema0.5"),
        Samples(weights=["best"]),
        FrechetDistance("callbacks.features.fd_lite.FdLite", weights=["x"]),
    ):
        with pytest.raises(ValueError, match=r"this run has ema, raw, ema0\.9"):
            fit(tmp_path, callback, room=room)
    assert room.updates == 0


# ---- guard


def test_guard_stops_with_a_message_that_names_everything(tmp_path):
    room = Breaks(at=7)
    guard = Guard()
    with pytest.raises(RuntimeError, match=r"Update 4 is not finite: gradient norm nan") as caught:
        fit(tmp_path, guard, room=room, accumulate_grad_batches=2)
    text = str(caught.value)
    assert "Rank 0: loss nan. Samples: 000384, 000385" in text  # the seventh micro-batch of 64, not the eighth
    assert "and 56 more" in text
    assert "First gradient that is not finite: net.mean" in text
    assert re.search(r"norms of the last 3 updates: \d\.\d+, \d\.\d+, \d\.\d+", text)
    saved = torch.load(tmp_path / "health" / "nan_0000004.pt", weights_only=True)
    assert saved["batch"]["key"][0] == "000384"
    assert saved["micro_batch"] == 6
    assert weights(room).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_guard_skips_an_update_without_a_trace_in_weights_or_optimiser(tmp_path, value):
    clean, room = Bells(), Breaks(at=6, value=value)
    fit(tmp_path / "clean", Guard(), room=clean, max_steps=5)
    guard = Guard("skip")
    fit(tmp_path / "skip", guard, room=room, max_steps=6, gradient_clip_val=1.0)
    assert guard.skipped == 1
    assert torch.allclose(weights(room), weights(clean), atol=1e-6)  # six updates, the sixth left out
    rows = [json.loads(line) for line in (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["value"], row["step"]) for row in rows if row["tag"] == "health/skipped_steps"] == [(1.0, 6)]
    restored = Guard("skip")
    restored.load_state_dict(guard.state_dict())
    assert restored.skipped == 1


def test_guard_stops_skipping_when_nothing_else_happens(tmp_path):
    class Always(Breaks):
        def loss(self, batch):
            return {"loss": Bells.loss(self, batch)["loss"] * float("nan")}

    guard = Guard("skip", most_in_a_row=3)
    with pytest.raises(RuntimeError, match="Update 4"):
        fit(tmp_path, guard, room=Always(at=0))
    with pytest.raises(ValueError, match="expected stop or skip"):
        Guard("ignore")


def test_the_first_bad_module_is_found():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight[0, 0] = float("inf")
    room = Bells()
    room.net = net
    room.loss = lambda batch: {"loss": net(torch.ones(1, 2)).sum()}
    before = torch.random.get_rng_state()
    assert first_bad_module(room, {}, 0) == "net.1"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not net[1]._forward_hooks


def test_gradient_norm_is_over_everything():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert float(gradient_norm(parameters)) == 5.0
    assert float(gradient_norm(parameters[1:2])) == 0.0


# ---- sampling


def test_shares_cover_every_number_once_with_equally_many_calls():
    for count, world, chunk in [(10, 3, 2), (7, 4, 8), (4, 4, 1), (1800, 7, 64)]:
        parts = [list(shares(count, rank, world, chunk)) for rank in range(world)]
        assert len({tuple(len(numbers) for numbers, _ in part) for part in parts}) == 1
        assert sorted(n for part in parts for numbers, used in part for n in numbers[:used]) == list(range(count))


def test_a_broken_picture_does_not_stop_training(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(records, "_warned", set())

    class NoPictures(Bells):
        def trajectory(self, *args, **kwargs):
            raise OSError("disk on fire")

    room = fit(tmp_path, Samples(trajectory_every=1), room=NoPictures())
    assert room.updates == 20
    warnings = [record for record in caplog.records if "disk on fire" in record.message]
    assert len(warnings) == 1  # two validations, one warning
    assert (tmp_path / "samples/step_000000020/progress.png").is_file()


def test_a_stop_abandons_measurements_without_a_trace(tmp_path):
    room = Bells()
    room.stop_requested = lambda: room.updates >= 10
    digits = FrechetDistance("callbacks.features.digits.Digits", n=100)
    fit(tmp_path, Samples(), digits, Likelihood(), room=room, max_steps=10)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row["step"] and row["tag"].startswith(("metrics", "health"))]
    assert digits.state_dict() == {"shown": 0, "done": -1}


def test_the_same_validation_is_not_measured_twice(tmp_path):
    digits = FrechetDistance("callbacks.features.digits.Digits", n=100, every=3)
    callbacks = [Samples(), digits, Likelihood()]
    room = fit(tmp_path, *callbacks, max_steps=40)
    lines = (tmp_path / "metrics.jsonl").read_text()
    steps = [row["step"] for row in map(json.loads, lines.splitlines()) if row["tag"] == "metrics/fd_digits"]
    assert steps == [10, 40]  # the first, the fourth
    room.trainer.state.fn = "fit"
    for callback in callbacks:
        again = type(callback)(*(["callbacks.features.digits.Digits"] if callback is digits else []))
        again.load_state_dict(callback.state_dict())
        again.on_validation_epoch_end(room.trainer, room)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_metrics_that_cannot_be_made_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"extractor='callbacks\.features\.nets\.Dino' cannot be loaded"):
        FrechetDistance("callbacks.features.nets.Dino")
    with pytest.raises(ValueError, match="at least 2 samples"):
        FrechetDistance("callbacks.features.fd_lite.FdLite", n=1)

    class NoPictures(DigitData):
        reference_images = None

    fid = FrechetDistance("callbacks.features.fd_lite.FdLite")
    with pytest.raises(ValueError, match="data=NoPictures has no reference_images"):
        fit(tmp_path, fid, data=NoPictures())


def test_options_of_a_likelihood_are_those_the_room_knows(tmp_path):
    with pytest.raises(
        ValueError, match=r"likelihood.options.steps: the likelihood of Bells has no such option; it has "
    ):
        fit(tmp_path, Likelihood(options={"steps": 4}))


def test_noise_of_a_sample_follows_its_key():
    seeds = seeds_of({"key": ["a", "b", "a"]})
    assert seeds[0] == seeds[2] != seeds[1]
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- speed and progress


def test_log_lines_are_plain_and_complete(tmp_path):
    out = io.StringIO()
    progress = Progress(every=10, console=Console(file=out, highlight=False, soft_wrap=True))
    fit(tmp_path, Throughput(), Guard(), Likelihood(), progress)
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()
    number = r"-?[\d.]+"
    line = rf"step 10/20  640 img  loss {number}  grad {number}  \d+ img/s  data \d+%  mem {number}G  eta \d+s"
    assert re.fullmatch(line, lines[0]), lines[0]
    assert re.fullmatch(rf"validation at 10  bpd {number}  accuracy_bayes {number}  val/loss {number}", lines[1]), (
        lines[1]
    )
    assert lines[2].startswith("step 20/20  1.3k img")
    assert len(lines) == 4


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_one_live_line_and_is_left_clean(tmp_path, no_color):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, no_color=no_color, legacy_windows=False, soft_wrap=True)
    fit(tmp_path, Likelihood(), Progress(console=console), max_steps=10)
    text = out.getvalue()
    assert "step 10/10" in text
    assert re.search(r"step 10/10.*validating", text)
    assert "\u2026" not in text  # what does not fit is left out, not cut off
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is back
    assert ("\x1b[1m" in text) != no_color


def test_durations_have_two_units():
    assert [duration(s) for s in (-1, 40, 750, 14_700, 273_600)] == ["0s", "40s", "12m30s", "4h05m", "3d04h"]


def test_partial_settings_reach_classify(tmp_path):
    seen = []

    class Asks(Bells):
        def classify(self, batch, *, draws=1):
            seen.append(draws)
            return super().classify(batch)

    fit(tmp_path, partial(Likelihood, classify_settings={"draws": 3}, max_batches=2)(), room=Asks(), max_steps=10)
    assert seen == [3, 3]
