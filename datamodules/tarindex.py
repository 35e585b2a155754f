"""Where each member of each sample lies inside one WebDataset tar shard.

A raw scan of the tar headers finds what a streaming reader passes over in silence: truncated files, zero blocks in
the middle (which end a tar early without an error), damaged headers and duplicate keys.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

BLOCK = 512
_ZERO = bytes(BLOCK)
_REGULAR = b"0\0" + b"7"
_WITHOUT_DATA = b"123456"  # links, devices, folders, fifos: a header and nothing behind it
_NOT_SAMPLES = re.compile(r"__[^/]*__($|/)")  # names webdataset keeps for itself
_CACHED_FROM = 1000  # samples; a smaller shard is scanned about as fast as its cache file is opened
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class TarIndex:
    """Index of one shard, row = sample.

    Attributes:
        keys: utf-8 keys, bytes (n,).
        extensions: lower-case member names behind the key's first dot, one per column.
        offsets: byte position of each member, int64 (n, k); -1 where the sample lacks it.
        sizes: bytes of each member, int64 (n, k); 0 where the sample lacks it.
        problem: what ended the scan early, with the byte; empty for a sound shard.
        problem_key: key of the sample at the damage, if it is known.
    """

    keys: NDArray[np.bytes_]
    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    problem: str = ""
    problem_key: str = ""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def key(self, row: int) -> str:
        """Key of one sample."""
        return bytes(self.keys[row]).decode("utf-8", "surrogateescape")


def cache_folder() -> Path:
    """Folder for files that can be made again: $PLATFORM_CACHE, or ~/.cache/platform."""
    return Path(os.environ.get("PLATFORM_CACHE") or Path.home() / ".cache" / "platform")


def load(path: Path) -> TarIndex:
    """Index of a shard, from the cache where path, size and modification time agree, else scanned.

    Raises:
        OSError: the shard cannot be opened.
    """
    stat = path.stat()
    identity = f"{_CACHE_FORMAT}\0{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    cached = cache_folder() / "tar-index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    index = _read_cache(cached)
    if index is None:
        index = scan(path)
        if len(index) >= _CACHED_FROM:
            _write_cache(cached, index)
    return index


def scan(path: Path) -> TarIndex:
    """Read every header of a shard; damage is reported in the index, not raised.

    Raises:
        OSError: the shard cannot be opened.
    """
    grouping = _Grouping()
    problem = ""
    try:
        with path.open("rb") as file:
            for name, offset, size in _members(file.fileno()):
                grouping.add(name, offset, size)
    except _Damage as damage:
        problem = str(damage)
        grouping.drop(damage.name)
    return grouping.index(problem)


class _Damage(Exception):
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
    problem_key: str = ""

    def add(self, name: str, offset: int, size: int) -> None:
        stem, extension = base_plus_ext(name)
        if stem is None or _NOT_SAMPLES.match(name):
            return
        key, extension = stem.encode("utf-8", "surrogateescape"), extension.lower()
        if not self.keys or key != self.keys[-1]:
            if key in self.seen:
                raise _Damage(f"key {stem} appears twice, again at byte {offset}", name)
            self.seen.add(key)
            self.keys.append(key)
            self.rows.append({})
        if extension in self.rows[-1]:
            raise _Damage(f"member {name} appears twice, again at byte {offset}", name)
        self.rows[-1][extension] = (offset, size)

    def drop(self, name: str) -> None:
        """Forget the last sample if the damage cut it: by the member's name, or because it lacks a member."""
        stem = base_plus_ext(name)[0] or ""
        if not self.keys:
            self.problem_key = stem
            return
        last = self.keys[-1].decode("utf-8", "surrogateescape")
        if stem == last or (not stem and len(self.rows[-1]) < len(set().union(*self.rows))):
            self.problem_key = last
            self.keys.pop()
            self.rows.pop()
        else:
            self.problem_key = stem or f"{last} or the one after it"

    def index(self, problem: str) -> TarIndex:
        extensions = tuple(dict.fromkeys(extension for row in self.rows for extension in row))
        missing = (-1, 0)
        table = np.array(
            [[row.get(extension, missing) for extension in extensions] for row in self.rows], dtype=np.int64
        ).reshape(len(self.rows), len(extensions), 2)
        return TarIndex(
            keys=np.array(self.keys, dtype=np.bytes_),
            extensions=extensions,
            offsets=np.ascontiguousarray(table[:, :, 0]),
            sizes=np.ascontiguousarray(table[:, :, 1]),
            problem=problem,
            problem_key=self.problem_key,
        )


def _members(file: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, byte offset of the content, content size) of every regular file in an open tar."""
    end = os.fstat(file).st_size
    if os.pread(file, 2, 0) == b"\x1f\x8b":
        raise _Damage("it is gzip-compressed, which cannot be read by offset; unpack it with gunzip")
    at = 0
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    while True:
        header = os.pread(file, BLOCK, at)
        if header == _ZERO:
            return _check_tail(file, at, end)
        if len(header) < BLOCK:
            raise _Damage(f"truncated at byte {end}: the end-of-archive blocks are missing")
        _check_header(header, at)
        kind = header[156:157]
        name = own.get("path") or shared.get("path") or _name(header)
        size = 0 if kind in _WITHOUT_DATA else _size(header, own, at)
        start = at + BLOCK
        if start + size > end:
            raise _Damage(f"truncated at byte {end}: {start + size - end} bytes of {name} are missing", name)
        if kind in b"gxX":
            (shared if kind == b"g" else own).update(_pax(os.pread(file, size, start), at))
        elif kind in b"LK":
            own["path" if kind == b"L" else "linkpath"] = _text(os.pread(file, size, start))
        else:
            if kind == b"S" or any(word.startswith("GNU.sparse.") for word in own):
                raise _Damage(f"member {name} at byte {at} is stored sparse and cannot be read by offset", name)
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
        raise _Damage(f"damaged header at byte {at} (wrong checksum)" if at else "it is not a tar file")


def _check_tail(file: int, at: int, end: int) -> None:
    """A zero block ends an archive; anything but zeros behind it means that samples would be lost in silence."""
    step = 1 << 20
    for begin in range(at, end, step):
        used = np.frombuffer(os.pread(file, step, begin), dtype=np.uint8) != 0
        if used.any():
            raise _Damage(f"zero block at byte {at} inside the archive, data goes on at byte {begin + used.argmax()}")
    if end - at < 2 * BLOCK:
        raise _Damage(f"truncated at byte {end}: the end-of-archive blocks are missing")


def _size(header: bytes, own: dict[str, str], at: int) -> int:
    if "size" not in own:
        return _number(header[124:136], at)
    if not own["size"].isdigit():
        raise _Damage(f"damaged pax header before byte {at} (size {own['size']!r})")
    return int(own["size"])


def _number(raw: bytes, at: int) -> int:
    """Octal text, or GNU base-256 where the first bit is set."""
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    try:
        return int(raw.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        raise _Damage(f"damaged header at byte {at} (a number field holds {raw!r})") from None


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # Only the POSIX layout has a prefix there; old GNU archives keep time stamps in the same bytes.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(raw: bytes, at: int) -> dict[str, str]:
    """Parse the records "<length> <field>=<value><newline>" of a pax header."""
    fields: dict[str, str] = {}
    while raw.strip(b"\0"):
        length, _, _rest = raw.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(raw):
            raise _Damage(f"damaged pax header at byte {at}")
        record = raw[len(length) + 1 : int(length)]
        name, _, value = record.removesuffix(b"\n").partition(b"=")
        fields[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        raw = raw[int(length) :]
    return fields


def _read_cache(path: Path) -> TarIndex | None:
    try:
        with np.load(path, allow_pickle=False) as table:
            return TarIndex(
                keys=table["keys"],
                extensions=tuple(str(name) for name in table["extensions"]),
                offsets=table["offsets"],
                sizes=table["sizes"],
                problem=str(table["problem"]),
                problem_key=str(table["problem_key"]),
            )
    except Exception:  # absent, unreadable or half written: the shard itself is the truth
        return None


def _write_cache(path: Path, index: TarIndex) -> None:
    """Best effort: a read-only or full disk costs time, never the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            np.savez(
                made,
                keys=index.keys,
                extensions=np.array(index.extensions, dtype=np.str_),
                offsets=index.offsets,
                sizes=index.sizes,
                problem=np.array(index.problem),
                problem_key=np.array(index.problem_key),
            )
            made.replace(path)
    except OSError:
        return
