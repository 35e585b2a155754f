"""Tar shards as a random-access sequence of samples: which files, how many samples, and the bytes of sample i."""

import difflib
import logging
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Protocol

import numpy as np
from webdataset.shardlists import expand_urls

from datamodules import catalogue, tarindex
from datamodules.order import Ints, fingerprint
from datamodules.tarindex import TarIndex, cache_folder

log = logging.getLogger(__name__)

_CHECKED_BYTES = 64 * 2**20  # sets up to this size are read and hashed before the start; it takes a moment
_ANNOUNCED_BYTES = 2**30  # without index.json, more than this takes long enough to say so
_RESTORE = "Restore the data, or accept such losses with e.g. data.max_bad_fraction=0.001."
_NUMBERED = re.compile(r"(.*?)(\d+)\.tar$")


class BadSample(ValueError):
    """A sample that cannot be used.

    Args:
        text: what is wrong, naming shard and sample; no full stop at the end.
        advice: what the user can do about it, a sentence.
    """

    def __init__(self, text: str, advice: str = _RESTORE) -> None:
        super().__init__(text)
        self.advice = advice


class Source(Protocol):
    """A numbered set of samples, the same for every rank and worker; safe to read from several threads.

    Attributes:
        names: names of the shards, in order.
        counts: samples per shard, int64.
        classes: per shard, samples per stored class; None if that is not known beforehand.
        fingerprint: hash over names, counts and sizes; changes when the set changes.
    """

    names: list[str]
    counts: Ints
    classes: list[Counter[int]] | None
    fingerprint: str

    def key(self, sample: int) -> str:
        """Key of a sample, for messages and ledgers."""

    def shard(self, sample: int) -> str:
        """Name of the shard that holds a sample."""

    def read(self, sample: int) -> dict[str, bytes]:
        """Members of a sample by extension.

        Raises:
            BadSample: the sample cannot be read.
        """


class ShardSet:
    """Samples of a list of tar shards, read by position through one index per shard.

    Nothing is kept open but the shards in use, and no index but theirs is held in memory.

    Args:
        paths: shard files in order.
        setting: name of the setting that chose them, for messages, e.g. "data.train".
        max_bad_fraction: accepted share of unreadable samples; 0 refuses any damage.
        open_shards: how many files and indices are kept at hand; at least two shuffle windows.

    Raises:
        ValueError: a shard is damaged, empty or not what index.json says, beyond the accepted share.
    """

    def __init__(
        self, paths: Sequence[Path], setting: str, max_bad_fraction: float = 0.0, open_shards: int = 64
    ) -> None:
        self.paths = list(paths)
        self.names = [path.name for path in self.paths]
        self.setting = setting
        self.strict = max_bad_fraction == 0
        self.open_shards = open_shards
        listed = {folder: catalogue.read(folder) for folder in {path.parent for path in self.paths}}
        self._entries = [index.shards.get(path.name) if (index := listed[path.parent]) else None for path in self.paths]
        self._indices: OrderedDict[int, TarIndex] = OrderedDict()
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        sizes = [path.stat().st_size for path in self.paths]
        self.bytes = sum(sizes)
        self.counts: Ints = np.zeros(len(self.paths), dtype=np.int64)
        self._take_stock(sizes, max_bad_fraction)
        self.starts: Ints = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self.fingerprint = fingerprint(self.names, self.counts, sizes)
        self.classes = self._count_classes()

    def extensions(self) -> tuple[str, ...]:
        """Member names of the first shard's samples."""
        return self._index(0).extensions

    def shard(self, sample: int) -> str:
        """Name of the shard that holds a sample."""
        return self.names[self._locate(sample)[0]]

    def key(self, sample: int) -> str:
        """Key of a sample; for a row that a damaged shard has lost, its number."""
        shard, row = self._locate(sample)
        index = self._index(shard)
        return index.key(row) if row < len(index) else f"#{row}"

    def read(self, sample: int) -> dict[str, bytes]:
        """Members of a sample by extension, in one read.

        Raises:
            BadSample: the shard is damaged, has gone, or ends inside the sample.
        """
        shard, row = self._locate(sample)
        try:
            index = self._index(shard)
            handle = self._handle(shard)
        except OSError as error:
            raise BadSample(f"{self.names[shard]}, sample #{row}: {error.strerror or error}") from error
        if index.problem and (self.strict or row >= len(index)):
            raise BadSample(_damage(self.names[shard], index))
        if row >= len(index):
            raise BadSample(
                f"{self.names[shard]}, sample #{row}: the shard holds {len(index)} samples, "
                f"{catalogue.FILE_NAME} says {self.counts[shard]}"
            )
        offsets, sizes = index.offsets[row].tolist(), index.sizes[row].tolist()
        begin = min(offset for offset in offsets if offset >= 0)
        end = max(offset + size for offset, size in zip(offsets, sizes, strict=True))
        data = os.pread(handle.file, end - begin, begin)
        if len(data) < end - begin:
            raise BadSample(
                f"{self.names[shard]}, sample {index.key(row)}: truncated at byte {begin + len(data)}, "
                f"the sample ends at byte {end}"
            )
        return {
            extension: data[offset - begin : offset - begin + size]
            for extension, offset, size in zip(index.extensions, offsets, sizes, strict=True)
            if offset >= 0
        }

    def close(self) -> None:
        """Close every file; reading again opens them again."""
        with self._lock:
            self._handles.clear()
            self._indices.clear()

    def _locate(self, sample: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, int(sample - self.starts[shard])

    def _index(self, shard: int) -> TarIndex:
        with self._lock:
            if shard not in self._indices:
                self._indices[shard] = tarindex.load(self.paths[shard])
                if len(self._indices) > self.open_shards:
                    self._indices.popitem(last=False)
            return self._indices[shard]

    def _handle(self, shard: int) -> "_Handle":
        with self._lock:
            if shard not in self._handles:
                self._handles[shard] = _Handle(self.paths[shard])
                if len(self._handles) > self.open_shards:
                    self._handles.popitem(last=False)
            return self._handles[shard]

    def _take_stock(self, sizes: list[int], max_bad_fraction: float) -> None:
        """Count the samples of every shard, and judge the damage found on the way."""
        found: list[str] = []
        lost = 0
        if self.bytes > _ANNOUNCED_BYTES and None in self._entries:
            log.info("%s: indexing %s of shards once, for %s", self.setting, _mebibytes(self.bytes), cache_folder())
        for shard, (entry, size) in enumerate(zip(self._entries, sizes, strict=True)):
            if entry is not None and entry.bytes == size and self.bytes > _CHECKED_BYTES:
                self.counts[shard] = entry.samples
                continue
            index = tarindex.load(self.paths[shard])
            self.counts[shard] = len(index)
            problem = self._problem(shard, size, index)
            if problem:
                found.append(problem)
                lost += max(1, entry.samples - len(index) if entry else 0)
        if not found:
            return
        more = f" ({len(found)} of {len(sizes)} shards are damaged.)" if len(found) > 1 else ""
        if lost > max_bad_fraction * (lost + self.counts.sum()):
            raise ValueError(
                f"{self.setting}: {found[0]}.{more} Copy the shard again (folder {self.paths[0].parent}), "
                f"or accept the loss with data.max_bad_fraction={_share(lost, int(self.counts.sum()))}."
            )
        for text in found:
            log.warning("%s: %s", self.setting, text)

    def _count_classes(self) -> list[Counter[int]] | None:
        """Samples per class of each shard, from index.json; a small set without one is read through."""
        if all(entry is not None for entry in self._entries):
            listed = [entry.histogram() for entry in self._entries if entry is not None]
            return listed if all(listed) else None
        if self.bytes > _CHECKED_BYTES:
            return None
        found = [Counter[int]() for _ in self.paths]
        for sample in range(int(self.counts.sum())):
            text = self.read(sample).get("cls", b"").strip()
            if text.lstrip(b"-").isdigit():  # anything else is reported with its key when it is used
                found[self._locate(sample)[0]][int(text)] += 1
        return found if any(found) else None

    def _problem(self, shard: int, size: int, index: TarIndex) -> str:
        """What is wrong with one shard, or an empty string."""
        name, entry = self.names[shard], self._entries[shard]
        if index.problem:
            told = f", {catalogue.FILE_NAME} says {_mebibytes(entry.bytes)}" if entry else ""
            return f"{_damage(name, index)} (file {_mebibytes(size)}{told})"
        if not len(index):
            return f"{name} holds no samples ({size} bytes)"
        if entry is None:
            return ""
        if size != entry.bytes or len(index) != entry.samples:
            return (
                f"{name} has {len(index)} samples in {size} bytes, but {catalogue.FILE_NAME} says {entry.samples} in "
                f"{entry.bytes} bytes; if the shard was replaced on purpose, delete {catalogue.FILE_NAME}"
            )
        if catalogue.sha256(self.paths[shard]) != entry.sha256:
            return f"{name} was changed after it was written (its sha256 is not the one in {catalogue.FILE_NAME})"
        return ""


class _Handle:
    """An open file that closes itself when its last user lets go of it, so that eviction cannot pull it away."""

    __slots__ = ("file",)

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


def find(patterns: str | Iterable[str], root: Path, setting: str, allow_missing: bool = False) -> list[Path]:
    """Files (or one folder) that a setting names.

    Args:
        patterns: names relative to ``root`` or absolute, with ``*``, ``?``, ``[..]`` or braces as in
            ``train-{000000..001023}.tar``; a list of them; or a folder.
        root: folder that relative names start from.
        setting: name of the setting, for messages, e.g. "data.train".
        allow_missing: accept that some of the named files are absent.

    Returns:
        Existing paths, sorted, each once.

    Raises:
        ValueError: nothing is found, or some of the files are missing.
    """
    wanted: dict[Path, None] = {}
    texts = [patterns] if isinstance(patterns, str) else list(patterns)
    for text in texts:
        matches = [path for name in _braces(text, setting) for path in _expand(root / Path(name).expanduser())]
        if not any(path.exists() for path in matches):
            raise ValueError(_nothing_found(text, root, setting))
        wanted.update(dict.fromkeys(matches))
    paths = sorted(wanted)
    missing = [path for path in paths if not path.exists()]
    if missing and not allow_missing:
        shown = str(root / texts[0]) if len(texts) == 1 else f"{len(texts)} patterns in {root}"
        raise ValueError(
            f"{setting}='{shown}': {len(missing)} of {len(paths)} files are missing, first: {missing[0].name}. "
            "Copy them, or accept the rest with data.allow_missing=true."
        )
    if missing:
        log.warning("%s: %d of %d files are missing, first: %s", setting, len(missing), len(paths), missing[0].name)
    return [path for path in paths if path.exists()]


def _braces(text: str, setting: str) -> list[str]:
    try:
        return list(expand_urls(text))
    except ValueError as error:
        raise ValueError(f"{setting}='{text}': {error}. Write ranges as in train-{{000000..001023}}.tar.") from error


def _expand(path: Path) -> list[Path]:
    """Files that one name stands for, absent ones included where their absence can be known."""
    if path.is_dir():
        return sorted(path.glob("*.tar")) or [path]
    if not has_magic(str(path)):
        return [path]
    found = [Path(name) for name in glob(str(path))]
    index = catalogue.read(path.parent) if found and not has_magic(str(path.parent)) else None
    if index is not None:
        return [*found, *(path.parent / name for name in index.shards if Path(name).match(path.name))]
    return [*found, *_gaps(found)]


def _gaps(found: list[Path]) -> list[Path]:
    """Files whose absence shows as a gap in an otherwise dense numbering."""
    groups: dict[tuple[Path, str, int], set[int]] = {}
    for path in found:
        match = _NUMBERED.match(path.name)
        if match:
            groups.setdefault((path.parent, match[1], len(match[2])), set()).add(int(match[2]))
    gaps: list[Path] = []
    for (folder, stem, width), numbers in groups.items():
        span = max(numbers) - min(numbers) + 1
        if len(numbers) < span <= 2 * len(numbers):
            absent = set(range(min(numbers), max(numbers))) - numbers
            gaps += [folder / f"{stem}{number:0{width}d}.tar" for number in absent]
    return gaps


def _nothing_found(text: str, root: Path, setting: str) -> str:
    path = root / text
    folder = path.parent
    if has_magic(str(folder)) or "{" in str(folder):
        folder = root
    if not folder.is_dir():
        nearest = next(parent for parent in folder.absolute().parents if parent.is_dir())
        return (
            f"{setting}='{path}' matches no file: the folder {folder} does not exist, only {nearest} does. "
            "Set data.root to the folder of the shards."
        )
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(Path(text).name, names, n=3, cutoff=0.4) or names[:3]
    there = f"Nearest names there: {', '.join(close)}." if close else "The folder is empty."
    return f"{setting}='{path}' matches no file. {there} Set {setting} and data.root to your shards."


def _damage(name: str, index: TarIndex) -> str:
    sample = f", sample {index.problem_key}" if index.problem_key else ""
    return f"{name}{sample}: {index.problem}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**19 else f"{size / 2**10:.1f} KiB"


def _share(lost: int, kept: int) -> str:
    """A fraction that would just accept the loss, rounded up to one digit."""
    share = lost / (lost + kept)
    digit = 10.0 ** np.floor(np.log10(share))
    return f"{min(np.ceil(share / digit) * digit, 1.0):g}"
