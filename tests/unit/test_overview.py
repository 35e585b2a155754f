"""Columns of a whole set in one file: believed for the content they were made from, and for nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import catalogue, files, indexing, overview, tarindex
from datamodules.check import check
from datamodules.overview import FILE_NAME, Overview
from datamodules.shards import BadSample, ShardSet, find
from datamodules.text import Text
from datamodules.tokenizers import Bytes, Characters
from datamodules.writer import DatasetWriter

SHARDS, EACH = 24, 3


def document(number: int) -> bytes:
    return b"abcdefgh"[: 1 + number % 7] * (1 + number % 5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 shards of three documents; an empty cache."""
    monkeypatch.setenv("PLATFORM_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set")
    return tmp_path / "set"


def write(folder: Path, first: int = 0) -> None:
    with DatasetWriter(folder, dataset="texts", licence="none", sources={}) as writer:
        samples = ({"__key__": f"d{i:03d}", "txt": document(first + i)} for i in range(SHARDS * EACH))
        writer.write("train", samples, EACH, measures={"twice": lambda sample: (2 * len(sample["txt"]), -1)})


def opened(folder: Path, **options: Any) -> ShardSet:
    return ShardSet(find("train-*.tar", folder, "data.train"), "data.train", **options)


def planned(folder: Path, **options: Any) -> Text:
    defaults = {"length": 16, "batch_size": 4, "workers": 0, "window": 2, "tokenizer": Bytes()}
    data = Text(root=folder, train="train-*.tar", **{**defaults, **options})
    data.setup("fit")
    data.training_sequence()
    return data


def pieces(data: Text) -> list[Any]:
    sequence = data.training_sequence()
    return [column.tolist() for column in sequence(np.arange(2 * sequence.length()))]


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError("an index file was opened")


@pytest.mark.parametrize("mode", ["concat", "pack"])
def test_plans_open_no_index_file(folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(Overview, "column", lambda *arguments: None)
        slow = pieces(planned(folder, mode=mode))
    again = folder.with_name("again")
    write(again)
    assert (again / FILE_NAME).read_bytes() == (folder / FILE_NAME).read_bytes()
    read, seen = tarindex.read, []
    monkeypatch.setattr(tarindex, "read", lambda *one: seen.append(one[0].name) or read(*one))
    monkeypatch.setattr(files.LocalFiles, "keys_before", lambda *one: np.zeros(0, dtype="S1"))
    data = planned(again, mode=mode)
    assert pieces(data) == slow
    opened_at_first = len(seen)
    assert next(iter(data.train_dataloader()))["tokens"].shape == (4, 16)
    data.teardown("fit")
    assert opened_at_first <= 1  # that which tells the members of the first shard
    assert len(set(seen)) <= 5  # and the shards of the rows


def test_measured_columns_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(folder)
    monkeypatch.setattr(tarindex, "read_measured", refuse)
    for shard in range(SHARDS):
        sizes = [len(document(shard * EACH + row)) for row in range(EACH)]
        assert source.measured(shard, "twice", refuse, 2).tolist() == [[2 * size, -1] for size in sizes]


def other_hash(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"]["train-000002.tar"]["sha256"] = "0" * 64
    (folder / "index.json").write_text(json.dumps(index))


def flipped_byte(folder: Path) -> None:
    column = overview._header(folder / FILE_NAME).columns["size/txt"]
    content = bytearray((folder / FILE_NAME).read_bytes())
    content[column.begin + 2 * EACH * column.step] ^= 1
    (folder / FILE_NAME).write_bytes(content)


def cut_off(folder: Path) -> None:
    column = overview._header(folder / FILE_NAME).columns["size/txt"]
    (folder / FILE_NAME).write_bytes((folder / FILE_NAME).read_bytes()[: column.begin + 2 * EACH * column.step + 1])


def no_header(folder: Path) -> None:
    (folder / FILE_NAME).write_bytes(b"\xff" * 100)


def other_set(folder: Path) -> None:
    write(folder.with_name("other"), first=1)
    (folder / FILE_NAME).write_bytes((folder.with_name("other") / FILE_NAME).read_bytes())


@pytest.mark.parametrize("damage", [other_hash, flipped_byte, cut_off, no_header, other_set])
def test_what_does_not_fit_is_not_believed(folder: Path, damage: Any) -> None:
    index = catalogue.read(folder)
    assert index is not None
    damage(folder)
    stamp = json.loads((folder / "index.json").read_text())["shards"]["train-000002.tar"]["sha256"]
    assert Overview(folder / FILE_NAME).column("size/txt", "train-000002.tar", stamp, (EACH,)) is None
    source = opened(folder, max_bad_fraction=1.0)
    for shard in range(SHARDS):
        assert source.sizes(shard, "txt").tolist() == [len(document(shard * EACH + row)) for row in range(EACH)]


def test_lost_documents_keep_their_places(folder: Path) -> None:
    sound = planned(folder)
    whole, state = pieces(sound), sound.state_dict()
    shard = folder / "train-000005.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    damaged = planned(folder, max_bad_fraction=0.1)
    assert pieces(damaged) == whole
    damaged.load_state_dict(state)
    sound.teardown("fit")
    damaged.teardown("fit")


def test_a_shard_with_other_documents_of_the_same_size(folder: Path) -> None:
    """Rows are planned with the lengths of index.json's shard; documents of other lengths are not cut to fit them."""
    name = "train-000003.tar"
    write(folder.with_name("other"), first=1)
    for strict in (True, False):
        source = opened(folder, max_bad_fraction=0.0 if strict else 0.5)
        assert source.sizes(3, "txt").tolist() == [len(document(9 + row)) for row in range(3)]
        before = (folder / name).read_bytes()
        for other in (name, f"{name}.idx.npz"):
            (folder / other).write_bytes((folder.with_name("other") / other).read_bytes())
        assert len((folder / name).read_bytes()) == len(before)
        for sample in (9, 10, 11):
            with pytest.raises(BadSample, match="its members have other sizes than when the shard was indexed"):
                source.read(sample)
        source.close()
        (folder / name).write_bytes(before)


def test_counted_tokens_are_kept_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    options = {"tokenizer": Characters("abcdefgh")}
    first = pieces(planned(folder, **options))
    assert len(list((folder.parent / "cache").rglob("*.safetensors"))) == 1
    with monkeypatch.context() as changed:
        changed.setattr(tarindex, "read_measured", refuse)
        changed.setattr(Characters, "encode", refuse)
        assert pieces(planned(folder, **options)) == first
    shard = folder / "train-000004.tar"
    shard.write_bytes((folder / "train-000005.tar").read_bytes())
    rows = planned(folder, max_bad_fraction=1.0, **options)
    lengths = rows._lengths(rows.source_of("train"))
    assert lengths(4).tolist() == lengths(5).tolist() == [len(document(15 + row)) + 1 for row in range(3)]


def test_index_and_check(folder: Path) -> None:
    written = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).unlink()
    assert check(folder).problems == []
    options: dict[str, Any] = {"name": None, "licence": "", "workers": 1, "progress": lambda *state: None}
    assert indexing.write_indices(folder, **options) == (0, False)
    assert (folder / FILE_NAME).read_bytes() == written
    index = catalogue.read(folder)
    assert index is not None
    shards = [(name, entry.sha256) for name, entry in sorted(index.shards.items())]
    overview.write(folder / FILE_NAME, shards, {"size/txt": [np.arange(1, 4)] * SHARDS})
    report = check(folder)
    assert len(report.problems) == SHARDS
    assert str(report.problems[0]) == (
        "train-000000.tar: overview.safetensors says something else. Delete it and type data index"
    )


@pytest.mark.parametrize("described", [True, False])
def test_zeros_of_a_shard_out_of_reach_are_not_kept(folder: Path, described: bool) -> None:
    """Those of a damaged one are: it is what it is until its file changes."""
    (folder / FILE_NAME).unlink()
    if not described:
        (folder / "index.json").unlink()
    right = [[len(document(number))] for number in range(SHARDS * EACH)]

    def measured(source: ShardSet, measure: Any) -> list[Any]:
        return [row for shard in range(SHARDS) for row in source.measured(shard, "bytes", measure, 1).tolist()]

    def count(sample: Any) -> tuple[int]:
        return (len(sample["txt"]),)

    source, shard = opened(folder), folder / "train-000001.tar"
    source.close()
    shard.rename(folder.with_name("away"))
    assert measured(source, count) == right[:3] + [[0]] * 3 + right[6:]
    folder.with_name("away").rename(shard)
    for measure in (count, refuse):
        assert measured(opened(folder), measure) == right
    shard.write_bytes(shard.read_bytes()[:2000])
    for measure in (count, refuse):
        assert measured(opened(folder, max_bad_fraction=0.5), measure)[:3] == right[:3]
