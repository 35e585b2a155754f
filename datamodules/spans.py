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
from dataclasses import dataclass
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

    def size(self) -> int:
        """Bytes that can be read now.

        Raises:
            OSError: the file is out of reach.
        """
        size = os.fstat(self.file).st_size
        return size if self.mapped is None else min(size, len(self.mapped))

    @functools.cached_property
    def mapped(self) -> memoryview | None:
        """The content, or None where a map is not safe."""
        stat = os.fstat(self.file)
        if _file_system(stat.st_dev) not in _LOCAL or not stat.st_size:
            return None
        with contextlib.suppress(OSError, ValueError):
            return memoryview(mmap.mmap(self.file, stat.st_size, access=mmap.ACCESS_READ))
        return None


@dataclass(frozen=True)
class Spans:
    """Parts of one member of several samples.

    Attributes:
        handles: the shard of each, n of them.
        members: byte of the shard at which the member begins, -1 if there is none; int64 (n,), as all that follow.
        sizes: bytes of the member.
        begins: first byte wanted, inside the member.
        lengths: bytes wanted.
        at: where they go, in a flat array of bytes.
    """

    handles: list[Handle]
    members: Ints
    sizes: Ints
    begins: Ints
    lengths: Ints
    at: Ints


def locate(index: TarIndex, rows: Ints, extension: str) -> tuple[Ints, Ints]:
    """Begin and size of one member of some rows of a shard, int64 (n,); -1 and 0 where there is none."""
    if extension not in index.extensions or (rows >= len(index)).any():
        here = rows < len(index) if extension in index.extensions else np.zeros(len(rows), dtype=bool)
        members, sizes = np.full(len(rows), -1, dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        if here.any():
            members[here], sizes[here] = locate(index, rows[here], extension)
        return members, sizes
    column = index.extensions.index(extension)
    return index.offsets[rows, column], index.sizes[rows, column].astype(np.int64)


def copy(spans: Spans, out: Bytes) -> int:
    """Copy parts of shards to their places in ``out``, uint8 (size,). Members must lie inside their files.

    Returns:
        -1; or the first part whose header is not where the index says, or that the file ends in. The ones behind it
        are not copied.

    Raises:
        OSError: a file cannot be read; ``filename`` is the number of the part.
    """
    target = out.data
    digits = {size: b"%011o" % size for size in np.unique(spans.sizes).tolist()}
    columns = (spans.members, spans.sizes, spans.members + spans.begins, spans.lengths, spans.at)
    parts = zip(spans.handles, *(column.tolist() for column in columns), strict=True)
    for number, (handle, member, size, begin, length, at) in enumerate(parts):
        source = handle.mapped
        if source is None:
            try:
                if not _read(handle.file, member, size, begin, target[at : at + length]):
                    return number
            except OSError as error:
                error.filename = number
                raise
            continue
        # The size in the header (bytes 124 to 134) tells in passing whether the shard is the one that was indexed.
        if source[member - 388 : member - 377] != digits[size] and not states(
            bytes(source[member - BLOCK : member]), size
        ):
            return number
        target[at : at + length] = source[begin : begin + length]
    return -1


def _read(file: int, member: int, size: int, begin: int, target: memoryview) -> bool:
    """Copy one part by a system call, with the header where that is next to it; False if something is wrong."""
    if begin != member:
        return os.preadv(file, (target,), begin) == len(target)
    header = bytearray(BLOCK)
    return os.preadv(file, (header, target), begin - BLOCK) == BLOCK + len(target) and states(bytes(header), size)


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
