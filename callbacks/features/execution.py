"""Run generated Python against the tests of a problem, shut off from the rest of the machine; nothing runs on import.

One process per program, in its own session, with an empty environment, in a temporary folder that is removed, without
standard input, network, further processes or access to files outside that folder, under limits of processor time,
memory and file size. This keeps accidents from spreading; it is no cage for a hostile program that exploits the
interpreter. Callers ask for the user's permission first.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from callbacks.features.text import parses

log = logging.getLogger(__name__)

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
_STOPS = ("\nclass ", "\ndef ", "\nif __name__", "\nprint(", "\n#", "\n@", "\nassert ")
_BEHIND = ("[DONE]", "\nassert ", "\nprint(", "\nif __name__", '\n"""')  # what follows a solution that stands alone
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # NumPy cannot be imported where it may start none
_CHILD = Path(__file__).with_name("confined.py")
_DETAIL = 300  # characters kept of a failing program's last words


@dataclass(frozen=True)
class Outcome:
    """What became of one program: ``passed``, ``failed`` or ``timed out``, and the last words of a failure."""

    status: str
    detail: str = ""


@dataclass(frozen=True)
class Problem:
    """A programming problem.

    Attributes:
        name: its ``task_id``.
        prompt: what the model continues.
        tests: code that raises unless the answer is right.
        stub: whether the answer continues the prompt's own code (HumanEval) or stands alone (MBPP).
    """

    name: str
    prompt: str
    tests: str
    stub: bool

    def program(self, answer: str) -> str:
        """The answer, cut where it ends, together with its tests."""
        return f"{self.prompt + _first_part(answer) if self.stub else _fenced(answer)}\n\n{self.tests}\n"


def run(source: str, *, timeout_sec: float = 5.0, memory_mib: int = 1024) -> Outcome:
    """Run one program in a process of its own.

    Args:
        source: Python source. It passes if it runs to its end: an early exit does not count.
        timeout_sec: wall-clock seconds, after which its process group is killed.
        memory_mib: address space.

    Returns:
        The outcome; nothing the program does raises here.
    """
    with _folder() as folder, tempfile.TemporaryFile() as errors:
        receipt, written = os.pipe()
        # not -I, which would ignore PYTHONHASHSEED: what hangs on the order of a set must come out the same each time
        options = ["-s", "-P", "-B"]
        command = [sys.executable, *options, str(_CHILD), str(max(1, round(timeout_sec + 1))), str(memory_mib)]
        process = subprocess.Popen(
            [*command, str(written)],
            cwd=folder,
            env={"PATH": "", "HOME": folder, "PYTHONHASHSEED": "0", **_ONE_THREAD},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,  # a file, which its limit keeps small; a pipe would be read into our memory without end
            pass_fds=[written],
            start_new_session=True,
        )
        os.close(written)
        try:
            process.communicate(source.encode("utf-8", "replace"), timeout=timeout_sec)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process)
        os.set_blocking(receipt, False)  # whoever else still holds the other end must not keep us waiting
        with os.fdopen(receipt, "rb", buffering=0) as pipe:
            finished = pipe.read(4) == b"done"
        said = _last_words(errors)
    if late:
        return Outcome(TIMED_OUT, f"longer than {timeout_sec:g} s")
    if process.returncode == 0 and finished:
        return Outcome(PASSED)
    if process.returncode == 0:
        return Outcome(FAILED, "ended before its tests did")
    return Outcome(FAILED, said or f"exit code {process.returncode}")


def run_all(programs: Sequence[str], *, timeout_sec: float = 5.0, memory_mib: int = 1024) -> list[Outcome]:
    """Run programs side by side, half as many as there are cores at a time, and return their outcomes in order."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return list(pool.map(lambda source: run(source, timeout_sec=timeout_sec, memory_mib=memory_mib), programs))


def problems(file: Path) -> list[Problem]:
    """Read a file of problems in the format of HumanEval or of MBPP, one JSON object per line.

    Raises:
        ValueError: it is missing or has another format; the message names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 inside a string, too
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). Give a HumanEval or MBPP file, unpacked.") from error
    found = [_problem(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ValueError(f"{file} holds no problem. Give a HumanEval or MBPP file: one JSON object per line.")
    return found


def _problem(file: Path, number: int, line: str) -> Problem:
    try:
        row: dict[str, Any] = json.loads(line)
        if "entry_point" in row:
            tests = f"{row['test']}\ncheck({row['entry_point']})"
            return Problem(str(row["task_id"]), _string(row, "prompt"), tests, stub=True)
        checks: Sequence[str] = row["test_list"]
        if not checks:
            raise ValueError("test_list is empty, and any answer would pass")
        setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
        prompt = f'"""\n{row.get("text") or _string(row, "prompt")}\n{chr(10).join(checks)}\n"""\n'
        more = row.get("test") or ""  # of MBPP+, whose test_list has the tests of MBPP alone
        return Problem(str(row["task_id"]), prompt, "\n".join([setup, *checks, more]), stub=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}, line {number}: {type(error).__name__}: {error}. Expected a JSON object with task_id, prompt, test"
            " and entry_point (HumanEval), or with task_id, text and test_list (MBPP)."
        ) from error


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, not a string")
    return value


def _first_part(answer: str, stops: Iterable[str] = _STOPS) -> str:
    """A continuation up to where a function's body ends."""
    ends = [at for stop in stops if (at := answer.find(stop)) >= 0]
    return answer[: min(ends)] if ends else answer


def _fenced(answer: str) -> str:
    """The first fenced block; where there is none, everything up to the end of the solution."""
    block = re.search(r"```(?:python)?\n(.*?)(```|\Z)", answer, re.DOTALL)
    if block and block[2]:
        return block[1]
    return _complete(block[1] if block else _first_part(answer, _BEHIND))


def _complete(source: str) -> str:
    """Python without the last lines that the end of the row cut off; as it is where nothing before them is Python."""
    lines = source.splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        if parses(part := "".join(lines[:count])):
            return part
    return source


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder; one that cannot be removed stays, and a warning says so."""
    folder = tempfile.TemporaryDirectory(prefix="program-")
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except (OSError, RecursionError) as error:  # a thousand folders inside one another, with Python before 3.13
            log.warning("%s stays, it could not be removed (%s). Type: rm -r %s", folder.name, error, folder.name)


def _last_words(errors: IO[bytes]) -> str:
    """What stands at the end of a file."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4 * _DETAIL))  # a character has at most four bytes
    return errors.read().decode("utf-8", "replace").strip()[-_DETAIL:]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of the program, its children included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
