"""The quickstart's shards: lossless, always the same bytes, whole or not there."""

import hashlib
import io
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from datamodules import catalogue, digits8
from datamodules.check import check
from datamodules.digits8 import held_out
from datamodules.shards import ShardSet, find
from datamodules.writer import DatasetWriter

FORK = multiprocessing.get_context("fork")  # spawned processes would import torch again
SHARDS = [f"train-{i:06d}.tar" for i in range(8)] + ["val-000000.tar", "val-000001.tar"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "digits8"
    digits8.write(root)
    return root


def test_split_is_every_fourth_of_each_class() -> None:
    mask = held_out(load_digits().target)
    assert mask.sum() == 445
    assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16] == "8b871b3e94d658c5"


def test_every_digit_is_there_once_and_lossless(digits: Path) -> None:
    pixels, labels = load_digits(return_X_y=True)
    mask = held_out(labels)
    for split, chosen in (("train", ~mask), ("val", mask)):
        shards = ShardSet(find(f"{split}-*.tar", digits, "data.x"), "data.x")
        numbers = [int(shards.key(i)) for i in range(shards.counts.sum())]
        assert sorted(numbers) == np.flatnonzero(chosen).tolist()
        assert numbers != sorted(numbers)
        for i, number in enumerate(numbers):
            members = shards.read(i)
            image = np.asarray(Image.open(io.BytesIO(members["png"])))
            assert int(members["cls"]) == labels[number]
            np.testing.assert_array_equal(image, 15 * pixels[number].reshape(8, 8))


def test_index_tells_the_truth(digits: Path) -> None:
    indices = [f"{shard}.idx.npz" for shard in SHARDS]
    assert sorted(path.name for path in digits.iterdir()) == sorted(
        ["index.json", "overview.safetensors", *SHARDS, *indices]
    )
    assert check(digits).problems == []
    index = catalogue.read(digits)
    assert index is not None
    assert list(index.shards) == SHARDS
    assert sum(entry.samples for entry in index.shards.values()) == 1797
    for entry in index.shards.values():
        assert sum(entry.classes.values()) == entry.samples
        assert len(entry.classes) == 10  # shuffled: no shard is sorted by class
    broken = digits / SHARDS[3]
    raw = broken.read_bytes()
    try:
        broken.write_bytes(raw[:-1] + b"x")
        assert [str(problem) for problem in check(digits).problems] == [
            f"{SHARDS[3]}: its sha256 is not the one in index.json",
            f"{SHARDS[3]}, sample 001736 or the one after it: zero block at byte 346112 inside the archive, "
            f"data goes on at byte {len(raw) - 1}",
        ]
    finally:
        broken.write_bytes(raw)


def test_same_bytes_every_time_and_quiet_when_there(digits: Path, tmp_path: Path) -> None:
    with FORK.Pool(2) as pool:  # at the same time, into the same folder
        pool.map(digits8.write, [tmp_path / "again"] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]
    for path in digits.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in digits.iterdir()}
    digits8.write(digits)
    assert before == {path: path.stat().st_mtime_ns for path in digits.iterdir()}


def test_webdataset_reads_the_shards(digits: Path) -> None:
    stream = webdataset.WebDataset(str(digits / "val-{000000..000001}.tar"), shardshuffle=False).decode("l8")
    samples = list(stream)
    assert len(samples) == 445
    assert samples[0]["png"].shape == (8, 8)
    assert 0 <= samples[0]["cls"] <= 9


def write_and_die(root: Path, number: int) -> None:
    def samples() -> Iterator[dict[str, bytes | str]]:
        for i in range(100):
            yield {"__key__": str(i), "txt": b"x"}
        os.kill(os.getpid(), number)

    with DatasetWriter(root, dataset="d", licence="", sources={}) as writer:
        writer.write("train", samples(), per_shard=30)


def test_no_half_shard_after_a_kill(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for number in (signal.SIGKILL, signal.SIGINT):
        process = FORK.Process(target=write_and_die, args=(root, number))
        process.start()
        process.join()
        assert process.exitcode
        assert not root.exists()
    with DatasetWriter(root, dataset="d", licence="", sources={}) as writer:
        writer.write("train", ({"__key__": str(i), "txt": b"x"} for i in range(70)), per_shard=30)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # what the killed process left is gone, too
    index = catalogue.read(root)
    assert index is not None
    assert [entry.samples for entry in index.shards.values()] == [30, 30, 10]


def test_a_set_that_another_process_makes_meanwhile_is_kept(tmp_path: Path) -> None:
    def writer(name: str) -> DatasetWriter:
        return DatasetWriter(tmp_path / "data", dataset=name, licence="", sources={"text": "1"})

    def samples() -> Iterator[dict[str, bytes | str]]:
        yield {"__key__": "0", "txt": b"x"}

    with writer("d") as first:
        first.write("train", samples(), per_shard=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    with writer("d") as second:
        second.write("train", samples(), per_shard=1)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    with pytest.raises(ValueError, match="is not empty"), writer("e"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "train-000000.tar"
    mine.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"is not empty.*data\.source=null"):
        digits8.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]
    assert mine.read_bytes() == b"precious"


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write digits8 to .*file/digits8: .*PLATFORM_CACHE"):
        digits8.write(tmp_path / "file" / "digits8")
