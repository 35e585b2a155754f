"""A room that writes down what it is trained on, and the processes of runs that are killed and continued.

The file is copied into a copy of the checkout as a room of its own, so it imports no other test.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lightningmodules.base import GenerativeModule
from lightningmodules.shared.codecs import Pixels

ROOT = Path(__file__).resolve().parents[2]
ROOM = "lightningmodules/ledger"
ATTEMPT = "LEDGER_ATTEMPT"  # set for the processes of one attempt

Items = list[str]


class Ledger(GenerativeModule):
    """One weight, and one line per micro-batch in ``folder``: attempt, update, rank, micro-batch, items.

    Args:
        folder: where the lines go, one file per rank.
        pause: seconds that a micro-batch takes besides.
        optimizer: as in every room.
    """

    def __init__(self, *, folder: str, pause: float = 0.0, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__(codec=Pixels(8, 1), optimizer=optimizer)
        self.folder, self.pause = Path(folder), pause

    def build(self) -> None:
        self.net = nn.Linear(1, 1)

    def averaged(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.trainer.training:
            line = {
                "attempt": int(os.environ[ATTEMPT]),
                "update": (self.micro_batches - 1) // self.trainer.accumulate_grad_batches,
                "rank": self.global_rank,
                "micro": (self.micro_batches - 1) % self.trainer.accumulate_grad_batches,
                "items": items_of(batch),
            }
            with (self.folder / f"rank{self.global_rank}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            time.sleep(self.pause)
        return {"loss": self.net(torch.ones(1, 1)).mean()}


def items_of(batch: Mapping[str, Any]) -> Items:
    """Key of every row together with a checksum of all that the row holds."""
    tensors = [value for _, value in sorted(batch.items()) if isinstance(value, Tensor)]
    texts = [value for name, value in sorted(batch.items()) if isinstance(value, list) and name != "key"]
    found = []
    for row, key in enumerate(batch["key"]):
        content = b"".join(tensor[row].contiguous().numpy().tobytes() for tensor in tensors)
        content += b"".join(str(text[row]).encode() for text in texts)
        found.append(f"{key}:{zlib.crc32(content):08x}")
    return found


class Runs:
    """A copy of the checkout with the room above and one experiment, and its runs.

    Args:
        folder: an empty folder.
        data: the data block of the experiment.
        steps: updates of the whole run.
        every: updates between checkpoints.
    """

    def __init__(self, folder: Path, data: Mapping[str, Any], *, steps: int, every: int = 3) -> None:
        self.folder, self.steps, self.every = folder, steps, every
        self.attempts = 0
        self.checkpoints = folder / "runs" / "ledger" / "checkpoints"
        skip = shutil.ignore_patterns("__pycache__", "data", "*.png")
        for name in ("platform", "datamodules", "lightningmodules", "callbacks", "experiments"):
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        (folder / ROOM).mkdir()
        (folder / ROOM / "__init__.py").write_text('"""A room for tests."""\n')
        shutil.copy(__file__, folder / ROOM / "module.py")
        (folder / "lines").mkdir()
        experiment = {
            "defaults": ["base", {"hardware": "cpu"}, "_self_"],
            "module": {
                "_target_": "lightningmodules.ledger.module.Ledger",
                "folder": str(folder / "lines"),
                "pause": 0.005,
                "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1},
            },
            "data": dict(data),
            "trainer": {"max_steps": steps, "val_every": 0, "log_every": 1},
            "checkpoints": {"every": every, "every_minutes": None},
            "callbacks": {name: None for name in ("ema", "samples", "likelihood", "guard", "progress")},
        }
        (folder / "experiments" / "ledger.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))

    def kill(self, *, ranks: int, after: int, settings: Sequence[str] = ()) -> None:
        """Start or continue on so many ranks, and kill one process at a random moment after so many updates more."""
        process = self._start(ranks, settings)
        limit = time.monotonic() + 120
        try:
            while self._updates() < after:
                assert process.poll() is None, f"ended before it was killed:\n{process.communicate()[0]}"
                assert time.monotonic() < limit, "no progress"
                time.sleep(0.01)
            time.sleep(random.random() * 0.1)
            members = [pid for pid in session(process.pid) if pid == process.pid or is_rank(pid)]
            victim = random.choice(members)
            os.kill(victim, signal.SIGKILL)
            output, _ = process.communicate(timeout=90)
            assert process.returncode != 0, f"killed process {victim} of {members}, but the run ended well:\n{output}"
            wait_until(lambda: not session(process.pid), 30, f"survivors: {session(process.pid)}\n{output}")
        finally:
            end(process)

    def finish(self, *, ranks: int, settings: Sequence[str] = ()) -> str:
        """Continue to the end."""
        process = self._start(ranks, settings)
        try:
            output, _ = process.communicate(timeout=150)
        finally:
            end(process)
        assert process.returncode == 0, output
        return output

    def trained(self) -> list[Items]:
        """Items of every update of the surviving trajectory, in the order of positions.

        Of the updates that were made more than once, because a killed attempt had saved none after them, those of the
        last attempt count; the earlier ones must have seen the same.
        """
        lines = [json.loads(line) for file in (self.folder / "lines").iterdir() for line in whole_lines(file)]
        made: dict[tuple[int, int], dict[tuple[int, int], Items]] = {}
        for line in lines:
            micro = made.setdefault((line["update"], line["attempt"]), {})
            assert (line["micro"], line["rank"]) not in micro, f"twice in one attempt: {line}"
            micro[line["micro"], line["rank"]] = line["items"]
        found = []
        for update in range(self.steps):
            attempts = sorted(attempt for at, attempt in made if at == update)
            assert attempts, f"update {update} was not made"
            rows = [[item for _, part in sorted(made[update, a].items()) for item in part] for a in attempts]
            for earlier in rows[:-1]:  # a killed one may have got through a part of the update only
                assert set(earlier) <= set(rows[-1]), f"update {update} saw other samples when it was repeated"
            found.append(rows[-1])
        return found

    def _updates(self) -> int:
        """Updates begun in this attempt."""
        file = self.folder / "lines" / "rank0.jsonl"
        lines = [json.loads(line) for line in whole_lines(file)] if file.exists() else []
        return len({line["update"] for line in lines if line["attempt"] == self.attempts})

    def _start(self, ranks: int, settings: Sequence[str]) -> "subprocess.Popen[str]":
        self.attempts += 1
        command = [sys.executable, "-m", "platform", "fit", "ledger", f"trainer.devices={ranks}", *settings]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), ATTEMPT: str(self.attempts)}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip


def whole_lines(file: Path) -> list[str]:
    """Lines of a file, without one that a killed process did not finish."""
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def session(leader: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(of) == leader and state != "Z":
                found.append(int(folder.name))
    return found


def is_rank(pid: int) -> bool:
    """Whether a process is a rank, and not a tool that one of them started."""
    try:
        return b"platform" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, otherwise
        time.sleep(0.05)


def end(process: "subprocess.Popen[str]") -> None:
    """Leave nothing behind, whatever happened."""
    for pid in session(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(30)
