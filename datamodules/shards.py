"""Tar shards as a random-access sequence of samples: how many there are, and the bytes of sample i."""

import bisect
import contextlib
import dataclasses
import logging
import operator
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import catalogue, overview, spans, stamp
from datamodules.files import Files, LocalFiles
from datamodules.held import Held
from datamodules.order import Ints, fingerprint
from datamodules.patterns import find
from datamodules.source import BadSample, Bytes, Measure, Members, Source, measure_rows
from datamodules.spans import Column, Handle
from datamodules.stock import count_classes, damage, take_stock
from datamodules.tarindex import BLOCK, TarIndex, states

__all__ = ["BadSample", "ShardSet", "Source", "find", "open_source"]

log = logging.getLogger(__name__)

_CHECKED_BYTES = 64 * 2**20  # sets up to this size are read and hashed before the start; it takes a moment
_CACHE_BYTES = 64 * 2**30
_NOTHING = np.zeros(0, dtype="S1")
_HELD = 2**16  # samples whose places and keys are held in any case
_REMOTE = re.compile(r"pipe:|(?!file:)[a-z][a-z0-9+.-]*://")


class ShardSet:
    """Samples of a list of tar shards, read by position through one index per shard.

    Nothing is kept open but the shards in use, at most ``open_shards``, and no index but theirs is held in memory: 12
    bytes per member and the longest key per sample; the keys once more, and 16 bytes per member that is copied, side by
    side for look-ups of whole batches. Shards that ``gather`` and ``pieces`` copy from are mapped; what counts as
    resident for that is the page cache, which the system takes back when it needs it.

    With index.json, counts and fingerprint are what it says, so that damage never moves a sample to another position.

    Args:
        paths: shard files in order, or another place to get them from.
        setting: name of the setting that chose them, for messages, e.g. "data.train".
        max_bad_fraction: accepted share of unreadable samples; 0 refuses any damage.
        open_shards: how many files and indices are kept at hand; at least two shuffle windows.

    Raises:
        ValueError: a shard is damaged, empty or not what index.json says, beyond the accepted share.
    """

    def __init__(
        self,
        paths: Sequence[Path] | Files,
        setting: str,
        max_bad_fraction: float = 0.0,
        open_shards: int = 64,
    ) -> None:
        self.files: Files = LocalFiles(paths) if isinstance(paths, Sequence) else paths
        self.names = self.files.names
        self.setting = setting
        self.strict = max_bad_fraction == 0
        self.open_shards = open_shards
        self._indices: OrderedDict[int, TarIndex] = OrderedDict()
        self._handles: OrderedDict[int, Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = [threading.Lock() for _ in range(16)]
        self._places: dict[str, Held] = {}  # of members, by extension
        self._described: dict[str, dict[str, Any]] = {}
        sizes = self.files.sizes
        self.bytes = sum(sizes)
        stock = take_stock(self.files, setting, max_bad_fraction, _CHECKED_BYTES)
        self.counts: Ints = stock.counts
        self.lost = stock.lost
        self._repeats = stock.repeats
        self._refused: dict[int, dict[int, str]] = {}  # rows of the shards in use that nobody may read, and why
        self._before = stock.keys
        self.starts: Ints = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        stated = [entry.bytes if entry else size for entry, size in zip(self.files.entries, sizes, strict=True)]
        self._firsts: list[int] = self.starts.tolist()
        self.fingerprint = fingerprint(self.names, self.counts, stated)
        self._room = max(_HELD, int(self.counts.sum()) * open_shards // max(1, len(self.counts)))
        self._keys = Held(self.starts, self._listed, self._room)
        self.classes = count_classes(self.files, self.counts, self.read, _CHECKED_BYTES)

    def extensions(self) -> tuple[str, ...]:
        """Member names of the first readable shard's samples."""
        for shard in range(len(self.names)):
            try:
                if found := self._index(shard).extensions:
                    return found
            except OSError as error:
                log.warning("%s: %s: %s", self.setting, self.names[shard], error.strerror or error)
        return ()

    def shard(self, sample: int) -> str:
        """Name of the shard that holds a sample."""
        return self.names[self._locate(sample)[0]]

    def key(self, sample: int) -> str:
        """Key of a sample; where a shard has lost it and nothing tells it any more, "#" and the row."""
        return self._key(*self._locate(sample))

    def keys(self, shard: int) -> "np.ndarray[tuple[int], np.dtype[np.bytes_]]":
        """Keys of all samples of a shard that can be read, bytes (n,).

        Raises:
            OSError: the shard is not to be had.
        """
        return self._index(shard).keys

    def keys_at(self, samples: Ints) -> list[str]:
        """Keys of many samples at once, as ``key`` gives them."""
        if not len(samples):
            return []
        try:
            found = self._keys(samples, np.searchsorted(self.starts, samples, side="right") - 1)
        except OSError:  # a shard has gone
            return [self.key(sample) for sample in samples.tolist()]
        return b"\0".join(found.tolist()).decode("utf-8", "surrogateescape").split("\0")  # no key has a zero byte

    def sizes_at(self, samples: Ints, extension: str) -> Ints:
        """Bytes of one member of each sample; 0 where it is missing or the shard is damaged. int64 (n,)."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        try:
            found: Ints = self._held(extension)(samples, shards)[:, 1] if len(samples) else samples
        except OSError:
            found = np.zeros(len(samples), dtype=np.int64)
            for shard in np.unique(shards).tolist():
                with contextlib.suppress(OSError):
                    sizes = spans.members(self._index(shard), extension, int(self.counts[shard]))[:, 1]
                    found[shards == shard] = sizes[samples[shards == shard] - self.starts[shard]]
        return found

    def read(self, sample: int) -> Members:
        """Members of a sample by extension, in one read.

        Raises:
            BadSample: the shard is damaged, has gone, or ends inside the sample.
        """
        shard, row = self._locate(sample)
        index, handle = self._open(shard, row)
        if index.problem or row >= len(index.keys):
            self._check_row(shard, row, index)
        offsets, sizes = index.offsets[row].tolist(), index.sizes[row].tolist()
        begin = min(offsets)
        if begin < 0:  # a sample without one of the members
            begin = min(offset for offset in offsets if offset >= 0)
        begin -= BLOCK
        end = max(map(operator.add, offsets, sizes))
        try:
            data = os.pread(handle.file, end - begin, begin)
        except OSError as error:
            self._forget(shard)
            raise self._unreadable(shard, index.key(row), error) from error
        if len(data) < end - begin:
            raise BadSample(_cut(self.names[shard], index.key(row), begin + len(data), end))
        members: Members = {}
        for extension, offset, size in zip(index.extensions, offsets, sizes, strict=False):
            if offset < 0:
                continue
            at = offset - begin
            # The size in the header (bytes 124 to 134) tells in passing whether the shard is the one that was indexed.
            if data[at - 388 : at - 377] != b"%011o" % size and not states(data[at - BLOCK : at], size):
                raise self._misplaced(shard, row, offset - BLOCK)
            members[extension] = data[at : at + size]
        return members

    def sizes(self, shard: int, extension: str) -> Ints:
        """Bytes of one member for every sample of a shard, 0 where it is missing, (n,); an overview knows lost ones."""
        name, count = f"{overview.SIZE}{extension}", int(self.counts[shard])
        known = self.files.recall(shard, name, (count,))
        if known is not None:
            return known
        try:
            index = self._index(shard)
        except OSError:
            return np.zeros(count, dtype=np.int64)
        table = np.ascontiguousarray(spans.members(index, extension, count)[:, 1])
        if not index.problem:
            self.files.note(shard, name, table)
        return table

    def described(self, name: str) -> dict[str, Any]:
        """Entry of the data set's card, e.g. of a member; empty where index.json says nothing; see ``stamp.agreed``."""
        found = self._described[name] = self._described.get(name) or stamp.agreed(self.files, name, self.setting)
        return dict(found)

    def stored(self, shard: int, name: str, width: int) -> Ints | None:
        """Measured numbers (n, width) if they are known without reading the samples, else None."""
        try:
            return self.files.stored(shard, name, (int(self.counts[shard]), width))
        except OSError:
            return None

    def measured(self, shard: int, name: str, measure: Measure, width: int) -> Ints:
        """Numbers about every sample of a shard, int64 (n, width): looked up, else measured once and kept.

        Zeros for a sample that cannot be read or measured.
        """
        table = self.stored(shard, name, width)
        if table is None:
            start = int(self.starts[shard])
            table, lasting = measure_rows(lambda row: self.read(start + row), int(self.counts[shard]), measure, width)
            if lasting:
                self.keep(shard, name, table)
        return table

    def keep(self, shard: int, name: str, table: Ints) -> None:
        """Remember measured numbers in the user's cache."""
        try:
            self.files.store(shard, name, table)
        except OSError as error:
            log.warning("%s: %s", self.names[shard], error.strerror or error)

    def gather(self, samples: Ints, extension: str, out: Bytes) -> None:
        """Copy one member of equal size from each sample into the rows of ``out``, uint8 (n, size).

        Raises:
            BadSample: a member is missing, unreadable or of another size; ``row`` says which.
        """
        count, size = out.shape
        whole = np.full(count, size, dtype=np.int64)
        self._copy(samples, extension, None, whole, out, np.arange(count, dtype=np.int64) * size)

    def pieces(self, samples: Ints, extension: str, begins: Ints, lengths: Ints, out: Bytes, at: Ints) -> None:
        """Copy bytes ``begins[i]`` to ``begins[i] + lengths[i]`` of a member of each sample to ``out`` at ``at[i]``.

        Raises:
            BadSample: a member is missing, unreadable or too short; ``row`` says which.
        """
        self._copy(samples, extension, begins, lengths, out, at)

    def expect(self, samples: Ints) -> None:
        """Say which samples will be read about one shuffle window from now."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        self.files.expect([int(shard) for shard in dict.fromkeys(shards.tolist())])

    def health(self) -> dict[str, float]:
        """Counters for the log."""
        return self.files.health()

    def close(self) -> None:
        """Close every file and end background work; reading again opens them again."""
        self.files.close()
        with self._lock:
            self._handles.clear()
            self._indices.clear()

    # Reading

    def _copy(self, samples: Ints, extension: str, begins: Ints | None, lengths: Ints, out: Bytes, at: Ints) -> None:
        """Copy parts of members, or whole ones where ``begins`` is None."""
        assert out.flags.c_contiguous
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        rows = samples - self.starts[shards]

        try:
            columns = {
                shard: self._column(shard, rows, shards) for shard in np.flatnonzero(np.bincount(shards)).tolist()
            }
            table = self._held(extension)(samples, shards)
            failed = spans.copy(columns, shards, table, begins, lengths, out.reshape(-1), at)
        except OSError as error:
            asked = int(error.filename)
            self._forget(int(shards[asked]))
            raise self._unreadable(int(shards[asked]), self.key(int(samples[asked])), error, asked) from error
        if failed >= 0:
            raise self._unfit(int(shards[failed]), int(rows[failed]), failed, extension, begins, int(lengths[failed]))

    def _column(self, shard: int, rows: Ints, shards: Ints) -> Column:
        """A shard opened for a batch of ``rows`` of ``shards``."""
        index, handle = self._indices.get(shard), self._handles.get(shard)
        if index is None or handle is None:
            asked = int((shards == shard).argmax())
            index, handle = self._open(shard, int(rows[asked]), asked)
        if index.problem and self.strict:
            raise BadSample(damage(self.names[shard], index), row=int((shards == shard).argmax()))
        try:
            return Column(handle)
        except OSError as error:
            asked = int((shards == shard).argmax())
            self._forget(shard)
            raise self._unreadable(shard, self._key(shard, int(rows[asked])), error, asked) from error

    def _held(self, extension: str) -> Held:
        """Places and sizes of a member of all samples of the shards in use."""
        found = self._places.get(extension)
        if found is None:

            def load(shard: int) -> Ints:
                return spans.members(self._index(shard), extension, int(self.counts[shard]))

            found = self._places.setdefault(extension, Held(self.starts, load, self._room))
        return found

    def _unfit(self, shard: int, row: int, asked: int, extension: str, begins: Ints | None, length: int) -> BadSample:
        """Why a part of a member cannot be copied."""
        index, _ = self._open(shard, row, asked)
        self._check_row(shard, row, index, asked)
        key = index.key(row)
        held = [name for name, at in zip(index.extensions, index.offsets[row], strict=True) if at >= 0]
        if extension not in held:
            among = f"no .{extension} among its members ({', '.join(held)})"
            return BadSample(f"{self.names[shard]}, sample {key}: {among}", row=asked)
        column = index.extensions.index(extension)
        size, member = int(index.sizes[row, column]), int(index.offsets[row, column])
        wanted = length if begins is None else int(begins[asked]) + length
        if wanted > size or (begins is None and wanted < size):
            told = f".{extension} has {size} bytes, expected {'' if begins is None else 'at least '}{wanted}"
            return BadSample(f"{self.names[shard]}, sample {key}: {told}", row=asked)
        there = os.fstat(self._handle(shard).file).st_size
        if member + size > there:
            return BadSample(_cut(self.names[shard], key, there, member + size), row=asked)
        return self._misplaced(shard, row, member - BLOCK, asked)

    def _check_row(self, shard: int, row: int, index: TarIndex, asked: int = -1) -> None:
        name = self.names[shard]
        if index.problem and self.strict:
            raise BadSample(damage(name, index), row=asked)
        if row >= len(index):
            told = f"the shard holds {len(index)} samples, {catalogue.FILE_NAME} says {self.counts[shard]}"
            raise BadSample(f"{name}, sample {self._key(shard, row)}: is lost; {index.problem or told}", row=asked)
        if row in self._refused.get(shard, ()):
            raise BadSample(f"{name}, {self._refused[shard][row]}", row=asked)

    def _unreadable(self, shard: int, key: str, error: OSError, asked: int = -1) -> BadSample:
        return BadSample(f"{self.names[shard]}, sample {key}: {error.strerror or error}", row=asked)

    def _misplaced(self, shard: int, row: int, header: int, asked: int = -1) -> BadSample:
        """The shard is not what its index says; a look at all its headers tells why."""
        name = self.names[shard]
        if self.strict:
            with contextlib.suppress(OSError):
                found = self.files.scan(shard)
                if found.problem:
                    return BadSample(damage(name, found), row=asked)
        where = f"{name}, sample {self._index(shard).key(row)}"
        return BadSample(f"{where}: the header at byte {header} is not the one in the index of the shard", row=asked)

    def _key(self, shard: int, row: int) -> str:
        """Key of a row, as the index tells it, or what was known of the shard before."""
        try:
            keys = self._index(shard).keys
        except OSError:
            keys = _NOTHING
        if row >= len(keys):
            if shard not in self._before and isinstance(self.files, LocalFiles):
                self._before[shard] = self.files.keys_before(shard)
            keys = self._before.get(shard, _NOTHING)
        return keys.item(row).decode("utf-8", "surrogateescape") if row < len(keys) else f"#{row}"

    def _listed(self, shard: int) -> "np.ndarray[tuple[int], np.dtype[np.bytes_]]":
        """Keys of all rows of a shard, as ``key`` gives them."""
        keys = self._index(shard).keys[: int(self.counts[shard])]
        gone = (self._key(shard, row) for row in range(len(keys), int(self.counts[shard])))
        lost = [key.encode("utf-8", "surrogateescape") for key in gone]
        return np.concatenate([keys, np.array(lost, dtype=np.bytes_)]) if lost else keys

    def _locate(self, sample: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._firsts, sample) - 1  # a tenth of what numpy takes for one number
        return shard, sample - self._firsts[shard]

    def _open(self, shard: int, row: int, asked: int = -1) -> tuple[TarIndex, Handle]:
        try:
            return self._index(shard), self._handle(shard)
        except OSError as error:
            raise self._unreadable(shard, self._key(shard, row), error, asked) from error

    def _index(self, shard: int) -> TarIndex:
        index = self._indices.get(shard)  # in one step under the interpreter lock, as is every change of it
        if index is not None:
            return index
        with self._loading[shard % len(self._loading)]:  # others may go on reading other shards meanwhile
            index = self._indices.get(shard) or self._checked_index(shard)
        for held in (self._keys, *self._places.values()):  # the file may be another one by now
            held.forget(shard)
        with self._lock:
            self._indices[shard] = index
            if len(self._indices) > self.open_shards:
                self._indices.popitem(last=False)
        return index

    def _checked_index(self, shard: int) -> TarIndex:
        """The index, with a problem where it is not what is known about the shard from elsewhere."""
        index, entry = self.files.index(shard), self.files.entries[shard]
        shape, rows = (int(self.counts[shard]),), self._repeats.get(shard, {})
        if not self.files.verified:
            rows = rows | overview.resized(index, lambda name: self.files.recall(shard, name, shape))
        self._refused[shard] = rows
        if rows:
            offsets = index.offsets.copy()
            offsets[[row for row in rows if row < len(index)]] = -1  # so that nobody copies them unasked
            index = dataclasses.replace(index, offsets=offsets, problem=index.problem or next(iter(rows.values())))
        if entry is None or index.problem or index.size == entry.bytes:
            return index
        told = f"the file has {index.size} bytes, {catalogue.FILE_NAME} says {entry.bytes}"
        return dataclasses.replace(index, problem=told)

    def _handle(self, shard: int) -> Handle:
        handle = self._handles.get(shard)
        if handle is not None:
            return handle
        with self._loading[shard % len(self._loading)]:
            handle = self._handles.get(shard) or Handle(self.files.open(shard))
            stamp.compare(handle.file, self._described, f"{self.setting}: {self.names[shard]}")
        with self._lock:
            self._handles[shard] = handle
            if len(self._handles) > self.open_shards:
                self._handles.popitem(last=False)
        return handle

    def _forget(self, shard: int) -> None:
        """Let the next read open the file again: it may be there again by then."""
        with self._lock:
            self._handles.pop(shard, None)


def _cut(name: str, key: str, at: int, end: int) -> str:
    return f"{name}, sample {key}: truncated at byte {at}, the sample ends at byte {end}"


def open_source(
    patterns: str | Iterable[str],
    root: Path,
    setting: str,
    *,
    allow_missing: bool = False,
    max_bad_fraction: float = 0.0,
    window: int = 16,
    cache_bytes: int = _CACHE_BYTES,
    columns: Sequence[str] = (),
) -> Source:
    """Open whatever a setting names: shards here or elsewhere, or a folder of images.

    Args:
        patterns: as ``find`` takes them; or addresses of shards (http://, https://, s3://, gs://, ... or pipe:COMMAND)
            with braces.
        root: folder that relative names start from.
        setting: name of the setting, for messages, e.g. "data.train".
        allow_missing: accept that some of the named files are absent.
        max_bad_fraction: accepted share of unreadable samples, 0..1.
        window: shards whose samples are mixed with one another; this many must be at hand twice.
        cache_bytes: room for copies of remote shards on this machine.
        columns: folders of further shards with the same names and keys, whose members are added to each sample.

    Raises:
        ValueError: nothing is found, or it is damaged, or its columns do not match.
    """
    from datamodules.columns import Joined
    from datamodules.folders import ImageFolder
    from datamodules.remote import RemoteFiles, check_room

    texts = [patterns] if isinstance(patterns, str) else list(patterns)
    remote = [text for text in texts if _REMOTE.match(text)]
    if remote and len(remote) < len(texts):
        local = next(text for text in texts if text not in remote)
        raise ValueError(
            f"{setting} mixes addresses ({remote[0]}) with files ({local}). "
            "Name one kind, or make two sources of a mixture of them."
        )

    def opened(files: Files | list[Path]) -> ShardSet:
        return ShardSet(files, setting, max_bad_fraction, open_shards=2 * window if remote else max(64, 2 * window))

    if remote:
        first = RemoteFiles.find(remote, setting, allow_missing, cache_bytes)
        further = {name: first.column(name) for name in columns}
        check_room([first, *further.values()], window)
        primary, others = opened(first), {name: opened(part) for name, part in further.items()}
        return Joined(primary, others) if others else primary
    paths = find([text.removeprefix("file://").removeprefix("file:") for text in texts], root, setting, allow_missing)
    if len(paths) == 1 and paths[0].is_dir():
        if columns:
            raise ValueError(f"data.columns={list(columns)} needs shards, but {setting}='{paths[0]}' is a folder.")
        return ImageFolder(paths[0], setting)
    primary, others = opened(paths), {name: opened(_column(root / name, paths)) for name in columns}
    return Joined(primary, others) if others else primary


def _column(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Shards of the same names in another folder."""
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [path.name for path in paths if path.name not in there]
    if missing:
        raise ValueError(
            f"data.columns: {folder} lacks {len(missing)} of {len(paths)} shards, first: {missing[0]}. "
            "Copy or make them, or take the folder out of data.columns."
        )
    return [folder / path.name for path in paths]
