"""Which samples a damaged shard hides: those behind the damage, and those whose key came before."""

import os
import tarfile
from collections.abc import Iterator

from webdataset.tariterators import base_plus_ext

from datamodules.tarindex import TarIndex


def hidden(file: int, index: TarIndex) -> Iterator[tuple[str, str]]:
    """Yield key and reason of every sample that is in an open shard, but not in the index a scan of it found.

    Args:
        file: descriptor of the shard.
        index: the index.
    """
    have = {index.key(row) for row in range(len(index))}
    met: set[str] = set()
    last = ""
    for key in _surviving_keys(file):
        if key == last:
            continue
        if key in met:
            yield key, "its key appears again, and what stands there is not read"
        elif key not in have:
            yield key, "lies behind the damage and is not read"
        met.add(key)
        last = key


def _surviving_keys(file: int) -> list[str]:
    """Keys of every member whose header can still be found, also behind zeros and damaged headers."""
    found: list[str] = []
    try:
        with (
            os.fdopen(os.dup(file), "rb") as shard,
            tarfile.open(fileobj=shard, mode="r:", ignore_zeros=True) as archive,
        ):
            for member in archive:
                stem = base_plus_ext(member.name)[0]
                if member.isreg() and stem is not None:
                    found.append(stem)
    except (tarfile.TarError, OSError, EOFError, ValueError):  # the rest is cut off
        pass
    return found
