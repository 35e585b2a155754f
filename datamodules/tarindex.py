"""Where each member of each sample lies inside one WebDataset tar shard.

A raw scan of the tar headers finds what a streaming reader passes over in silence: truncated files, zero blocks in
the middle (which end a tar early without an error), damaged headers and duplicate keys.

An index is kept as ``<shard>.idx.npz`` beside the shard by whoever writes a data set, and otherwise in the user's
cache. Either way it costs 12 bytes per member and the length of the longest key per sample; beside the shard another 4
per member, a checksum that tells which samples have changed since.
"""

import hashlib
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

BLOCK = 512
_ZERO = bytes(BLOCK)
_REGULAR = b"0\0" + b"7"
_WITHOUT_DATA = b"123456"  # links, devices, folders, fifos: a header and nothing behind it
_NOT_SAMPLES = re.compile(r"__[^/]*__($|/)")  # names webdataset keeps for itself
CACHED_FROM = 1000  # samples; smaller shards are cached together, see setindex.py
_FORMAT = 2
_MEASURED = "measured/"
_SUMS = "crc32"


@dataclass(frozen=True)
class TarIndex:
    """Index of one shard, row = sample.

    Attributes:
        keys: utf-8 keys, bytes (n,).
        extensions: lower-case member names behind the key's first dot, one per column.
        offsets: byte position of each member, int64 (n, k); -1 where the sample lacks it.
        sizes: bytes of each member, int32 (int64 where members exceed 2 GiB), (n, k); 0 where the sample lacks it.
        problem: the first thing found wrong, with the byte; empty for a sound shard.
        problem_key: key of the sample at the damage, if it is known.
        size: bytes of the shard; -1 if it is not known.
        lost: samples that are known to be left out for that, duplicates of a key; a cut-off end is not counted.
    """

    keys: NDArray[np.bytes_]
    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.integer[Any]]
    problem: str = ""
    problem_key: str = ""
    size: int = -1
    lost: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def key(self, row: int) -> str:
        """Key of one sample."""
        return bytes(self.keys[row]).decode("utf-8", "surrogateescape")


def cache_folder() -> Path:
    """Folder for files that can be made again: $PLATFORM_CACHE, or ~/.cache/platform."""
    return Path(os.environ.get("PLATFORM_CACHE") or Path.home() / ".cache" / "platform")


def sidecar(path: Path) -> Path:
    """Name of the index file that belongs beside a shard."""
    return path.with_name(f"{path.name}.idx.npz")


def write_sidecar(path: Path, index: TarIndex, measured: Mapping[str, NDArray[np.int64]] | None = None) -> Path:
    """Write the index of a shard beside it, in one step; equal input gives equal bytes.

    Args:
        path: the finished shard; its size is recorded, and an index that states another size is not used.
        index: what ``scan`` finds in it.
        measured: numbers about every sample that plans need before decoding, int64 (n, width) by name, e.g. "shape"
            for height and width.

    Returns:
        The file written.

    Raises:
        OSError: it cannot be written.
    """
    columns = {f"{_MEASURED}{name}": np.asarray(table, np.int64) for name, table in (measured or {}).items()}
    made = sidecar(path)
    sums = {_SUMS: member_sums(path, index)}
    _save(made, {**_arrays(replace(index, size=path.stat().st_size)), **columns, **sums})
    return made


def member_sums(path: Path, index: TarIndex) -> NDArray[np.uint32]:
    """CRC-32 of every member of a shard, (n, k); 0 where the sample lacks it.

    Raises:
        OSError: the shard cannot be read.
    """
    sums = np.zeros(index.offsets.shape, dtype=np.uint32)
    with path.open("rb") as file:
        for row, column in np.argwhere(index.offsets >= 0):
            data = os.pread(file.fileno(), int(index.sizes[row, column]), int(index.offsets[row, column]))
            sums[row, column] = zlib.crc32(data)
    return sums


def written_sums(path: Path) -> list[tuple[str, dict[str, int]]]:
    """What the index file beside a shard says: key and checksum by extension of every sample; empty without one."""
    try:
        with np.load(sidecar(path), allow_pickle=False) as table:
            keys = [bytes(key).decode("utf-8", "surrogateescape") for key in table["keys"]]
            names, there = [str(name) for name in table["extensions"]], (table["offsets"] >= 0).tolist()
            sums = table[_SUMS].tolist() if _SUMS in table else [[]] * len(keys)
    except Exception:  # absent or unreadable
        return []
    return [
        (key, {name: value for name, value, held in zip(names, row, present, strict=False) if held})
        for key, row, present in zip(keys, sums, there, strict=True)
    ]


def load(path: Path) -> TarIndex:
    """Index of a shard: from beside it, from the cache where path, size and time of change agree, or scanned.

    Raises:
        OSError: the shard cannot be opened.
    """
    with path.open("rb") as file:
        return load_open(file.fileno(), identity(path), sidecar(path))


def load_open(file: int, known_as: str, beside: Path) -> TarIndex:
    """Index of an open shard, wherever its file is by now.

    Args:
        file: descriptor of the shard.
        known_as: what stands for this content in the cache, see ``identity``.
        beside: its index file, which need not exist.

    Raises:
        OSError: the shard cannot be read.
    """
    size = os.fstat(file).st_size
    index = read(beside, size)
    if index is not None and _fits(file, index):
        return index
    cached = cache_file(known_as)
    index = read(cached, size)
    if index is None:
        index = scan_open(file)
        if len(index) >= CACHED_FROM:
            keep(cached, index)
    return index


def identity(path: Path, stat: os.stat_result | None = None) -> str:
    """What stands for the content of a local shard: its path, size and time of change, as in ``stat`` or now.

    Raises:
        OSError: the shard is not there.
    """
    stat = stat or path.stat()
    return f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def cache_file(known_as: str, column: str = "") -> Path:
    """File of the user's cache for the index of a shard, or for one measured column of it."""
    digest = hashlib.sha256(f"{_FORMAT}\0{known_as}\0{column}".encode()).hexdigest()[:32]
    return cache_folder() / "tar-index" / f"{digest}.npz"


def read_measured(file: Path, size: int, name: str, shape: tuple[int, int]) -> NDArray[np.int64] | None:
    """A measured column from a file beside the shard or in the cache.

    Args:
        file: the index file.
        size: bytes of the shard that it must belong to.
        name: what was measured.
        shape: samples and numbers per sample.

    Returns:
        int64 of that shape, or None where there is no such column.
    """
    try:
        with np.load(file, allow_pickle=False) as table:
            if (int(table["format"]), int(table["bytes"])) != (_FORMAT, size):
                return None
            column = table[f"{_MEASURED}{name}"]
    except Exception:  # absent, unreadable or half written: the shard itself is the truth
        return None
    return column if column.shape == shape and column.dtype == np.int64 else None


def keep(file: Path, index: TarIndex) -> None:
    """Put the index of a shard into a cache file, if the disk allows."""
    keep_arrays(file, _arrays(index))


def keep_file(file: Path, content: bytes) -> None:
    """Put an index file that comes from elsewhere into the cache, if the disk allows."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            made.write_bytes(content)
            made.replace(file)
    except OSError:
        return


def keep_measured(file: Path, size: int, name: str, column: NDArray[np.int64]) -> None:
    """Put a measured column of a shard of ``size`` bytes into a cache file, if the disk allows."""
    keep_arrays(file, {"format": np.array(_FORMAT), "bytes": np.array(size), f"{_MEASURED}{name}": column})


def scan(path: Path) -> TarIndex:
    """Read every header of a shard; damage is reported in the index, not raised.

    Raises:
        OSError: the shard cannot be opened.
    """
    with path.open("rb") as file:
        return scan_open(file.fileno())


def scan_open(file: int) -> TarIndex:
    """Read every header of an open shard; damage is reported in the index, not raised.

    Raises:
        OSError: the shard cannot be read.
    """
    grouping = _Grouping()
    try:
        for name, offset, size in _members(file):
            grouping.add(name, offset, size)
    except Damage as damage:
        grouping.cut(str(damage), damage.name)
    return grouping.index(os.fstat(file).st_size)


class Damage(Exception):
    """The archive cannot be read further; ``name`` is the member at hand when it is known."""

    def __init__(self, text: str, name: str = "") -> None:
        super().__init__(text)
        self.name = name


@dataclass
class _Grouping:
    """Joins consecutive members of one key to samples, by webdataset's own rule for key and extension."""

    keys: list[bytes] = field(default_factory=list)
    rows: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    current: bytes | None = None
    repeated: bool = False
    problem: str = ""
    problem_key: str = ""
    lost: int = 0

    def add(self, name: str, offset: int, size: int) -> None:
        stem, extension = base_plus_ext(name)
        if stem is None or _NOT_SAMPLES.match(name):
            return
        key, extension = stem.encode("utf-8", "surrogateescape"), extension.lower()
        if key != self.current:
            self.current = key
            self.repeated = key in self.seen
            if self.repeated:
                self.note(f"key {stem} appears twice, again at byte {offset}", stem)
                self.lost += 1
            else:
                self.seen.add(key)
                self.keys.append(key)
                self.rows.append({})
        if self.repeated:
            return
        if extension in self.rows[-1]:
            self.note(f"member {name} appears twice, again at byte {offset}", stem)
        else:
            self.rows[-1][extension] = (offset, size)

    def note(self, problem: str, key: str) -> None:
        """Keep the first thing that is wrong."""
        if not self.problem:
            self.problem, self.problem_key = problem, key

    def cut(self, problem: str, name: str) -> None:
        """End early, without the last sample if the damage cut it: by the member's name, or as it lacks a member."""
        stem = base_plus_ext(name)[0] or ""
        if not self.keys:
            self.note(problem, stem)
            return
        last = self.keys[-1].decode("utf-8", "surrogateescape")
        if stem == last or (not stem and len(self.rows[-1]) < len(set().union(*self.rows))):
            self.note(problem, last)
            self.keys.pop()
            self.rows.pop()
        else:
            self.note(problem, stem or f"{last} or the one after it")

    def index(self, size: int) -> TarIndex:
        extensions = tuple(dict.fromkeys(extension for row in self.rows for extension in row))
        missing = (-1, 0)
        table = np.array(
            [[row.get(extension, missing) for extension in extensions] for row in self.rows], dtype=np.int64
        ).reshape(len(self.rows), len(extensions), 2)
        sizes = table[:, :, 1]
        return TarIndex(
            keys=np.array(self.keys, dtype=np.bytes_),
            extensions=extensions,
            offsets=np.ascontiguousarray(table[:, :, 0]),
            sizes=sizes.astype(np.int64 if sizes.max(initial=0) >= 2**31 else np.int32),
            problem=self.problem,
            problem_key=self.problem_key,
            size=size,
            lost=self.lost,
        )


def _members(file: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, byte offset of the content, content size) of every regular file in an open tar."""
    end = os.fstat(file).st_size
    if os.pread(file, 2, 0) == b"\x1f\x8b":
        raise Damage("it is gzip-compressed, which cannot be read by offset; unpack it with gunzip")
    at = 0
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    while True:
        header = os.pread(file, BLOCK, at)
        if header == _ZERO:
            return _check_tail(file, at, end)
        if len(header) < BLOCK:
            raise Damage(f"truncated at byte {end}: the end-of-archive blocks are missing")
        _check_header(header, at)
        kind = header[156:157]
        name = own.get("path") or shared.get("path") or _name(header)
        size = 0 if kind in _WITHOUT_DATA else _size(header, own, at)
        start = at + BLOCK
        if start + size > end:
            raise Damage(f"truncated at byte {end}: {start + size - end} bytes of {name} are missing", name)
        if kind in b"gxX":
            (shared if kind == b"g" else own).update(pax_records(os.pread(file, size, start), at))
        elif kind in b"LK":
            own["path" if kind == b"L" else "linkpath"] = _text(os.pread(file, size, start))
        else:
            if kind == b"S" or any(word.startswith("GNU.sparse.") for word in own):
                raise Damage(f"member {name} at byte {at} is stored sparse and cannot be read by offset", name)
            if kind in _REGULAR and not name.endswith("/"):
                yield name, start, size
            own = {}
        at = start + -(-size // BLOCK) * BLOCK


def _check_header(header: bytes, at: int) -> None:
    """Refuse a block whose checksum is wrong."""
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    stored = header[148:156].split(b"\0", 1)[0].strip()
    try:
        fine = int(stored, 8) == total
    except ValueError:
        fine = False
    if not fine:
        raise Damage(f"damaged header at byte {at} (wrong checksum)" if at else "it is not a tar file")


def _check_tail(file: int, at: int, end: int) -> None:
    """A zero block ends an archive; anything but zeros behind it means that samples would be lost in silence."""
    step = 1 << 20
    for begin in range(at, end, step):
        used = np.frombuffer(os.pread(file, step, begin), dtype=np.uint8) != 0
        if used.any():
            raise Damage(f"zero block at byte {at} inside the archive, data goes on at byte {begin + used.argmax()}")
    if end - at < 2 * BLOCK:
        raise Damage(f"truncated at byte {end}: the end-of-archive blocks are missing")


def _size(header: bytes, own: dict[str, str], at: int) -> int:
    if "size" not in own:
        return _number(header[124:136], at)
    if not own["size"].isdigit():
        raise Damage(f"damaged pax header before byte {at} (size {own['size']!r})")
    return int(own["size"])


def _number(raw: bytes, at: int) -> int:
    """Octal text, or GNU base-256 where the first bit is set."""
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    try:
        return int(raw.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        raise Damage(f"damaged header at byte {at} (a number field holds {raw!r})") from None


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # Only the POSIX layout has a prefix there; old GNU archives keep time stamps in the same bytes.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def pax_records(raw: bytes, at: int) -> dict[str, str]:
    """Parse the records "<length> <field>=<value><newline>" of a pax header."""
    fields: dict[str, str] = {}
    while raw.strip(b"\0"):
        length, _, _rest = raw.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(raw):
            raise Damage(f"damaged pax header at byte {at}")
        record = raw[len(length) + 1 : int(length)]
        name, _, value = record.removesuffix(b"\n").partition(b"=")
        fields[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        raw = raw[int(length) :]
    return fields


def states(header: bytes, size: int) -> bool:
    """Whether a header says that ``size`` bytes follow: a shard may have changed since it was indexed."""
    if header[124:135] == b"%011o" % size:
        return True
    try:
        return len(header) == BLOCK and (_number(header[124:136], 0) == size or size >= 8**11)
    except Damage:
        return False


def _fits(file: int, index: TarIndex) -> bool:
    """Whether the last member of an index is where it says: a shard of the same size may have taken its place."""
    if not len(index):
        return True
    row, column = np.unravel_index(index.offsets.argmax(), index.offsets.shape)
    header = os.pread(file, BLOCK, int(index.offsets[row, column]) - BLOCK)
    return states(header, int(index.sizes[row, column]))


def _arrays(index: TarIndex) -> dict[str, NDArray[Any]]:
    return {
        "format": np.array(_FORMAT),
        "bytes": np.array(index.size),
        "keys": index.keys,
        "extensions": np.array(index.extensions, dtype=np.str_),
        "offsets": index.offsets,
        "sizes": index.sizes,
        "problem": np.array(index.problem),
        "problem_key": np.array(index.problem_key),
        "lost": np.array(index.lost),
    }


def read(path: Path, size: int | None) -> TarIndex | None:
    """An index file that belongs to a shard of ``size`` bytes, or of any size, or None."""
    try:
        with np.load(path, allow_pickle=False) as table:
            stated = int(table["bytes"])
            if int(table["format"]) != _FORMAT or size not in (stated, None):
                return None
            return TarIndex(
                keys=table["keys"],
                extensions=tuple(str(name) for name in table["extensions"]),
                offsets=table["offsets"],
                sizes=table["sizes"],
                problem=str(table["problem"]),
                problem_key=str(table["problem_key"]),
                size=stated,
                lost=int(table["lost"]),
            )
    except Exception:  # absent, unreadable or half written: the shard itself is the truth
        return None


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an npz file in one step."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".idx-") as folder:
        made = Path(folder) / path.name
        np.savez(made, allow_pickle=False, **arrays)
        made.replace(path)


def keep_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Save into the cache, best effort: a read-only or full disk costs time, never the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, arrays)
    except OSError:
        return
