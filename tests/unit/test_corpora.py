"""Corpora that are generated: split by origin, each text once, the same bytes every time, captions that are true."""

import ast
import hashlib
import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import bpe, catalogue, corpora, glyphs32
from datamodules.check import check
from datamodules.shards import ShardSet, find
from datamodules.tokenizers import Pretrained

FEW = (
    "json/",
    "email/",
    "zipfile.py",
    "html/",
    "concurrent/",
    "collections/",
    "importlib/",
    "wsgiref/",
    "dbm/",
    "asyncio/",
)


def opened(root: Path, split: str) -> ShardSet:
    return ShardSet(find(f"{split}-*.tar", root, "data.x"), "data.x")


def contents(root: Path, split: str) -> list[dict[str, bytes]]:
    shards = opened(root, split)
    return [shards.read(sample) for sample in range(int(shards.counts.sum()))]


@pytest.fixture(scope="module")
def few() -> dict[str, bytes]:
    return {path: data for path, data in corpora._library().items() if path.startswith(FEW)}


def test_a_bpe_is_trained_on_the_training_texts_once(
    few: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "_library", lambda: few)
    for name in ("a", "b"):
        corpora.pydoc_prose_bpe(tmp_path / name, entries=300)
    folders = [tmp_path / name / bpe.FOLDER for name in ("a", "b")]
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1
    index = json.loads((folders[0] / "index.json").read_text())
    assert index["sha256"] == hashlib.sha256((folders[0] / "tokenizer.json").read_bytes()).hexdigest()
    tokenizer = Pretrained(folders[0])
    assert (tokenizer.size, tokenizer.eos) == (300, 0)
    text = "the value\u00e9 of <|endoftext|>\n\tx\U0001f600"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the value")) < 9
    stamp = (folders[0] / "tokenizer.json").stat().st_mtime_ns
    corpora.pydoc_prose_bpe(tmp_path / "a", entries=300)
    assert (folders[0] / "tokenizer.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"data\.source\.entries=400, but .* of 300 entries"):
        corpora.pydoc_prose_bpe(tmp_path / "a", entries=400)
    with pytest.raises(ValueError, match="expected at least the 257"):
        bpe.train(tmp_path / "a", entries=256)


@pytest.mark.parametrize(("name", "member"), [("pydoc_prose", "txt"), ("stdlib_code", "py")])
def test_texts_of_the_library(
    name: str, member: str, few: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "_library", lambda: few)
    write = getattr(corpora, name)
    write(tmp_path / "a")
    assert check(tmp_path / "a").problems == []
    index = catalogue.read(tmp_path / "a")
    assert index is not None
    assert index.sources["python"].startswith("3.")
    assert index.card["files"]["json/decoder.py"]
    train, val = contents(tmp_path / "a", "train"), contents(tmp_path / "a", "val")
    texts = [sample[member] for sample in train + val]
    assert len(set(texts)) == len(texts) == int(index.sources["texts"]) > 50
    assert sum(map(len, texts)) == int(index.sources["bytes"])
    assert max(map(len, texts)) <= 65536
    assert all(text.decode().strip() for text in texts)
    origins = [{json.loads(sample["json"])["origin"] for sample in part} for part in (train, val)]
    assert all(origins)
    assert not origins[0] & origins[1]
    assert [corpora.held_out(next(iter(part))) for part in origins] == [False, True]
    assert len(opened(tmp_path / "a", "train").names) == 8
    assert len(opened(tmp_path / "a", "val").names) == 2
    write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    write(tmp_path / "a")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}


def test_every_program_parses(few: dict[str, bytes]) -> None:
    found = [text for path, data in few.items() for text in corpora._programs(path, data)]
    for document in found:
        ast.parse(document.text)
    cut = [document for document in found if document.origin == "zipfile.py"]  # more than 64 KiB
    assert len(cut) == 2
    assert "".join(document.text for document in cut).encode() == few["zipfile.py"]


def test_docstrings_in_the_order_of_the_file() -> None:
    source = b'"m"\nif x:\n    class C:\n        "c"\n        def f(): "f"\ntry: pass\nexcept E:\n    def g(): "g"\n'
    assert [document.text for document in corpora._docstrings("m.py", source)] == ["m", "c", "f", "g"]


def test_unicode_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_LAST_CODE_POINT", 0xFFF)
    corpora.unicode_names(tmp_path / "names")
    train, val = ([sample["txt"].decode() for sample in contents(tmp_path / "names", s)] for s in ("train", "val"))
    assert not set(train) & set(val)
    assert 0.04 < len(val) / len(train) < 0.06
    for name in train + val:
        unicodedata.lookup(name)
        assert set(name) <= set(corpora.NAME_ALPHABET)
    assert "GREEK SMALL LETTER ALPHA" in train + val
    assert len(train) + len(val) > 3_000


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glyphs") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs32, "TRAIN", 320)
        patch.setattr(glyphs32, "VAL", 40)
        glyphs32.write(root)
        glyphs32.write(root.with_name("b"))
    return root


def test_captions_are_true(glyphs: Path) -> None:
    samples = contents(glyphs, "train") + contents(glyphs, "val")
    assert len(samples) == 360
    for sample in samples:
        shown = json.loads(sample["json"])
        image = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert image.shape == (32, 32, 3)
        assert glyphs32.colours(image) == (shown["colour"], shown["background"])
        assert glyphs32.CHARACTERS[int(sample["cls"])] == shown["character"]
        caption = sample["txt"].decode()
        assert all(f" {shown[word]}" in f" {caption}" for word in ("size", "colour", "character"))
        assert ("tilted" in caption) == (abs(shown["angle"]) > 10)
    assert len({sample["txt"] for sample in samples}) > 300
    assert {sample["cls"] for sample in samples} == {str(label).encode() for label in range(36)}


def test_glyphs_are_large_and_tilted_as_told() -> None:
    def box(size: str, tilt: str) -> tuple[int, float]:
        shown = {"character": "I", "colour": "black", "background": "white", "size": size, "tilt": tilt}
        dark = glyphs32.draw({**shown, "angle": glyphs32.TILTS[tilt], "x": 0, "y": 0})[:, :, 0] < 128
        rows = np.flatnonzero(dark.any(axis=1))
        return len(rows), float(np.flatnonzero(dark[rows[0]]).mean() - np.flatnonzero(dark[rows[-1]]).mean())

    heights = [box(size, "upright")[0] for size in ("small", "medium", "large")]
    assert heights == sorted(set(heights))
    leans = [box("large", tilt)[1] for tilt in ("left", "upright", "right")]  # where the top is, from the foot
    assert leans[0] < -4 < abs(leans[1]) < 1 < 4 < leans[2]


def test_same_glyphs_every_time(glyphs: Path) -> None:
    assert check(glyphs).problems == []
    for path in glyphs.iterdir():
        assert path.read_bytes() == (glyphs.with_name("b") / path.name).read_bytes()
    index = catalogue.read(glyphs)
    assert index is not None
    assert len(index.shards) == 10
    assert all(len(entry.classes) > 15 for name, entry in index.shards.items() if name.startswith("train"))


@pytest.mark.slow
def test_full_size(tmp_path: Path) -> None:
    sizes = {}
    for write in (corpora.pydoc_prose, corpora.stdlib_code, corpora.unicode_names, glyphs32.write):
        root = tmp_path / write.__name__
        write(root)
        sizes[write.__name__] = sum(int(opened(root, split).counts.sum()) for split in ("train", "val"))
    assert sizes["write"] == 22_000
    assert sizes["pydoc_prose"] > 5_000
    assert sizes["stdlib_code"] > 400
    assert sizes["unicode_names"] > 30_000
