"""Write WebDataset tar shards that are byte-identical every time and never visible half done."""

import contextlib
import hashlib
import io
import os
import shutil
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
from PIL import Image
from webdataset import TarWriter

from datamodules import catalogue, overview, stamp, tarindex
from datamodules.catalogue import Catalogue, ShardEntry
from datamodules.transforms import IMAGE_EXTENSIONS

Sample = Mapping[str, bytes | str]
Measure = Callable[[Sample], Sequence[int]]

# uid, gid and mode have fixed defaults in webdataset; an integer mtime also spares a pax header per member.
_REPRODUCIBLE = {"mtime": 0, "user": "", "group": "", "encoder": False}
_PROGRESS_SECONDS = 0.2
_BUFFER = 2**20
_PNG = b"\x89PNG\r\n\x1a\n"


def image_shape(data: bytes) -> tuple[int, int]:
    """Height and width of an image file in pixels, from its header; (0, 0) if it has none that can be read."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return int(height), int(width)
        if data[:8] == _PNG and data[12:16] == b"IHDR":
            width, height = struct.unpack(">II", data[16:24])
            return height, width
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception:  # decoders raise a dozen types for broken input; whoever decodes it reports it
        return 0, 0


def _shape(sample: Sample) -> tuple[int, int]:
    data = next((sample[kind] for kind in IMAGE_EXTENSIONS if kind in sample), b"")
    assert isinstance(data, bytes)
    return image_shape(data)


class DatasetWriter:
    """Writes one folder of shards: all of it appears under its name by one rename, or nothing does.

    Use as a context manager and call ``write`` once per split; every shard gets its index file beside it, and
    ``index.json`` is added at the end. Two processes that make the same folder at once do not disturb each other: the
    first rename wins, the other copy is dropped.

    Args:
        folder: where the shards go. It must not exist yet, or be empty.
        dataset: name recorded in index.json.
        licence: licence text recorded in index.json.
        sources: versions recorded in index.json.
        card: what readers must know about the members, recorded in index.json: per extension {"dtype", "shape",
            "scale", ...}, "tokenizer", "classes", ...; plain JSON values.

    Raises:
        ValueError: the folder holds something already, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dataset: str,
        licence: str,
        sources: Mapping[str, str],
        card: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.dataset = dataset
        self.licence = licence
        self.sources = dict(sources)
        self.card = dict(card or {})
        self.shards: dict[str, ShardEntry] = {}
        self._temporary = self.folder.parent / f".{self.folder.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        self._progress = _Progress(dataset, self.folder)

    def __enter__(self) -> "DatasetWriter":
        """Make the temporary folder beside the final one, and clear away what dead processes left there."""
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self._appeared():
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

    def write(
        self, split: str, samples: Iterable[Sample], per_shard: int, measures: Mapping[str, Measure] | None = None
    ) -> None:
        """Write one split to ``<split>-000000.tar`` and so on.

        Args:
            split: prefix of the file names, e.g. "train".
            samples: mappings with "__key__" (a string without dots, unique) and one item of bytes per extension;
                "cls", if present, is the class as decimal text and goes into the class histogram.
            per_shard: samples per file; the last one may hold fewer.
            measures: name -> function of a sample that gives its integers, kept in the shard's index file. "shape"
                (height, width) of images is always kept.
        """
        before = sum(entry.samples for entry in self.shards.values())
        shard: ShardFile | None = None
        number = 0
        for sample in samples:
            if shard is None:
                shard = ShardFile(self._temporary / f"{split}-{number:06d}.tar", measures, stamp.of(self.card))
                number += 1
            shard.write(sample)
            before += 1
            self._progress.show(before)
            if shard.samples == per_shard:
                self.shards[shard.path.name] = shard.close()
                shard = None
        if shard is not None:
            self.shards[shard.path.name] = shard.close()

    def _appeared(self) -> bool:
        """Whether another process has made this very set since the caller found that it was not there."""
        found = catalogue.read(self.folder)
        return (
            found is not None
            and (found.dataset, found.card) == (self.dataset, self.card)
            and self.sources.items() <= found.sources.items()
        )

    def _publish(self) -> None:
        index = Catalogue(self.dataset, self.licence, self.sources, self.shards, self.card)
        overview.describe(self._temporary, self.shards)
        write_text(self._temporary / catalogue.FILE_NAME, index.to_json())
        try:
            # Replaces the folder only if it is absent or empty, in one step.
            self._temporary.rename(self.folder)
        except OSError:
            if catalogue.read(self.folder) != index:
                raise
        sync_folder(self.folder.parent)
        self._progress.finish(self.shards)

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(
            f"cannot write {self.dataset} to {self.folder}: {error.strerror or error}. "
            "Set PLATFORM_CACHE to a folder with space that you may write to, or set data.root."
        )


class ShardFile:
    """One shard being written under a passing name; closing it gives it its name and its index file.

    Args:
        path: the shard's final name, in a folder that exists.
        measures: name -> integers about a sample that are kept in the index file, beside "shape" of images.
        entries: what the shard is to say of its members by itself, see :mod:`datamodules.stamp`.
    """

    def __init__(
        self, path: Path, measures: Mapping[str, Measure] | None = None, entries: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.samples = 0
        self.bytes = 0
        self._measures = dict(measures or {})
        self._measured: dict[str, list[Sequence[int]]] = {}
        self._classes: Counter[int] = Counter()
        self._part = path.with_name(f"{path.name}.part")
        self._file = _HashingFile(self._part.open("wb"))
        self._buffer = io.BufferedWriter(self._file, _BUFFER)  # the tar writer passes on 10 kB at a time
        self._buffer.write(stamp.header(entries or {}))
        self._tar = TarWriter(self._buffer, **_REPRODUCIBLE)

    def write(self, sample: Sample) -> None:
        """Append one sample: "__key__", and bytes per extension."""
        if not self.samples and any(kind in sample for kind in IMAGE_EXTENSIONS):
            self._measures = {"shape": _shape, **self._measures}
        self.bytes += self._tar.write(sample)
        self.samples += 1
        if "cls" in sample:
            self._classes[int(sample["cls"])] += 1
        for name, measure in self._measures.items():
            self._measured.setdefault(name, []).append(measure(sample))

    def close(self) -> ShardEntry:
        """Finish the file, give it its name, write its index file, and return its entry of index.json.

        Raises:
            ValueError: a key came twice.
        """
        self._tar.close()
        self._buffer.flush()
        self._file.finish()
        index = tarindex.scan(self._part)
        if index.problem:
            raise ValueError(f"{self.path.name}: {index.problem}. Every sample needs a key of its own.")
        self._part.rename(self.path)
        measured = {name: np.array(rows, dtype=np.int64) for name, rows in self._measured.items()}
        tarindex.write_sidecar(self.path, index, measured=measured)
        classes = {str(label): self._classes[label] for label in sorted(self._classes)}
        return ShardEntry(self.samples, self._file.size, self._file.digest.hexdigest(), classes)


class _HashingFile(io.RawIOBase):
    """Binary file that hashes what passes through it."""

    def writable(self) -> bool:
        """Yes."""
        return True

    def __init__(self, file: BinaryIO) -> None:
        self._inner = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any, /) -> int:
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
        self._rank = _rank()
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


def _rank() -> str:
    """Rank of this process; the rule of ``platform.journal.rank_of_process``, which this package may not import."""
    by_slurm = "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK") if by_slurm else ("RANK", "LOCAL_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0")


def write_text(path: Path, text: str) -> None:
    """Write a file whose text is on the disk when this returns; it appears under its name only when whole."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


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


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
