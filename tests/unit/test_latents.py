"""Latents: the stored numbers in the right order, mirrored by a pure bit, with classes and text features."""

import logging
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.latents import Latents, features_card, latent_card
from datamodules.order import sample_bits
from datamodules.writer import DatasetWriter

SHAPE = (8, 2, 3)
CARD = latent_card(shape=SHAPE, encoder="sdvae-1f", scale=0.18215, flip=True)


def latent(number: int, mirrored: bool = False) -> np.ndarray:
    values = np.random.default_rng(number).normal(size=SHAPE).astype(np.float16)
    return values[:, :, ::-1] if mirrored else values


def features(number: int) -> np.ndarray:
    """Upper halves of float32, which is bfloat16; 0 to 6 rows."""
    return np.random.default_rng(number).integers(0, 0x4000, (number % 7, 4), dtype=np.uint16)


def write(folder: Path, numbers: range, per_shard: int = 7, card: dict[str, Any] = CARD, **bad: bytes) -> None:
    """Sample n has class n mod 10; ``bad`` maps keys to other bytes for the latent, ``cls_`` + key to another class."""
    with DatasetWriter(folder, dataset="latents", licence="", sources={}, card=card) as writer:
        samples = [
            {
                "__key__": f"k{number:03d}",
                "lat": bad.get(f"k{number:03d}", latent(number).tobytes()),
                "lat.flip": latent(number, mirrored=True).tobytes(),
                "cls": bad.get(f"cls_k{number:03d}", str(number % 10).encode()),
            }
            for number in numbers
        ]
        writer.write("train", samples, per_shard)


def write_features(folder: Path, numbers: range, per_shard: int = 7) -> None:
    card = features_card("emb.t5", 4, "t5-2c", dtype="bfloat16")
    with DatasetWriter(folder, dataset="features", licence="", sources={}, card=card) as writer:
        writer.write("train", [{"__key__": f"k{n:03d}", "emb.t5": features(n).tobytes()} for n in numbers], per_shard)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "set"
    write(folder, range(30))
    write_features(folder / "text", range(30))
    return folder


def latents(root: Path, rank: int = 0, world: int = 1, seen: int | None = None, **options: Any) -> Latents:
    data = Latents(root=root, **{"train": "train-*.tar", "batch_size": 6, "window": 2, **options})
    data.setup("fit")
    module = SimpleNamespace() if seen is None else SimpleNamespace(samples_seen=seen)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=module)  # type: ignore[assignment]
    return data


def read(data: Latents, batches: int) -> list[dict[str, Any]]:
    stream = iter(data.train_dataloader())
    try:
        return list(islice(stream, batches))
    finally:
        stream.close()
        data.teardown("fit")


def numbers(batch: dict[str, Any]) -> list[int]:
    return [int(key[1:]) for key in batch["key"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(root: Path, workers: int) -> None:
    data = latents(root, num_classes=10, columns=["text"], features="emb.t5", feature_length=5, workers=workers)
    assert data.card["scale"] == 0.18215
    batches = read(data, 10)
    assert sorted(number for batch in batches[:5] for number in numbers(batch)) == list(range(30))
    for batch in batches:  # all held at once: recycled memory is not recycled too early
        assert batch["latent"].dtype == torch.float16
        assert batch["text_features"].dtype == torch.bfloat16
        np.testing.assert_array_equal(batch["latent"], np.stack([latent(number) for number in numbers(batch)]))
        assert batch["label"].tolist() == [number % 10 for number in numbers(batch)]
        for row, number in enumerate(numbers(batch)):
            stored = features(number)[:5]
            assert batch["text_mask"][row].tolist() == [place < len(stored) for place in range(5)]
            raw = batch["text_features"][row].view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(raw[: len(stored)], stored)
            assert not raw[len(stored) :].any()


def test_mirrored_by_sample_and_epoch(root: Path) -> None:
    ideal = [batch for batch in read(latents(root, flip=True, seed=5), 20)]
    for update, batch in enumerate(ideal):
        chosen = np.array(numbers(batch), dtype=np.int64)
        bits = sample_bits(5, np.full(6, update // 5, dtype=np.int64), chosen) & np.uint64(1)
        expected = np.stack([latent(number, bool(bit)) for number, bit in zip(chosen.tolist(), bits, strict=True)])
        np.testing.assert_array_equal(batch["latent"], expected)
    for world in (1, 2, 3):
        for rank in range(world):
            part = read(latents(root, rank, world, seen=18, flip=True, seed=5), 4)
            for batch, whole in zip(part, ideal[3:7], strict=True):
                here = slice(rank * 6 // world, (rank + 1) * 6 // world)
                assert batch["key"] == whole["key"][here]
                assert torch.equal(batch["latent"], whole["latent"][here])


def test_validation_is_never_mirrored(root: Path) -> None:
    data = latents(root, val="train-*.tar", flip=True)
    batches = list(data.val_dataloader())
    assert [number for batch in batches for number in numbers(batch)] == list(range(30))
    for batch in batches:
        np.testing.assert_array_equal(batch["latent"], np.stack([latent(number) for number in numbers(batch)]))


def test_bad_samples_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a", range(30), k004=b"short", k017=bytes(100))
    with pytest.raises(ValueError, match=r"train-00000\d\.tar, sample k0(04|17): \.lat has (5|100) bytes, expected 96"):
        read(latents(tmp_path / "a"), 5)
    caplog.set_level(logging.WARNING)
    for flip in (False, True):
        found = read(latents(tmp_path / "a", flip=flip, max_bad_fraction=0.2), 10)
        keys = [number for batch in found for number in numbers(batch)]
        assert set(range(30)) - set(keys) <= {4, 17}
        for batch in found:
            for row, number in enumerate(numbers(batch)):
                options = (latent(number), latent(number, mirrored=True))[: 1 + flip]
                assert any(np.array_equal(batch["latent"][row], option) for option in options)
                assert number not in (4, 17) or np.array_equal(batch["latent"][row], options[-1])
    assert {key for key in ("k004", "k017") if key in caplog.text} == {"k004", "k017"}
    ranks = [read(latents(tmp_path / "a", rank, 2, max_bad_fraction=0.2), 10) for rank in range(2)]
    merged = [key for pair in zip(*ranks, strict=True) for batch in pair for key in batch["key"]]
    assert merged == [key for batch in read(latents(tmp_path / "a", max_bad_fraction=0.2), 10) for key in batch["key"]]


def test_bad_labels_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a", range(30), cls_k003=b"11", cls_k012=b" 2\n", cls_k020=b"0" * 30)
    data = latents(tmp_path / "a", num_classes=10, max_bad_fraction=0.1)
    found = read(data, 10)
    assert data.bad_samples == 1
    shown = {
        number: int(label) for batch in found for number, label in zip(numbers(batch), batch["label"], strict=True)
    }
    assert shown == {number: number % 10 for number in range(30) if number != 3}
    with pytest.raises(ValueError, match=r"labels run from 0 to 11, but data\.num_classes=10"):
        latents(tmp_path / "a", num_classes=10)
    (tmp_path / "a" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"index\.json says nothing about \.lat"):
        latents(tmp_path / "a")


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    for change, told in (
        ({"encoder": "other"}, r"come from the encoder sdvae-1f, but data\.encoder=other"),
        ({"features": "emb.t5"}, r"no \.emb\.t5\. Set data\.columns"),
        ({"num_classes": 9}, r"labels run from 0 to 9, but data\.num_classes=9"),
        ({"feature_length": 0}, r"data\.feature_length=0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            latents(root, **change)
    latents(root, encoder="sdvae-1f")
    write(tmp_path / "mute", range(8), card={"lat": {"dtype": "float16"}})
    with pytest.raises(ValueError, match=r"about \.lat; expected dtype float16, shape \[2C, h, w\], encoder and scale"):
        latents(tmp_path / "mute")
    write(tmp_path / "other", range(8), card=latent_card(shape=SHAPE, encoder="other", scale=1.0))
    mixture = {"a": {"path": str(root / "train-*.tar")}, "b": {"path": str(tmp_path / "other" / "*.tar")}}
    with pytest.raises(ValueError, match=r"its latents are .*, those of the other shards"):
        latents(root, train=mixture).source_of("train")
    mixture["b"] = mixture["a"]
    found = read(latents(root, train=mixture, num_classes=10, flip=True), 10)
    assert {key.partition("/")[0] for batch in found for key in batch["key"]} == {"a", "b"}
