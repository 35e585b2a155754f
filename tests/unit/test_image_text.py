"""Images with captions: choice of captions, tokens, features, latents, aspect ratios, and what is refused."""

import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.buckets import Buckets
from datamodules.image_text import ImageText
from datamodules.images import Images
from datamodules.tokenizers import Bytes
from tests.tars import picture, png, write_tar

WIDTH, LATENT = 3, (4, 2, 2)
SHAPES = [(8, 8), (8, 16), (16, 8), (9, 8)]


def features_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(1 + number % 6, WIDTH)).astype(np.float16)


def latent_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=LATENT).astype(np.float16)


def sized(number: int) -> bytes:
    height, width = SHAPES[number % 4]
    with io.BytesIO() as file:
        Image.fromarray(np.full((height, width, 3), number, dtype=np.uint8)).save(file, format="PNG")
        return file.getvalue()


def members(number: int) -> dict[str, bytes]:
    return {
        "png": png(picture(number)),
        "txt": f" original {number}\n".encode(),
        "recap.txt": f"re-written {number}".encode(),
        "json": json.dumps({"alt": f"alternative {number}"}).encode(),
        "emb.t5": features_of(number).tobytes(),
        "lat": latent_of(number).tobytes(),
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for prefix, shards in (("train", 4), ("val", 1)):
        for shard in range(shards):
            numbers = range(10 * shard, 10 * shard + 10)
            write_tar(tmp_path / f"{prefix}-{shard:06d}.tar", {f"{i:05d}": members(i) for i in numbers})
            write_tar(
                tmp_path / f"sized-{shard:06d}.tar", {f"{i:05d}": {"png": sized(i), "txt": b"x"} for i in numbers}
            )
    return tmp_path


def image_text(root: Path, **options: Any) -> ImageText:
    defaults = {"train": "train-*.tar", "val": "val-*.tar", "size": 8, "channels": 1, "batch_size": 8, "workers": 0}
    data = ImageText(root=root, **{**defaults, **options})
    data.setup("fit")
    return data


def batches(data: Images, count: int) -> list[dict[str, Any]]:
    stream = iter(data.train_dataloader())
    try:
        return list(islice(stream, count))
    finally:
        data.teardown()


def test_captions_are_drawn_per_sample_and_epoch(root: Path) -> None:
    shares = {"txt": 0.5, "recap.txt": 0.25, "json:alt": 0.25}

    def drawn(batch_size: int, workers: int) -> dict[tuple[int, str], str]:
        data = image_text(root, captions=shares, batch_size=batch_size, workers=workers)
        found = {}
        for step, batch in enumerate(batches(data, 1600 // batch_size)):
            for row, (key, text) in enumerate(zip(batch["key"], batch["text"], strict=True)):
                kind, number = text.rsplit(" ", 1)
                assert number == str(int(key))
                found[(step * batch_size + row) // 40, key] = kind
        return found

    first = drawn(8, 0)
    assert first == drawn(40, 2)
    counts = Counter(first.values())
    assert 720 < counts["original"] < 880  # of 1600, standard deviation 20
    assert 330 < counts["re-written"] < 470
    assert counts.keys() == {"original", "re-written", "alternative"}
    texts = [text for batch in image_text(root, captions=shares).val_dataloader() for text in batch["text"]]
    assert texts == [f"original {i}" for i in range(10)]


def test_captions_are_drawn_among_those_a_sample_has(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shares = {"txt": 0.5, "recap.txt": 0.3, "json:alt": 0.2}
    whole = batches(image_text(root, captions=shares), 100)
    lacking = {1: ["txt"], 2: ["json"], 3: ["txt", "recap.txt"], 4: ["txt", "recap.txt", "json"]}
    for shard in range(4):
        content = {f"{i:05d}": members(i) for i in range(10 * shard, 10 * shard + 10)}
        for key, held in content.items():
            for name in lacking.get(int(key) % 10, ()):
                del held[name]
        write_tar(root / f"train-{shard:06d}.tar", content)
    found = batches(image_text(root, captions=shares, max_bad_fraction=0.1), 100)
    drawn: dict[int, Counter[str]] = {}
    for before, after in zip(whole, found, strict=True):
        for row, key in enumerate(after["key"]):
            drawn.setdefault(int(key) % 10, Counter())[after["text"][row].rsplit(" ", 1)[0]] += 1
            if int(key) % 10 not in lacking and before["key"][row] == key:
                assert before["text"][row] == after["text"][row]
    assert drawn[1].keys() == {"re-written", "alternative"}
    assert abs(drawn[1]["re-written"] / drawn[1].total() - 0.6) < 0.2  # about 80 draws, standard deviation 0.055
    assert drawn[2].keys() == {"original", "re-written"}
    assert drawn[3].keys() == {"alternative"}
    assert 4 not in drawn
    assert caplog.text.count("skipped: ") == 4
    (root / "val-000000.tar").write_bytes((root / "train-000000.tar").read_bytes())
    held = image_text(root, captions=shares, max_bad_fraction=0.1).val_dataloader()
    texts = {key: text for batch in held for key, text in zip(batch["key"], batch["text"], strict=True)}
    assert [texts[f"0000{i}"].split(" ")[0] for i in (0, 1, 3)] == ["original", "re-written", "alternative"]


def test_tokens_features_and_latents(root: Path) -> None:
    settings = {"image": False, "tokenizer": Bytes(), "length": 12, "feature_width": WIDTH, "feature_length": 4}
    data = image_text(root, features="emb.t5", latents="lat", latent_shape=LATENT, caption_suffix="!", **settings)
    for batch in batches(data, 12):  # buffers come round again
        assert set(batch) == {"text", "tokens", "valid", "text_features", "text_mask", "latent", "key"}
        assert batch["text_features"].dtype == batch["latent"].dtype == torch.float16
        for row, key in enumerate(batch["key"]):
            number = int(key)
            text = f"original {number}!"
            assert batch["text"][row] == text
            wanted = [*text.encode()[:11], 256]
            assert batch["tokens"][row].tolist() == wanted + [0] * (12 - len(wanted))
            assert int(batch["valid"][row].sum()) == len(wanted)
            stored = features_of(number)[:4]
            np.testing.assert_array_equal(batch["text_features"][row][: len(stored)], stored)
            assert not batch["text_features"][row][len(stored) :].any()
            assert batch["text_mask"][row].tolist() == [True] * len(stored) + [False] * (4 - len(stored))
            np.testing.assert_array_equal(batch["latent"][row], latent_of(number))
    pixels, _ = data.reference_images("val")  # metrics may want what training does not read
    np.testing.assert_array_equal(pixels[:, 0], np.stack([picture(i) for i in range(10)]))


def test_a_sample_without_its_caption_is_replaced_whole(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    healthy = [key for batch in batches(image_text(root), 5) for key in batch["key"]]
    broken = healthy[3]
    shard = int(broken) // 10
    content = {f"{i:05d}": members(i) for i in range(10 * shard, 10 * shard + 10)}
    del content[broken]["txt"]
    write_tar(root / f"train-{shard:06d}.tar", content)
    batch = batches(image_text(root, max_bad_fraction=0.1), 1)[0]
    assert batch["key"] == [*healthy[:3], healthy[4], *healthy[4:8]]
    assert batch["text"][3] == f"original {int(healthy[4])}"
    np.testing.assert_array_equal(batch["image"][3, 0], picture(int(healthy[4])))
    assert f"train-{shard:06d}.tar, sample {broken}: no .txt among its members" in caplog.text


def test_buckets_give_updates_of_one_shape(root: Path) -> None:
    buckets = Buckets(8, 4, ("1:1", "2:1", "1:2"))
    settings = {"train": "sized-*.tar", "channels": 3, "buckets": buckets, "batch_size": 4, "micro_batch": 2}
    names = {"1:1": {(8, 8), (9, 8)}, "2:1": {(8, 16)}, "1:2": {(16, 8)}}

    def run(workers: int) -> list[dict[str, Any]]:
        data = image_text(root, val="sized-*.tar", workers=workers, caption_suffix=" in {ratio}", **settings)
        assert {tuple(batch["image"].shape[2:]) for batch in data.val_dataloader()} == {(8, 8)}
        return batches(data, 40)

    seen: Counter[str] = Counter()
    found = run(0)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["bucket"] == second["bucket"]
        for batch in (first, second):
            shape = buckets.shapes[buckets.names.index(batch["bucket"])]
            assert tuple(batch["image"].shape) == (2, 3, *shape)
            assert batch["text"] == [f"x in {batch['bucket']}"] * 2
            for key, image in zip(batch["key"], batch["image"], strict=True):
                assert SHAPES[int(key) % 4] in names[batch["bucket"]]
                assert (image == int(key)).all()
            seen.update(batch["key"])
    assert set(seen.values()) == {2}  # 80 items of 40 samples: two epochs without remainders
    assert [batch["key"] for batch in run(2)] == [batch["key"] for batch in found]
    state = image_text(root, train="sized-*.tar", batch_size=4).state_dict()
    with pytest.raises(ValueError, match=r"data.buckets was None, is 8x8,4x12,12x4, data.batch_size was None, is 4"):
        image_text(root, **settings).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"captions": {"txt": 0.5, "recap.txt": 0.2}}, r"data.captions: the probabilities \[0.5, 0.2\] sum to 0.7"),
        ({"captions": "caption.txt"}, r"have \.png, .*but data.captions wants \.caption\.txt. Set data.captions to a"),
        ({"captions": None, "tokenizer": Bytes()}, "data.tokenizer is set, but data.captions is null"),
        ({"features": "emb.t5"}, r"data.features=emb.t5: index.json does not say how many numbers a row has"),
        ({"latents": "lat"}, r"data.latents=lat: index.json does not say which shape"),
        ({"latents": "lat", "flip": True}, "data.flip=true mirrors images only"),
        ({"latents": "lat", "latent_shape": [4, 2, 3]}, r"sample \d+: \.lat has 32 bytes, expected 48 for the shape"),
        ({"captions": "json:no"}, r"sample \d+: no no in \.json"),
        ({"captions": None, "image": False}, "data.image=false leaves nothing to read"),
    ],
)
def test_mistakes(root: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        batches(image_text(root, **options), 1)
