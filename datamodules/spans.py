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
from collections.abc import Callable
from pathlib import Path

import numpy as np

from datamodules.order import Ints
from datamodules.source import Bytes
from datamodules.tarindex import BLOCK, TarIndex, states

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}


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


class Column:
    """One member of all samples of an open shard, for the time of one batch.

    Args:
        index: of the shard.
        handle: of the shard.
        extension: which member.

    Attributes:
        file: descriptor of the shard.
        source: its content, or None where it has to be read; short slices of it are made faster than of ``view``.
        view: the same, for slices that are not copied.
        end: bytes that can be read now.
        members: byte of the shard at which each member begins, -1 where there is none, int64; and its size. Both are
            empty if no sample has it.

    Raises:
        OSError: the file is out of reach.
    """

    def __init__(self, index: TarIndex, handle: Handle, extension: str) -> None:
        self.handle = handle
        self.file = handle.file
        self.source = handle.mapped
        size = os.fstat(handle.file).st_size
        self.view = None if self.source is None else memoryview(self.source)
        self.end = size if self.source is None else min(size, len(self.source))
        known = extension in index.extensions
        column = index.extensions.index(extension) if known else 0
        self.members = index.offsets[:, column] if known else index.offsets[:0].ravel()
        self.sizes = index.sizes[:, column] if known else index.sizes[:0].ravel()


def copy(
    column_of: Callable[[int, int], Column],
    shards: Ints,
    rows: Ints,
    begins: Ints | None,
    lengths: Ints,
    out: Bytes,
    at: Ints,
) -> int:
    """Copy parts of members to their places in ``out``.

    One part after the other, as nothing that handles all of them at once pays: the rows of a batch are spread over
    the shards of a window.

    Args:
        column_of: shard, and the first part that wants it, to the member's column.
        shards: number of the shard of each part, int64 (n,).
        rows: row of the shard, int64 (n,).
        begins: first byte inside the member, int64 (n,); None for whole members, which must have ``lengths`` bytes.
        lengths: bytes wanted, int64 (n,).
        out: uint8 (size,).
        at: where each part goes, int64 (n,).

    Returns:
        -1; or the first part that is not in its shard, or whose shard is not what its index says. The ones behind it
        are not copied.

    Raises:
        OSError: a file cannot be read; ``filename`` is the number of the part.
    """
    target = out.data
    columns: dict[int, Column] = {}
    whole = begins is None
    starts = np.zeros_like(rows) if begins is None else begins
    known, digits = -1, b""
    parts = zip(shards.tolist(), rows.tolist(), starts.tolist(), lengths.tolist(), at.tolist(), strict=True)
    for number, (shard, row, begin, length, place) in enumerate(parts):
        column = columns.get(shard)
        if column is None:
            column = columns[shard] = column_of(shard, number)
        if row >= len(column.members):
            return number
        member, size = column.members.item(row), column.sizes.item(row)
        end = begin + length
        if member < 0 or member + size > column.end or end > size or begin < 0 or (whole and end < size):
            return number
        if size != known:
            known, digits = size, b"%011o" % size
        source, view = column.source, column.view
        if source is None or view is None:
            try:
                if not _read(column.file, member, size, begin, target[place : place + length]):
                    return number
            except OSError as error:
                error.filename = number
                raise
            continue
        # The size in the header (bytes 124 to 134) tells in passing whether the shard is the one that was indexed.
        if source[member - 388 : member - 377] != digits and not states(source[member - BLOCK : member], size):
            return number
        target[place : place + length] = view[member + begin : member + end]
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
