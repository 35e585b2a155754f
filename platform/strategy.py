"""One strategy for one process and for many: FSDP2 shards, distributed checkpoints committed by a single rename."""

import json
import os
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from lightningmodules.base import GenerativeModule
from platform.runs import OLD

META = "meta.pt"  # everything that is not a tensor of the model or of an optimiser
MARKER = "complete.json"  # written last: name, size and checksum of every file


class Sharded(ModelParallelStrategy):
    """Data parallel over all ranks; with one rank nothing is wrapped, and everything else is the same.

    Lightning's parent sizes the mesh by nodes and processes per node, writes checkpoints in place and cannot load
    them into a model without shards; these three are replaced.
    """

    def setup_environment(self) -> None:
        """Every rank holds a shard of the same model."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write aside, fsync, read back, rename; a folder without its marker was never finished."""
        final = Path(self.broadcast(str(filepath)))
        aside = final.with_name(final.name + ".tmp")
        if self.is_global_zero:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.barrier()
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        for index, state in enumerate(checkpoint.pop("optimizer_states", [])):
            tensors[f"optimizer_{index}"] = state
        try:
            dcp.save(tensors, checkpoint_id=aside)
            if self.is_global_zero:
                with (aside / META).open("wb") as stream:  # a path would be written in C++, which hides why it failed
                    torch.save(checkpoint, stream)
                commit(aside, final)
        except (CheckpointException, RuntimeError) as error:
            raise _reason(error) from error
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimisers in place, saved by any number of ranks; returns the rest."""
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.model is not None
        load_tensors(self.model, path)
        options = StateDictOptions(cpu_offload=True)
        for index, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{index}": get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(
                self.model, optimizer, optim_state_dict=state[f"optimizer_{index}"], options=options
            )
        rest = torch.load(path / META, weights_only=False)  # our own file, named by our own run folder
        assert self.lightning_module is not None
        _rescale(rest, self.lightning_module.trainer.accumulate_grad_batches)
        return rest


def shard(module: GenerativeModule) -> None:
    """Wrap the room's blocks, then its networks, when there is more than one rank."""
    mesh = module.device_mesh
    if mesh is None or mesh.size() == 1:
        return
    for unit in [*module.shard_units(), *module.averaged().values()]:
        fully_shard(unit, mesh=mesh["data_parallel"])


def load_tensors(module: nn.Module, path: Path) -> None:
    """Copy ``state_dict`` of a checkpoint folder into a module, sharded or not.

    Raises:
        ValueError: names or shapes differ between the folder and the module.
    """
    state = {"state_dict": get_model_state_dict(module)}
    stored = {
        key.removeprefix("state_dict."): tuple(entry.size)
        for key, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if key.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    wrong = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    if wrong:
        lines = [
            f"  {key}: {stored.get(key, 'absent')} in the file, {wanted.get(key, 'absent')} in the model"
            for key in wrong
        ]
        raise ValueError(
            f"{path} was written by a model of another shape; {len(wrong)} tensors differ, first:\n"
            + "\n".join(lines[:5])
            + "\nThe same run: restore the settings in its config.yaml. Another run beside it: add tag=NAME."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
        dcp.load(state, checkpoint_id=path)
    module.load_state_dict(state["state_dict"])


def commit(aside: Path, final: Path) -> None:
    """Make a written folder a checkpoint: checksums, fsync, one rename."""
    marker = {file.name: fingerprint(file) for file in sorted(aside.iterdir())}
    for file in aside.iterdir():
        _sync(file)
    (aside / MARKER).write_text(json.dumps(marker, indent=1))
    _sync(aside / MARKER)
    _sync(aside)
    replaced = final.with_name(final.name + OLD)
    if final.exists():  # the same step saved again: at no moment is there neither of the two
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(aside, final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    if (damage := what_is_wrong(final)) is not None:
        raise OSError(f"{final} was written but does not read back: {damage}")


def what_is_wrong(folder: Path) -> str | None:
    """Why a folder is not a usable checkpoint, or None when every byte is as it was written."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return f"{MARKER} is missing or unreadable, so it was never finished"
    for name, (size, checksum) in marker.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if fingerprint(file)[1] != checksum:
            return f"{name} does not have the checksum it was written with"
    return None


def fingerprint(file: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _reason(error: BaseException) -> Exception:
    """Why a checkpoint could not be written: what the system said, as an exception that can be caught as one.

    torch collects the failures of all ranks in an exception that is no ``Exception``, and in each of them its own
    complaint about the unfinished file stands before the one of the system.
    """
    failures = [error]
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, OSError):
                return cause
            cause = cause.__context__
    return RuntimeError(f"the checkpoint could not be written: {failures[0]}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rescale(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Restate Lightning's micro-batch counters for today's accumulation; updates are what was really done."""
    updates = checkpoint["counters"]["updates"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for count in ("total", "current"):
        behind = {key: progress[count]["ready"] - value for key, value in progress[count].items()}
        for key, lag in behind.items():
            progress[count][key] = updates * accumulation - lag
