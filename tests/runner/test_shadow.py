"""Our ``platform`` is a strict superset of the standard library's module, at no cost."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

import platform

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(os.__file__).with_name("platform.py")

# Importing a submodule binds its name in the package, so none may be called like something of the standard library's
# module, in any Python that is supported: names that come and go between versions stand here.
TAKEN = {
    *("architecture", "collections", "freedesktop_os_release", "functools", "itertools", "java_ver", "libc_ver"),
    *("mac_ver", "android_ver", "ios_ver", "machine", "node", "os", "platform", "processor", "re", "release", "sys"),
    *("python_branch", "python_build", "python_compiler", "python_implementation", "python_revision", "python_version"),
    *("python_version_tuple", "subprocess", "system", "system_alias", "uname", "uname_result", "version"),
    *("win32_edition", "win32_is_iot", "win32_ver", "terse", "nonaliased"),
}

PROBE = """
import json, platform, sys
names = ["architecture", "libc_ver", "machine", "node", "platform", "processor", "python_branch", "python_build",
         "python_compiler", "python_implementation", "python_revision", "python_version", "python_version_tuple",
         "release", "system", "uname", "version", "freedesktop_os_release", "mac_ver", "win32_ver"]
facts = {name: repr(getattr(platform, name)()) for name in names}
print(json.dumps({"facts": facts, "names": dir(platform), "modules": sorted(sys.modules), "file": platform.__file__}))
"""


def probe(cwd: Path, code: str = PROBE) -> dict:
    """Run code in a fresh interpreter without site-packages, in the checkout or outside."""
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def stdlib() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stdlib_platform", STDLIB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_same_names_and_answers_in_a_fresh_interpreter(tmp_path):
    ours, theirs = probe(ROOT), probe(tmp_path)
    assert ours["file"] == str(ROOT / "platform" / "__init__.py")
    assert theirs["file"] == str(STDLIB)
    assert set(ours["names"]) == {*theirs["names"], "__path__"}
    assert ours["facts"] == theirs["facts"]
    extra = {name.partition(".")[0] for name in set(ours["modules"]) - set(theirs["modules"])}
    assert extra <= {"importlib"}  # least of all torch


def test_our_version_in_this_process_has_every_name(stdlib):
    assert [name for name in dir(stdlib) if not hasattr(platform, name)] == []


def test_functions_see_patches():
    assert platform.system.__globals__ is vars(platform)
    with mock.patch("platform.uname", return_value=mock.Mock(system="Plan 9")):
        assert platform.system() == "Plan 9"
    with mock.patch("platform.system", return_value="BeOS"):
        assert platform.system() == "BeOS"
    assert platform.system() == os.uname().sysname


def test_results_can_be_pickled():
    assert pickle.loads(pickle.dumps(platform.uname())) == platform.uname()


def test_reload_turns_the_stdlib_module_into_the_package(tmp_path):
    code = f"""
import importlib, json, sys
import platform
before, system = platform, platform.system
assert not hasattr(platform, "__path__")
sys.path.insert(0, {str(ROOT)!r})
importlib.reload(platform)
import platform.suggest
print(json.dumps([platform is before, platform.system is system, platform.__file__, list(platform.__path__)]))
"""
    same, untouched, file, path = probe(tmp_path, code)
    assert same
    assert untouched
    assert Path(file).parent == Path(path[0]) == ROOT / "platform"


def test_import_costs_nothing_noticeable(tmp_path):
    code = "import time; t = time.perf_counter(); import platform; print(1e3 * (time.perf_counter() - t))"
    ours, theirs = (min(probe(place, code) for _ in range(5)) for place in (ROOT, tmp_path))
    assert ours < theirs + 15, f"{ours:.1f} ms against {theirs:.1f} ms"


def test_no_submodule_takes_a_name_of_the_stdlib(stdlib):
    public = {name for name in dir(stdlib) if not name.startswith("__")}
    assert public - TAKEN == {name for name in public if name.startswith("_")}, "TAKEN misses names of this Python"
    mine = {path.stem for path in (ROOT / "platform").iterdir() if not path.name.startswith("__")}
    assert len(mine) > 5
    assert mine & (TAKEN | public) == set()
