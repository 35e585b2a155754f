"""Generated programs: what passes, what fails, and what they cannot do."""

import json
import os
import resource
import tempfile
import time
from pathlib import Path

import pytest

from callbacks.features import execution
from callbacks.features.execution import FAILED, PASSED, TIMED_OUT


def outcome(source: str, **limits) -> str:
    return execution.run(source, **{"timeout_sec": 5.0, **limits}).status


def test_a_right_program_passes_and_a_wrong_one_fails():
    assert outcome("import math\nassert math.sqrt(4) == 2") == PASSED
    assert outcome("assert 1 == 2") == FAILED
    assert outcome("def f(:") == FAILED


def test_leaving_early_does_not_count():
    for way in ("raise SystemExit(0)", "import os\nos._exit(0)"):
        assert outcome(f"{way}\nassert False") == FAILED


def test_the_order_of_a_set_is_the_same_each_time():
    assert outcome("import sys\nassert not sys.flags.hash_randomization") == PASSED
    assert outcome("import sys\nassert sys.flags.safe_path and sys.flags.no_user_site") == PASSED


def test_a_program_without_end_is_killed():
    begin = time.monotonic()
    assert outcome("while True: pass", timeout_sec=1.0) == TIMED_OUT
    assert time.monotonic() - begin < 4


@pytest.mark.parametrize(
    "source",
    [
        "x = bytearray(3 << 30)",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import socket\nsocket.socket()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.fork()",
        "import os\nos.system('true')",
        "import ctypes\nctypes.CDLL(None)",
        "open('/etc/passwd').read()",
        "import os\nos.listdir('/')",
        "import os\nassert os.environ.get('SECRET')",
        "assert input()",
    ],
)
def test_what_a_program_cannot_do(source, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert outcome(source) == FAILED


def test_files_stay_in_the_temporary_folder(tmp_path: Path):
    target = tmp_path / "out"
    assert outcome(f"open({str(target)!r}, 'w')") == FAILED
    assert outcome(f"import os\nos.remove({str(Path(__file__))!r})") == FAILED
    assert not target.exists()
    assert Path(__file__).exists()
    assert outcome("open('own', 'w').write('x')\nassert open('own').read() == 'x'") == PASSED


@pytest.mark.parametrize(
    "source",
    [
        "import sqlite3\nsqlite3.connect({folder!r} + '/left').execute('create table t(x)')",
        "import os, sys\nwhere = os.open(sys.prefix, os.O_PATH | os.O_DIRECTORY)",
        "import os\nos.mkfifo({folder!r} + '/left')",
        "import os\nos.mknod('device', 0o60600, os.makedev(8, 0))",
        "import os\nos.chroot('.')",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "import sys\nimport multiprocessing.util as util\n"
        "util.spawnv_passfds(sys.executable.encode(), [b'p', b'-c', b'open(\"{folder}/left\", \"w\")'], [])",
        "import sys, _posixsubprocess\ndel sys.modules['_posixsubprocess']\nimport _posixsubprocess",
        "import _xxsubinterpreters",
    ],
)
def test_what_no_audit_event_tells_of(source, tmp_path: Path):
    assert outcome(source.format(folder=str(tmp_path))) == FAILED
    assert not list(tmp_path.iterdir())


def test_what_needs_no_rights_stays_possible():
    assert outcome("import subprocess, multiprocessing, signal, sqlite3, shelve, pdb, cmd") == PASSED
    assert outcome("import os\nos.mkdir('d')\nos.close(os.open('d/f', os.O_CREAT | os.O_WRONLY))") == PASSED


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("def f():\n    return 1\n[DONE]\n\nYou are an expert", "def f():\n    return 1\n"),
        ("def f():\n    return 1\nprint(f())\nassert f() == 2", "def f():\n    return 1"),
        ('def f():\n    return 1\n"""\nWrite another one.', "def f():\n    return 1"),
        ("def f():\n    return 1\ndef g(x):\n    return (x +", "def f():\n    return 1\n"),
        ("```python\ndef f():\n    return 1\ndef g(", "def f():\n    return 1\n"),
        ("```python\ndef f():\n    return (\n```\nmore", "def f():\n    return (\n"),
        ("It is\nno Python.", "It is\nno Python."),
    ],
)
def test_answers_that_stand_alone_end_with_the_solution(answer: str, kept: str):
    problem = execution.Problem("p", "", "tests()", stub=False)
    assert problem.program(answer) == f"{kept}\n\ntests()\n"


def test_a_folder_that_cannot_be_removed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    real = tempfile.TemporaryDirectory.cleanup

    def cleanup(folder: tempfile.TemporaryDirectory) -> None:
        real(folder)
        raise RecursionError("too deep")  # what Python before 3.13 says of a thousand folders inside one another

    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", cleanup)
    assert outcome("") == PASSED
    assert "could not be removed (too deep). Type: rm -r" in caplog.text


def test_numpy_starts_no_threads():
    """For anyone but root the import ends the program otherwise, and the tests of MBPP+ import it."""
    source = "import os, numpy\nassert os.environ['OPENBLAS_NUM_THREADS'] == '1'\nassert numpy.eye(2).sum() == 2"
    assert outcome(source, timeout_sec=30.0) == PASSED


def test_who_keeps_the_receipt_does_not_keep_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    child = tmp_path / "child.py"
    child.write_text(
        "import subprocess, sys\nsys.stdin.read()\nsleep = [sys.executable, '-c', 'import time; time.sleep(6)']\n"
        "subprocess.Popen(sleep, start_new_session=True, close_fds=False)\n"
    )
    monkeypatch.setattr(execution, "_CHILD", child)
    begin = time.monotonic()
    assert outcome("") == FAILED
    assert time.monotonic() - begin < 5


def test_what_a_program_says_does_not_fill_our_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = execution.run("import os\nwhile True: os.write(2, b'x' * (1 << 20))", timeout_sec=3.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert said.status == FAILED
    assert execution.run("raise ValueError('\u00e4' * 999 + 'end')").detail.endswith("\u00e4end")


def test_no_process_is_left(tmp_path: Path):
    before = set(os.listdir("/proc"))
    execution.run_all(["while True: pass"] * 2, timeout_sec=0.5)
    left = [pid for pid in set(os.listdir("/proc")) - before if pid.isdigit() and _ours(pid)]
    assert not left


def _ours(pid: str) -> bool:
    try:
        return "confined.py" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def test_problem_files(tmp_path: Path):
    human = {
        "task_id": "H/0",
        "prompt": "def add(a, b):\n",
        "test": "def check(f):\n    assert f(1, 2) == 3",
        "entry_point": "add",
    }
    mbpp = {"task_id": 7, "text": "Add two numbers.", "test_list": ["assert add(1, 2) == 3"]}
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(human) + "\n" + json.dumps(mbpp) + "\n")
    first, second = execution.problems(file)
    answers = [
        first.program("    return a + b\n\ndef other():\n    syntax error"),
        first.program("    return a - b\n"),
        second.program("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."),
    ]
    assert [result.status for result in execution.run_all(answers)] == [PASSED, FAILED, PASSED]
    file.write_text(json.dumps(mbpp | {"test": "assert add(0, 4) == 4"}) + "\n")
    (more,) = execution.problems(file)
    answers = [more.program(f"def add(a, b):\n    return {value}") for value in ("a + b", "3")]
    assert [result.status for result in execution.run_all(answers)] == [PASSED, FAILED]
    file.write_text('{"task_id": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        execution.problems(file)
