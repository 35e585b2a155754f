"""``data`` on the command line: packs, checks, shows, and says what is wrong in one message."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from platform import cli, data, dataverb, verbs
from tests.tars import picture, png

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of 20 pictures and two files that are no pictures; the working folder is beside them."""
    for number in range(40):
        folder = tmp_path / "photos" / ("ant", "bee")[number // 20]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(picture(number)))
    (tmp_path / "photos" / "ant" / "notes.txt").write_text("hello")
    (tmp_path / "photos" / "bee" / "page.png").write_text("<html>")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def call(*words: str) -> int:
    """Exit code of a command run in this process."""
    try:
        return cli.main(("data", *words))
    except SystemExit as end:
        return int(end.code or 0)


def test_pack_check_show(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("pack", "photos", "out", "--per-shard", "10", "--val", "0.2", "--licence", "mine") == 0
    out, err = capfd.readouterr()
    assert err == ""
    told = [" ".join(line.split()) for line in out.splitlines()]
    assert told[0].startswith(f"packed out (folder) in {tmp_path / 'out'}, ")
    assert "inputs 40 written + 2 refused = 42 seen" in told
    assert "refused 2 not an image" in told
    assert "classes 0 ant, 1 bee" in told
    assert call("pack", "photos", "out", "--per-shard", "10", "--val", "0.2", "--licence", "mine") == 0
    assert capfd.readouterr().out.startswith(f"{tmp_path / 'out'} is packed already; --fresh makes it again")

    assert call("check", "out") == 0
    assert capfd.readouterr().out.startswith("out: nothing wrong (40 samples in ")
    shard = tmp_path / "out" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    assert call("check", "out", "--sample", "0.5") == 2
    found = capfd.readouterr().out.splitlines()
    assert found[0].startswith("train-000001.tar: 9000 bytes, index.json says ")
    assert found[1].startswith("train-000001.tar, sample 0000")
    assert "problems" in found[-1]

    assert call("pack", "photos", "out", "--fresh", "--size", "4") == 0
    assert "stored anew  40 resized" in capfd.readouterr().out
    assert call("show", "out", "--n", "6") == 0
    assert "contact sheet: out.png" in capfd.readouterr().out
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 400
    assert call("stats", "out/train-*.tar") == 0
    out = capfd.readouterr().out
    assert "ant: 20, bee: 20" in out
    assert "4x4: 40 (width x height)" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.png", "photos"]


def test_show_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poem.txt").write_text("roses\nviolets\n")
    assert call("pack", "poem.txt", "poem", "--split-lines", "--no-shuffle") == 0
    assert call("show", "poem") == 0
    shard = "train-000000.tar"
    expected = [f"{shard}  000000", "  .txt", "    roses", f"{shard}  000001", "  .txt", "    violets"]
    assert capsys.readouterr().out.splitlines()[-6:] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poem", "poem.txt"]


def test_index(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("pack", "photos", "out") == 0
    for path in (tmp_path / "out").glob("*.[!t]*"):
        if path.suffix != ".tar":
            path.unlink()
    capsys.readouterr()
    assert call("index", "out", "--name", "mine") == 0
    assert capsys.readouterr().out == "out: 1 index file written, index.json written\n"
    assert call("check", "out") == 0


# What is typed -> the beginning of the answer.
MISTAKES = {
    "": "the following arguments are required: action, PATH",
    "pack photos": "data pack takes a source and a folder to write, but 1 came: photos.",
    "check a b": "data check takes one path, but 2 came: a b.",
    "chek a": "argument action: invalid choice: 'chek'",
    "check a --val 0.1": "--val belongs to data pack, not to data check.",
    "pack a b --n 3": "--n belongs to data show, not to data pack.",
    "show a --name x": "--name belongs to data pack, not to data show.",
    "pack a b --val 2": "argument --val: '2' is not a share from 0 to 1. Type for example 0.05.",
    "pack a b --shard-mib 0": "argument --shard-mib: '0' is not a number above 0.",
    "pack a b --sizes 3": "unrecognized arguments: --sizes 3. Did you mean --size?",
    "pack a b --kind zip": "argument --kind: invalid choice: 'zip'",
    "pack nowhere out": "nowhere does not exist. Type the folder or file to pack.",
    "check nowhere": "nowhere does not exist. Type a folder of shards (.tar), one shard, or a quoted pattern",
    "check photos": "photos names no shard. Type a folder of shards",
    "pack photos photos/out": "{cwd}/photos/out and photos lie inside one another.",
    "pack photos out --strict": "--strict: 2 of 42 inputs were refused (2 not an image). Nothing was published.",
    "pack photos out --kind mnist": "photos holds 0 idx files of images (), expected one for training",
    "pack photos photos/ant/0.png": "{cwd}/photos/ant/0.png and photos lie inside one another.",
    "index photos/ant/0.png": "photos/ant/0.png is not a folder.",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(MISTAKES[words].format(cwd=tmp_path))
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_unwritable_places(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert call("pack", "photos", "file") == 2
    assert "file is a file. Type the folder that the shards go to" in capsys.readouterr().err
    assert call("pack", "photos", "file/out") == 2
    assert "cannot write to" in capsys.readouterr().err
    assert call("pack", "photos", "out") == 0
    capsys.readouterr()
    assert call("show", "out", "--out", "file/x.png") == 2
    assert "cannot write file/x.png: Not a directory. Name another file with --out FILE." in capsys.readouterr().err


def test_the_words_are_those_of_the_code() -> None:
    from datamodules.inputs.accept import MAX_PIXELS
    from datamodules.inputs.detect import KINDS
    from datamodules.inputs.entries import Choices
    from datamodules.pack import Recipe

    assert tuple(KINDS) == dataverb.KINDS
    args = verbs.parse("data", ["pack", "a", "b"])
    assert args.max_pixels == MAX_PIXELS
    recipe = Recipe("b")
    for name in Recipe.__dataclass_fields__:
        if name != "name":
            assert getattr(args, name) == getattr(recipe, name), name
    assert (args.max_bytes, args.text_field) == (Choices.max_bytes, Choices.text_field)
    assert verbs.parse("data", ["pack", "a", "b", "--extensions", "py,.pyi"]).extensions == (".py", ".pyi")


def test_progress_in_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 1.0, 2.0, 12.0, 13.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with data.Bar() as bar:
        for done in (1, 2, 23, 24, 40):
            bar("packing", done, 40, "2 shards")
    assert capsys.readouterr().err.splitlines() == [
        "packing: 23 of 40, 2/s, 8 s left; 2 shards",
        "packing: 40 of 40, 1/s, 0 s left; 2 shards",
    ]


def test_interrupted_pack_continues(photos: Path, tmp_path: Path) -> None:
    """Ctrl-C ends with 75 and leaves nothing under the name; the same command goes on."""
    for number in range(40, 1500):
        shutil.copy(photos / "ant" / "0.png", photos / "bee" / f"{number}.png")
    command = [sys.executable, "-m", "platform", "data", "pack", str(photos), "out"]
    command += ["--per-shard", "50", "--duplicates", "keep", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / ".out.pack" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.is_file() and journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.strip().endswith("interrupted; the same command continues")
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "finished by an earlier attempt" in done.stdout
    assert "1500 written + 2 refused = 1502 seen" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]
