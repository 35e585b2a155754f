"""Columns in folders of their own, joined by shard and key."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.columns import Joined
from datamodules.shards import BadSample, Source, open_source
from tests.tars import write_tar


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards of 5 images with a class, and two columns for them."""
    for folder in ("", "latents", "text"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for shard in range(2):
        keys = [f"{5 * shard + i:03d}" for i in range(5)]
        contents = {
            "": {key: {"png": b"p" + key.encode(), "cls": b"3"} for key in keys},
            "latents": {key: {"lat": bytes([int(key)]) * 16, "cls": b"8"} for key in keys},
            "text": {key: {"txt": b"x" * int(key)} for key in keys},
        }
        for folder, samples in contents.items():
            write_tar(tmp_path / folder / f"train-{shard}.tar", samples)
    return tmp_path


def joined(root: Path, **options: object) -> Source:
    return open_source("train-*.tar", root, "data.train", columns=["latents", "text"], **options)  # type: ignore[arg-type]


def test_members_of_all_columns(root: Path) -> None:
    source = joined(root)
    assert isinstance(source, Joined)
    assert source.extensions() == ("png", "cls", "lat", "txt")
    assert source.read(7) == {"png": b"p007", "cls": b"3", "lat": b"\7" * 16, "txt": b"x" * 7}
    out = np.zeros((3, 16), dtype=np.uint8)
    source.gather(np.array([9, 0, 6]), "lat", out)
    assert out.tolist() == [[9] * 16, [0] * 16, [6] * 16]
    assert source.sizes(1, "txt").tolist() == [5, 6, 7, 8, 9]
    both = source.measured(1, "both", lambda members: (len(members["txt"]), members["lat"][0]), 2)
    assert both.tolist() == [[i, i] for i in range(5, 10)]
    assert source.measured(1, "both", lambda members: (0, 0), 2).tolist() == both.tolist()
    assert source.fingerprint == open_source("train-*.tar", root, "data.train").fingerprint
    source.close()


def test_columns_by_address(root: Path) -> None:
    source = open_source(f"pipe:cat {root}/train-{{0..1}}.tar", root, "data.train", columns=["latents"])
    assert source.read(7)["lat"] == b"\7" * 16
    assert source.health() == {"cache_hits": 0.0, "cache_misses": 4.0}  # each fetched once, to be indexed
    source.close()


def test_other_keys_are_refused(root: Path) -> None:
    write_tar(root / "text" / "train-1.tar", {key: {"txt": b""} for key in ("005", "006", "017", "008", "009")})
    source = joined(root)
    assert source.read(4)["txt"] == b"xxxx"
    told = "train-1.tar of text does not hold the samples of the other column: sample 2 is 017, expected 007"
    with pytest.raises(ValueError, match=told) as caught:
        source.read(9)
    assert not isinstance(caught.value, BadSample)  # every pair behind it would be wrong, so no share of it is accepted
    with pytest.raises(ValueError, match=told):
        source.gather(np.array([9]), "lat", np.zeros((1, 16), dtype=np.uint8))


def test_other_shards_are_refused(root: Path) -> None:
    write_tar(root / "text" / "train-1.tar", {key: {"txt": b""} for key in ("005", "006")})
    with pytest.raises(ValueError, match=r"train-1.tar of text holds 2 samples, train-1.tar of data.train holds 5"):
        joined(root)
    (root / "text" / "train-1.tar").unlink()
    with pytest.raises(ValueError, match=r"data.columns: .*text lacks 1 of 2 shards, first: train-1.tar"):
        joined(root)
    (root / "pictures").mkdir()
    with pytest.raises(ValueError, match="needs shards"):
        open_source("pictures", root, "data.train", columns=["text"])


def test_damage_names_the_column(root: Path) -> None:
    source = joined(root, max_bad_fraction=0.5)
    source.read(2)
    path = root / "latents" / "train-0.tar"
    path.write_bytes(path.read_bytes()[:3000])
    source.close()
    assert isinstance(source.read(6)["lat"], bytes)
    with pytest.raises(BadSample, match=r"column latents, train-0.tar, sample 00\d: .*truncated at byte 3000"):
        source.read(2)
