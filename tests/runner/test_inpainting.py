"""``sample --image --mask`` and ``--decoder``: a part of a picture filled in, and pictures of another decoder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightningmodules.shared import autoencoder
from platform import cli
from tests.toy import untrained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of a small flow on latents."""
    folder = tmp_path_factory.mktemp("weights") / "flow"
    autoencoder.save(untrained("starflow_digits_latent", folder).codec.autoencoder, folder.parent / "vae")
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of a small model of pixels as tokens."""
    folder = tmp_path_factory.mktemp("weights") / "tokens"
    untrained("cadd_digits", folder)
    return folder


def call(*words: object) -> int:
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize(("kind", "setting"), [("model", "iterations"), ("tokens", "steps")])
def test_a_part_is_filled_in_and_the_rest_stays(
    kind: str, setting: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(kind)
    picture = (np.arange(64).reshape(8, 8) // 4 * 15).astype(np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(picture).save(tmp_path / "seven.png")
    Image.fromarray(mask).save(tmp_path / "below.png")
    words = [
        "sample",
        model,
        "--image",
        tmp_path / "seven.png",
        "--mask",
        tmp_path / "below.png",
        "--out",
        tmp_path / "o",
    ]
    assert call(*words, "--seeds", "3-5", "--label", 7, f"{setting}=2") == 0
    drawn = [np.array(Image.open(tmp_path / "o" / f"seed_{seed:06d}.png")) for seed in (3, 4, 5)]
    for image in drawn:
        assert np.array_equal(image[:4], picture[:4])
        assert not np.array_equal(image[4:], picture[4:])
    assert not np.array_equal(drawn[0], drawn[1])
    settings = json.loads((tmp_path / "o" / "settings.json").read_text())["settings"]
    assert settings[setting] == 2


def test_mistakes_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "dark.png")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "bright.png")
    (tmp_path / "text.png").write_text("no picture")
    dark, wide, text, bright = (tmp_path / f"{name}.png" for name in ("dark", "wide", "text", "bright"))
    for message, options in (
        ("--image and --mask go together", ["--image", dark]),
        ("is dark everywhere", ["--image", dark, "--mask", dark]),
        ("has 9x8 pixels, the model draws 8x8", ["--image", wide, "--mask", dark]),
        ("values up to 255; white is 240", ["--image", bright, "--mask", bright]),
        ("no such file", ["--image", tmp_path / "none.png", "--mask", dark]),
        ("cannot be read as a picture", ["--image", text, "--mask", dark]),
        ("holds no autoencoder", ["--decoder", tmp_path]),
    ):
        assert call("sample", model, *options) == 2, message
        assert message in "".join(capsys.readouterr())


def test_pictures_of_another_decoder(model: Path, tmp_path: Path) -> None:
    tuned = autoencoder.load(model.parent / "vae")
    tuned.state_dict()["decoder.conv_out.bias"].sub_(10.0)
    autoencoder.save(tuned, tmp_path / "tuned")
    assert (
        call("sample", model, "--seeds", "0", "--decoder", tmp_path / "tuned", "--out", tmp_path / "o", "denoise=0")
        == 0
    )
    assert not np.array(Image.open(tmp_path / "o" / "seed_000000.png")).any()
