"""Folders of ``torch.distributed.checkpoint``, which sharded training writes: flat state dicts in and out."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

PARTS = (  # modules that a checkpoint's description may name
    "torch",
    "torch.serialization",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder written by ``torch.distributed.checkpoint``, on the CPU; nothing in it is executed.

    Args:
        folder: holds ``.metadata`` and ``*.distcp`` files of a flat state dict.

    Raises:
        ValueError: it is no such folder, or names something else than the format's own classes.
    """
    reader = _CarefulReader(folder)
    try:
        entries = reader.read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{folder} is no folder of torch.distributed.checkpoint ({error}). Expected a file .metadata in it, as an"
            " FSDP training writes."
        ) from error
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    if not state:
        raise ValueError(f"{folder} holds no tensors: {sorted(entries)[:5]}. Take the model's folder, not another one.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def write_folder(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a flat state dict as a folder of ``torch.distributed.checkpoint``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process is no news
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


class _Careful(pickle.Unpickler):
    """Builds the classes and dtypes that describe a checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePosixPath  # where the folder was when it was written
        if name.isidentifier() and module in PARTS:
            found = super().find_class(module, name)
            own = isinstance(found, type) and found.__module__ in PARTS[2:]
            if own or isinstance(found, torch.dtype) or found in (torch.Size, torch.serialization._get_layout):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class _CarefulReader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            found = _Careful(stream).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it describes a {type(found).__name__}")
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
