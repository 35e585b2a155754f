"""``prepare latents`` and ``prepare text-features``: from shards to shards that data modules read beside them."""

import base64
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import catalogue, check, indexing, stamp
from datamodules.image_text import ImageText
from datamodules.latents import Latents
from datamodules.shards import ShardSet
from lightningmodules.shared import autoencoder, codecs
from lightningmodules.shared.autoencoder import AutoencoderKL
from lightningmodules.shared.text_encoders import RandomBytes
from platform import cli, encoders, verbs
from tests.tars import picture, sample, write_tar

COUNTS = (5, 4, 6)
WHITE = 240


def members(number: int, size: int = 8) -> dict[str, bytes]:
    caption = f"picture {number}" if number else ""
    return {**sample(number, number % 3, size=size), "txt": caption.encode()}


def write_pictures(folder: Path, replaced: Mapping[int, Mapping[str, bytes]] | None = None) -> None:
    """Two shards of training samples, one of held-out ones."""
    folder.mkdir()
    begin = 0
    for name, count in zip(("train-000000.tar", "train-000001.tar", "val-000000.tar"), COUNTS, strict=True):
        numbers = range(begin, begin + count)
        write_tar(folder / name, {f"k{n:03d}": (replaced or {}).get(n) or members(n) for n in numbers})
        begin += count


def network(channels: int = 1) -> AutoencoderKL:
    torch.manual_seed(1)
    shape = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 2}
    return AutoencoderKL(in_channels=channels, out_channels=channels, scaling_factor=0.5, shift_factor=0.25, **shape)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, an autoencoder, and the latents and text features of the pictures, as the commands make them."""
    root = tmp_path_factory.mktemp("made")
    write_pictures(root / "pictures")
    autoencoder.save(network(), root / "vae")
    latents = ["latents", str(root / "pictures"), str(root / "pictures" / "latents"), "--encoder", str(root / "vae")]
    assert call(*latents, "--flip", "--white", str(WHITE), "--batch", "3") == 0
    texts = ["text-features", str(root / "pictures"), str(root / "pictures" / "text"), "--encoder", "random:8x6"]
    assert call(*texts, "--name", "bytes", "--dtype", "bfloat16", "--batch", "4") == 0
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new working folder from which the pictures and the autoencoder can be named in a word."""
    for name in ("pictures", "vae"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> int:
    """Exit code of a command run in this process."""
    try:
        return cli.main(("prepare", *words))
    except SystemExit as end:
        return int(end.code or 0)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def batches(data: Any) -> Iterator[dict[str, Any]]:
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=SimpleNamespace())
    data.setup("fit")
    stream = iter(data.train_dataloader())
    try:
        yield from islice(stream, 3)
    finally:
        stream.close()
        data.teardown("fit")


LATENTS = {"train": "train-*.tar", "val": "val-*.tar", "num_classes": 3, "batch_size": 3}


def test_latents_are_what_the_codec_computes(made: Path) -> None:
    """Pictures -> shards of latents -> data module -> codec -> pictures."""
    net = autoencoder.load(made / "vae")
    data = Latents(root=made / "pictures" / "latents", encoder=net.fingerprint(), flip=True, **LATENTS)
    pixels = codecs.Pixels(8, 1, 17, WHITE)
    codec = codecs.Latents(4, 2, data.card["scale"], data.card["shift"], weights=str(made / "vae"), pixels=pixels)
    assert (codec.scale, codec.shift, data.card["flip"]) == (0.5, 0.25, True)
    seen = set()
    for batch in batches(data):
        images = torch.from_numpy(np.stack([picture(int(key[1:])) for key in batch["key"]]))[:, None]
        plain, mirrored = (torch.cat(codec.moments(x), 1).half() for x in (images, images.flip(-1)))
        for row, key in enumerate(batch["key"]):
            found = [torch.allclose(batch["latent"][row], x[row], atol=2e-3) for x in (plain, mirrored)]
            assert any(found), key
            seen.add(found.index(True))
            assert batch["label"][row] == int(key[1:]) % 3
        decoded = codec.decode(codec.encode(batch))
        assert (decoded.shape, decoded.dtype) == ((3, 1, 8, 8), torch.uint8)
    assert seen == {0, 1}
    card = json.loads((made / "pictures" / "latents" / "index.json").read_text())["card"]
    values = np.concatenate([codec.moments(torch.from_numpy(picture(n))[None, None])[0].numpy() for n in range(15)])
    assert card["spread"]["mean"] == pytest.approx(values.mean(), rel=1e-4)
    with pytest.raises(ValueError, match=rf"come from the encoder {net.fingerprint()}, but data.encoder=another"):
        Latents(root=data.root, encoder="another", **LATENTS).setup("fit")


def test_columns_beside_the_pictures(made: Path) -> None:
    """Names, numbers and keys are those of the source, so both sets join it; so do the features and the latents."""
    settings = {"train": "train-*.tar", "batch_size": 3, "feature_length": 6, "features": "emb.bytes"}
    columns = ["latents", "text"]
    both = ImageText(
        root=made / "pictures", size=8, channels=1, latents="lat", columns=columns, num_classes=3, **settings
    )
    encoder = RandomBytes(8, 6)
    for batch in batches(both):
        numbers = [int(key[1:]) for key in batch["key"]]
        assert torch.equal(batch["image"], torch.from_numpy(np.stack([picture(n) for n in numbers]))[:, None])
        assert batch["latent"].shape == (3, 4, 4, 4)
        features, mask = encoder.encode([f"picture {n}" if n else "" for n in numbers])
        assert torch.equal(batch["text_mask"], mask)
        assert torch.allclose(batch["text_features"].float(), features, atol=2e-2)
        assert batch["text_features"].dtype == torch.bfloat16
    alone = Latents(root=made / "pictures", columns=columns, **settings)
    first = next(batches(alone))
    assert (first["latent"].shape, first["text_features"].shape) == ((3, 4, 4, 4), (3, 6, 8))
    found = catalogue.read(made / "pictures" / "text")
    assert found is not None
    assert found.card["emb.bytes"]["encoder"] == encoder.fingerprint
    raw = torch.frombuffer(bytearray(base64.b64decode(found.card["empty_caption"]["emb.bytes"])), dtype=torch.bfloat16)
    empty, mask = encoder.encode([""])
    assert torch.allclose(raw.view(-1, 8).float(), empty[mask], atol=2e-2)


def test_interrupted_job_continues(here: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Finished shards stay, nothing else appears under a final name, and the end is the same to the byte."""
    words = ["latents", "pictures", "out", "--encoder", "vae", "--flip", "--white", str(WHITE), "--batch", "3"]
    encode, calls = encoders.Pictures.encode, list[int]()

    def stopped(self: Any, items: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, items)

    monkeypatch.setattr(encoders.Pictures, "encode", stopped)
    assert call(*words) == 75
    assert {path.name for path in (here / "out").iterdir()} == {
        ".prepare",
        "train-000000.tar",
        "train-000000.tar.idx.npz",
    }
    with pytest.raises(ValueError, match=r"the card in index.json says nothing"):
        Latents(root=here / "out", train="*.tar", batch_size=1).setup("fit")
    assert call(*words[:-2], "--scale", "2") == 2
    assert "out was made with other settings: scale was 0.5, is 2.0" in capsys.readouterr().err
    calls[:] = [0] * 10
    assert call(*words) == 0
    assert calls[10:] == [3, 1, 3, 3]
    assert "15 samples in 3 shards" in (out := capsys.readouterr().out)
    assert "(1 shards by an earlier attempt)" in out
    wanted = content(made / "pictures" / "latents")
    found = content(here / "out")
    same = json.loads(found.pop("index.json")), json.loads(wanted.pop("index.json"))
    assert (found, same[0]["card"], same[0]["shards"]) == (wanted, same[1]["card"], same[1]["shards"])
    assert sorted(path.name for path in (here / "out").iterdir()) == sorted([*wanted, "index.json"])
    assert call(*words) == 0
    assert "all of it was there already" in capsys.readouterr().out
    (here / "out" / "val-000000.tar").unlink()
    assert call(*words) == 2
    assert "out/val-000000.tar is missing or not the file that index.json lists" in capsys.readouterr().err


def test_processes_share_the_shards(here: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["latents", "pictures", "out", "--encoder", "vae", "--flip", "--white", str(WHITE), "--batch", "3"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shards in ((1, 1), (0, 3)):
        monkeypatch.setenv("RANK", str(rank))
        assert call(*words) == 0
        assert len(list((here / "out").glob("*.tar"))) == shards
        assert (here / "out" / "index.json").is_file() == (rank == 0)
    assert capsys.readouterr().out.startswith("process 1 of 2: its 1 shards are done; the process that ends last")
    found, wanted = content(here / "out"), content(made / "pictures" / "latents")
    assert {**found, "index.json": b""} == {**wanted, "index.json": b""}
    monkeypatch.setenv("RANK", "2")
    assert call(*words) == 2
    assert "RANK=2 and WORLD_SIZE=2" in capsys.readouterr().err


def test_second_process_of_the_same_rank_is_refused(here: Path, capsys: Any) -> None:
    (here / "out" / ".prepare").mkdir(parents=True)
    with (here / "out" / ".prepare" / "lock-0").open("w") as stream:
        stream.write("4711")
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert call("latents", "pictures", "out", "--encoder", "vae") == 2
    assert capsys.readouterr().err.startswith("out is being written by process 4711 of another start.")


def test_bad_samples(here: Path, capsys: Any) -> None:
    """Refused by default; left out on demand, and then no column of the source any more."""
    bad = {3: {"png": b"no image"}, 7: members(7, size=16), 9: {**members(9), "cls": b"cat"}}
    write_pictures(here / "some", bad)
    words = ["latents", "some", "some/latents", "--encoder", "vae"]
    assert call(*words) == 2
    err = capsys.readouterr().err
    assert err.startswith("train-000000.tar, sample k003: not a readable image")
    assert "add --skip-bad" in err
    assert "Traceback" not in err
    assert list((here / "some" / "latents").glob("*.tar*")) == []
    assert call(*words, "--skip-bad") == 0
    out = capsys.readouterr().out
    assert "12 samples in 3 shards" in out
    assert "3 samples, see some/latents/skipped.jsonl" in out
    rows = [json.loads(line) for line in (here / "some" / "latents" / "skipped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["k003", "k007", "k009"]
    assert "16x16 pixels (width x height), the first one 8x8" in rows[1]["reason"]
    assert "the class is b'cat'" in rows[2]["reason"]
    assert call(*words) == 2
    assert "was made with --skip-bad and lacks 3 samples" in capsys.readouterr().err
    data = Latents(root=here / "some", train="train-*.tar", columns=["latents"], batch_size=1)
    with pytest.raises(ValueError, match=r"train-000000.tar of latents holds 4 samples, .* holds 5"):
        data.setup("fit")
    assert call("latents", "some", "sized", "--encoder", "vae", "--size", "4", "--skip-bad") == 0
    assert "13 samples in 3 shards" in capsys.readouterr().out


def test_no_good_sample_in_a_shard(here: Path, capsys: Any) -> None:
    write_pictures(here / "some", {number: {"png": b"no image"} for number in range(5, 9)})
    assert call("latents", "some", "out", "--encoder", "vae", "--skip-bad") == 2
    assert "train-000001.tar: none of its 4 samples can be used" in capsys.readouterr().err
    assert not (here / "out" / "index.json").exists()


def test_a_run_is_an_encoder(here: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its weights, its white, and the scale that gives its latents unit variance."""
    (here / "run").mkdir()
    (here / "run" / "config.yaml").touch()
    asked = []
    module = torch.nn.Module()
    module.net, module.codec = autoencoder.load(made / "vae"), codecs.Pixels(8, 1, 17, WHITE)  # type: ignore[assignment]
    monkeypatch.setattr("platform.runs.load_module", lambda path, kind: (asked.append((path.name, kind)) or module, {}))
    assert call("latents", "pictures", "out", "--encoder", "run", "--weights", "raw", "--batch", "3", "--flip") == 0
    assert asked == [("run", "raw")]
    wanted, found = (catalogue.read(folder) for folder in (made / "pictures" / "latents", here / "out"))
    assert wanted is not None
    assert found is not None
    assert found.shards.keys() == wanted.shards.keys()
    for name, entry in found.shards.items():
        assert entry.sha256 == catalogue.sha256(here / "out" / name)
        with (here / "out" / name).open("rb") as file:
            assert stamp.read(file.fileno()) == {"lat": found.card["lat"]}
        told = [(one.samples, one.bytes, one.classes) for one in (entry, wanted.shards[name])]
        assert told[0] == told[1]
    assert found.card["lat"]["scale"] == pytest.approx(1 / found.card["spread"]["std"], rel=1e-4)
    assert call("latents", "pictures", "other", "--encoder", "run", "--white", "255") == 2
    assert "the run run was trained with white at 240" in capsys.readouterr().err
    module.net = torch.nn.Linear(1, 1)
    assert call("latents", "pictures", "other", "--encoder", "run") == 2
    assert "--encoder run is a run of Module, which is no autoencoder." in capsys.readouterr().err


def test_numbers_that_do_not_fit(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    encode = RandomBytes.encode
    monkeypatch.setattr(RandomBytes, "encode", lambda *words: (encode(*words)[0] * 1e6, encode(*words)[1]))
    assert call("text-features", "pictures", "out", "--encoder", "random:8x6") == 2
    err = capsys.readouterr().err
    assert err.startswith("train-000000.tar, one of the 5 samples from k000 on: the encoder makes numbers up to ")
    assert "--dtype bfloat16" in err
    assert list((here / "out").glob("*.tar*")) == []


# What is typed -> the beginning of the answer.
MISTAKES = {
    "latent pictures out": "'latent' is neither an experiment nor something else to prepare. Did you mean latents?",
    "text_features pictures out": (
        "'text_features' is neither an experiment nor something else to prepare. Did you mean text-features?"
    ),
    "latents pictures": "prepare latents takes a source (shards of images) and a folder to write, but 1 came: pictures",
    "latents pictures out": "prepare latents needs an encoder. Add --encoder PATH.",
    "latents pictures out --encoder vae --name t5": "--name belongs to prepare text-features, not to prepare latents.",
    "quickstart --flip": "--flip belongs to prepare latents, not to prepare EXPERIMENT.",
    "quickstart --batch 8": "--batch belongs to prepare latents and text-features, not to prepare EXPERIMENT.",
    "latents pictures out --encoder vae --tiny": "--tiny belongs to prepare EXPERIMENT, not to prepare latents.",
    "latents pictures out --encoder vae --dtype bfloat16": "--dtype bfloat16: latents are stored as float16",
    "latents pictures out --encoder vae --scale 0": "argument --scale: '0' is not a number above 0.",
    "latents pictures out --encoder vae --shift x": "argument --shift: 'x' is not a number.",
    "latents pictures out --encoder vae --size 7": (
        "--size 7, but this autoencoder makes one latent pixel of 2x2, so both sides must be multiples of 2."
        " Type --size 6 or --size 8."
    ),
    "latents pictures out --encoder vae --device tpu": "--device tpu: expected cpu, cuda",
    "latents pictures out --encoder vae --device cpu:1": "--device cpu:1: this machine has 1 of that kind.",
    "latents pictures out --encoder vae --weights raw": "--weights raw belongs to a run, but --encoder vae is none.",
    "latents pictures out --encoder pictures": "pictures holds no autoencoder: expected one of",
    "latents pictures out --encoder .": "--encoder . is a whole pipeline. Type its autoencoder: --encoder vae",
    "latents nowhere out --encoder vae": "nowhere does not exist. Type a folder of shards",
    "latents vae out --encoder vae": "vae is a folder without shards (.tar). Make some of what is in it:",
    "latents pictures/latents out --encoder vae": "pictures/latents: its samples have ",
    "latents pictures pictures --encoder vae": "pictures is not empty, and what is there was not made by prepare.",
    "latents pictures pictures/text --encoder vae": "pictures/text was made with other settings: action was text-feat",
    "latents pictures pictures/train-000000.tar --encoder vae": "pictures/train-000000.tar is a file.",
    "latents pictures vae/config.json/out --encoder vae": "cannot write to vae/config.json/out: Not a directory.",
    "text-features pictures out --encoder random:8": "--encoder random:8: expected random:WIDTHxLENGTH",
    "text-features pictures out --encoder random:8x6 --length 7": "--length 7 and --encoder random:8x6 name two",
    "text-features pictures out --encoder random:8x6 --member text": "pictures: its samples have .png, .cls, .txt, but",
    "text-features pictures out --encoder random:8x6 --name T5": "argument --name: 'T5' is not made of",
    "text-features pictures out --encoder vae": "text encoder vae: the weights (model.safetensors or",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words: str, here: Path, capsys: Any) -> None:
    assert call(*words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(MISTAKES[words])
    assert "Traceback" not in err
    assert not (here / "out").exists()


def test_words() -> None:
    words = ["latents", "a/*.tar", "b", "--encoder", "e", "--scale", "measure", "--shift", "-0.5", "--skip-bad"]
    args = verbs.parse("prepare", words)
    assert (args.action, args.source, args.out, args.encoder) == ("latents", "a/*.tar", "b", "e")
    assert (args.scale, args.shift, args.skip_bad, args.size, args.batch) == ("measure", -0.5, True, None, 32)
    args = verbs.parse("prepare", ["--tiny", "quickstart", "seed=1"])
    assert (args.action, args.experiment, args.overrides, args.tiny) == (None, "quickstart", ["seed=1"], True)
    assert verbs.parse("prepare", ["text-features", "a", "b", "--encoder", "e"]).member == "txt"


def test_shards_tell_what_they_are(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that was made otherwise is refused, listed or not; index.json can be made again from the shards."""
    monkeypatch.setattr("datamodules.shards._CHECKED_BYTES", 0)  # as of a large set, which is not hashed at the start
    whole = tmp_path / "whole"
    shutil.copytree(made / "pictures" / "latents", whole)
    card = catalogue.read(whole).card["lat"]  # type: ignore[union-attr]
    (whole / "index.json").unlink()
    indexing.write_indices(whole, name=None, licence="", workers=1, progress=lambda *_: None)
    data = Latents(root=whole, **LATENTS)
    data.setup("fit")
    assert data.card == card
    other = {**card, "encoder": "another", "scale": 0.75}
    for listed in (False, True):
        mixed = tmp_path / f"mixed{listed}"
        shutil.copytree(made / "pictures" / "latents", mixed)
        name = "train-000001.tar" if listed else "train-000002.tar"
        if not listed:
            (mixed / "val-000000.tar").rename(mixed / name)
        stamp.replace(mixed / name, {"lat": other})
        told = f"its header says of .lat encoder 'another' instead of '{card['encoder']}', scale 0.75"
        with pytest.raises(ValueError, match=rf"{name} was made otherwise than the rest: {told}"):
            Latents(root=mixed, **{**LATENTS, "val": None}).setup("fit")
        problems = [problem.text for problem in check.check(mixed).problems if problem.shard == name]
        assert any("its header says of .lat encoder 'another' instead of" in text for text in problems), problems


def test_shard_that_changes_after_the_start(made: Path, tmp_path: Path) -> None:
    """Shards by the thousand are asked when they are opened."""
    shutil.copytree(made / "pictures" / "latents", tmp_path / "set")
    paths = sorted((tmp_path / "set").glob("train-*.tar"))
    source = ShardSet(paths, "data.train")
    card = source.described("lat")
    stamp.replace(paths[1], {"lat": {**card, "flip": False}})
    out = np.empty((1, 2 * int(np.prod(card["shape"]))), np.uint8)
    source.gather(np.array([0]), "lat", out)
    with pytest.raises(ValueError, match=r"train-000001.tar was made otherwise .* flip False instead of True"):
        source.gather(np.array([COUNTS[0]]), "lat", out)
