"""The loaders of other packages, where these are installed: litdata, MosaicML streaming, Megatron Energon, HF datasets.

Each reads the same JPEG files in its own format through the loader that its documentation recommends, shuffled, and
decodes them as ``rivals.Fast`` does inside its workers. None of the packages is a dependency.
"""

import contextlib
import functools
import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from datamodules.bench import sets
from datamodules.bench.rivals import BATCH, Fast

_BUFFER = 1000  # samples in a shuffle buffer

Row = dict[str, Any]


class Package(NamedTuple):
    """A loader to compare with.

    Attributes:
        name: as the table calls it.
        module: what has to be importable.
        install: what pip calls it.
        loader: makes its loader from the imported module, the folder of the shards, the size in pixels and the number
            of processes; to go through it once takes one epoch.
    """

    name: str
    module: str
    install: str
    loader: Callable[[Any, Path, int, int], Any]


def installed() -> dict[str, Callable[[Path, int, int], Any]]:
    """Loaders of those that can be imported, by name; prints one line about each that cannot."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # Energon asks for it on any machine
    found: dict[str, Callable[[Path, int, int], Any]] = {}
    for package in PACKAGES:
        try:
            module = importlib.import_module(package.module)
        except Exception as error:  # of whatever kind, it is the package's own
            print(f"not measured: {package.name} ({error}); pip install {package.install}")
        else:
            found[package.name] = functools.partial(package.loader, module)
    return found


class _Decode:
    """Turns the rows of a batch into images and classes; tensors in shared memory when in a worker."""

    def __init__(self, size: int) -> None:
        self._fast = Fast(size)

    def __call__(self, rows: list[Row]) -> list[Tensor]:
        batch: list[Tensor] = default_collate([(self._fast(row["image"]), row["class"]) for row in rows])
        return batch


def _litdata(litdata: Any, shards: Path, size: int, workers: int) -> Any:
    def write(folder: Path) -> None:
        cache = litdata.streaming.Cache(str(folder), chunk_bytes="64MB")
        for number, row in enumerate(_rows(shards)):
            cache[number] = row
        cache.done()
        cache.merge()

    data = litdata.StreamingDataset(str(_converted(shards, "litdata", write)), shuffle=True)
    return litdata.StreamingDataLoader(data, batch_size=BATCH, collate_fn=_Decode(size), **_workers(workers))


def _mds(streaming: Any, shards: Path, size: int, workers: int) -> Any:
    def write(folder: Path) -> None:
        with streaming.MDSWriter(out=str(folder), columns={"image": "bytes", "class": "int"}) as writer:
            for row in _rows(shards):
                writer.write(row)

    data = streaming.StreamingDataset(local=str(_converted(shards, "mds", write)), shuffle=True, batch_size=BATCH)
    return streaming.StreamingDataLoader(data, batch_size=BATCH, collate_fn=_Decode(size), **_workers(workers))


def _energon(energon: Any, shards: Path, size: int, workers: int) -> Any:
    def write(folder: Path) -> None:
        folder.mkdir()
        for path in sets.files(shards):
            os.link(path, folder / path.name)
        names = [path.name for path in sets.files(folder)]
        prepare = energon.flavors.webdataset.prepare.WebdatasetPreparator.prepare_dataset
        prepare(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
        described = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (folder / ".nv-meta" / "dataset.yaml").write_text(described)

    @energon.stateless
    def cook(sample: Row) -> Row:
        return {**energon.basic_sample_keys(sample), "image": sample["jpg"], "class": int(sample["cls"])}

    class Task(energon.TaskEncoder):
        decoder = None
        cookers = (energon.Cooker(cook),)
        batch = staticmethod(_Decode(size).__call__)

    folder = _converted(shards, "energon", write)
    data = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Task(),
        virtual_epoch_length=_count(shards) // BATCH,
    )
    return energon.get_savable_loader(data)


def _hf_map(datasets: Any, shards: Path, size: int, workers: int) -> Any:
    data = datasets.load_from_disk(str(_arrow(datasets, shards)))
    return DataLoader(data, BATCH, shuffle=True, collate_fn=_Decode(size), **_workers(workers))


def _hf_iterable(datasets: Any, shards: Path, size: int, workers: int) -> Any:
    data = datasets.load_from_disk(str(_arrow(datasets, shards))).to_iterable_dataset(num_shards=sets.SHARDS)
    data = data.shuffle(seed=0, buffer_size=_BUFFER)
    return DataLoader(data, BATCH, collate_fn=_Decode(size), **_workers(workers))


def _hf_parquet(datasets: Any, shards: Path, size: int, workers: int) -> Any:
    def write(folder: Path) -> None:
        datasets.disable_progress_bars()
        data = datasets.load_from_disk(str(_arrow(datasets, shards)))
        folder.mkdir()
        for number in range(sets.SHARDS):
            data.shard(sets.SHARDS, number, contiguous=True).to_parquet(folder / f"{number:05d}.parquet")

    files = str(_converted(shards, "parquet", write) / "*.parquet")
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # seconds at each end of an epoch, which are not its speed
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    data = data.shuffle(seed=0, buffer_size=_BUFFER)
    return DataLoader(data, BATCH, collate_fn=_Decode(size), **_workers(workers))


def _arrow(datasets: Any, shards: Path) -> Path:
    def write(folder: Path) -> None:
        features = datasets.Features({"image": datasets.Value("binary"), "class": datasets.Value("int64")})
        given = {"shards": shards}
        cache = folder.with_name(f"{folder.name}-cache")
        datasets.disable_progress_bars()
        data = datasets.Dataset.from_generator(_rows, features, gen_kwargs=given, cache_dir=str(cache))
        data.save_to_disk(str(folder), num_shards=sets.SHARDS)
        shutil.rmtree(cache)

    return _converted(shards, "arrow", write)


def _rows(shards: Path) -> Iterator[Row]:
    for sample in webdataset.WebDataset([str(path) for path in sets.files(shards)], shardshuffle=False):
        yield {"image": sample["jpg"], "class": int(sample["cls"])}


def _count(shards: Path) -> int:
    return sum(1 for _ in _rows(shards))


def _workers(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, "persistent_workers": workers > 0}


def _converted(shards: Path, form: str, write: Callable[[Path], None]) -> Path:
    """The images in another format, beside the shards; under a passing name until they are all there."""
    folder = shards.with_name(f"{form}-{shards.name}")
    if not folder.exists():
        passing = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(passing, ignore_errors=True)
        with contextlib.redirect_stdout(sys.stderr):
            write(passing)
        passing.rename(folder)
    return folder


PACKAGES = (
    Package("litdata", "litdata", "litdata", _litdata),
    Package("MosaicML streaming", "streaming", "mosaicml-streaming", _mds),
    Package("Megatron Energon", "megatron.energon", "megatron-energon", _energon),
    Package("HF datasets, map", "datasets", "datasets", _hf_map),
    Package("HF datasets, iterable", "datasets", "datasets", _hf_iterable),
    Package("HF datasets, parquet stream", "datasets", "datasets", _hf_parquet),
)
