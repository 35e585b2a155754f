"""The tar index against Python's own tar reader and webdataset, and every kind of damage."""

import gzip
import re
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from datamodules import tarindex
from datamodules.shards import BadSample, ShardSet, find
from datamodules.tarindex import BLOCK, scan
from tests.tars import add, sample, write_set, write_tar


def content(path: Path) -> list[dict[str, object]]:
    """What our index makes of a shard, in webdataset's words."""
    index, raw = scan(path), path.read_bytes()
    rows = []
    for row in range(len(index)):
        columns = zip(index.extensions, index.offsets[row], index.sizes[row], strict=True)
        rows.append({"__key__": index.key(row), **{e: raw[o : o + n] for e, o, n in columns if o >= 0}})
    return rows


def by_webdataset(path: Path) -> list[dict[str, object]]:
    with path.open("rb") as file:
        return [
            {name: value for name, value in found.items() if name == "__key__" or not name.startswith("__")}
            for found in group_by_keys({"__url__": "", **member} for member in tar_file_iterator(file))
        ]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_same_samples_as_webdataset(tmp_path: Path, layout: int) -> None:
    deep = "folder/" * 20  # beyond the 100 bytes of the name field
    names = [f"{deep}{'k' * 30}.jpg", "b.seg.PNG", "b.cls", "c/d.txt", "./e.txt", "no_extension", "__meta__/x.txt"]
    if layout != tarfile.USTAR_FORMAT:
        names += ["w" * 300 + ".png", "gr\u00fc\u00dfe.png"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=layout) as archive:
        folder = tarfile.TarInfo("c")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate(names):
            add(archive, name, name.encode() * (200 * number))
        link = tarfile.TarInfo("f.png")
        link.type, link.linkname = tarfile.SYMTYPE, "c/d.txt"
        archive.addfile(link)
        late = tarfile.TarInfo("g.txt")
        late.mtime = 1.5  # a pax header in the pax layout
        archive.addfile(late)
    ours = content(path)
    assert scan(path).problem == ""
    assert ours == by_webdataset(path)
    assert {"__key__": "b", "seg.png": names[1].encode() * 200, "cls": names[2].encode() * 400} in ours


def test_base_256_size(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"x": {"txt": b"12345"}, "y": {"txt": b"678"}})
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\x80" + (5).to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:BLOCK])
    path.write_bytes(raw)
    assert content(path) == by_webdataset(path) == [{"__key__": "x", "txt": b"12345"}, {"__key__": "y", "txt": b"678"}]


def damage_zero_block(raw: bytearray) -> bytes:
    raw[4 * BLOCK : 5 * BLOCK] = bytes(BLOCK)
    return bytes(raw)


def damage_header(raw: bytearray) -> bytes:
    raw[4 * BLOCK + 3] ^= 1
    return bytes(raw)


DAMAGE: dict[str, tuple[Callable[[bytearray], bytes], str, str]] = {
    "inside a member": (lambda raw: raw[:3000], "truncated at byte 3000: 60 bytes of k2.txt are missing", "k2"),
    "between members": (lambda raw: raw[: 6 * BLOCK], "truncated at byte 3072: the end-of-archive", "k2 or the one"),
    "inside a header": (lambda raw: raw[: 6 * BLOCK + 9], "truncated at byte 3081: the end-of-archive", "k2 or the"),
    "zero block": (damage_zero_block, "zero block at byte 2048 inside the archive, data goes on at byte 2560", "k1 or"),
    "damaged header": (damage_header, r"damaged header at byte 2048 \(wrong checksum\)", "k1 or the one after it"),
    "gzip": (lambda raw: gzip.compress(raw), "gzip-compressed", ""),
    "no tar": (lambda raw: b"<html>" * 500, "it is not a tar file", ""),
    "empty file": (lambda raw: b"", "the end-of-archive blocks are missing", ""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_its_byte(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "a.tar", {f"k{i}": {"txt": b"x" * 500} for i in range(5)})
    assert len(scan(path)) == 5
    change, text, key = DAMAGE[kind]
    path.write_bytes(change(bytearray(path.read_bytes())))
    index = scan(path)
    assert re.search(text, index.problem), index.problem
    assert index.problem_key.startswith(key)
    kept = {"inside a member": 2, "between members": 3, "inside a header": 3, "zero block": 2, "damaged header": 2}
    assert len(index) == kept.get(kind, 0)


def test_duplicate_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for names in (["a.txt", "b.txt", "a.txt"], ["b.txt", "a.txt", "a.txt"]):
        with tarfile.open(path, "w") as archive:
            for name in names:
                add(archive, name, b"")
        assert "a.txt appears twice" in scan(path).problem or "key a appears twice" in scan(path).problem
        with pytest.raises(ValueError, match=r"a.tar, sample a: .*appears twice, again at byte 1536"):
            ShardSet([path], "data.train")


def test_random_access_from_threads(tmp_path: Path) -> None:
    write_set(tmp_path, [4, 7, 5], classes=3)
    shards = ShardSet(find("train-*.tar", tmp_path, "data.train"), "data.train", open_shards=1)
    assert shards.counts.tolist() == [4, 7, 5]
    expected = [sample(i, i % 3) for i in range(16)]
    order = [(7 * i) % 16 for i in range(400)]
    with ThreadPoolExecutor(4) as pool:
        for number, members in zip(order, pool.map(shards.read, order), strict=True):
            assert members == expected[number]
    assert [shards.key(i) for i in (0, 4, 15)] == ["train00000", "train00004", "train00015"]
    assert [shards.shard(i) for i in (0, 4, 15)] == [f"train-00000{i}.tar" for i in range(3)]
    assert shards.classes is not None
    assert sum(sum(shards.classes, start=type(shards.classes[0])()).values()) == 16
    shards.close()
    assert shards.read(11) == expected[11]


def test_moving_keeps_the_fingerprint_and_adding_changes_it(tmp_path: Path) -> None:
    prints = []
    for name, counts in (("a", [2, 3]), ("b", [2, 3]), ("c", [3, 2]), ("d", [2, 3, 1])):
        folder = write_set(tmp_path / name, counts)
        prints.append(ShardSet(find("*.tar", folder, "data.train"), "data.train").fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_index_cache_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tarindex, "_CACHED_FROM", 3)
    path = write_tar(tmp_path / "a.tar", {str(i): {"txt": b"x"} for i in range(3)})
    made = tarindex.load(path)
    with monkeypatch.context() as patch:
        patch.setattr(tarindex, "scan", None)
        again = tarindex.load(path)
    assert (again.keys == made.keys).all()
    assert (again.offsets == made.offsets).all()
    assert (again.sizes == made.sizes).all()
    assert (again.extensions, again.problem) == (made.extensions, made.problem)
    write_tar(path, {str(i): {"txt": b"x"} for i in range(40)})
    assert len(tarindex.load(path)) == 40
    for cached in (tmp_path / "cache").rglob("*.npz"):
        cached.write_bytes(b"half written")
    assert len(tarindex.load(path)) == 40


def test_shard_that_goes_away_while_reading(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [3, 3])
    paths = find("*.tar", folder, "data.train")
    shards = ShardSet(paths, "data.train")
    paths[1].unlink()
    shards.close()
    with pytest.raises(BadSample, match=r"train-000001.tar, sample #1: No such file"):
        shards.read(4)
    paths[0].write_bytes(paths[0].read_bytes()[:2000])
    shards.close()
    with pytest.raises(BadSample, match=r"train-000000.tar, sample train00000.*: truncated at byte 2000"):
        shards.read(2)


def test_accepted_damage_loses_only_what_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = find("*.tar", write_set(tmp_path / "set", [4, 4]), "data.train")
    raw = paths[1].read_bytes()
    paths[1].write_bytes(raw[:5000])
    with pytest.raises(ValueError, match=r"accept the loss with data\.max_bad_fraction=0\.2\."):
        ShardSet(paths, "data.train")
    shards = ShardSet(paths, "data.train", max_bad_fraction=0.2)
    assert shards.counts.tolist() == [4, 2]
    assert shards.read(5) == sample(5, 5)
    assert "train-000001.tar, sample train00006: truncated at byte 5000" in caplog.text


def test_names_and_patterns(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [1, 1, 1])
    every = [folder / f"train-{i:06d}.tar" for i in range(3)]
    for patterns in ("*.tar", "train-{000000..000002}.tar", ["train-000002.tar", "train-0*[01].tar"], ".", str(folder)):
        assert find(patterns, folder, "data.train") == every
    assert find("set/train-000001.tar", tmp_path, "data.train") == [every[1]]
    every[1].unlink()
    assert find("*.tar", folder, "data.train", allow_missing=True) == [every[0], every[2]]
