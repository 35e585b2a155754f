"""The image DataModule: pixels, order, continuation, bad samples and threads."""

import io
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import Images
from datamodules.loader import SizedLoader
from datamodules.transforms import decode_into
from tests.tars import picture, png, sample, write_set, write_tar

Keys = list[list[str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_set(tmp_path, [6, 5, 7, 6], classes=10)
    return write_set(tmp_path, [5, 4], prefix="val", classes=10)


def images(root: Path, **options: Any) -> Images:
    defaults = {"train": "train-*.tar", "val": "val-*.tar", "size": 8, "channels": 1, "num_classes": 10}
    data = Images(root=root, **{**defaults, "batch_size": 12, "window": 2, "workers": 0, **options})
    data.setup("fit")
    return data


def attach(data: Images, rank: int = 0, world: int = 1, seen: int | None = None) -> Images:
    module = SimpleNamespace() if seen is None else SimpleNamespace(samples_seen=seen)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=module)  # type: ignore[assignment]
    return data


def keys(data: Images, batches: int) -> Keys:
    stream = iter(data.train_dataloader())
    try:
        return [batch["key"] for batch in islice(stream, batches)]
    finally:
        data.teardown("fit")


def test_batch_content(root: Path) -> None:
    batch = next(iter(images(root).train_dataloader()))
    numbers = [int(key.removeprefix("train")) for key in batch["key"]]
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].shape == (12, 1, 8, 8)
    np.testing.assert_array_equal(batch["image"][:, 0], np.stack([picture(i) for i in numbers]))
    assert batch["label"].tolist() == [i % 10 for i in numbers]
    assert "label" not in next(iter(images(root, num_classes=0).train_dataloader()))


@pytest.mark.parametrize("shape", [(40, 60), (60, 41), (8, 8), (5, 9), (16, 16)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_resize_and_crop_are_pillows(shape: tuple[int, int], kind: str) -> None:
    with io.BytesIO() as file:
        smooth = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize(shape).save(file, format=kind, lossless=True, quality=95)
        data = file.getvalue()
    for channels, mode in ((3, "RGB"), (1, "L")):
        if (kind, channels) == ("JPEG", 1):
            continue  # the luma plane itself, where Pillow rounds through RGB
        picture = Image.open(io.BytesIO(data)).convert(mode)
        width, height = (8 * side // min(shape) for side in shape)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 8) / 2), round((height - 8) / 2)
        out = np.empty((8, 8, channels), dtype=np.uint8)
        decode_into(data, out)
        difference = np.abs(out.squeeze().astype(int) - np.asarray(picture.crop((left, top, left + 8, top + 8))))
        assert difference.max() <= (min(shape) != 8)
        assert difference.mean() < 0.03  # float arithmetic, rounded once, would be off by 0.1 and more
        for wide in (8, 5):  # rows of whole words, and others
            pair = np.empty((2, 8, wide, channels), dtype=np.uint8)
            for mirrored in (False, True):
                decode_into(data, pair[int(mirrored)], mirrored)
            np.testing.assert_array_equal(pair[1], pair[0, :, ::-1])


def test_grey_colour_and_transparent_files() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colour, single = np.empty((8, 8, 3), np.uint8), np.empty((8, 8, 1), np.uint8)
    decode_into(png(grey), colour)
    np.testing.assert_array_equal(colour, np.repeat(grey[:, :, None], 3, axis=2))
    decode_into(png(np.dstack([grey, grey, grey, grey])), single)
    np.testing.assert_array_equal(single[:, :, 0], grey)
    with io.BytesIO() as file:
        Image.fromarray(np.dstack([grey] * 4), mode="CMYK").save(file, format="JPEG", quality=100)
        decode_into(file.getvalue(), colour)
        np.testing.assert_array_equal(colour, np.asarray(Image.open(file).convert("RGB")))
    for broken in (b"", b"<html>", png(grey)[:50], b"\xff\xd8\xff" + bytes(40), png(grey.astype(np.uint16))):
        with pytest.raises(ValueError, match="not a readable image"):
            decode_into(broken, single)


def test_workers_do_not_change_anything(root: Path) -> None:
    def run(workers: int) -> list[dict[str, Any]]:
        data = images(root, workers=workers, flip=True)
        result = list(islice(data.train_dataloader(), 7))
        data.teardown("fit")
        return result

    expected = run(0)
    for workers in (1, 3):
        for ours, theirs in zip(run(workers), expected, strict=True):
            assert ours["key"] == theirs["key"]
            assert torch.equal(ours["image"], theirs["image"])
            assert torch.equal(ours["label"], theirs["label"])


def test_flips_belong_to_sample_and_epoch(root: Path) -> None:
    def flipped(batch_size: int) -> dict[tuple[int, str], bool]:
        found = {}
        data = images(root, flip=True, batch_size=batch_size)
        for step, batch in enumerate(islice(data.train_dataloader(), 240 // batch_size)):
            for row, (key, image) in enumerate(zip(batch["key"], batch["image"][:, 0].numpy(), strict=True)):
                original = picture(int(key[-5:]))
                mirrored = not np.array_equal(image, original)
                np.testing.assert_array_equal(image, original[:, ::-1] if mirrored else original)
                found[((step * batch_size + row) // 24, key)] = mirrored
        return found

    small, large = flipped(8), flipped(40)
    assert small == large
    assert 90 < sum(small.values()) < 150  # 240 fair coins, standard deviation 8
    assert len({small[epoch, "train00003"] for epoch in range(10)}) == 2
    data = images(root, flip=True)
    assert all(
        np.array_equal(image[0], picture(int(key[-5:])))
        for batch in data.val_dataloader()
        for key, image in zip(batch["key"], batch["image"].numpy(), strict=True)
    )


def test_ranks_share_the_sequence(root: Path) -> None:
    whole = keys(images(root), 6)
    for world in (1, 2, 3, 4):
        for micro in (None, 1):
            parts = [attach(images(root, micro_batch=micro), rank, world) for rank in range(world)]
            steps = parts[0].accumulation
            assert steps == (1 if micro is None else 12 // world)
            streams = [keys(part, 6 * steps) for part in parts]
            for update in range(6):
                chunk = [stream[update * steps : (update + 1) * steps] for stream in streams]
                assert [key for pieces in zip(*chunk, strict=True) for piece in pieces for key in piece] == whole[
                    update
                ]


def test_validation_comes_once(root: Path) -> None:
    for world in (1, 2, 4):
        loaders = [
            attach(images(root, workers=1, val_batch_size=4), rank, world).val_dataloader() for rank in range(world)
        ]
        batches = [list(loader) for loader in loaders]
        assert {len(part) for part in batches} == {len(loader) for loader in loaders}  # type: ignore[arg-type]
        assert len({len(part) for part in batches}) == 1
        found = sorted(key for part in batches for batch in part for key in batch["key"])
        assert found == [f"val{i:05d}" for i in range(9)]
    with pytest.raises(ValueError, match=r"data\.val holds 9 samples, fewer than the 10 ranks"):
        attach(images(root, batch_size=10), 0, 10).val_dataloader()
    assert images(root, val=None).val_dataloader() == []


def test_continues_where_the_state_says(root: Path) -> None:
    whole = [key for batch in keys(images(root, flip=True), 8) for key in batch]
    state = attach(images(root), seen=36).state_dict()
    assert set(state) == {"samples", "seed", "window", "fingerprint", "next_key"}
    assert (state["samples"], state["next_key"]) == (36, whole[36])
    data = images(root, workers=3, batch_size=20)
    data.load_state_dict(state)
    assert data.samples == 36
    assert [key for batch in keys(data, 3) for key in batch] == whole[36:96]
    assert keys(attach(data, seen=36), 1) == [whole[36:56]]
    for wrong in (0, 20):
        with pytest.raises(AssertionError, match="training would continue at"):
            keys(attach(data, seen=wrong), 1)


def test_state_of_other_data_is_refused(root: Path, tmp_path: Path) -> None:
    state = attach(images(root), seen=12).state_dict()
    with pytest.raises(ValueError, match=r"data\.seed was 0, is 1, data\.window was 2, is 3"):
        images(root, seed=1, window=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the checkpoint says other: the content of the shards has changed"):
        images(root).load_state_dict({**state, "next_key": "other"})
    with pytest.raises(ValueError, match=r"the fingerprint of data\.train was"):
        images(root, train="train-00000[01].tar").load_state_dict(state)


def test_class_folder_reads_like_shards(root: Path, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / "folder" / str(number % 10)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / str(number % 10) / f"{number:05d}.png").write_bytes(png(picture(number)))
    data = images(root, train=str(tmp_path / "folder"))
    assert data.describe()["samples"] == 20
    seen = {}
    for batch in islice(data.train_dataloader(), 5):
        for key, image, label in zip(batch["key"], batch["image"], batch["label"].tolist(), strict=True):
            number = int(key.split("/")[1])
            assert label == number % 10 == int(key.split("/")[0])
            np.testing.assert_array_equal(image[0], picture(number))
            seen[key] = label
    assert len(seen) == 20
    assert "3/00013" in seen
    named = tmp_path / "named"
    for name in ("wild", "cat", "dog"):
        (named / name).mkdir(parents=True)
        (named / name / "x.png").write_bytes(png(picture(0)))
    _, labels = images(root, train=str(named), val=None, num_classes=3).reference_images("train")
    assert labels.tolist() == [0, 1, 2]


def test_reference_images(root: Path) -> None:
    data = images(root, workers=2, flip=True)
    pixels, labels = data.reference_images("train")
    np.testing.assert_array_equal(pixels[:, 0], np.stack([picture(i) for i in range(24)]))
    assert labels.tolist() == [i % 10 for i in range(24)]
    some, _ = data.reference_images("val", limit=4)
    np.testing.assert_array_equal(some[:, 0], np.stack([picture(i) for i in (0, 2, 4, 6)]))


def test_bad_samples_are_replaced_by_the_next(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    healthy = [key for batch in keys(images(root), 4) for key in batch]
    mislabelled, broken = healthy[7], {healthy[8], healthy[20]}
    for shard, first, last in ((0, 0, 6), (1, 6, 11), (2, 11, 18), (3, 18, 24)):
        content = {f"train{i:05d}": sample(i, i % 10) for i in range(first, last)}
        for key in content:
            if key in broken:
                content[key]["png"] = b"broken"
            if key == mislabelled:
                content[key]["cls"] = b"77"
        write_tar(root / f"train-{shard:06d}.tar", content)
    expected = list(healthy)
    for position in range(46, -1, -1):
        if expected[position] in {mislabelled, *broken}:
            expected[position] = expected[position + 1]
    for workers in (0, 2):
        data = images(root, max_bad_fraction=0.2, workers=workers)
        assert [key for batch in keys(data, 3) for key in batch] == expected[:36]
        assert data.bad_samples == 3
    assert caplog.text.count("skipped: ") == 6
    assert "not a readable image" in caplog.text
    assert "Label 77 in shard" in caplog.text
    for allowed, told in ((0.0, "Restore the data"), (0.05, "Bad samples so far: 2 of 24; training stops above")):
        with pytest.raises(ValueError, match=f"not a readable image.*{told}"):
            keys(images(root, max_bad_fraction=allowed, num_classes=100), 3)


def test_pictures_resized_together_are_those_resized_alone(root: Path) -> None:
    def jpeg(number: int, size: int) -> bytes:
        with io.BytesIO() as file:
            Image.fromarray(picture(number, size, 3)).save(file, format="JPEG")
            return file.getvalue()

    healthy = [key for batch in keys(images(root), 2) for key in batch]
    sizes = {
        healthy[0]: 24,
        healthy[13]: 24,
        healthy[4]: 8,
    }  # the last comes in place of the one before, and need not wait
    files = {f"train{i:05d}": jpeg(i, sizes.get(f"train{i:05d}", 16)) for i in range(24)}
    content = {key: {"jpg": data, "cls": b"0"} for key, data in files.items()}
    content[healthy[3]]["cls"] = b"77"  # decoded before its label is refused
    content[healthy[9]]["jpg"] = files[healthy[9]][:100]
    for shard, (first, last) in enumerate(((0, 6), (6, 11), (11, 18), (18, 24))):
        write_tar(root / f"train-{shard:06d}.tar", {key: content[key] for key in list(files)[first:last]})
    data = images(root, max_bad_fraction=0.2, channels=3, flip=True)
    flipped = 0
    for batch in islice(data.train_dataloader(), 2):
        assert not {healthy[3], healthy[9]} & set(batch["key"])
        for key, pixels in zip(batch["key"], batch["image"], strict=True):
            alone = np.empty((2, 8, 8, 3), dtype=np.uint8)
            decode_into(files[key], alone[0])
            decode_into(files[key], alone[1], mirrored=True)
            found = pixels.permute(1, 2, 0).numpy()
            mirrored = np.array_equal(found, alone[1])
            assert mirrored or np.array_equal(found, alone[0]), key
            flipped += mirrored
    assert 0 < flipped < 24
    assert data.bad_samples == 2
    data.teardown("fit")


def test_held_batches_are_not_overwritten(root: Path) -> None:
    data = images(root, workers=2)
    stream = iter(data.train_dataloader())
    held = [next(stream) for _ in range(4)]
    copies = [batch["image"].clone() for batch in held]
    addresses = {next(stream)["image"].data_ptr() for _ in range(60)}
    assert all(torch.equal(batch["image"], copy) for batch, copy in zip(held, copies, strict=True))
    assert not addresses & {batch["image"].data_ptr() for batch in held}
    assert len(addresses) < 20  # memory is recycled
    data.teardown("fit")


def reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread is not threading.main_thread()}


def test_no_thread_is_left(root: Path) -> None:
    before = reader_threads()
    data = images(root, workers=3)
    streams: list[Iterator[Any]] = [iter(data.train_dataloader()), iter(data.val_dataloader())]
    for stream in streams:
        next(stream)
    assert len(reader_threads() - before) >= 6
    data.teardown("fit")
    for stream in streams:
        assert next(stream, None) is None
    abandoned = iter(data.train_dataloader())
    next(abandoned)
    del abandoned
    deadline = time.monotonic() + 5
    while reader_threads() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not reader_threads() - before


def test_interpreter_ends_cleanly_with_a_running_loader() -> None:
    program = (
        "from itertools import count; from datamodules.loader import Loader\n"
        "stream = iter(Loader(count, lambda n: n, workers=2)); assert [next(stream), next(stream)] == [0, 1]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


class Ledger(L.LightningModule):
    """Notes every key it trains on and counts samples as the real modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 1)
        self.samples_seen = 0
        self.keys: list[str] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.keys += batch["key"]
        self.samples_seen += len(batch["key"])
        return self.layer(batch["image"].flatten(1) / 255.0).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.samples_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.samples_seen = checkpoint["seen"]


def test_lightning_trains_resumes_and_joins_the_threads(root: Path, tmp_path: Path) -> None:
    def fit(steps: int, workers: int, micro: int, checkpoint: Path | None) -> tuple[L.Trainer, list[str]]:
        data = images(root, workers=workers, micro_batch=micro)
        module = Ledger()
        trainer = L.Trainer(
            max_epochs=-1,
            max_steps=steps,
            accumulate_grad_batches=data.accumulation,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
        return trainer, module.keys

    before = reader_threads()
    _, whole = fit(9, 0, 12, None)
    trainer, first = fit(4, 3, 4, None)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, second = fit(9, 2, 4, tmp_path / "half.ckpt")
    assert len(whole) == 9 * 12
    assert first + second == whole
    assert not reader_threads() - before


def mixture(root: Path, kind: str, first: float, second: float, **options: Any) -> Images:
    parts = {"old": {"path": "train-*.tar", kind: first}, "new": {"path": "val-*.tar", kind: second}}
    return images(root, train=parts, val=None, **options)


def test_mixtures_keep_their_shares_and_continue_exactly(root: Path) -> None:
    data = attach(mixture(root, "weight", 0.75, 0.25), seen=48)
    whole = [key for batch in keys(mixture(root, "weight", 0.75, 0.25), 16) for key in batch]
    for update in range(16):
        assert sum(key.startswith("old/train") for key in whole[12 * update : 12 * update + 12]) == 9
    assert data.describe()["samples"] == 24 + 9
    assert data.describe()["mixture"] == "old, new"
    health = data.health()
    assert (health["data/share_old"], health["data/share_new"]) == (0.75, 0.25)
    assert (health["data/epoch_old"], health["data/epoch_new"]) == (36 / 24, 12 / 9)
    state = data.state_dict()
    assert state["next_key"] == whole[48]
    parts = [attach(mixture(root, "weight", 3, 1, workers=rank), rank, 2, seen=48) for rank in range(2)]
    for part in parts:
        part.load_state_dict(state)
    streams = [keys(part, 12) for part in parts]
    assert [key for pieces in zip(*streams, strict=True) for piece in pieces for key in piece] == whole[48:]
    with pytest.raises(ValueError, match=r"data\.shares was 3:1, is 1:1"):
        mixture(root, "weight", 1, 1).load_state_dict(state)
    repeated = Counter(key for batch in keys(mixture(root, "repeat", 1, 4, batch_size=10), 6) for key in batch)
    assert {key.split("/")[0]: count for key, count in repeated.items()} == {"old": 1, "new": 4}
    assert len(repeated) == 24 + 9
    with pytest.raises(ValueError, match=r"data\.train\.a=\{'weight': 1\}: a source of a mixture has a path and"):
        images(root, train={"a": {"weight": 1}})


def test_columns_join_the_samples(root: Path) -> None:
    (root / "classes").mkdir()
    for shard, (first, last) in enumerate(((0, 6), (6, 11), (11, 18), (18, 24))):
        write_tar(root / f"train-{shard:06d}.tar", {f"train{i:05d}": sample(i) for i in range(first, last)})
        content = {f"train{i:05d}": {"cls": str(9 - i % 10).encode()} for i in range(first, last)}
        write_tar(root / "classes" / f"train-{shard:06d}.tar", content)
    data = images(root, val=None, columns=["classes"])
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].tolist() == [9 - int(key[-5:]) % 10 for key in batch["key"]]
    assert data.describe()["columns"] == "classes"


def test_a_key_that_nobody_can_tell_is_no_contradiction(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.shards._CHECKED_BYTES", 0)  # else the keys are remembered
    data = attach(images(root), seen=12)
    state = data.state_dict()
    data.teardown()
    for path in root.glob("train-*.tar"):
        path.rename(path.with_suffix(".away"))
    assert data.state_dict()["next_key"].startswith("#")  # a checkpoint is written all the same
    for path in root.glob("train-*.away"):
        path.rename(path.with_suffix(".tar"))
    images(root).load_state_dict({**state, "next_key": "#3"})


def test_reader_threads_compute_with_one_core_each() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert set(SizedLoader(list(range(9)), lambda number: torch.get_num_threads(), workers=2)) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_shards_from_elsewhere_are_announced_a_window_ahead(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(root, batch_size=4, window=2)  # about 12 samples
    source = data.source_of("train")
    announced: set[int] = set()
    monkeypatch.setattr(source, "health", lambda: {"cache_hits": 1.0}, raising=False)
    monkeypatch.setattr(source, "expect", lambda samples: announced.update(samples.tolist()), raising=False)
    order = data.training_sequence()
    for update, _ in enumerate(islice(data.train_dataloader(), 18)):
        soon = order(np.arange(4 * update, 4 * update + 8))[1].tolist()
        assert set(soon) <= announced
    assert len(announced) == 24
    assert data.health()["data/cache_hits"] == 1
