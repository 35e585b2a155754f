"""Write WebDataset tar shards that are byte-identical every time and never visible half done."""

import contextlib
import hashlib
import io
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from webdataset import ShardWriter

from datamodules import catalogue
from datamodules.catalogue import Catalogue, ShardEntry

# uid, gid and mode have fixed defaults in webdataset; an integer mtime also spares a pax header per member.
_REPRODUCIBLE = {"mtime": 0, "user": "", "group": "", "encoder": False}
_PROGRESS_SECONDS = 0.2


class DatasetWriter:
    """Writes one folder of shards: all of it appears under its name by one rename, or nothing does.

    Use as a context manager and call ``write`` once per split; ``index.json`` is added at the end. Two processes
    that make the same folder at once do not disturb each other: the first rename wins, the other copy is dropped.

    Args:
        folder: where the shards go. It must not exist yet, or be empty.
        dataset: name recorded in index.json.
        licence: licence text recorded in index.json.
        sources: versions recorded in index.json.

    Raises:
        ValueError: the folder holds something already, or cannot be written.
    """

    def __init__(self, folder: Path, *, dataset: str, licence: str, sources: Mapping[str, str]) -> None:
        self.folder = Path(folder).absolute()
        self.dataset = dataset
        self.licence = licence
        self.sources = dict(sources)
        self.shards: dict[str, ShardEntry] = {}
        self._temporary = self.folder.parent / f".{self.folder.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        self._progress = _Progress(dataset, self.folder)

    def __enter__(self) -> "DatasetWriter":
        """Make the temporary folder beside the final one, and clear away what dead processes left there."""
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} is not empty, and {self.dataset} is not written over other files. "
                f"Set data.root to a new folder, or data.source=null to use what is there."
            )
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.folder)
            self._temporary.mkdir()
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Publish the folder, or remove every trace of it after an error."""
        try:
            if kind is None:
                self._publish()
        except OSError as failure:
            raise self._unwritable(failure) from failure
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._unwritable(error) from error

    def write(self, split: str, samples: Iterable[Mapping[str, bytes | str]], per_shard: int) -> None:
        """Write one split to ``<split>-000000.tar`` and so on.

        Args:
            split: prefix of the file names, e.g. "train".
            samples: mappings with "__key__" (a string without dots, unique) and one item of bytes per extension;
                "cls", if present, is the class as decimal text and goes into the class histogram.
            per_shard: samples per file; the last one may hold fewer.
        """
        recorder = _Recorder(self._temporary, self.shards)
        shards = ShardWriter(
            f"{split}-%06d.tar", per_shard, opener=recorder.open, post=recorder.close, verbose=0, **_REPRODUCIBLE
        )
        with shards:
            for sample in samples:
                shards.write(sample)  # before counting: this call may close the previous file
                recorder.count(sample)
                self._progress.show(recorder.total)

    def _publish(self) -> None:
        index = Catalogue(self.dataset, self.licence, self.sources, self.shards)
        with (self._temporary / catalogue.FILE_NAME).open("w") as file:
            file.write(index.to_json())
            file.flush()
            os.fsync(file.fileno())
        try:
            # Replaces the folder only if it is absent or empty, in one step.
            self._temporary.rename(self.folder)
        except OSError:
            if catalogue.read(self.folder) != index:
                raise
        _sync_folder(self.folder.parent)
        self._progress.finish(self.shards)

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(
            f"cannot write {self.dataset} to {self.folder}: {error.strerror or error}. "
            "Set PLATFORM_CACHE to a folder with space that you may write to, or set data.root."
        )


class _Recorder:
    """Opens shard files under a passing name, and notes size, hash and classes when they are closed."""

    def __init__(self, folder: Path, shards: dict[str, ShardEntry]) -> None:
        self.folder = folder
        self.shards = shards
        self.total = 0
        self._file: _HashingFile | None = None
        self._samples = 0
        self._classes: Counter[int] = Counter()

    def open(self, name: str) -> "_HashingFile":
        self._file = _HashingFile((self.folder / f"{name}.part").open("wb"))
        self._samples = 0
        self._classes = Counter()
        return self._file

    def count(self, sample: Mapping[str, bytes | str]) -> None:
        self.total += 1
        self._samples += 1
        if "cls" in sample:
            self._classes[int(sample["cls"])] += 1

    def close(self, name: str) -> None:
        assert self._file is not None
        self._file.finish()
        (self.folder / f"{name}.part").rename(self.folder / name)
        classes = {str(label): self._classes[label] for label in sorted(self._classes)}
        self.shards[name] = ShardEntry(self._samples, self._file.size, self._file.digest.hexdigest(), classes)


class _HashingFile(io.RawIOBase):
    """Binary file that hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._inner = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Append and hash."""
        self.digest.update(data)
        self.size += len(data)
        return self._inner.write(data)

    def finish(self) -> None:
        """Close the file once its bytes are on the disk."""
        self._inner.flush()
        os.fsync(self._inner.fileno())
        self._inner.close()


class _Progress:
    """One line on stderr: rewritten in place on a terminal, printed once at the end elsewhere; rank 0 only."""

    def __init__(self, dataset: str, folder: Path) -> None:
        self.dataset = dataset
        self.folder = folder
        self._rank = next((os.environ[v] for v in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if v in os.environ), "0")
        self._live = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()

    def show(self, samples: int) -> None:
        if self._live and self._rank == "0" and time.monotonic() - self._shown > _PROGRESS_SECONDS:
            self._shown = time.monotonic()
            sys.stderr.write(f"\r{self.dataset}: {samples} samples written")
            sys.stderr.flush()

    def finish(self, shards: Mapping[str, ShardEntry]) -> None:
        if self._rank != "0":
            return
        samples = sum(entry.samples for entry in shards.values())
        mebibytes = sum(entry.bytes for entry in shards.values()) / 2**20
        begin = "\r" if self._live else ""
        sys.stderr.write(
            f"{begin}{self.dataset}: {samples} samples in {len(shards)} shards "
            f"({mebibytes:.1f} MiB) written to {self.folder} in {time.monotonic() - self._start:.1f} s\n"
        )
        sys.stderr.flush()


def problems(folder: Path) -> Iterator[str]:
    """Compare every shard of a folder with index.json, sha256 included, and yield one line per difference."""
    index = catalogue.read(folder)
    if index is None:
        yield f"{folder} has no {catalogue.FILE_NAME}"
        return
    for name, entry in sorted(index.shards.items()):
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry.bytes:
            yield f"{name} has {path.stat().st_size} bytes, {catalogue.FILE_NAME} says {entry.bytes}"
        elif catalogue.sha256(path) != entry.sha256:
            yield f"{name} has another sha256 than {catalogue.FILE_NAME} says"


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of processes of this host that are gone."""
    begin = f".{folder.name}.{socket.gethostname()}."
    for old in folder.parent.glob(f"{begin}*.tmp"):
        process = old.name.removeprefix(begin).removesuffix(".tmp")
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(old, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
