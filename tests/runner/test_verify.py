"""``verify``: one line per quantity, and an exit code that can be trusted."""

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from platform import cli, verify


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    """A method that doubles its input; the metadata say how it goes wrong."""

    def check(tensors, metadata, path):
        fault = metadata.get("fault")
        if fault == "refused":
            raise ValueError("width is missing")
        for name in sorted(verify_names(tensors)):
            if fault == "forgets" and name == "out/b":
                continue
            if fault == "breaks" and name == "out/b":
                raise KeyError("state/weight")
            error = (2 * tensors["in/x"] - tensors[name]).abs().max()
            yield name, error, 1e-6

    def verify_names(tensors):
        return {name for name in tensors if name.startswith("out/")}

    module = ModuleType("toy_golden")
    module.check, module.references = check, verify_names
    monkeypatch.setitem(sys.modules, "toy_golden", module)
    monkeypatch.setattr(verify, "methods", lambda: {"toy": "toy_golden"})


@pytest.fixture
def write(tmp_path):
    def write(name="a", method="toy", value=2.0, outputs=("a", "b"), **metadata) -> str:
        tensors = {f"out/{key}": torch.full((3,), value) for key in outputs} | {"in/x": torch.ones(3)}
        if method:
            metadata["method"] = method
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata or None)
        return str(tmp_path / f"{name}.safetensors")

    return write


def run(*files: str) -> int:
    return cli.main(["verify", *files])


def test_agreement(write, capsys):
    file = write()
    assert run(file) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: toy",
        "  out/a  error         0  tolerance     1e-06  ok",
        "  out/b  error         0  tolerance     1e-06  ok",
        "  2 quantities, all ok",
    ]


@pytest.mark.parametrize("value", [2.1, float("nan"), float("inf")])
def test_difference(write, capsys, value):
    assert run(write(value=value)) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL\n") == 3  # two lines and the sum
    assert "ok" not in out


def test_what_was_not_checked_fails(write, capsys):
    assert run(write(fault="forgets")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("ok")
    assert lines[2:] == ["  out/b  not checked  FAIL", "  2 quantities, 1 FAIL"]


def test_a_comparison_that_breaks_off_fails(write, capsys):
    assert run(write(fault="breaks")) == 1
    out = capsys.readouterr().out
    assert "the comparison broke off: KeyError: 'state/weight'  FAIL" in out
    assert "out/b  not checked  FAIL" in out


def _truncate(file: str, write) -> None:
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: len(content) - 7])


UNREADABLE = {
    "truncated": (_truncate, "no readable safetensors file"),
    "garbage": (lambda file, write: Path(file).write_bytes(b"\x80\x02}q\x00."), "no readable safetensors file"),
    "empty": (lambda file, write: Path(file).write_bytes(b""), "no readable safetensors file"),
    "absent": (lambda file, write: Path(file).unlink(), "there is no such file"),
    "unknown method": (lambda file, write: write(method="toi"), "no method is called 'toi'. Did you mean toy? Known"),
    "no method": (lambda file, write: write(method=""), "its metadata has no key 'method'. Known methods: toy."),
    "no references": (lambda file, write: write(outputs=()), "holds no reference quantity of method toy"),
    "refused by the room": (lambda file, write: write(fault="refused"), "width is missing"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable(write, capsys, case):
    file = write()
    spoil, message = UNREADABLE[case]
    spoil(file, write)
    assert run(file) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{file}: cannot be replayed: ")
    assert message in err
    assert "Traceback" not in err


def test_all_files_are_compared_and_the_worst_counts(write, capsys):
    good, bad = write("good"), write("bad", value=3.0)
    assert run(good, bad) == 1
    assert run("absent", bad, good) == 2
    out = capsys.readouterr().out
    assert out.count("all ok") == out.count("2 FAIL") == 2


def test_methods_are_found_without_importing_the_rooms(tmp_path, monkeypatch):
    monkeypatch.undo()
    for room, text in {"one": 'METHODS = ("a", "b")', "two": 'METHODS: tuple[str, ...] = ("c",)', "three": ""}.items():
        folder = tmp_path / "lightningmodules" / room
        folder.mkdir(parents=True)
        (folder / "golden.py").write_text(f"import not_installed_anywhere\n{text}\n")
    one, two = "lightningmodules.one.golden", "lightningmodules.two.golden"
    assert verify.methods(tmp_path) == {"a": one, "b": one, "c": two}


def test_run_takes_several_files(write):
    assert verify.run(Namespace(files=[write("a"), write("b")], trace=False)) == 0
