"""All callbacks together in one small training run, and what they leave behind."""

import filecmp
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.ema import EMA
from callbacks.fid import FrechetDistance
from callbacks.guard import Guard
from callbacks.likelihood import Likelihood
from callbacks.progress import Progress
from callbacks.records import picture
from callbacks.samples import Samples
from callbacks.throughput import Throughput
from tests.unit.bells import DigitData, fit, trainer

SETTINGS = {"guidance": 1.5}
PICTURES = {
    "samples/ema/g1.5", "samples/raw/g1.5", "samples/classes", "samples/guidance", "samples/trajectory",
    "samples/progress", "samples/reconstruction", "samples/data",
}  # fmt: skip


def callbacks():
    digits, lite = "callbacks.features.digits.Digits", "callbacks.features.fd_lite.FdLite"
    return [
        EMA(),
        Samples(SETTINGS),
        FrechetDistance(digits, SETTINGS, n=300),
        FrechetDistance(lite, SETTINGS, n=60, weights=["ema"], guidances=[1.0, 2.0]),
        Likelihood(),
        Throughput(peak_flops=1e12),
        Guard(),
        Progress(),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(folder, *callbacks())


def rows(folder: Path) -> dict[tuple[str, int], dict]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({(row["tag"], row["step"]) for row in read}) == len(read)  # nothing twice
    return {(row["tag"], row["step"]): row for row in read}


def test_every_number_is_in_both_places(run):
    folder, room = run
    read = rows(folder)
    board = EventAccumulator(str(folder / "board"), size_guidance={"images": 0, "scalars": 0}).Reload()
    for (tag, step), row in read.items():
        shown = {event.step: event.value for event in board.Scalars(tag)}
        assert shown[step] == pytest.approx(row["value"], rel=1e-6)
    wanted = {
        "train/loss", "train/grad_norm", "val/loss", "metrics/fd_digits", "metrics/fd_digits_raw",
        "metrics/recall_digits", "metrics/precision_digits", "metrics/agreement_digits", "metrics/fd_lite_g1",
        "metrics/fd_lite_g2", "metrics/bpd", "metrics/accuracy_bayes", "health/clipped_fraction",
        "speed/samples_per_sec", "speed/data_wait_percent", "speed/mfu_percent",
    }  # fmt: skip
    assert wanted <= {tag for tag, _ in read}
    assert read["train/loss", 20]["samples_seen"] == 20 * 64
    assert set(board.Tags()["images"]) == PICTURES
    assert {event.step for event in board.Images("samples/ema/g1.5")} == {10, 20}
    assert {event.step for event in board.Images("samples/data")} == {0}
    trajectory = board.Images("samples/trajectory")[-1].encoded_image_string
    assert trajectory == (folder / "samples/step_000000020/trajectory.png").read_bytes()  # animation and all
    assert room.active_weights == "raw"


def test_metric_rows_say_what_was_measured(run):
    folder, _ = run
    row = rows(folder)["metrics/fd_digits", 20]
    assert {
        "n": 300,
        "weights": "ema0.9",
        "guidance": 1.5,
        "seeds": "0-299",
        "labels": "balanced",
    }.items() <= row.items()
    assert row["sampler"] == {"guidance": 1.5}
    assert len(row["extractor_sha256"]) == len(row["reference_sha256"]) == 64
    assert rows(folder)["metrics/fd_digits_raw", 20]["weights"] == "raw"
    assert rows(folder)["metrics/fd_lite_g2", 20]["guidance"] == 2.0
    assert rows(folder)["metrics/bpd", 20]["n"] == 150


def test_pictures_are_files_too_and_depend_on_weights_only(run, tmp_path):
    folder, room = run
    names = {"ema_g1.5", "raw_g1.5", "classes", "guidance", "trajectory", "progress", "reconstruction"}
    last = folder / "samples/step_000000020"
    assert {path.stem for path in last.iterdir()} == names
    assert not filecmp.cmp(last / "ema_g1.5.png", last / "raw_g1.5.png", shallow=False)
    with Image.open(last / "trajectory.png") as opened:
        assert opened.n_frames == 24
    torch.manual_seed(1)  # whatever happened before must not matter
    again = trainer(tmp_path, [Samples(SETTINGS, chunk=7)], room)
    again.strategy.connect(room)
    room.trainer = again
    samples = again.callbacks[0]
    with room.use_weights("ema"):
        samples.on_validation_epoch_end(again, room)
    for name in names - {"progress", "reconstruction"}:  # these need earlier files, and data
        assert filecmp.cmp(last / f"{name}.png", tmp_path / f"samples/step_000000020/{name}.png", shallow=False), name


def test_bits_per_dimension_is_what_the_definition_says(run):
    folder, room = run
    batches = list(DigitData().val_dataloader())
    with room.use_weights("ema"), torch.no_grad():
        total = sum(room.log_likelihood(batch, seeds=range(50)).double().sum() for batch in batches)
    mine = -float(total) / 150 / 64 / math.log(2)
    assert rows(folder)["metrics/bpd", 20]["value"] == pytest.approx(mine, abs=0.02)  # other noise, so not equal
    assert rows(folder)["metrics/accuracy_bayes", 20]["value"] > 0.5


def test_large_pictures_are_jpeg_in_tensorboard_and_png_in_the_folder(tmp_path):
    room = fit(tmp_path, max_steps=1)
    path = picture(room.trainer, "samples/big", np.zeros((40, 600, 3), np.uint8))
    assert path.read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    (event,) = board.Images("samples/big")
    assert event.encoded_image_string.startswith(b"\xff\xd8")
    assert (event.width, event.height, event.step) == (600, 40, 1)
