"""The check of shards names every bad sample; the look at them shows what is there."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import catalogue, contact, indexing, survey, tarindex
from datamodules.check import Report, check
from datamodules.images import Images
from datamodules.pack import Recipe, pack
from datamodules.patterns import split_of
from datamodules.writer import DatasetWriter
from tests.tars import add, picture, png, sample, write_set, write_tar


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 30 samples; sample i has class i mod 10, and names are given to the classes."""
    folder = tmp_path_factory.mktemp("sound") / "set"
    card = {"classes": [f"class{number}" for number in range(10)]}
    with DatasetWriter(folder, dataset="test", licence="none", sources={}, card=card) as writer:
        writer.write("train", ({"__key__": f"{i:05d}", **sample(i, i % 10)} for i in range(120)), per_shard=30)
    return folder


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "set"))


def told(report: Report) -> list[str]:
    return [str(problem) for problem in report.problems]


def test_a_sound_set(root: Path) -> None:
    report = check(root)
    assert (told(report), report.notes, report.decoded) == ([], [], 120)
    assert (report.facts.samples, report.facts.shards) == (120, 4)
    assert report.facts.labels == dict.fromkeys(range(10), 12)
    assert report.facts.shapes == {(8, 8): 120}
    few = check(root, fraction=0.25)
    assert told(few) == []
    assert 10 < few.decoded < 55
    assert check(root / "train-000001.tar").facts.samples == 30
    assert check(root / "train-*2.tar").facts.samples == 30
    assert told(check(root / "train-{000000..000004}.tar")) == [
        "train-000004.tar: missing",
        "train-000004.tar: not listed in index.json",
    ]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50_000])


def zero_block(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096:5120] = bytes(1024)
    path.write_bytes(raw)


def repeat_keys(path: Path) -> None:
    (path.parent / "index.json").unlink()
    tarindex.sidecar(path).unlink()
    raw = path.read_bytes()
    path.write_bytes(raw[: 3072 * 2] + raw)


def vanish(path: Path) -> None:
    path.unlink()


def stray(path: Path) -> None:
    write_tar(path.parent / "train-000009.tar", {"x": sample(1, 1)})


def other_index(path: Path) -> None:
    shutil.copy(tarindex.sidecar(path.with_name("train-000002.tar")), tarindex.sidecar(path))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[1636] ^= 1
    path.write_bytes(raw)


def silent(path: Path) -> None:
    """Exchange the classes of two samples: every member can be read, and the counts agree."""
    index, raw = tarindex.scan(path), bytearray(path.read_bytes())
    first, second = (int(index.offsets[row, index.extensions.index("cls")]) for row in (3, 14))
    raw[first], raw[second] = raw[second], raw[first]
    path.write_bytes(raw)


SHARD = "train-000001.tar"
CUT = [f"{number:05d}" for number in range(55, 60)]
DAMAGE: dict[Callable[[Path], None], list[str]] = {
    truncate: [
        f"{SHARD}: 50000 bytes, index.json says 71680",
        f"{SHARD}, sample 00054: truncated at byte 50000: ",
        f"{SHARD}: 24 samples, index.json says 30",
        *[f"{SHARD}, sample {key}: is lost" for key in CUT],
    ],
    zero_block: [
        f"{SHARD}: its sha256 is not the one in index.json",
        f"{SHARD}, sample 00031 or the one after it: zero block at byte 4096 inside the archive, data goes on at byte "
        "5120",
        *[f"{SHARD}, sample {number:05d}: lies behind the damage and is not read" for number in range(33, 60)],
        f"{SHARD}, sample 00032: lies behind the damage and is not read",
        f"{SHARD}: 2 samples, index.json says 30",
    ],
    repeat_keys: [
        f"{SHARD}, sample 00030: key 00030 appears twice, again at byte 6656",
        *[
            f"{SHARD}, sample {key}: its key appears again, and what stands there is not read"
            for key in ("00031", "00032")
        ],
    ],
    vanish: [
        f"{SHARD}: listed in index.json, but missing",
        *[f"{SHARD}, sample {number:05d}: is lost" for number in range(30, 60)],
    ],
    stray: ["train-000009.tar: not listed in index.json"],
    other_index: [f"{SHARD}: the index file beside it says something else. Delete it and type data index"],
    flip: [
        f"{SHARD}: its sha256 is not the one in index.json",
        f"{SHARD}, sample 00030: .png: broken image",
    ],
    silent: [
        f"{SHARD}: its sha256 is not the one in index.json",
        *[f"{SHARD}, sample {key}: .cls: has changed since it was written" for key in ("00033", "00044")],
    ],
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named(root: Path, damage: Callable[[Path], None]) -> None:
    damage(root / SHARD)
    found = told(check(root))
    for line in DAMAGE[damage]:
        assert any(text.startswith(line) for text in found), line
    named = {text.split(":")[0] for text in found}
    assert named == {line.split(":")[0] for line in DAMAGE[damage]}


def test_every_bad_sample_is_named(tmp_path: Path) -> None:
    good = sample(1, 1)
    content = {
        "a": good,
        "b": {"png": b"<html>", "cls": b"1"},
        "c": {"png": png(picture(2, 32))[:-100], "cls": b"2"},
        "d": {"png": good["png"], "cls": b"two"},
        "e": {"png": good["png"]},
        "f": {"cls": b"1"},
        "g": {"png": good["png"], "cls": b"7", "txt": b"\xff"},
        "h": {"png": good["png"], "cls": b"-1", "json": b"{"},
        "i": {"jpg": good["png"], "cls": b"1"},
        "j": good,
    }
    write_tar(tmp_path / "x-0.tar", content)
    write_tar(tmp_path / "x-1.tar", {"j": good, "k": good})
    write_tar(tmp_path / "y-0.tar", {"k": good})
    report = check(tmp_path, classes=5)
    assert told(report) == [
        "x-0.tar, sample g: class 7, expected 0..4",
        "x-0.tar, sample h: class -1, expected 0..4",
        "x-0.tar, sample b: .png: not an image (it begins with b'<html>')",
        "x-0.tar, sample c: .png: broken image (OSError: image file is truncated)",
        "x-0.tar, sample d: .cls: b'two' is not a whole number",
        "x-0.tar, sample e: lacks .cls, which other samples of the shard have",
        "x-0.tar, sample f: lacks .png, which other samples of the shard have",
        "x-0.tar, sample g: .txt: not utf-8 (byte 0xff at 0)",
        "x-0.tar, sample h: .json: b'{' is not JSON",
        "x-1.tar, sample j: x-0.tar has a sample of the same key",
    ]
    assert report.notes == [
        "1 keys stand in more than one split",
        "3 shards have no index file beside them; data index writes them",
        "without an entry in index.json, sizes and hashes cannot be compared",
    ]


def test_captions_and_manifest(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.png").write_bytes(png(picture(number)))
    rows = [f"{number}.png,one,{'' if number == 2 else 'other'}" for number in range(6)]
    (tmp_path / "in" / "metadata.csv").write_text("\n".join(["file,caption,caption2", *rows, "7.png,x,y"]))
    pack(tmp_path / "in", tmp_path / "out", Recipe("captions", per_shard=3, shuffle=False))
    report = check(tmp_path / "out")
    assert (told(report), report.notes) == ([], ["1 of 6 samples have no .caption2.txt"])
    listed = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "manifest.jsonl").write_text("".join(listed[1:-1]))
    assert told(check(tmp_path / "out")) == [
        "train-000000.tar, sample 000000: not listed in manifest.jsonl",
        "manifest.jsonl: 0 inputs refused: missing file, index.json says 1",
        "manifest.jsonl: 5 inputs written, index.json says 6",
    ]
    assert "sample 000000" in told(check(tmp_path / "out" / "train-000000.tar"))[0]
    (tmp_path / "out" / "manifest.jsonl").write_text("".join([*listed[:2], "{"]))
    assert any(text.startswith("manifest.jsonl: line 3 cannot be read") for text in told(check(tmp_path / "out")))
    (tmp_path / "out" / "manifest.jsonl").unlink()
    assert told(check(tmp_path / "out")) == ["manifest.jsonl: missing"]


def test_keys_with_dots_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"a.{i}": {"png": png(picture(i)), "cls": b"1"} for i in range(3)})
    write_tar(tmp_path / "b.tar", {"v.x": {"png": png(picture(0))}})
    write_tar(tmp_path / "c.tar", {"c": {"png": png(picture(0)), "0.txt": b"x", "1.txt": b"y"}})
    assert [text.partition(": a key ends")[0] for text in told(check(tmp_path)) if "first dot" in text] == [
        "a.tar: its members .0.png and .1.png differ in a number only",
        "b.tar: no data module looks for its member .x.png",
    ]
    with pytest.raises(ValueError, match=r"no image.* A key ends at the first dot of the name, so KEY\.0\.png is"):
        Images(root=tmp_path, train="a.tar", size=8, batch_size=1).setup()


def test_counts_of_the_index(root: Path) -> None:
    content = json.loads((root / "index.json").read_text())
    content["shards"][SHARD]["samples"] = 31
    content["shards"][SHARD]["classes"]["3"] = 4
    (root / "index.json").write_text(json.dumps(content))
    assert told(check(root)) == [
        f"{SHARD}: 30 samples, index.json says 31",
        f"{SHARD}: 3 samples of class 3, index.json says 4",
    ]


def test_raw_arrays_against_the_card(tmp_path: Path) -> None:
    card = {"lat": {"dtype": "float16", "shape": [2, 2]}, "tok": {"dtype": "uint16"}}
    with DatasetWriter(tmp_path / "d", dataset="d", licence="", sources={}, card=card) as writer:
        samples = [{"__key__": str(i), "lat": bytes(8 - i), "tok": bytes(4 + i)} for i in range(2)]
        writer.write("train", samples, per_shard=5)
    assert told(check(tmp_path / "d")) == [
        "train-000000.tar, sample 1: .lat: 7 bytes, expected 8 for float16 [2, 2]",
        "train-000000.tar, sample 1: .tok: 5 bytes are no whole number of uint16",
    ]


def test_sorted_classes_are_noted(tmp_path: Path) -> None:
    write_tar(tmp_path / "sorted.tar", {f"{i:03d}": sample(i, i // 20) for i in range(100)})
    assert any("sorted by class along the shards (1.00 of 1)" in note for note in check(tmp_path).notes)
    mixed = np.random.default_rng(0).permutation(100)
    write_tar(tmp_path / "sorted.tar", {f"{i:03d}": sample(i, mixed[i] // 20) for i in range(100)})
    assert not any("sorted by class" in note for note in check(tmp_path).notes)


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist. Type a folder of shards"):
        check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="names no shard"):
        check(tmp_path)
    with pytest.raises(ValueError, match="Write ranges as in"):
        check(tmp_path / "x-{0..3.tar")


def test_index_of_foreign_shards(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "foreign", [4, 3])
    options = {"name": None, "licence": "theirs", "workers": 1, "progress": lambda *state: None}
    assert indexing.write_indices(folder, **options) == (2, True)
    index = catalogue.read(folder)
    assert index is not None
    assert (index.dataset, index.licence) == ("foreign", "theirs")
    assert [entry.samples for entry in index.shards.values()] == [4, 3]
    assert index.shards["train-000001.tar"].classes == {"4": 1, "5": 1, "6": 1}
    report = check(folder)
    assert (told(report), report.notes) == ([], [])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert indexing.write_indices(folder, **options) == (0, False)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    tarindex.sidecar(folder / "train-000000.tar").write_bytes(b"x")
    assert indexing.write_indices(folder, **options) == (1, False)
    write_set(folder, [4, 3, 2])
    with pytest.raises(ValueError, match=r"does not list 1 of 3 shards, first: train-000002.tar"):
        indexing.write_indices(folder, **options)
    with tarfile.open(folder / "train-000002.tar", "w") as archive:
        for key in "aba":
            add(archive, f"{key}.png", b"")
    with pytest.raises(ValueError, match=r"train-000002.tar: key a appears twice"):
        indexing.write_indices(folder, **options)


def test_survey_counts(root: Path) -> None:
    found = survey.survey(survey.find(root), 1, lambda *state: None)
    assert list(found) == ["train"]
    assert found["train"].samples == 120
    assert found["train"].members["cls"] == (120, 120)
    assert split_of("x.tar") == "x"
    assert split_of("00012.tar") == "all"


def test_contact_sheet(root: Path) -> None:
    paths = survey.find(root)
    looks = contact.pick(paths, 13)
    assert {look.shard for look in looks} == {path.name for path in paths}
    assert len({look.key for look in looks}) == 13
    looks[3] = contact.Look("x", "broken", {"png": b"x"})
    looks[4].members["txt"] = b"a caption that is long enough to need a line or two " * 8
    drawn = contact.sheet(looks, "test", "120 samples", ["naught"])
    again = contact.sheet(looks, "test", "120 samples", ["naught"])
    assert drawn.tobytes() == again.tobytes()
    pixels = np.asarray(drawn)
    tile = np.asarray(looks[0].picture())
    factor = 160 // 8
    grown = np.asarray(Image.fromarray(tile).resize((8 * factor, 8 * factor), Image.Resampling.NEAREST))
    places = [
        (top, 14)
        for top in range(pixels.shape[0] - grown.shape[0])
        if np.array_equal(pixels[top : top + grown.shape[0], 14 : 14 + grown.shape[1]], grown)
    ]
    assert len(places) == 1  # whole, unblurred, unstretched
    assert contact.sheet(contact.pick(paths, 1), "test", "x " * 300, []).width >= 480


def test_lines_of_other_samples() -> None:
    members = {
        "txt": "\n".join(f"line {number}" for number in range(9)).encode(),
        "lat": np.zeros(4, dtype=np.float16).tobytes(),
        "tok": np.arange(20, dtype=np.uint16).tobytes(),
        "raw": b"123",
    }
    card = {"lat": {"dtype": "float16", "shape": [2, 2]}, "tok": {"dtype": "uint16"}}
    assert contact.lines_of(contact.Look("s.tar", "k", members), card) == [
        "s.tar  k",
        "  .lat  float16 [2, 2], mean 0, deviation 0, 0 to 0",
        "  .raw  3 bytes",
        "  .tok  20 x uint16: 0 1 2 3 4 5 6 7 8 9 10 11 ...",
        "  .txt  (9 lines, 62 bytes)",
        *[f"    line {number}" for number in range(6)],
        "    ...",
    ]
