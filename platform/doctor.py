"""``doctor``: one line per prerequisite of this machine, ``ok`` or how to fix it."""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "generative-platform"
INSTALL = f"pip install -e {ROOT}"
GIB, MIB = 2**30, 2**20
DISK_GIB, MEMORY_GIB, SHARED_MIB, OPEN_FILES = 1, 2, 256, 1024  # below these, things that people try first go wrong


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: the prerequisite.
        good: whether it is met.
        text: what was found, or what to do.
        hard: nothing runs without it.
    """

    name: str
    good: bool
    text: str
    hard: bool = False

    def __str__(self) -> str:
        """The line as it is printed."""
        return f"{self.name:<14} {'ok  ' if self.good else 'fix:'} {self.text}"


def run(args: argparse.Namespace) -> int:
    """Print the findings as they come.

    Returns:
        0 when nothing that everybody needs is missing, else 1.
    """
    bad = []
    for check in CHECKS:
        for finding in check():
            print(finding, flush=True)
            if not finding.good:
                bad.append(finding)
    hard = [finding.name for finding in bad if finding.hard]
    if hard:
        print(f"nothing will run before this is fixed: {', '.join(hard)}")
    elif bad:
        print(f"ready; worth a look: {', '.join(finding.name for finding in bad)}")
    else:
        print("ready")
    return 1 if hard else 0


def python() -> Iterator[Finding]:
    """Version of the interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("python", good, found if good else f"this is {found}; use 3.11 or newer.", True)


def dependencies() -> Iterator[Finding]:
    """Presence and version of every package this project asks for."""
    for name, wanted in requirements().items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, False, f"not installed (>= {wanted} needed). {INSTALL}", True)
            continue
        good = release(found) >= release(wanted)
        text = f"{found} (>= {wanted})" if good else f"{found} is too old, >= {wanted} needed. {INSTALL}"
        yield Finding(name, good, text, True)


def requirements() -> dict[str, str]:
    """Name -> smallest version, as pyproject.toml or the installed wheel states them."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = [line for line in importlib.metadata.requires(DISTRIBUTION) or [] if "extra ==" not in line]
    matches = [re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines]
    return {match[1]: match[2] for match in matches if match}


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, ``2.13.0+cpu`` -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def command() -> Iterator[Finding]:
    """Whether ``python -m platform`` means this program in every folder, or prints the name of the system instead."""
    probe = "import platform; print(*getattr(platform, '__path__', ()))"
    found = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True, cwd="/").stdout.strip()
    if not found:
        yield Finding("command", False, f"python -m platform works in {ROOT} only. For every folder: {INSTALL}")
    elif not os.path.samefile(found, ROOT / "platform"):
        yield Finding("command", False, f"elsewhere python -m platform runs {found}. To change that: {INSTALL}")
    else:
        yield Finding("command", True, "python -m platform is this checkout in every folder")


def processor() -> Iterator[Finding]:
    """Cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding("cpu", True, f"{cores} cores" + (f", OMP_NUM_THREADS={threads}" if threads else ""))


def memory() -> Iterator[Finding]:
    """Memory that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    gib = next(int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith("MemAvailable"))
    good = gib >= MEMORY_GIB
    yield Finding("memory", good, f"{gib:.1f} GiB available" + ("" if good else f", {MEMORY_GIB} needed."))


def accelerator() -> Iterator[Finding]:
    """CUDA devices, bf16, NCCL."""
    if importlib.util.find_spec("torch") is None:
        return  # reported among the packages
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        reason = "CUDA_VISIBLE_DEVICES is empty" if hidden else f"torch {torch.__version__} sees no device"
        driver = shutil.which("nvidia-smi") is not None and not hidden
        good_text = f"none ({reason}); hardware=cpu and --tiny run without"
        fix = f"{reason}, but nvidia-smi is here. Install a CUDA build of torch (pytorch.org), or update the driver."
        yield Finding("cuda", not driver, fix if driver else good_text)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", True, f"{facts.name}, {facts.total_memory / GIB:.0f} GiB")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Finding("bf16", bf16, "supported" if bf16 else "these devices have no bf16 units. Use trainer.precision=32.")
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else ""
    yield Finding("nccl", nccl, version or "torch was built without NCCL; use one device, or another build of torch.")


def disk() -> Iterator[Finding]:
    """Space where runs are written."""
    gib = shutil.disk_usage(Path.cwd()).free / GIB
    fix = f"only {gib:.2f} GiB free in {Path.cwd()}. Free some, or write elsewhere with runs=FOLDER."
    yield Finding("disk", gib >= DISK_GIB, f"{gib:.1f} GiB free in {Path.cwd()}" if gib >= DISK_GIB else fix)


def shared_memory() -> Iterator[Finding]:
    """``/dev/shm``, which several processes on one machine talk through."""
    if not Path("/dev/shm").is_dir():
        return
    mib = shutil.disk_usage("/dev/shm").free / MIB
    good = mib >= SHARED_MIB
    fix = f"{mib:.0f} MiB free in /dev/shm, several processes need {SHARED_MIB}. In docker: --shm-size=8g"
    yield Finding("shared memory", good, f"{mib / 1024:.1f} GiB free in /dev/shm" if good else fix)


def open_files() -> Iterator[Finding]:
    """Files a process may hold open; each shard in use is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = soft == resource.RLIM_INFINITY
    good = infinite or soft >= OPEN_FILES
    allowed = hard if hard != resource.RLIM_INFINITY else 65536
    fix = f"limit of {soft}, {OPEN_FILES} needed. ulimit -n {min(allowed, 65536)}"
    yield Finding("open files", good, "no limit" if infinite else f"limit of {soft}" if good else fix)


def scheduler(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """SLURM variables, which decide how many processes a run waits for."""
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        yield Finding("slurm", True, "not inside a job")
        return
    tasks = environ.get("SLURM_NTASKS", "1")
    name = environ.get("SLURM_JOB_NAME", "")
    text = f"job {job} ({name}), {tasks} tasks, restarted {environ.get('SLURM_RESTART_COUNT', '0')} times"
    lonely = tasks != "1" and "SLURM_STEP_ID" not in environ and name not in ("bash", "interactive")
    fix = f"job {job} has {tasks} tasks but was not started by srun and would wait for the others. Use srun."
    yield Finding("slurm", not lonely, fix if lonely else text)


def board_server() -> Iterator[Finding]:
    """TensorBoard's fast loader, which forgets the points that an interrupted run wrote beyond its checkpoint."""
    good = importlib.util.find_spec("tensorboard_data_server") is not None
    yield Finding("board", good, "fast loader present" if good else "pip install tensorboard-data-server")


def cache() -> Iterator[Finding]:
    """Folder for prepared data."""
    folder = Path(os.environ.get("PLATFORM_CACHE") or Path.home() / ".cache" / "platform")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = f"cannot write {folder} ({error.strerror}). Set PLATFORM_CACHE to a folder of yours."
        yield Finding("cache", False, fix, True)
        return
    yield Finding("cache", True, f"{folder} is writable")


def version_control() -> Iterator[Finding]:
    """Git, which names the code of every run."""
    if shutil.which("git") is None:
        yield Finding("git", False, "not found; runs cannot note which code made them. Install git.")
        return
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    yield Finding("git", True, f"commit {commit}" if commit else f"present, but {ROOT} has no commit yet")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python,
    dependencies,
    command,
    processor,
    memory,
    accelerator,
    disk,
    shared_memory,
    open_files,
    scheduler,
    board_server,
    cache,
    version_control,
)
