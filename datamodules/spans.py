"""Open shards, and copies of many byte ranges of them into memory that is already there.

Ranges are copied out of memory maps where that is safe, which is about as fast as copying memory, and read by system
calls elsewhere. A map ends the process with a bus error, rather than with an exception, if the file cannot be read any
more. Hence maps are used on file systems of this machine only, and the size of the file is looked at before every
batch; what is left is a file that is cut short in place within the microseconds of one copy, and a failing disk.
"""

import contextlib
import functools
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from datamodules.order import Ints
from datamodules.source import Bytes
from datamodules.tarindex import BLOCK, TarIndex, states

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}
_SIZE_AT = BLOCK - 124  # bytes from the size in a header to the content behind it
_DIGITS = 11  # of that size, octal
_OCTAL = 8.0 ** np.arange(_DIGITS)[::-1]


class Handle:
    """An open file that closes itself when its last user lets go of it, so that eviction cannot pull it away.

    Args:
        file: descriptor, owned from now on.
    """

    def __init__(self, file: int) -> None:
        self.file = file

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.file)

    @functools.cached_property
    def mapped(self) -> mmap.mmap | None:
        """The content, or None where a map is not safe."""
        stat = os.fstat(self.file)
        if _file_system(stat.st_dev) not in _LOCAL or not stat.st_size:
            return None
        with contextlib.suppress(OSError, ValueError):
            return mmap.mmap(self.file, stat.st_size, access=mmap.ACCESS_READ)
        return None

    @functools.cached_property
    def view(self) -> memoryview | None:
        """The same, for slices that are not copied."""
        return None if self.mapped is None else memoryview(self.mapped)


class Column:
    """An open shard, for the time of one batch.

    Args:
        handle: of the shard.

    Attributes:
        file: descriptor of the shard.
        source: its content, or None where it has to be read; short slices of it are made faster than of ``view``.
        view: the same, for slices that are not copied.
        end: bytes that can be read now.

    Raises:
        OSError: the file is out of reach.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.file = handle.file
        self.source = handle.mapped
        size = os.fstat(handle.file).st_size
        self.view = handle.view
        self.end = size if self.source is None else min(size, len(self.source))


def members(index: TarIndex, extension: str, count: int) -> Ints:
    """Where one member of each sample begins in a shard, -1 where there is none, and its size; int64 (count, 2)."""
    table: Ints = np.full((count, 2), (-1, 0), dtype=np.int64)
    if extension in index.extensions:
        column, rows = index.extensions.index(extension), min(count, len(index))
        table[:rows, 0] = index.offsets[:rows, column]
        table[:rows, 1] = index.sizes[:rows, column]
    return table


def copy(
    columns: Mapping[int, Column],
    shards: Ints,
    table: Ints,
    begins: Ints | None,
    lengths: Ints,
    out: Bytes,
    at: Ints,
) -> int:
    """Copy parts of members to their places in ``out``.

    Everything is checked at once; the copies are made one after the other, as the parts are spread over many files.

    Args:
        columns: the open shards by number.
        shards: number of the shard of each part, int64 (n,).
        table: first byte and size of its member, see ``members``, int64 (n, 2).
        begins: first byte inside the member, int64 (n,); None for whole members, which must have ``lengths`` bytes.
        lengths: bytes wanted, int64 (n,).
        out: uint8 (size,).
        at: where each part goes, int64 (n,).

    Returns:
        -1; or the first part that is not in its shard, or whose shard is not what its index says. Others may or may
        not be copied then.

    Raises:
        OSError: a file cannot be read; ``filename`` is the number of the part.
    """
    if not len(shards):
        return -1
    first, sizes = table.T
    numbers = np.fromiter(columns, np.int64, len(columns))
    limits = np.zeros(int(numbers.max()) + 1, dtype=np.int64)
    limits[numbers] = [column.end for column in columns.values()]
    stops = lengths if begins is None else begins + lengths
    wrong = (first < 0) | (first + sizes > limits[shards])
    wrong |= (stops != sizes) if begins is None else ((stops > sizes) | (begins < 0))
    if wrong.any():
        return int(wrong.argmax())
    chosen = [columns[shard] for shard in shards.tolist()]
    if any(column.source is None for column in columns.values()):
        return _read_all(chosen, table, begins, lengths, out.data, at)
    target = out.data
    places = (at.tolist(), (at + lengths).tolist())
    starts = first if begins is None else first + begins
    headers = (first - _SIZE_AT).tolist()
    stated: list[bytes] = []
    parts = zip(chosen, *places, starts.tolist(), (first + stops).tolist(), headers, strict=True)
    for column, low, high, start, end, header in parts:
        stated.append(column.source[header : header + _DIGITS])
        target[low:high] = column.view[start:end]
    return _moved(chosen, first, sizes, stated)


def _moved(chosen: list[Column], first: Ints, sizes: Ints, stated: list[bytes]) -> int:
    """First of several mapped members whose header states another size than its index, or -1.

    It is how a shard that has changed since it was indexed is found out in passing. ``stated`` is what stands where a
    header has the size; it may be written in another way.
    """
    found = b"".join(stated)
    if len(found) != len(first) * _DIGITS:
        return 0
    codes = np.frombuffer(found, dtype=np.uint8).reshape(-1, _DIGITS) ^ ord("0")
    numbers = codes.astype(np.float64) @ _OCTAL  # exact up to 2**53; anything but a digit makes it differ
    for part in np.flatnonzero((numbers != sizes) | (codes > 7).any(axis=1)).tolist():
        begin, content = int(first[part]), chosen[part].source
        if content is None or not states(content[begin - BLOCK : begin], int(sizes[part])):
            return int(part)
    return -1


def _read_all(
    chosen: list[Column], table: Ints, begins: Ints | None, lengths: Ints, target: memoryview, at: Ints
) -> int:
    """Copy the parts by system calls; the first one that cannot be had, or -1."""
    starts = np.zeros_like(at) if begins is None else begins
    numbers = (table[:, 0], table[:, 1], starts, lengths, at)
    for part, (member, size, begin, length, place) in enumerate(zip(*(n.tolist() for n in numbers), strict=True)):
        try:
            if not _read(chosen[part].file, member, size, begin, target[place : place + length]):
                return part
        except OSError as error:
            error.filename = part
            raise
    return -1


def _read(file: int, member: int, size: int, begin: int, target: memoryview) -> bool:
    """Copy one part by a system call, with the header where that is next to it; False if something is wrong."""
    if begin:
        return os.preadv(file, (target,), member + begin) == len(target)
    header = bytearray(BLOCK)
    return os.preadv(file, (header, target), member - BLOCK) == BLOCK + len(target) and states(bytes(header), size)


@functools.lru_cache(maxsize=64)
def _file_system(device: int) -> str:
    """Type of the file system with a device number, e.g. "ext4"; empty where the kernel does not say."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == number:
                return rest.split()[0]
    return ""
