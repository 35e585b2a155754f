"""Every way of starting the program reaches the program, never the standard library's ``platform``.

A small copy of the checkout with a room of its own, whose ``bench`` tells where it runs, is started in two
environments: one without any trace of us, and one after ``pip install -e``.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BENCH = '''
"""Tells where it runs."""
import importlib.util, json, multiprocessing, os, sys
from pathlib import Path


def where(_=None):
    import platform
    import platform.suggest
    strangers = [name for name in ("suggest", "signals") if importlib.util.find_spec(name)]
    return [platform.system(), list(platform.__path__), platform.suggest.__file__, strangers, __file__]


def workers():
    found = []
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found += pool.map(where, [0])
    return found


def lightning(folder):
    note = Path(folder, os.environ.get("LOCAL_RANK", "0"))
    note.write_text(json.dumps(where()))
    if "LOCAL_RANK" not in os.environ:
        from lightning.fabric.plugins.environments import LightningEnvironment
        from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
        launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
        launcher.launch(lambda: [process.wait() for process in launcher.procs])
    return where()


def main(argv):
    line = json.dumps(globals()[argv[0]](*argv[1:]))
    os.write(1, f"{line}\\n".encode())  # in one piece: torchrun's children write to the same pipe without a buffer
    return 0
'''


class Environment:
    """A virtual environment that sees the packages of the one running the tests, but not its start-up hooks."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = str(folder / "bin" / "python")
        paths = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
        parents = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.packages / "parent.pth").write_text("\n".join(parents) + "\n")

    def run(self, *words: str, cwd: Path, code: int = 0, **extra: str) -> str:
        """Standard output of a command that must end with this code."""
        left_out = ("PYTHON", "PIP_", "COVERAGE")
        environ = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
        words = (self.python, *words)
        done = subprocess.run(words, cwd=cwd, env=environ | extra, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "platform", folder / "platform", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("# a copy\n")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_it.py").write_text(
        "import platform.cli\n\n\ndef test_it():\n    assert platform.cli.main\n"
    )
    (folder / "lightningmodules" / "probe").mkdir(parents=True)
    (folder / "lightningmodules" / "__init__.py").touch()
    (folder / "lightningmodules" / "probe" / "bench.py").write_text(textwrap.dedent(BENCH))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory, checkout) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"))
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--editable", "."]
    environment.run(*pip, cwd=checkout)
    return environment


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder with packages of the same names, which must not win."""
    for name in ("callbacks", "lightningmodules", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a stranger')\n")
    return tmp_path


def answered(output: str, checkout: Path) -> bool:
    """Whether the room answered, from this checkout."""
    system, path, module, strangers, room = json.loads(output)
    assert system == os.uname().sysname
    assert path == [str(checkout / "platform")]
    assert module == str(checkout / "platform" / "suggest.py")
    assert strangers == [], "the package folder itself must not be on the path"
    return room == str(checkout / "lightningmodules" / "probe" / "bench.py")


WHERE = ("bench", "probe", "where")


@pytest.mark.parametrize("form", [("-m", "platform"), ("platform",), ("platform/__main__.py",)], ids=" ".join)
def test_from_the_checkout_without_installation(bare, checkout, form):
    assert answered(bare.run(*form, *WHERE, cwd=checkout), checkout)


@pytest.mark.parametrize("flags", [[], ["-P"], ["-I"]], ids=["plain", "-P", "-I"])
def test_by_path_from_anywhere_without_installation(bare, checkout, elsewhere, flags):
    assert answered(bare.run(*flags, str(checkout / "platform"), *WHERE, cwd=elsewhere), checkout)


def test_by_relative_path_and_through_a_link(bare, checkout, elsewhere):
    relative = os.path.relpath(checkout / "platform", elsewhere)
    assert answered(bare.run(relative, *WHERE, cwd=elsewhere), checkout)
    (elsewhere / "link").symlink_to(checkout / "platform")
    assert answered(bare.run("link", *WHERE, cwd=elsewhere), checkout)


def test_by_path_although_a_startup_file_imports_platform_first(bare, checkout, elsewhere, tmp_path_factory):
    early = tmp_path_factory.mktemp("early")
    (early / "sitecustomize.py").write_text("import platform\n")
    output = bare.run(str(checkout / "platform"), *WHERE, cwd=elsewhere, PYTHONPATH=str(early))
    assert answered(output, checkout)


def test_the_guard_of_batch_scripts(bare, checkout, elsewhere):
    guard = "import platform,sys; sys.exit(0 if hasattr(platform,'__path__') else 'not in the checkout')"
    bare.run("-c", guard, cwd=checkout)
    bare.run("-c", guard, cwd=elsewhere, PYTHONPATH=str(checkout))
    bare.run("-c", guard, cwd=elsewhere, code=1)


@pytest.mark.parametrize("flags", [[], ["-I"], ["-P"]], ids=["plain", "-I", "-P"])
@pytest.mark.parametrize("module", ["platform", "platform.__main__"])
def test_installed_from_any_folder(installed, checkout, elsewhere, flags, module):
    assert answered(installed.run(*flags, "-m", module, *WHERE, cwd=elsewhere), checkout)


@pytest.mark.parametrize("folder", ["elsewhere", "checkout"])
def test_installed_with_safe_path(installed, checkout, folder, request):
    cwd = request.getfixturevalue(folder)
    assert answered(installed.run("-m", "platform", *WHERE, cwd=cwd, PYTHONSAFEPATH="1"), checkout)


def test_installed_although_a_startup_file_imports_platform_first(installed, checkout, elsewhere, tmp_path_factory):
    early = tmp_path_factory.mktemp("early")
    (early / "sitecustomize.py").write_text("import platform\n")
    assert answered(installed.run("-m", "platform", *WHERE, cwd=elsewhere, PYTHONPATH=str(early)), checkout)
    first = installed.packages / "AAA_first.pth"  # read before our own start-up file
    first.write_text("import platform\n")
    try:
        assert answered(installed.run("-m", "platform", *WHERE, cwd=elsewhere), checkout)
    finally:
        first.unlink()


def test_installation_leaves_the_stdlib_module_alone(installed, elsewhere):
    code = "import sys; print('platform' in sys.modules); import platform; print(platform.__file__, platform.__doc__)"
    first, second = installed.run("-c", code, cwd=elsewhere).split("\n", 1)
    assert first == "False", "the hook must wait until somebody imports platform"
    assert second.startswith(str(Path(os.__file__).with_name("platform.py")))


def test_started_by_runpy(installed, checkout, elsewhere):
    code = f"import runpy, sys; sys.argv[1:] = {list(WHERE)!r}; runpy.run_module('platform', run_name='__main__')"
    assert answered(installed.run("-c", code, cwd=elsewhere), checkout)


def test_no_argument_prints_what_the_stdlib_prints(bare, installed, checkout, elsewhere):
    for words in ([], ["terse"], ["nonaliased", "--terse"]):
        expected = bare.run("-m", "platform", *words, cwd=elsewhere)
        assert bare.run("-m", "platform", *words, cwd=checkout) == expected
        assert installed.run("-m", "platform", *words, cwd=elsewhere) == expected
    assert os.uname().sysname in expected


def test_torchrun(installed, checkout, elsewhere):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "platform", *WHERE]
    output = installed.run(*words, cwd=elsewhere)
    for line in output.splitlines():
        assert answered(line, checkout)
    assert len(output.splitlines()) == 2


@pytest.mark.parametrize("name", ["bare", "installed"])
def test_forked_and_spawned_workers(name, checkout, elsewhere, request):
    environment = request.getfixturevalue(name)
    start = [str(checkout / "platform")] if name == "bare" else ["-m", "platform"]
    for worker in json.loads(environment.run(*start, "bench", "probe", "workers", cwd=elsewhere)):
        assert answered(json.dumps(worker), checkout)


def test_processes_started_by_lightning(bare, checkout, elsewhere, tmp_path_factory):
    # the hardest form: outside the checkout and not installed, the child is `python -m platform.__main__`
    notes = tmp_path_factory.mktemp("notes")
    bare.run(str(checkout / "platform"), "bench", "probe", "lightning", str(notes), cwd=elsewhere)
    assert sorted(file.name for file in notes.iterdir()) == ["0", "1"]
    assert answered((notes / "1").read_text(), checkout)


@pytest.mark.parametrize("name", ["bare", "installed"])
@pytest.mark.parametrize("form", ["program", "module"])
def test_pytest(name, form, checkout, tmp_path_factory, request):
    environment = request.getfixturevalue(name)
    script = tmp_path_factory.mktemp("bin") / "pytest"  # what pip writes for the program, but for its first line
    script.write_text("import sys\nfrom pytest import console_main\nsys.exit(console_main())\n")
    start = [str(script)] if form == "program" else ["-m", "pytest"]
    output = environment.run(*start, "-q", "-p", "no:cacheprovider", cwd=checkout)
    assert "1 passed" in output
