"""Who may import whom, and other promises about the source files, read from the files themselves."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("platform", "datamodules", "lightningmodules", "callbacks", "experiments")
SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))

MATHS = {"torch", "numpy", "safetensors", "timm", "transformers"}
TRAINING = MATHS | {"lightning"}


@dataclass(frozen=True)
class Layer:
    """What the files of one part of the house may import beside the standard library."""

    others: set[str]
    ours: tuple[str, ...]


def layer(path: Path) -> Layer:
    """The rules for a file; the first words of its path decide."""
    top, *rest = path.with_suffix("").parts
    if top == "platform":
        if rest[0] == "_install":
            return Layer({"hatchling"}, ())
        others = TRAINING | {"hydra", "omegaconf", "yaml", "rich", "PIL", "tensorboard"}
        return Layer(others, ("platform", "lightningmodules.base", "lightningmodules.shared", "callbacks"))
    if top == "datamodules":
        others = TRAINING | {"webdataset", "torchdata", "PIL", "simplejpeg", "tokenizers"}
        lazily = {"sklearn", "datasets", "pyarrow"}  # by the functions that need them
        return Layer(others | lazily, ("datamodules",))
    if top == "callbacks":
        others = TRAINING | {"PIL", "rich", "tensorboard", "yaml", "mauve"}
        return Layer(others, ("callbacks", "lightningmodules.base", "lightningmodules.shared"))
    if top == "experiments":
        return Layer(set(), ())
    if len(rest) == 1:  # base.py
        return Layer(TRAINING, ("lightningmodules.shared",))
    if rest[0] == "shared":
        return Layer(MATHS, ("lightningmodules.shared",))
    room = f"lightningmodules.{rest[0]}"
    if rest[1] in ("network", "process", "sampler", "weights"):
        return Layer(MATHS, (room, "lightningmodules.shared"))
    return Layer(TRAINING, (room, "lightningmodules.shared", "lightningmodules.base"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module that a file imports, at its top or later."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                submodule = ROOT.joinpath(*base.split("."), alias.name)
                found = submodule.is_dir() or submodule.with_suffix(".py").is_file()
                yield node.lineno, f"{base}.{alias.name}" if found else base


def below(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def offences(path: Path) -> Iterator[str]:
    rules = layer(path)
    for line, name in imports(path):
        top = name.partition(".")[0]
        if name == "platform" and path.parts[0] != "platform":
            continue  # the functions of the standard library
        ours = top in PACKAGES
        if (
            top == "tests"
            or (below(name, rules.ours) if ours else top in rules.others | sys.stdlib_module_names) is False
        ):
            yield f"{path}:{line} imports {name}"


def test_import_rules():
    assert len(SOURCES) > 20
    assert [offence for path in SOURCES for offence in offences(path)] == []


@pytest.mark.parametrize(
    ("path", "statement", "allowed"),
    [
        ("lightningmodules/shared/x.py", "import lightning", False),
        ("lightningmodules/shared/x.py", "from lightningmodules.tarflow import network", False),
        ("lightningmodules/tarflow/network.py", "from lightningmodules.shared import attention", True),
        ("lightningmodules/tarflow/network.py", "from lightningmodules.base import GenerativeModule", False),
        ("lightningmodules/tarflow/module.py", "from lightningmodules import base", True),
        ("lightningmodules/tarflow/module.py", "def f():\n    import lightningmodules.other.network", False),
        ("lightningmodules/tarflow/module.py", "from platform import signals", False),
        ("lightningmodules/tarflow/module.py", "import platform", True),
        ("callbacks/x.py", "from lightningmodules.tarflow.module import TarFlow", False),
        ("datamodules/x.py", "import callbacks.records", False),
        ("platform/x.py", "from lightningmodules import tarflow", False),
        ("platform/x.py", "from . import cli", True),
        ("platform/x.py", "import wandb", False),
    ],
)
def test_the_rules_themselves(path, statement, allowed, tmp_path, monkeypatch):
    """The check above finds what it is meant to find."""
    for name in ("lightningmodules/shared/attention.py", "lightningmodules/tarflow/network.py", "platform/cli.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("lightningmodules/base.py", "platform/signals.py"):
        (tmp_path / name).touch()
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(statement + "\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert (not list(offences(Path(path)))) is allowed


def test_packages_do_nothing_when_imported():
    for path in SOURCES:
        if path.name == "__init__.py" and path != Path("platform/__init__.py"):
            body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            assert len(body) == 1, path
            assert isinstance(body[0], ast.Expr), path


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in SOURCES}
    assert [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_names_and_sizes():
    drawers = {"utils", "helpers", "common", "misc"}
    assert [str(path) for path in SOURCES + TESTS if path.stem in drawers] == []
    sizes = {str(path): (ROOT / path).read_text(encoding="utf-8").count("\n") for path in SOURCES + TESTS}
    assert {path: lines for path, lines in sizes.items() if lines > 500} == {}


def test_sources_are_ascii():
    assert [str(path) for path in SOURCES + TESTS if not (ROOT / path).read_bytes().isascii()] == []
