"""The run folder: what lies in it, who may write to it, where a run continues, and weights to use from it."""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from platform import config as configs
from platform.verbs import PROGRAM

CONFIG, LOCK, EXIT, METRICS, PROVENANCE = "config.yaml", "lock", "exit.json", "metrics.jsonl", "provenance.json"
CHECKPOINTS, BOARD, COMMAND = "checkpoints", "board", "command.txt"
OLD = ".old"  # a checkpoint while a newer one of the same step takes its place
WEIGHTS = "weights.safetensors"
DRIVER = Path("/proc/driver/nvidia/version")
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "lightning", "torchdata", "webdataset", "hydra-core", "numpy", "tensorboard")


class Run:
    """One run folder.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step-<updates>`` checkpoints."""
        return self.path / CHECKPOINTS

    def steps(self) -> list[int]:
        """Updates of every finished-looking checkpoint, ascending; unfinished ones (``.tmp``) are left out."""
        return sorted({step_of(folder) for folder in self._saved()})

    def _saved(self) -> list[Path]:
        folders = [folder for folder in self.checkpoints.glob("step-*") if folder.is_dir()]
        return [folder for folder in folders if folder.name[5:].removesuffix(OLD).isdigit()]

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of one step; the one before it, if a kill came while it was being replaced."""
        folder = self.checkpoints / f"step-{step:08d}"
        old = folder.with_name(folder.name + OLD)
        return old if old.is_dir() and not folder.is_dir() else folder

    def latest(self) -> Path | None:
        """Newest checkpoint whose every byte is as it was written; damaged ones are named on the way."""
        from platform.strategy import what_is_wrong

        for step in reversed(self.steps()):
            folder = self.checkpoint(step)
            damage = what_is_wrong(folder)
            if damage is None:
                return folder
            print(f"{folder} is damaged ({damage}); trying the one before.", file=sys.stderr)
        return None

    def prune(self, keep: int, milestones: frozenset[int]) -> None:
        """Delete all but the newest ``keep`` checkpoints and the milestones; only after a newer one is committed."""
        for step in self.steps()[:-keep]:
            if step not in milestones:
                shutil.rmtree(self.checkpoint(step), ignore_errors=True)

    def tidy(self, step: int) -> None:
        """Before a run goes on from ``step``: remove what killed saves left, rename damaged checkpoints beyond it.

        Under their own names these would count as the newest, and :meth:`prune` would delete good ones instead.
        """
        for unfinished in self.checkpoints.glob("step-*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for folder in self._saved():
            if step_of(folder) > step:
                number = next(n for n in range(1, 10_000) if not Path(f"{folder}.damaged{n}").exists())
                folder.rename(f"{folder}.damaged{number}")
                print(f"{folder} is now {folder.name}.damaged{number}.", file=sys.stderr)

    def has_history(self, cfg: Any) -> bool:
        """Whether to begin anew would lose numbers: it was completed or continued, or logged updates of other settings.

        One of the same settings that was killed before its first checkpoint only logs the same once more.
        """
        file = self.path / PROVENANCE
        attempts = json.loads(file.read_text()) if file.is_file() else []
        if (self.ending() or {}).get("reason") == "complete" or any(facts.get("start_step") for facts in attempts):
            return True
        file = self.path / CONFIG
        if file.is_file() and not configs.difference(configs.load(file), cfg):
            return False
        file = self.path / METRICS
        lines = file.read_text().splitlines() if file.is_file() else []
        return any(not line.startswith('{"step": 0,') for line in lines)  # the last may be broken off

    def set_aside(self) -> None:
        """Rename what lies in the folder out of the way; nothing is deleted."""
        number = next(n for n in range(1, 10_000) if not self.path.with_name(f"{self.path.name}.old{n}").exists())
        old = self.path.with_name(f"{self.path.name}.old{number}")
        old.mkdir()
        for item in self.path.iterdir():
            if item.name != LOCK:
                item.rename(old / item.name)
        print(f"What was in {self.path} is now in {old}.", file=sys.stderr)

    def check_config(self, cfg: Any) -> None:
        """Refuse to continue a run under other settings.

        Raises:
            ValueError: a setting that shapes the result differs from the run's own.
        """
        changes = configs.difference(configs.load(self.path / CONFIG), cfg)
        if not changes:
            return
        listed = "\n".join(f"  {key}: {old} in {self.path / CONFIG}, now {new}" for key, old, new in changes[:10])
        key, old, _ = changes[0]
        raise ValueError(
            f"{self.path} holds a run with other settings:\n{listed}\n"
            f"The same run: leave {key} at {old}. Another run beside it: add tag=NAME."
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder while writing to it. The system lets go of it when this process ends, however it ends.

        Raises:
            ValueError: another live process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / LOCK).touch()
        except OSError as error:
            raise ValueError(
                f"runs={self.path.parent}: {self.path} cannot be written ({error.strerror}). Type runs=FOLDER with a"
                " folder of yours."
            ) from None
        with (self.path / LOCK).open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(self._held(stream)) from None
            except OSError as error:  # some network file systems are mounted without locks
                warnings.warn(
                    f"{stream.name} cannot be locked ({error}); take care to start this run once.", stacklevel=3
                )
            stream.truncate(0)
            job = os.environ.get("SLURM_JOB_ID")
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": time.time()}, stream)
            stream.flush()
            yield

    def _held(self, stream: IO[str]) -> str:
        stream.seek(0)
        try:
            holder = json.loads(stream.read())
            job = f" (job {holder['job']})" if holder["job"] else ""
            seconds = max(0, int(time.time() - holder["since"]))
            who = f"process {holder['pid']} on {holder['host']}{job}, started {seconds} s ago"
        except ValueError:
            who = "another process"
        return (
            f"{self.path} is being written by {who}; it holds {stream.name}. One run folder takes one writer. Wait for"
            " it, stop it, or start another run with tag=NAME."
        )

    def truncate_metrics(self, step: int, validated: bool) -> None:
        """Drop rows that a killed attempt wrote after its last checkpoint.

        Args:
            step: updates of the checkpoint the run continues from; 0 for a run that begins again, which keeps no row.
            validated: False when the validation of ``step`` will be run again, so its rows go too.
        """
        file = self.path / METRICS
        if not file.is_file():
            return
        kept = []
        for line in file.read_text().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line the killed process was writing
            measured = row.get("validation", False) or row["tag"].startswith("val/")
            if row["step"] < step or (0 < row["step"] == step and (validated or not measured)):
                kept.append(line)
        _replace(file, "".join(kept))

    def rows(self) -> list[dict[str, Any]]:
        """Everything in ``metrics.jsonl``, oldest first; none before the first row."""
        file = self.path / METRICS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def record_attempt(self, facts: dict[str, Any]) -> None:
        """Append one attempt to the provenance file: command, commit, versions, machine, where it started.

        Uncommitted changes of the checkout go to ``changes_<attempt>.diff`` beside it.
        """
        file = self.path / PROVENANCE
        attempts = json.loads(file.read_text()) if file.is_file() else []
        if changes := _git(ROOT, "diff", "HEAD"):
            facts["diff"] = f"changes_{len(attempts) + 1}.diff"
            _replace(self.path / facts["diff"], changes + "\n")
        _replace(file, json.dumps([*attempts, facts], indent=1))
        _replace(self.path / COMMAND, f"{PROGRAM} {shlex.join(sys.argv[1:])}\n")

    def finish(self, reason: str, code: int, step: int) -> None:
        """Say why this attempt ended."""
        _replace(self.path / EXIT, json.dumps({"reason": reason, "code": code, "step": step, "time": time.time()}))

    def ending(self) -> dict[str, Any] | None:
        """The last attempt's ending, or None."""
        file = self.path / EXIT
        return json.loads(file.read_text()) if file.is_file() else None


def provenance(start: int = 0, world_size: int = 1, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Facts about this attempt that are not in its configuration.

    Args:
        start: updates of the checkpoint it continues from, 0 for a new run.
        world_size: number of ranks.
        data: ``datamodule.describe()``, with the fingerprint of the shards; None when no data is read.
    """
    import torch

    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "command": sys.argv,
        "commit": _git(ROOT, "rev-parse", "HEAD"),
        "dirty": bool(_git(ROOT, "status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
        "host": socket.gethostname(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "driver": DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else None,
        "data": data,
        "slurm": {key: value for key, value in os.environ.items() if key.startswith("SLURM_JOB")},
        "world_size": world_size,
        "start_step": start,
        "time": time.time(),
    }


def make_out(folder: Path, what: str = "--out") -> None:
    """Create the folder that ``--out`` names, or another that is written to.

    Raises:
        ValueError: it cannot be created, or not be written to.
    """
    advice = "Type another --out FOLDER." if what == "--out" else "Make its place writable, or work on a copy."
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what} {folder} cannot be made ({error.strerror}). {advice}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{what} {folder} cannot be written to. {advice}")


def step_of(checkpoint: Path) -> int:
    """Updates done in a checkpoint folder."""
    return int(checkpoint.name[5:].removesuffix(OLD))


def read_config(path: str | Path) -> Any:
    """Configuration of a run or weights folder, or of the weights file in it.

    Raises:
        ValueError: there is none.
    """
    folder = _folder(path)
    if not (folder / CONFIG).is_file():
        above = next((parent for parent in folder.absolute().parents[:3] if (parent / CONFIG).is_file()), None)
        if above is not None and folder.exists():
            raise ValueError(f"{path} lies in a run folder or weights folder. Type that: {above}")
        raise ValueError(
            f"{path}: no {CONFIG} there, so it is neither a run folder nor a weights folder.{_neighbours(folder)}"
            f" Train one with: {PROGRAM} fit"
        )
    return configs.load(folder / CONFIG)


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    return folder.parent if folder.name == WEIGHTS else folder


def load_module(path: str | Path, weights: str = "ema") -> tuple[Any, Any]:
    """A room with weights in it, ready to sample.

    Args:
        path: a run folder (its newest good checkpoint is used) or a weights folder made by ``weights``.
        weights: ``raw``, ``ema`` or ``ema<decay>``; a weights folder holds one kind only, which ``ema`` means, too.

    Returns:
        The module (CPU, eval mode) and its configuration.

    Raises:
        ValueError: nothing usable lies at ``path``, or its tensors do not fit its configuration.
    """
    import hydra
    import torch

    torch.set_flush_denormal(True)  # as in training; numbers too small to matter cost ten times the others
    folder, cfg = _folder(path), read_config(path)
    module = hydra.utils.instantiate(cfg.module, _convert_="all")
    module.run_seed = cfg.seed
    module.start = None  # the weights it began with need not be on this machine
    if (folder / WEIGHTS).is_file():
        module.ema_decays = ()
        module.configure_model()
        _fill(module, folder / WEIGHTS)
        if (folder / PROVENANCE).is_file():
            facts = json.loads((folder / PROVENANCE).read_text())[-1]
            module.updates = facts.get("step", 0)
            module.hold_only(facts.get("weights", module.active_weights))
        module.resolve_weights(weights)
    else:
        checkpoint = Run(folder).latest()
        if checkpoint is None:
            command = folder / COMMAND
            again = f" Continue it with: {command.read_text().strip()}" if command.is_file() else ""
            raise ValueError(f"{folder} has no usable checkpoint yet.{again}")
        _load(module, checkpoint, module.resolve_weights(weights))
    return module.eval(), cfg


def device() -> str:
    """Where a loaded model draws samples: the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def use_decoder(module: Any, folder: str | None) -> str:
    """Let a model of latents draw its pictures with another autoencoder's decoder; None changes nothing.

    Returns:
        What to call the decoder in names of files: its folder's name and eight digits of its weights; "" for None.

    Raises:
        ValueError: the model has no latents, or the decoder belongs to another encoder.
    """
    if folder is None:
        return ""
    if not hasattr(module.codec, "use_decoder"):
        raise ValueError(f"--decoder {folder}: this model draws pictures without an autoencoder. Leave it out.")
    digits: str = module.codec.use_decoder(folder)
    return f"{Path(folder).resolve().name}-{digits[:8]}"


def _load(module: Any, checkpoint: Path, kind: str) -> None:
    import torch

    from platform.strategy import META, load_tensors

    module.configure_model()
    load_tensors(module, checkpoint)
    counters = torch.load(checkpoint / META, weights_only=False)["counters"]  # written by this program
    module.updates, module.samples_seen = counters["updates"], counters["samples_seen"]
    module.activate(kind)


def _fill(module: Any, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a readable safetensors file: {error}."
        ) from error
    for network, part in module.averaged().items():
        prefix = f"{network}."
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        expected = {key: tuple(value.shape) for key, value in part.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in own.items()}
        wrong = [
            f"{key}: {expected.get(key, 'absent')} in the model, {given.get(key, 'absent')} in the file"
            for key in sorted(expected.keys() | given.keys())
            if expected.get(key) != given.get(key)
        ]
        if wrong:
            raise ValueError(
                f"{file} does not fit {file.parent / CONFIG}; first differences:\n  " + "\n  ".join(wrong[:5])
            )
        part.load_state_dict(own)


def _neighbours(folder: Path) -> str:
    found = sorted(item.parent.as_posix() for item in folder.parent.glob(f"*/{CONFIG}"))[:5]
    return f" Runs beside it: {', '.join(found)}." if found else ""


def _git(root: Path, *words: str) -> str | None:
    if not shutil.which("git"):
        return None
    result = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
