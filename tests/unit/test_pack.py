"""Packing: the same bytes with any workers, every input accounted for, whole or not there, continued after a kill."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules import packjournal
from datamodules.check import check
from datamodules.inputs.entries import Choices
from datamodules.inputs.folder import ImageFolder
from datamodules.pack import Packed, Recipe, pack, plan
from datamodules.shards import ShardSet, find
from tests.tars import picture, png

FORK = multiprocessing.get_context("fork")
RECIPE = Recipe("photos", per_shard=10)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 15 pictures each."""
    for number in range(45):
        folder = tmp_path / "photos" / ("ant", "bee", "cat")[number // 15]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(picture(number)))
    return tmp_path / "photos"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def told(call: Callable[[], Packed]) -> str:
    with pytest.raises(ValueError, match=" ") as caught:
        call()
    assert Path(caught.traceback[-1].path).parts[-2] in ("datamodules", "inputs")
    return str(caught.value)


def test_same_bytes_whatever_the_workers(photos: Path, tmp_path: Path) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    pack(photos, one, RECIPE, workers=1)
    pack(photos, four, RECIPE, workers=4)
    assert files(one) == files(four)
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    pack(moved, tmp_path / "other", RECIPE)
    assert files(one) == files(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "moved", "one", "other", "photos"]
    pack(photos, tmp_path / "seed", Recipe("photos", per_shard=10, seed=1))
    assert files(one)["train-000000.tar"] != files(tmp_path / "seed")["train-000000.tar"]


def test_what_is_written_is_what_was_there(photos: Path, tmp_path: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.rglob("*.png")}
    packed = pack(photos, tmp_path / "out", Recipe("photos", per_shard=10, val=0.3, licence="mine"))
    assert check(tmp_path / "out").problems == []
    index = packed.index
    assert (index.dataset, index.licence, index.card["classes"]) == ("photos", "mine", ["ant", "bee", "cat"])
    assert [(name, entry.samples) for name, entry in sorted(index.shards.items())] == [
        ("train-000000.tar", 10),
        ("train-000001.tar", 10),
        ("train-000002.tar", 10),
        ("train-000003.tar", 2),
        ("val-000000.tar", 10),
        ("val-000001.tar", 3),
    ]
    seen = {}
    sources = {line["key"]: line["source"] for line in manifest(tmp_path / "out")}
    for split in ("train", "val"):
        shards = ShardSet(find(f"{split}-*.tar", tmp_path / "out", "data.x"), "data.x")
        keys = [shards.key(sample) for sample in range(int(shards.counts.sum()))]
        assert keys != sorted(keys)
        for sample, key in enumerate(keys):
            members = shards.read(sample)
            assert (photos / sources[key]).read_bytes() == members["png"]
            assert ("ant", "bee", "cat")[int(members["cls"])] == sources[key].split("/")[0]
            seen[sources[key]] = split
    assert len(seen) == 45
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.rglob("*.png")}
    pack(photos, tmp_path / "again", Recipe("photos", seed=5, val=0.3))
    assert {line["source"] for line in manifest(tmp_path / "again") if line["shard"].startswith("val")} == {
        source for source, split in seen.items() if split == "val"
    }


def test_shuffled_once_or_not_at_all(photos: Path) -> None:
    inputs = ImageFolder(photos, Choices())
    assert plan(inputs, Recipe("x", shuffle=False))["train"].tolist() == list(range(45))
    order = plan(inputs, Recipe("x"))["train"]
    assert sorted(order) == list(range(45))
    assert abs(np.corrcoef(order, np.arange(45))[0, 1]) < 0.3
    splits = plan(inputs, Recipe("x", val=0.5))
    assert sorted(np.concatenate(list(splits.values()))) == list(range(45))
    assert list(splits) == ["train", "val"]


def test_shards_end_by_size(photos: Path, tmp_path: Path) -> None:
    packed = pack(photos, tmp_path / "out", Recipe("photos", shard_mib=1000 / 2**20))
    sizes = [entry.samples for entry in packed.index.shards.values()]
    assert sum(sizes) == 45
    assert 5 < len(sizes) < 15


def spoil(photos: Path) -> None:
    (photos / "ant" / "notes.txt").write_text("hello")
    (photos / "ant" / "empty.png").touch()
    (photos / "bee" / "cut.png").write_bytes(png(picture(99, 32))[:-200])
    (photos / "cat" / "again.png").write_bytes((photos / "ant" / "0.png").read_bytes())
    (photos / "cat" / "large.png").write_bytes(png(np.zeros((300, 300), dtype=np.uint8)))
    (photos / "cat" / "heavy.png").write_bytes(bytes(200_001))
    (photos / "cat" / "link.png").symlink_to("/etc/hostname")
    (photos / "cat" / "folder").symlink_to("/etc")
    os.mkfifo(photos / "bee" / "pipe.png")
    (photos / "alone.png").write_bytes(png(picture(100)))


REFUSED = {
    "not an image": 1,
    "empty": 1,
    "broken image": 1,
    "duplicate": 1,
    "too many pixels": 1,
    "too large": 1,
    "link out of the source": 1,
    "link to a folder": 1,
    "not a regular file": 1,
    "no class": 1,
}


def test_every_input_is_accounted_for(photos: Path, tmp_path: Path) -> None:
    spoil(photos)
    recipe = Recipe("photos", per_shard=10, max_pixels=80_000, max_bytes=200_000)
    packed = pack(photos, tmp_path / "out", recipe)
    counts = packed.index.card["inputs"]
    assert counts["refused"] == REFUSED
    assert (counts["seen"], counts["written"]) == (55, 45)
    lines = manifest(tmp_path / "out")
    assert len({line["source"] for line in lines}) == 55
    assert [line["source"] for line in lines if line.get("refused") == "too large"] == ["cat/heavy.png"]
    assert check(tmp_path / "out").problems == []
    kept = pack(photos, tmp_path / "kept", Recipe("photos", duplicates="keep"))
    assert "duplicate" not in kept.index.card["inputs"]["refused"]


def test_strict_publishes_nothing(photos: Path, tmp_path: Path) -> None:
    spoil(photos)
    message = told(lambda: pack(photos, tmp_path / "out", RECIPE, strict=True))
    assert message.startswith("--strict: 9 of 55 inputs were refused (1 broken image, 1 duplicate, 1 empty, ")
    assert "\n  cat/folder: link to a folder\n" in message
    assert not (tmp_path / "out").exists()
    assert pack(photos, tmp_path / "out", RECIPE).continued == 5  # the work is not lost


def test_nothing_usable(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(b"<html>")
    assert told(lambda: pack(source, tmp_path / "out", RECIPE)) == (
        "nothing to pack: 1 of 1 inputs were refused (1 not an image).\n"
        "  a.png: not an image (it begins with b'<html>')"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def pack_and_die(source: Path, out: Path, after: int) -> None:
    def progress(what: str, done: int, total: int, detail: str) -> None:
        if done == after:
            os.kill(os.getpid(), signal.SIGKILL)

    pack(source, out, RECIPE, workers=2, progress=progress)


def die(source: Path, out: Path, after: int) -> None:
    process = FORK.Process(target=pack_and_die, args=(source, out, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()


def test_a_killed_pack_goes_on(photos: Path, tmp_path: Path) -> None:
    spoil(photos)
    pack(photos, tmp_path / "whole", RECIPE)
    out = tmp_path / "out"
    for after in (7, 27, 49):
        die(photos, out, after)
    folder = tmp_path / ".out.pack" / "out"
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert len(stamps) >= 3
    packed = pack(photos, out, RECIPE)
    assert packed.continued == len(stamps)
    assert {name: (out / name).stat().st_mtime_ns for name in stamps} == stamps  # kept, not written again
    assert files(out) == files(tmp_path / "whole")
    assert not (tmp_path / ".out.pack").exists()


def test_damaged_shards_of_a_killed_pack_are_made_again(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "whole", RECIPE)
    out = tmp_path / "out"
    die(photos, out, 39)
    broken = tmp_path / ".out.pack" / "out" / "train-000001.tar"
    raw = bytearray(broken.read_bytes())
    raw[600] ^= 1
    broken.write_bytes(raw)
    assert pack(photos, out, RECIPE).continued == 1
    assert files(out) == files(tmp_path / "whole")


def test_other_settings_do_not_continue(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    die(photos, out, 27)
    assert told(lambda: pack(photos, out, Recipe("photos", per_shard=10, size=8))) == (
        f"{out} was begun in another way: size was not set, now it is 8. Type the command as it was to go on, "
        "or add --fresh to begin again."
    )
    (photos / "cat" / "new.png").write_bytes(png(picture(1000)))
    assert f"{out} was begun in another way: content was 45 inputs, " in told(lambda: pack(photos, out, RECIPE))
    assert pack(photos, out, RECIPE, fresh=True).continued == 0
    assert check(out).problems == []


def test_two_at_once(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with packjournal.Workplace(out, {}):
        assert "is being packed by another process" in told(lambda: pack(photos, out, RECIPE))


def test_what_is_there_stays(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pack(photos, out, RECIPE)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = pack(photos, out, RECIPE)
    assert again.was_there
    assert again.index == first.index
    (photos / "ant" / "0.png").write_bytes(png(picture(0, 9)))  # noticed by its size
    assert "is packed already, with content 45 inputs, " in told(lambda: pack(photos, out, RECIPE))
    (photos / "ant" / "0.png").write_bytes(png(picture(0)))
    assert told(lambda: pack(photos, out, Recipe("photos"))) == (
        f"{out} is packed already, with per_shard 10, and now it is None. Type another folder, "
        "or add --fresh to replace it."
    )
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    pack(photos, out, Recipe("photos"), fresh=True)
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["train-000000.tar"]
    (out / "diary.txt").write_text("mine")
    assert "holds a packed set and other files (diary.txt)" in told(lambda: pack(photos, out, RECIPE, fresh=True))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("mine")
    assert told(lambda: pack(photos, foreign, RECIPE, fresh=True)) == (
        f"{foreign} holds other files (diary.txt), and data pack writes over nothing. Type a new or empty folder."
    )
    assert files(foreign) == {"diary.txt": b"mine"}
    for inside in (photos / "out", photos, tmp_path):
        assert "lie inside one another" in told(lambda inside=inside: pack(photos, inside, RECIPE))
