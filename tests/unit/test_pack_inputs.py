"""Every kind of source: found out by itself, read in full, and its traps refused."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.inputs import accept, cifar
from datamodules.inputs.detect import KINDS, detect, open_inputs
from datamodules.inputs.entries import Choices, Inputs, Item, Refused
from datamodules.inputs.huggingface import HuggingFace
from datamodules.pack import Recipe, pack
from datamodules.transforms import decode_into
from tests.tars import picture, png

RNG = np.random.default_rng(0)


def read_all(inputs: Inputs) -> dict[str, Item | str]:
    """Item or reason of refusal of every input by name."""
    found: dict[str, Item | str] = {name: refusal.reason for name, refusal in inputs.refused}
    for number in range(len(inputs)):
        try:
            found[inputs.name(number)] = inputs.read(number)
        except Refused as refusal:
            found[inputs.name(number)] = refusal.reason
    inputs.close()
    return found


def opened(source: Path, kind: str, **choices: Any) -> Inputs:
    """Inputs of a source whose kind is found out."""
    assert detect(source, Choices(**choices)) == kind
    return open_inputs(source, None, Choices(**choices))


def pixels(item: Item | str) -> np.ndarray:
    assert isinstance(item, Item)
    return np.asarray(Image.open(io.BytesIO(item.content)))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def test_folder_of_splits_and_numbered_classes(tmp_path: Path) -> None:
    for name in ("train/10/a.png", "train/3/b.png", "val/3/c.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png(picture(1)))
    (tmp_path / "train" / ".trash").mkdir()
    (tmp_path / "train" / ".trash" / "x.db").touch()  # a folder without pictures is no class
    inputs = opened(tmp_path, "folder")
    assert [inputs.part(number) for number in range(len(inputs))] == ["train", "train", "train", "val"]
    found = read_all(inputs)
    assert {name: item.label for name, item in found.items() if isinstance(item, Item)} == {
        "train/10/a.png": 10,
        "train/3/b.png": 3,
        "val/3/c.png": 3,
    }
    assert inputs.class_names == []


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(picture(1)))
    found = read_all(opened(tmp_path, "folder"))["a.png"]
    assert isinstance(found, Item)
    assert found.label is None


CSV = """file,caption,caption_short,label
a.png,"a dog, running",dog,pet
b.png,a stone,,thing
b.png,another stone,,thing
../c.png,away,,pet
/etc/hostname,away,,pet
d.png,lost,,pet
a.png,,,pet
a.png,no class,,
"""


def test_captions_of_a_csv(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "b.png", "../c.png", "unused.png"):
        (folder / name).write_bytes(png(picture(len(name))))
    (folder / "captions.csv").write_text(CSV)
    inputs = opened(folder, "captions")
    found = read_all(inputs)
    assert [found[name].captions for name in ("a.png#1", "b.png#2")] == [  # type: ignore[union-attr]
        {"txt": "a dog, running", "caption_short.txt": "dog"},
        {"txt": "a stone"},
    ]
    assert [value for value in found.values() if isinstance(value, str)] == [
        "unsafe name",
        "unsafe name",
        "missing file",
        "no caption",
        "no class",
    ]
    assert inputs.class_names == ["pet", "thing"]
    assert inputs.left_out == 1
    assert inputs.group(1) == inputs.group(2)  # one image is not spread over splits
    packed = pack(folder, tmp_path / "out", Recipe("x"))
    assert packed.index.card["inputs"]["written"] == 3  # the same image with another caption is no duplicate


def test_captions_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(picture(1)))
    table = tmp_path / "table.jsonl"
    table.write_text('{"file_name": "a.png", "text": "one", "label": 3}\n\n')
    assert read_all(opened(table, "captions")) == {"a.png#1": Item(png(picture(1)), {"txt": "one"}, 3)}
    assert read_all(opened(tmp_path, "captions")) == {"a.png#1": Item(png(picture(1)), {"txt": "one"}, 3)}
    table.write_text('{"file": "a.png"}\n{"file": \n')
    with pytest.raises(ValueError, match=r"table.jsonl, line 2: not JSON"):
        open_inputs(table, "captions", Choices())
    table.write_text('{"name": "a.png"}\n')
    with pytest.raises(ValueError, match=r"has the columns name, but none of file names"):
        open_inputs(table, "captions", Choices())


def cifar_files(fine: bool) -> dict[str, bytes]:
    """Small batches of the authors' layout, pickled as Python 2 did it."""

    def batch(count: int) -> dict[bytes, object]:
        labels = RNG.integers(0, 10, count).tolist()
        content: dict[bytes, object] = {b"data": RNG.integers(0, 256, (count, 3072), dtype=np.uint8)}
        if fine:
            return {**content, b"fine_labels": labels, b"coarse_labels": [0] * count}
        return {**content, b"labels": labels}

    names = [b"label%d" % number for number in range(10)]
    if fine:
        return {
            "train": pickle.dumps(batch(7), 2),
            "test": pickle.dumps(batch(3), 2),
            "meta": pickle.dumps({b"fine_label_names": names}, 2),
        }
    files = {f"data_batch_{number}": pickle.dumps(batch(4), 2) for number in range(1, 4)}
    return {**files, "test_batch": pickle.dumps(batch(3), 2), "batches.meta": pickle.dumps({b"label_names": names}, 2)}


@pytest.mark.parametrize("fine", [False, True])
def test_cifar(fine: bool, tmp_path: Path) -> None:
    content = cifar_files(fine)
    folder = tmp_path / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir()
    archive = tmp_path / f"cifar-{100 if fine else 10}-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in {**content, "../../evil": b"x", "readme.html": b"x"}.items():
            info = tarfile.TarInfo(name if ".." in name else f"{folder.name}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for name, data in content.items():
        (folder / name).write_bytes(data)
    inputs = opened(archive, "cifar")
    found = read_all(inputs)
    assert found.pop("../../evil") == "unsafe name"
    assert (len(found), inputs.left_out) == (10 if fine else 15, 1)
    assert found == read_all(opened(folder, "cifar"))
    assert inputs.class_names[3] == "label3"
    parts = [inputs.part(number) for number in range(len(inputs))]
    assert parts.count("test") == 3
    name = "train#2" if fine else "data_batch_2#2"
    batch = pickle.loads(content[name.partition("#")[0]])
    np.testing.assert_array_equal(pixels(found[name]), batch[b"data"][2].reshape(3, 32, 32).transpose(1, 2, 0))
    assert found[name].label == batch[b"fine_labels" if fine else b"labels"][2]  # type: ignore[union-attr]
    packed = pack(archive, tmp_path / "out", Recipe("cifar"))
    assert {name: entry.samples for name, entry in packed.index.shards.items()} == {
        "train-000000.tar": 7 if fine else 12,
        "val-000000.tar": 3,
    }


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return open, (str(self.path), "w")


def test_pickles_run_no_code(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for content in (Trap(trap), {b"data": Trap(trap)}, np.array([Trap(trap)], dtype=object)):
        with pytest.raises(ValueError, match=r"it asks for (_io|io)\.open, which no CIFAR file needs"):
            cifar.load(pickle.dumps(content, 2), "x")
    with pytest.raises(ValueError, match="is not a file of plain arrays"):
        cifar.load(b"cos\nsystem\n(S'touch x'\ntR.", "x")
    assert not trap.exists()
    content = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], b"filenames": [b"a"]}
    found = cifar.load(pickle.dumps(content, 2), "x")
    np.testing.assert_array_equal(found.pop(b"data"), content.pop(b"data"))
    assert found == content


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(zipped: bool, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (9, 28, 28), dtype=np.uint8)
    labels = np.arange(9, dtype=np.uint8)
    for name, part in (("train", slice(0, 6)), ("t10k", slice(6, 9))):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(array[part])
            path = tmp_path / f"{name}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    inputs = opened(tmp_path, "mnist")
    found = read_all(inputs)
    np.testing.assert_array_equal(pixels(found["train#4"]), images[4])
    assert found["test#1"].label == 7  # type: ignore[union-attr]
    assert len(found) == 9
    first = tmp_path / f"train-images-idx3-ubyte{'.gz' if zipped else ''}"
    assert len(opened(first, "mnist")) == 6
    raw = first.read_bytes()
    first.write_bytes(raw[:-20])
    with pytest.raises(ValueError, match=r"train-images.* (is damaged|cannot be read)"):
        open_inputs(first, None, Choices())
    first.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + bytes([127] * 12)) if zipped else bytes([0, 0, 8, 3, 127]))
    with pytest.raises(ValueError, match="its header tells the shape"):
        open_inputs(first, "mnist", Choices())


def test_edm_zip(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    link = zipfile.ZipInfo("00000/link.png")
    link.external_attr = 0o120777 << 16
    labels = [["00000/a.png", 4], ["00000/b.png", 2], ["00000/large.png", 0], ["00000/half.png", 1.5]]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
        archive.writestr("00000/b.png", png(picture(2)))
        archive.writestr("00000/a.png", png(picture(1)))
        archive.writestr("00000/large.png", bytes(10**6))
        archive.writestr("00000/nameless.png", png(picture(3)))
        archive.writestr("00000/half.png", png(picture(5)))
        archive.writestr("../evil.png", png(picture(4)))
        archive.writestr("/evil.png", png(picture(4)))
        archive.writestr(link, "/etc/hostname")
    inputs = opened(path, "edm-zip", max_bytes=10**5)
    assert read_all(inputs) == {
        "../evil.png": "unsafe name",
        "/evil.png": "unsafe name",
        "00000/link.png": "link in the archive",
        "00000/a.png": Item(png(picture(1)), label=4),
        "00000/b.png": Item(png(picture(2)), label=2),
        "00000/large.png": "too large",
        "00000/nameless.png": "no class",
        "00000/half.png": "bad class",
    }
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"00000/b.png") + 30] ^= 255
    path.write_bytes(raw)
    assert read_all(opened(path, "edm-zip"))["00000/b.png"] == "cannot be read"
    path.write_bytes(raw[:-30])
    with pytest.raises(ValueError, match="is not a whole zip"):
        open_inputs(path, None, Choices())


def test_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "caption": datasets.Value("string"),
        }
    )
    rows = {
        "image": [{"bytes": png(picture(i)), "path": None} for i in range(3)],
        "label": [0, 1, -1],
        "caption": ["one", "two", None],
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "validation": data.select([0])}).save_to_disk(tmp_path / "both")
    inputs = opened(tmp_path / "both", "huggingface")
    assert read_all(inputs) == {
        "train#0": Item(png(picture(0)), {"txt": "one"}, 0),
        "train#1": Item(png(picture(1)), {"txt": "two"}, 1),
        "train#2": Item(png(picture(2))),
        "validation#0": Item(png(picture(0)), {"txt": "one"}, 0),
    }
    assert [inputs.part(number) for number in (0, 3)] == ["train", "val"]
    assert inputs.class_names == ["no", "yes"]
    assert isinstance(inputs, HuggingFace)
    for path, reason in (("/etc/hostname", "link out of the source"), ("../x", "unsafe name"), ("x", "missing file")):
        with pytest.raises(Refused, match=reason):
            inputs.linked(path)
    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).save_to_disk(tmp_path / "text")
    assert read_all(opened(tmp_path / "text", "huggingface")) == {"row#0": Item(b"a"), "row#1": Item(b"b")}
    datasets.Dataset.from_dict({"x": ["a"], "y": ["b"]}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"has the columns x \(Value\), y \(Value\): no image, and not one text."):
        open_inputs(tmp_path / "two", None, Choices())
    assert read_all(open_inputs(tmp_path / "two", None, Choices(text_field="y"))) == {"row#0": Item(b"b")}


def test_hugging_face_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"Type: pip install datasets$"):
        open_inputs(tmp_path, None, Choices())


def test_text_files_and_lines(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"one\r\ntwo\n\nlast")
    (source / "deep" / "b.txt").write_text("x" * 100 + "\n")
    (source / "deep" / "c.md").write_text("left out")
    inputs = opened(source, "text")
    assert read_all(inputs) == {"a.txt": Item(b"one\r\ntwo\n\nlast"), "deep/b.txt": Item(b"x" * 100 + b"\n")}
    assert inputs.left_out == 1
    assert read_all(opened(source, "text", split_lines=True, max_bytes=50)) == {
        "a.txt#1": Item(b"one"),
        "a.txt#2": Item(b"two"),
        "a.txt#3": Item(b""),
        "a.txt#4": Item(b"last"),
        "deep/b.txt#1": "too large",
    }
    assert list(read_all(opened(source, "text", extensions=(".md",)))) == ["deep/c.md"]
    assert list(read_all(opened(source / "a.txt", "text"))) == ["a.txt"]
    (source / "latin.txt").write_bytes("caf\u00e9".encode("latin1"))
    (source / "blank.txt").write_bytes(b" \n")
    packed = pack(source, tmp_path / "out", Recipe("x"))
    assert packed.index.card["inputs"] == {
        "seen": 4,
        "written": 2,
        "refused": {"empty": 1, "not utf-8": 1},
        "left_out": 1,
        "changed": {},
    }


def test_json_lines(tmp_path: Path) -> None:
    lines = ['{"text": "a\\u00e9"}', "", "{", '{"body": "b"}', '["text"]', '{"text": "\\ud800"}', '{"text": 5}']
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    assert list(read_all(opened(tmp_path / "d.jsonl", "jsonl")).values()) == [
        Item("a\u00e9".encode()),
        "empty",
        "not JSON",
        "no text",
        "no text",
        "not utf-8",
        "no text",
    ]
    assert read_all(open_inputs(tmp_path, None, Choices(text_field="body")))["d.jsonl#4"] == Item(b"b")
    (tmp_path / "d.jsonl").write_text('{"path": "x/y.py", "text": "code"}\n')  # a document with a path is no caption
    assert len(opened(tmp_path, "jsonl")) == 1


def test_code(tmp_path: Path) -> None:
    for name in ("m.py", "sub/n.py", ".git/hook.py", "data.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    inputs = opened(tmp_path, "code")
    assert list(read_all(inputs)) == ["m.py", "sub/n.py"]
    assert inputs.member == "py"
    assert open_inputs(tmp_path, "code", Choices(extensions=(".py", ".bin"))).member == "txt"


def test_unclear_sources_tell_what_was_seen(tmp_path: Path) -> None:
    source = tmp_path / "mixed"
    source.mkdir()
    kinds = "|".join(KINDS)
    with pytest.raises(ValueError, match=r"nowhere does not exist. Type the folder or file to pack."):
        open_inputs(tmp_path / "nowhere", None, Choices())
    for name in ("a.png", "b.png", "c.txt", "d"):
        (source / name).write_text(name)
    with pytest.raises(ValueError, match="mixed") as caught:
        detect(source, Choices())
    assert str(caught.value) == (
        f"{source}: cannot tell what it is. Seen: 2 .png, 1 .txt, 1 without extension. Choose with --kind {kinds}"
    )
    with pytest.raises(ValueError, match=r"a file that begins with b'a\.png'"):
        detect(source / "a.png", Choices())
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "x.tar").touch()
    with pytest.raises(ValueError, match="holds shards"):
        detect(tmp_path / "shards", Choices())
    assert list(read_all(open_inputs(source, "text", Choices()))) == ["c.txt"]


def test_pictures_stay_as_they_are_or_become_png() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        data = encoded(image, kind)
        assert accept.picture(data, 600, None) == accept.Picture(extension, data)
    bmp = accept.picture(encoded(image, "BMP"), 600, None)
    assert (bmp.extension, bmp.change) == ("png", "converted")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(bmp.data))), np.asarray(image))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = accept.picture(encoded(image, "PNG", exif=exif), 600, None)
    assert turned.change == "turned"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(turned.data))), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resized_as_training_would(mode: str) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    data = encoded(image, "JPEG")
    small = accept.picture(data, 600, 16)
    out = np.empty((16, 16, len(mode)), dtype=np.uint8)
    decode_into(data, out)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(small.data))).reshape(out.shape), out)
    assert accept.picture(small.data, 600, 16) == accept.Picture("png", small.data)


def test_pictures_that_are_refused() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    deep = Image.fromarray(RNG.integers(0, 65536, (4, 4), dtype=np.uint16))
    moving = encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)])
    bomb = bytearray(encoded(Image.new("1", (3, 3)), "PNG"))
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    for data, reason in [
        (b"", "empty"),
        (b"<html>", "not an image"),
        (encoded(image, "JPEG")[:-2], "broken image"),
        (encoded(image, "PNG")[:-100], "broken image"),
        (encoded(image, "WEBP")[:-100], "broken image"),
        (encoded(deep, "PNG"), "not 8 bits per channel"),
        (moving, "animation"),
        (bytes(bomb), "too many pixels"),
        (encoded(image.resize((31, 20)), "PNG"), "too many pixels"),
    ]:
        with pytest.raises(Refused) as caught:
            accept.picture(data, 600, None)
        assert caught.value.reason == reason
