"""The tar index against Python's own tar reader and webdataset, and every kind of damage."""

import gzip
import re
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from datamodules import catalogue, files, spans, tarindex
from datamodules.catalogue import Catalogue, ShardEntry
from datamodules.folders import ImageFolder
from datamodules.shards import BadSample, ShardSet, Source, find, open_source
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
    for names in (["a.txt", "b.txt", "a.txt", "a.cls", "c.txt"], ["b.txt", "a.txt", "a.txt", "c.txt"]):
        with tarfile.open(path, "w") as archive:
            for number, name in enumerate(names):
                add(archive, name, b"%d" % number)
        assert "a.txt appears twice" in scan(path).problem or "key a appears twice" in scan(path).problem
        with pytest.raises(ValueError, match=r"a.tar, sample a: .*appears twice, again at byte 2560"):
            ShardSet([path], "data.train")
        shards = ShardSet([path], "data.train", max_bad_fraction=0.5)
        assert [shards.key(i) for i in range(3)] == sorted(["a", "b", "c"], key="".join(names).index)
        assert [shards.read(i) for i in range(3)] == [
            {"txt": b"%d" % names.index(f"{shards.key(i)}.txt")} for i in range(3)
        ]


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
    monkeypatch.setattr(tarindex, "CACHED_FROM", 3)
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


def test_small_shards_are_cached_together_and_a_changed_one_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLATFORM_CACHE", str(tmp_path / "cache"))
    paths = [write_tar(tmp_path / f"{k}.tar", {f"{k}{i}": {"txt": b"x"} for i in range(3)}) for k in "ab"]
    scanned: list[Path] = []
    load = tarindex.load
    monkeypatch.setattr(tarindex, "load", lambda path: scanned.append(path) or load(path))

    def keys() -> list[str]:
        source = ShardSet(paths, "data.train")
        return [source.key(sample) for sample in range(int(source.counts.sum()))]

    assert keys() == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert scanned == paths
    assert keys() == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert scanned == paths
    write_tar(paths[1], {f"c{i}": {"txt": b"y" * 600} for i in range(2)})
    assert keys() == ["a0", "a1", "a2", "c0", "c1"]
    assert scanned == [*paths, paths[1]]
    for cached in (tmp_path / "cache").rglob("*.npz"):
        cached.write_bytes(b"half written")
    assert keys() == ["a0", "a1", "a2", "c0", "c1"]


def test_shard_that_goes_away_while_reading(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [3, 3])
    paths = find("*.tar", folder, "data.train")
    shards = ShardSet(paths, "data.train")
    paths[1].unlink()
    shards.close()
    with pytest.raises(BadSample, match=r"train-000001.tar, sample train00004: No such file"):
        shards.read(4)
    assert shards.key(4) == "train00004"
    with pytest.raises(BadSample, match=r"train-000001.tar, sample train00004: No such file") as caught:
        shards.gather(np.array([0, 4]), "cls", np.zeros((2, 1), dtype=np.uint8))
    assert caught.value.row == 1
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


def test_lost_samples_are_named_by_the_index_beside_the_shard(tmp_path: Path) -> None:
    paths = find("*.tar", write_set(tmp_path / "set", [4, 4]), "data.train")
    describe(paths[0].parent)
    for path in paths:
        tarindex.write_sidecar(path, tarindex.scan(path))
    paths[1].write_bytes(paths[1].read_bytes()[:5000])
    shards = ShardSet(paths, "data.train", max_bad_fraction=0.5)
    assert (shards.lost, shards.counts.tolist()) == (0, [4, 4])  # they keep their numbers
    for row in (6, 7):
        with pytest.raises(BadSample, match=rf"train-000001.tar, sample train0000{row}: is lost; truncated at byte"):
            shards.read(row)
        assert shards.key(row) == f"train0000{row}"
    (tmp_path / "set" / "index.json").unlink()
    assert (again := ShardSet(paths, "data.train", max_bad_fraction=0.5)).counts.tolist() == [4, 2]
    assert again.lost == 2


def test_a_key_in_two_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"train-{number}.tar" for number in range(2)]
    write_tar(paths[0], {"a": {"cls": b"0"}, "b": {"cls": b"1"}})
    write_tar(paths[1], {"b": {"cls": b"2"}, "c": {"cls": b"3"}})
    told = r"train-1.tar, sample b: train-0.tar has a sample of the same key"
    with pytest.raises(ValueError, match=rf"data\.train: {told}\..*max_bad_fraction=0\.3\."):
        ShardSet(paths, "data.train")
    shards = ShardSet(paths, "data.train", max_bad_fraction=0.3)
    assert "train-1.tar, sample b: train-0.tar" in caplog.text
    with pytest.raises(BadSample, match=told):
        shards.read(2)
    out = np.zeros((4, 1), dtype=np.uint8)
    with pytest.raises(BadSample, match=told) as caught:
        shards.gather(np.array([1, 3, 2, 0]), "cls", out)
    assert caught.value.row == 2
    assert [shards.read(number)["cls"] for number in (1, 3)] == [b"1", b"3"]
    write_tar(tmp_path / "val-0.tar", {"a": {"cls": b"0"}})  # another split may count from the start again
    assert ShardSet([paths[0], tmp_path / "val-0.tar"], "data.train").counts.tolist() == [2, 1]
    for path in paths:
        tarindex.write_sidecar(path, tarindex.scan(path))
    (tmp_path / "val-0.tar").unlink()
    describe(tmp_path)
    with pytest.raises(ValueError, match=told):  # whatever index.json says
        ShardSet(paths, "data.train")
    monkeypatch.setattr("datamodules.shards._CHECKED_BYTES", 0)
    assert ShardSet(paths, "data.train").counts.tolist() == [2, 2]  # too much to compare


def test_names_and_patterns(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [1, 1, 1])
    every = [folder / f"train-{i:06d}.tar" for i in range(3)]
    for patterns in ("*.tar", "train-{000000..000002}.tar", ["train-000002.tar", "train-0*[01].tar"], ".", str(folder)):
        assert find(patterns, folder, "data.train") == every
    assert find("set/train-000001.tar", tmp_path, "data.train") == [every[1]]
    every[1].unlink()
    assert find("*.tar", folder, "data.train", allow_missing=True) == [every[0], every[2]]


def test_a_folder_of_several_splits(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [1, 1])
    shutil.copy(folder / "train-000000.tar", folder / "val-000000.tar")
    assert [path.name for path in find(".", folder, "data.train")] == ["train-000000.tar", "train-000001.tar"]
    assert [path.name for path in find(".", folder, "data.train.web.path")] == ["train-000000.tar", "train-000001.tar"]
    assert [path.name for path in find(".", folder, "data.val")] == ["val-000000.tar"]
    describe(folder)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 files are missing, first: train-000000\.tar"):
        find(".", folder, "data.train")
    (folder / "index.json").unlink()
    (folder / "val-000000.tar").rename(folder / "test-000000.tar")
    with pytest.raises(ValueError, match=r"several splits \(test, train\), but none named val-"):
        find(".", folder, "data.val")


def test_hidden_samples_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_set(tmp_path / "set", [20])
    path = folder / "train-000000.tar"
    names = [scan(path).key(row) for row in range(20)]
    raw = bytearray(path.read_bytes())
    begin = int(scan(path).offsets[10].min()) - 512
    raw[begin : begin + 512] = bytes(512)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="zero block at byte"):
        ShardSet([path], "data.train", max_bad_fraction=0.2)
    assert ShardSet([path], "data.train", max_bad_fraction=0.6).counts.tolist() == [10]
    for name in names[11:]:
        assert f"train-000000.tar, sample {name}: lies behind the damage and is not read" in caplog.text


def describe(folder: Path) -> None:
    """Write index.json for the shards of a folder."""
    found = {path.name: scan(path) for path in sorted(folder.glob("*.tar"))}
    shards = {n: ShardEntry(len(i), i.size, catalogue.sha256(folder / n)) for n, i in found.items()}
    (folder / catalogue.FILE_NAME).write_text(Catalogue("test", "none", {}, shards).to_json())


def test_index_file_beside_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", {str(i): {"txt": b"x" * i, "cls": b"1"} for i in range(5)})
    shape = np.arange(10).reshape(5, 2)
    made = tarindex.write_sidecar(path, scan(path), {"shape": shape})
    assert made.name == "a.tar.idx.npz"
    before = made.read_bytes()
    assert tarindex.write_sidecar(path, scan(path), {"shape": shape}).read_bytes() == before
    index = tarindex.load(path)
    assert (index.keys.nbytes + index.offsets.nbytes + index.sizes.nbytes) / len(index) == 1 + 2 * 12
    with monkeypatch.context() as patch:
        patch.setattr(tarindex, "scan_open", None)
        shards = ShardSet([path], "data.train")
        assert shards.counts.tolist() == [5]
        assert shards.read(3) == {"txt": b"xxx", "cls": b"1"}
        assert shards.sizes(0, "txt").tolist() == [0, 1, 2, 3, 4]
        assert shards.measured(0, "shape", lambda members: (0, 0), 2).tolist() == shape.tolist()
    write_tar(path, {str(i): {"txt": b"x" * i, "cls": b"1"} for i in range(4)} | {"4": {"txt": b"yyyy", "c": b""}})
    assert made.stat().st_size
    assert tarindex.load(path).extensions == ("txt", "cls", "c")  # same size, but not the same shard
    write_tar(path, {str(i): {"txt": b"x" * 3000} for i in range(7)})
    assert len(tarindex.load(path)) == 7
    assert ShardSet([path], "data.train").measured(0, "shape", lambda m: (len(m["txt"]), 1), 2)[6].tolist() == [3000, 1]


def test_changes_behind_the_back_of_an_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"k{i}": {"lat": bytes([i]) * 600} for i in range(20)})
    tarindex.write_sidecar(path, scan(path))
    raw = bytearray(path.read_bytes())
    raw[1536:3072] = bytes(1536)  # header and content of k1
    path.write_bytes(raw)
    out = np.zeros((3, 600), dtype=np.uint8)
    for share, told in (
        (0.0, "zero block at byte 1536 inside the archive"),
        (0.1, "sample k1: the header at byte 1536"),
    ):
        shards = ShardSet([path], "data.train", share)
        assert shards.read(2) == {"lat": b"\2" * 600}
        with pytest.raises(BadSample, match=told):
            shards.read(1)
        with pytest.raises(BadSample, match=told) as caught:
            shards.gather(np.array([3, 1, 2]), "lat", out)
        assert caught.value.row == 1


@pytest.mark.parametrize("mapped", [True, False])
def test_gather_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    if not mapped:
        monkeypatch.setattr(spans, "_LOCAL", set())
    rng = np.random.default_rng(0)
    contents = [
        {"lat": rng.bytes(1000), "odd": rng.bytes(333), "tok": rng.bytes(2 + i), "cls": b"1" * (1 + i // 9)}
        for i in range(30)
    ]
    del contents[17]["tok"]
    paths = [
        write_tar(tmp_path / f"{n}.tar", {f"{i:02d}": contents[i] for i in range(10 * n, 10 * n + 10)})
        for n in range(3)
    ]
    shards = ShardSet(paths, "data.train")
    for number in (1, 5, 64):
        chosen = rng.integers(0, 30, number)
        for member, size in (("lat", 1000), ("odd", 333)):
            out = np.zeros((number, size), dtype=np.uint8)
            shards.gather(chosen, member, out)
            assert [row.tobytes() for row in out] == [contents[i][member] for i in chosen]
    chosen = rng.permutation([i for i in range(30) if i != 17])
    begins = np.array([i % 2 for i in chosen])
    lengths = np.array([1 + i for i in chosen]) - begins
    ends = np.cumsum(lengths)
    flat = np.zeros((2, ends[-1]), dtype=np.uint8)
    shards.pieces(chosen, "tok", begins, lengths, flat, ends - lengths)
    parts = [contents[i]["tok"][b : b + n] for i, b, n in zip(chosen, begins, lengths, strict=True)]
    assert flat[0].tobytes() == b"".join(parts)
    assert not flat[1].any()

    def refused(samples: list[int], member: str, size: int) -> tuple[str, int]:
        with pytest.raises(BadSample) as caught:
            shards.gather(np.array(samples), member, np.zeros((len(samples), size), dtype=np.uint8))
        return str(caught.value), caught.value.row

    assert refused([2, 2, 17], "tok", 4) == ("1.tar, sample 17: no .tok among its members (lat, odd, cls)", 2)
    assert refused([2, 3], "tok", 4) == ("0.tar, sample 03: .tok has 5 bytes, expected 4", 1)
    assert refused([2], "jpg", 4) == ("0.tar, sample 02: no .jpg among its members (lat, odd, tok, cls)", 0)
    raw = paths[1].read_bytes()
    paths[1].write_bytes(raw[:9000])  # while it is open, perhaps mapped
    text, row = refused([0, 10, 19], "lat", 1000)
    assert re.match(r"1.tar, sample 19: truncated at byte 9000, the sample ends at byte \d+", text)
    assert row == 2


def test_measured_numbers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(sample(number)["png"])
    write_set(tmp_path / "set", [2, 2], classes=0)
    sources: list[Source] = [ImageFolder(tmp_path / "images", "data.train")]
    sources.append(open_source("set", tmp_path, "data.train"))
    calls = []

    def length(members: dict[str, bytes]) -> list[int]:
        calls.append(members)
        if members == sample(1):
            raise ValueError("unreadable")
        return [len(members["png"])]

    for source in sources:
        for _ in range(2):
            calls.clear()
            found = np.concatenate([source.measured(i, "length", length, 1) for i in range(len(source.names))])
            assert found.ravel().tolist() == [len(sample(i)["png"]) if i != 1 else 0 for i in range(4)]
        assert calls == []
        sizes = np.concatenate([source.sizes(i, "png") for i in range(len(source.names))])
        assert sizes.tolist() == [len(sample(i)["png"]) for i in range(4)]
        out = np.zeros((1, sizes[3]), dtype=np.uint8)
        source.gather(np.array([3]), "png", out)
        assert out.tobytes() == sample(3)["png"]
        with pytest.raises(BadSample, match="expected 7"):
            source.gather(np.array([3]), "png", np.zeros((1, 7), dtype=np.uint8))


def test_positions_do_not_depend_on_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "set", [4, 4])
    describe(folder)
    sound = open_source("*.tar", folder, "data.train")
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    damaged = open_source("*.tar", folder, "data.train", max_bad_fraction=0.3)
    assert damaged.counts.tolist() == sound.counts.tolist()
    assert damaged.fingerprint == sound.fingerprint
    assert damaged.read(5) == sample(5, 5)
    with pytest.raises(BadSample, match=r"train-000001.tar, sample #3: is lost; truncated at byte 5000"):
        damaged.read(7)  # nothing tells its key
    monkeypatch.setattr(files, "_COMPARED_SHARDS", 0)
    monkeypatch.setattr("datamodules.shards._CHECKED_BYTES", 0)
    late = open_source("*.tar", folder, "data.train")  # too many shards to look at each
    assert late.read(3) == sample(3, 3)
    with pytest.raises(BadSample, match=r"train-000001.tar, sample train00006: truncated at byte 5000"):
        late.read(5)


def test_a_described_set_opens_without_reading_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "set", [2] * 20)
    describe(folder)
    monkeypatch.setattr("datamodules.shards._CHECKED_BYTES", 0)
    monkeypatch.setattr(files.LocalFiles, "index", None)
    monkeypatch.setattr(files.LocalFiles, "open", None)
    assert open_source("*.tar", folder, "data.train").counts.tolist() == [2] * 20


def test_file_addresses(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [2])
    for prefix in ("file://", "file:"):
        assert open_source(f"{prefix}{folder}/train-*.tar", tmp_path / "x", "data.train").counts.tolist() == [2]
