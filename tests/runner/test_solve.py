"""``evaluate --problems``: asked for twice before anything runs, and counted right."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from datamodules.tokenizers import Bytes
from lightningmodules.shared.codecs import Tokens
from lightningmodules.shared.conditioning import Condition
from platform import cli, solve
from platform.runs import METRICS


def request(file: Path, **changes: object) -> argparse.Namespace:
    given = {"problems": str(file), "answers": 4, "k": [1, 4], "timeout": 5, "allow_execution": True}
    return argparse.Namespace(**{**given, **changes})


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    file = tmp_path / "problems.jsonl"
    rows = [
        {"task_id": "add", "prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3"},
        {"task_id": "long", "prompt": "# " + "x" * 200 + "\n", "test": "def check(f):\n    pass"},
    ]
    file.write_text("".join(json.dumps(row | {"entry_point": "add"}) + "\n" for row in rows))
    return file


def writer(length: int = 100, codec: Tokens | None = None) -> SimpleNamespace:
    """A model whose every second answer is right, and is followed by the next document of its row."""
    codec = codec or Tokens(Bytes(), length)
    bodies = ["    return a + b\n", "    return a - b\n"]

    def sample(seeds: list[int], condition: Condition, **settings: object) -> torch.Tensor:
        assert condition.prompt is not None
        rows = torch.full((len(seeds), length), ord("!"))
        for row, prompt, seed in zip(rows, condition.prompt, seeds, strict=True):
            text = [*prompt.tolist(), *codec.tokenizer.encode(bodies[seed % 2]), codec.tokenizer.eos]
            row[: len(text)] = torch.tensor(text)
        return rows

    facts = {"updates": 7, "active_weights": "ema", "device": "cpu"}
    return SimpleNamespace(codec=codec, sample=sample, to=lambda device: None, **facts)


def written(folder: Path) -> list[dict[str, str]]:
    """The rows behind the first line."""
    (file,) = folder.glob("problems-problems-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()][1:]


def test_counts(problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solve.run(writer(), {}, request(problems), tmp_path / "out")
    said = capsys.readouterr().out
    assert "2 problems, 1 of them with a prompt longer than the model reads, 4 answers each" in said
    assert "pass@1    0.2500" in said  # half of one problem's answers, none of the other's
    assert "pass@4    0.5000" in said
    rows = written(tmp_path / "out")
    assert [row["status"] for row in rows] == ["passed", "failed", "passed", "failed", "prompt too long"]
    assert rows[0]["answer"] == "    return a + b\n"


def test_a_prompt_that_does_not_come_back_the_same(problems: Path, tmp_path: Path) -> None:
    class Loud(Bytes):
        """Like a tokenizer that normalises, and drops a space that stands first."""

        def decode(self, tokens: object) -> str:
            return super().decode(tokens).removeprefix(" ").replace("add", "ADD")

    solve.run(writer(codec=Tokens(Loud(), 100)), {}, request(problems), tmp_path / "out")
    assert written(tmp_path / "out")[0]["answer"] == "    return a + b\n"


def test_answers_are_drawn_a_few_at_a_time(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    model = writer()
    sample = model.sample
    model.sample = lambda seeds, condition, **settings: asked.append(seeds) or sample(seeds, condition)
    monkeypatch.setattr(solve, "AT_ONCE", 3)
    solve.run(model, {}, request(problems), tmp_path / "out")
    assert asked == [[0, 1, 2], [3]]


def test_an_interrupted_measurement_goes_on(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    problems.write_text("".join(line + "\n" for line in [*problems.read_text().splitlines()] * 2))
    solve.run(writer(), {}, request(problems), out)
    (file,) = out.glob("problems-*.jsonl")
    whole = file.read_bytes()
    file.unlink()

    def interrupted(after: int) -> SimpleNamespace:
        model, calls, sample = writer(), iter(range(after)), writer().sample
        model.sample = lambda *given, **more: sample(*given, **more) if next(calls, None) is not None else 1 / 0
        return model

    with pytest.raises(ZeroDivisionError):
        solve.run(interrupted(after=1), {}, request(problems), out)
    assert not file.exists()
    (part,) = out.glob("problems-*.part")
    rows = part.read_bytes().splitlines(keepends=True)
    assert len(rows) == 1 + 4 + 1
    for torn in (b"".join(rows) + rows[1] + rows[2], b"".join(rows) + rows[1][:9]):
        part.write_bytes(torn)
        capsys.readouterr()
        solve.run(interrupted(after=1), {}, request(problems), out)
        assert "2 of 4 problems are in" in capsys.readouterr().out
        assert file.read_bytes() == whole
        assert not part.exists()
        file.unlink()
    part.write_bytes(b"".join(rows))
    for change in ({"answers": 5}, {"timeout": 6}):
        with pytest.raises(ZeroDivisionError):
            solve.run(interrupted(after=1), {}, request(problems, **change), out)
    with pytest.raises(ZeroDivisionError):
        solve.run(interrupted(after=1), {"steps": 2}, request(problems), out)
    assert part.read_bytes() == b"".join(rows)


def test_every_measurement_is_kept(problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings in ({}, {"steps": 2}):
        solve.run(writer(), settings, request(problems), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("problems-*.jsonl"))) == 2
    solve.run(writer(), {}, request(problems, k=[2]), tmp_path / "out")
    assert "holds them already" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [(row["tag"], row["value"]) for row in rows] == [
        *[("metrics/pass@1", 0.25), ("metrics/pass@4", 0.5)] * 2,
        ("metrics/pass@2", pytest.approx(5 / 12)),
    ]
    assert [row["settings"] for row in rows] == [{}, {}, {"steps": 2}, {"steps": 2}, {}]


def test_the_same_command_runs_once(problems: Path, tmp_path: Path) -> None:
    model, sample = writer(), writer().sample

    def twice(*given: object, **more: object) -> torch.Tensor:
        with pytest.raises(ValueError, match="written by the same command"):
            solve.run(writer(), {}, request(problems), tmp_path / "out")
        return sample(*given, **more)

    model.sample = twice
    solve.run(model, {}, request(problems), tmp_path / "out")
    assert len(written(tmp_path / "out")) == 5


def test_nothing_runs_unasked(problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "no-such-run", "--problems", str(problems)]) == 2
    assert "add --allow-execution" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--k 9 needs as many answers"):
        solve.check(request(problems, k=[9]))
    with pytest.raises(ValueError, match="--scorer is not measured together with --problems"):
        solve.check(request(problems, scorer="somewhere"))
    problems.write_text(json.dumps({"task_id": "a", "text": "b", "test_list": []}) + "\n")
    with pytest.raises(ValueError, match="line 1: ValueError: test_list is empty"):
        solve.check(request(problems))
    row = {"task_id": "a", "prompt": None, "test": "", "entry_point": "f"}
    problems.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="prompt is None, not a string"):
        solve.check(request(problems))
    problems.write_text(json.dumps(row | {"prompt": "a\u2028b"}, ensure_ascii=False) + "\n")
    solve.check(request(problems))
    with pytest.raises(ValueError, match="a model that writes text"):
        solve.run(SimpleNamespace(codec=object()), {}, request(problems), problems.parent)
