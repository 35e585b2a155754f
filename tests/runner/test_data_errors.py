"""Every mistake with data ends in one message: what came, what was expected, where it was set, what to type."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules import shards
from datamodules.bad import BadSamples
from datamodules.imagereader import SampleReader
from datamodules.images import Images
from datamodules.order import InOrder
from datamodules.writer import DatasetWriter
from tests.tars import picture, sample, write_set, write_tar

Break = Callable[[Path], dict[str, Any]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four shards of 30 samples with index.json; sample i has class i mod 10."""
    folder = tmp_path / "data"
    with DatasetWriter(folder, dataset="test", licence="none", sources={}) as writer:
        writer.write("train", ({"__key__": f"{i:05d}", **sample(i, i % 10)} for i in range(120)), per_shard=30)
    return folder


def message(root: Path, **options: Any) -> str:
    """The error of setting up and reading one batch, with the folder replaced by ROOT."""
    settings = {"train": "train-*.tar", "size": 8, "channels": 1, "num_classes": 10, "batch_size": 60, "workers": 2}

    def first_batch() -> None:
        data = Images(root=root, **{**settings, **options})
        data.setup("fit")
        try:
            next(iter(data.train_dataloader()))
        finally:
            data.teardown()

    with pytest.raises(ValueError, match="data") as caught:
        first_batch()
    assert type(caught.value) is ValueError or isinstance(caught.value, shards.BadSample)
    innermost = caught.traceback[-1].path
    assert Path(innermost).parent.name == "datamodules"  # so that the command line knows whose mistake it is
    return str(caught.value).replace(str(root), "ROOT")


def test_missing_among_many(root: Path) -> None:
    (root / "train-000002.tar").unlink()
    told = "Copy them, or accept the rest with data.allow_missing=true."
    first = "1 of 4 files are missing, first: train-000002.tar."
    braces = "train-{000000..000003}.tar"
    assert message(root, train=braces) == f"data.train='ROOT/{braces}': {first} {told}"
    assert message(root) == f"data.train='ROOT/train-*.tar': {first} {told}"  # index.json knows
    (root / "index.json").unlink()
    assert message(root) == f"data.train='ROOT/train-*.tar': {first} {told}"  # the gap in the numbers shows it


def test_pattern_matching_nothing(root: Path) -> None:
    assert message(root, train="trian-*.tar") == (
        "data.train='ROOT/trian-*.tar' matches no file. Nearest names there: train-000003.tar, train-000002.tar, "
        "train-000001.tar. Set data.train and data.root to your shards."
    )
    assert message(root, train="x/{0..3}/*.tar") == (
        "data.train='ROOT/x/{0..3}/*.tar' matches no file. Nearest names there: index.json, train-000000.tar, "
        "train-000001.tar. Set data.train and data.root to your shards."
    )
    assert message(root / "no", val="val-*.tar") == (
        "data.train='ROOT/train-*.tar' matches no file: the folder ROOT does not exist, only "
        f"{root} does. Set data.root to the folder of the shards."
    )
    assert message(root, val="val-*.tar") == (
        "data.val='ROOT/val-*.tar' matches no file. Nearest names there: train-000003.tar, train-000002.tar, "
        "train-000001.tar. Set data.val and data.root to your shards."
    )
    assert message(root, train="train-{0..3.tar") == (
        "data.train='train-{0..3.tar': Unbalanced braces: 'train-{0..3.tar'. "
        "Write ranges as in train-{000000..001023}.tar."
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20000])


def zero_block(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096:5120] = bytes(1024)
    path.write_bytes(raw)


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[600] ^= 1
    path.write_bytes(raw)


def repeat_key(path: Path) -> None:
    (path.parent / "index.json").unlink()
    raw = path.read_bytes()
    path.write_bytes(raw[:3072] + raw)


def empty(path: Path) -> None:
    (path.parent / "index.json").unlink()
    write_tar(path, {})


END = "Copy the shard again (folder ROOT), or accept the loss with data.max_bad_fraction="
DAMAGE: dict[Callable[[Path], None], str] = {
    truncate: "train-000001.tar, sample 00039: truncated at byte 20000: 108 bytes of 00039.png are missing "
    f"(file 19.5 KiB, index.json says 70.0 KiB). {END}0.2.",
    zero_block: "train-000001.tar, sample 00031 or the one after it: zero block at byte 4096 inside the archive, "
    f"data goes on at byte 5120 (file 70.0 KiB, index.json says 70.0 KiB). {END}0.3.",
    flip_bit: "train-000001.tar was changed after it was written (its sha256 is not the one in index.json). "
    f"{END}0.009.",
    repeat_key: "train-000001.tar, sample 00030: key 00030 appears twice, again at byte 3584 "
    f"(file 73.0 KiB). {END}0.02.",
    empty: f"train-000001.tar holds no samples (10240 bytes). {END}0.3.",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_corrupt_shard(root: Path, damage: Callable[[Path], None]) -> None:
    damage(root / "train-000001.tar")
    assert message(root) == f"data.train: {DAMAGE[damage]}"


def test_large_sets_are_checked_while_reading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many gigabytes only sizes are compared before the start; damage still stops the run with the same facts."""
    monkeypatch.setattr(shards, "_CHECKED_BYTES", 0)
    zero_block(root / "train-000001.tar")
    assert message(root, window=1, seed=0, batch_size=120) == (
        "train-000001.tar, sample 00031 or the one after it: zero block at byte 4096 inside the archive, "
        "data goes on at byte 5120. "
        "Restore the data, or accept such losses with e.g. data.max_bad_fraction=0.001."
    )


def jpeg(number: int) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(picture(number)).save(file, format="JPEG")
        return file.getvalue()


def rewrite(path: Path, change: Callable[[dict[str, dict[str, bytes]]], object]) -> None:
    """Write the second shard anew, changed, with JPEG files."""
    content = {f"{i:05d}": {"jpg": jpeg(i), "cls": str(i % 10).encode()} for i in range(30, 60)}
    change(content)
    (path.parent / "index.json").unlink()
    write_tar(path, content)


def broken_jpeg(path: Path) -> None:
    rewrite(path, lambda content: content["00037"].update(jpg=content["00037"]["jpg"][:300]))


def missing_member(path: Path) -> None:
    rewrite(path, lambda content: content["00037"].pop("jpg"))


def wrong_label(path: Path) -> None:
    rewrite(path, lambda content: content["00037"].update(cls=b"77"))


def remove(path: Path) -> None:
    path.unlink()


# damage -> samples that cannot be used, those without a number, what the log says about one of them, and whether it
# comes after the start
SKIPPED: dict[Callable[[Path], None], tuple[int, int, str, bool]] = {
    broken_jpeg: (1, 0, "train-000001.tar, sample 00037: not a readable image", False),
    missing_member: (1, 0, "train-000001.tar, sample 00037: no image among its members (cls)", False),
    wrong_label: (1, 0, "Label 77 in shard train-000001.tar, sample 00037", False),
    truncate: (21, 0, "train-000001.tar, sample 00059: is lost; truncated at byte 20000", False),
    empty: (0, 30, "train-000001.tar, sample 00047: is lost", False),
    repeat_key: (1, 2, "train-000001.tar, sample 00030: key 00030 appears twice", False),
    remove: (30, 0, "train-000001.tar, sample 00059: No such file", True),
}


@pytest.mark.parametrize("damage", SKIPPED, ids=lambda damage: damage.__name__)
def test_bad_samples_are_skipped_and_the_rest_stays_exact(
    root: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    lost, before, told, while_training = SKIPPED[damage]
    place = root / "train-000001.tar"
    if not while_training:
        damage(place)

    def opened(allowed: float = 0.5, **options: Any) -> Images:
        settings = {"train": "train-*.tar", "size": 8, "channels": 1, "num_classes": 10, "window": 2, "seed": 3}
        data = Images(root=root, **{**settings, "batch_size": 24, "max_bad_fraction": allowed, **options})
        data.setup("fit")
        return data

    def keys(data: Images, updates: int = 10) -> list[list[str]]:
        try:
            stream = iter(data.train_dataloader())
            return [[key for _ in range(data.accumulation) for key in next(stream)["key"]] for _ in range(updates)]
        finally:
            data.teardown()

    parties = [
        [(rank, opened(workers=workers, micro_batch=micro)) for rank in range(world)]
        for world, workers, micro in ((1, 0, None), (1, 2, 4), (2, 1, 3), (4, 0, 6))
    ]
    ideal = opened()
    too_few = (lost + before - 0.5) / 120
    limited = opened(allowed=too_few) if while_training else None
    if while_training:
        for data in filter(None, [ideal, limited, *(data for party in parties for _, data in party)]):
            data.teardown()  # whoever has the file open could still read it
        damage(place)
    source, lookup = ideal.source_of("train"), ideal.training_sequence()
    total = int(source.counts.sum())
    strict = SampleReader(source, InOrder(total), BadSamples(total), ideal.filled("train", training=False))
    usable: dict[int, str] = {}
    for number in range(total):
        with contextlib.suppress(ValueError):
            [usable[number]] = strict(np.array([number]))["key"]
    assert len(usable) == total - lost
    order = lookup(np.arange(400))[1].tolist()
    expected = [usable[next(sample for sample in order[p:] if sample in usable)] for p in range(240)]
    for party in parties:
        for rank, data in party:
            module = SimpleNamespace(samples_seen=0)
            data.trainer = SimpleNamespace(global_rank=rank, world_size=len(party), lightning_module=module)  # type: ignore[assignment]
        found = [keys(data) for _, data in party]
        size = 24 // (len(party) * party[0][1].accumulation)
        merged = [part[u][n : n + size] for u in range(10) for n in range(0, len(found[0][0]), size) for part in found]
        assert [key for keys in merged for key in keys] == expected
        assert max(data.bad_samples for _, data in party) <= lost + before
    assert parties[0][0][1].bad_samples == parties[0][0][1].health()["data/bad_samples"] == lost + before
    assert told in caplog.text
    if lost:
        every = [data for party in parties for _, data in party]
        assert caplog.text.count("skipped: ") == sum(data.bad_samples - before for data in every)
        with pytest.raises(ValueError, match=r"train-000001\.tar.*data\.max_bad_fraction="):
            keys(limited or opened(allowed=too_few))


def test_label_out_of_range(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "Label 9 in shard train-000000.tar, but data.num_classes=9 allows 0..8. Labels seen in the index: 0..9, "
        "data.label_offset=0. Set data.num_classes=10."
    )
    assert message(root, num_classes=9) == told
    (root / "index.json").unlink()
    assert message(root, num_classes=9) == told
    assert message(root, label_offset=1) == (
        "Label 10 in shard train-000000.tar, but data.num_classes=10 allows 0..9. Labels seen in the index: 0..9, "
        "data.label_offset=1. Set data.label_offset=0."
    )
    monkeypatch.setattr(shards, "_CHECKED_BYTES", 0)
    found = message(root, num_classes=9)
    assert re.sub(r"\d{5}", "KEY", re.sub(r"train-\d{6}", "SHARD", found)) == (
        "Label 9 in shard SHARD.tar, sample KEY, but data.num_classes=9 allows 0..8 (stored class 9, "
        "data.label_offset=0). Correct data.label_offset or data.num_classes."
    )


def test_wrong_members(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "data" / "other"
    other.mkdir()
    write_tar(other / "text.tar", {"a": {"txt": b"x"}})
    assert message(root, train="other/text.tar") == (
        "data.train: the samples of text.tar have .txt, but no image (.png, .jpg, .jpeg, .webp). "
        "Set data.train to image shards."
    )
    write_set(other, [3], classes=0)
    assert message(root, train="other/train-000000.tar") == (
        "data.train: the samples of train-000000.tar have .png, but no class (.cls), and data.num_classes=10 wants "
        "one. Set data.num_classes=0, or use shards with classes."
    )
    (tmp_path / "data" / "empty").mkdir()
    assert message(root, train="empty") == (
        "data.train='ROOT/empty' is a folder without shards (.tar) and without images (.png, .jpg, .jpeg, .webp). "
        "Set data.train to the shards, or to a folder with one sub-folder per class."
    )


def test_broken_picture(root: Path) -> None:
    write_tar(root / "one.tar", {"00777": {"png": b"<html>", "cls": b"1"}})
    assert message(root, train="one.tar") == (
        "one.tar, sample 00777: not a readable image (unknown format, the first bytes are b'<html>'). "
        "Restore the data, or accept such losses with e.g. data.max_bad_fraction=0.001."
    )


def test_broken_index(root: Path) -> None:
    (root / "index.json").write_text("{")
    assert message(root).startswith("ROOT/index.json cannot be read (Expecting property name")
    (root / "index.json").write_text(json.dumps({"format": 1, "shards": 3}))
    assert message(root) == (
        "ROOT/index.json is not a shard index (AttributeError: 'int' object has no attribute 'items'). "
        "Delete it: the shards are then counted directly."
    )


def test_settings_out_of_range(root: Path) -> None:
    assert message(root, channels=4) == "data.channels=4: expected 1 (grey) or 3 (RGB). E.g. data.channels=3"
    assert message(root, workers=-1) == "data.workers=-1: expected 0 (no threads) or more. E.g. data.workers=2"
    assert message(root, micro_batch=25) == (
        "data.batch_size=60 does not divide over 1 ranks in micro-batches of 25 (60 / 25 = 2.4). "
        "Set data.batch_size to 50 or 75, or data.micro_batch to 20 or 30."
    )
    data = Images(root=root, train="train-*.tar", size=8, batch_size=96)
    with pytest.raises(ValueError, match=r"^data.batch_size=96 does not divide over 64 ranks \(96 / 64 = 1.5\). "):
        data.accumulation_for(64)
    assert data.accumulation_for(32) == 1
