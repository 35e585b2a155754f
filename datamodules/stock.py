"""Before the start: how many samples every shard of a set holds, and what is wrong with it."""

import hashlib
import logging

import numpy as np

from datamodules import catalogue, tarindex
from datamodules.catalogue import ShardEntry
from datamodules.files import Files
from datamodules.order import Ints
from datamodules.salvage import hidden
from datamodules.tarindex import TarIndex, cache_folder

log = logging.getLogger(__name__)

_ANNOUNCED_BYTES = 2**30  # without index.json, more than this takes long enough to say so


def take_stock(files: Files, setting: str, max_bad_fraction: float, checked_bytes: int) -> Ints:
    """Count the samples of every shard, and judge the damage found on the way.

    Args:
        files: the shards.
        setting: name of the setting that chose them, for messages, e.g. "data.train".
        max_bad_fraction: accepted share of lost samples.
        checked_bytes: sets up to this size are compared with their sha256.

    Returns:
        Samples per shard, int64: what index.json says, else what is there.

    Raises:
        ValueError: a shard is damaged, empty or not what index.json says, beyond the accepted share.
    """
    counts: Ints = np.zeros(len(files.names), dtype=np.int64)
    every = sum(files.sizes)
    found: list[str] = []
    named: list[str] = []
    lost = total = 0
    if every > _ANNOUNCED_BYTES and None in files.entries:
        log.info("%s: indexing %s of shards once, for %s", setting, mebibytes(every), cache_folder())
    for shard, (entry, size) in enumerate(zip(files.entries, files.sizes, strict=True)):
        if entry is not None:
            counts[shard] = entry.samples
            if files.verified or _passes(files, shard, entry, every <= checked_bytes):
                total += entry.samples
                continue
        problem, kept, missing = _examine(files, shard, entry, size)
        if entry is None:
            counts[shard] = kept
            unread = _hidden(files, shard) if problem else []
            named += unread
            missing = max(missing, len(unread))
        if problem:
            found.append(problem)
            lost += missing
        total += entry.samples if entry else kept + missing
    if not found:
        return counts
    more = f" ({len(found)} of {len(counts)} shards are damaged.)" if len(found) > 1 else ""
    total = max(total, lost)
    if lost > max_bad_fraction * total:
        raise ValueError(
            f"{setting}: {found[0]}.{more} Copy the shard again ({files.place}), "
            f"or accept the loss with data.max_bad_fraction={_share(lost, total)}."
        )
    for text in found + named:
        log.warning("%s: %s", setting, text)
    return counts


def _hidden(files: Files, shard: int) -> list[str]:
    """Every sample of a damaged shard that can be named, but not be read."""
    try:
        with open(files.open(shard), "rb") as file:
            index = tarindex.scan_open(file.fileno())
            return [f"{files.names[shard]}, sample {key}: {text}" for key, text in hidden(file.fileno(), index)]
    except OSError:
        return []


def _passes(files: Files, shard: int, entry: ShardEntry, hashed: bool) -> bool:
    """Whether a shard is what index.json says, as far as that is looked at before the start."""
    if entry.bytes != files.sizes[shard] or not entry.samples:
        return False
    try:
        return not hashed or _sha256(files, shard) == entry.sha256
    except OSError:
        return False


def _examine(files: Files, shard: int, entry: ShardEntry | None, size: int) -> tuple[str, int, int]:
    """What is wrong with one shard (or nothing), how many samples it holds, and how many it has lost at least."""
    try:
        index = files.scan(shard) if entry else files.index(shard)
        problem = _problem(files, shard, entry, size, index)
    except OSError as error:
        return f"{files.names[shard]}: {error.strerror or error}", 0, entry.samples if entry else 1
    missing = max(1, index.lost, entry.samples - len(index) if entry else 0)
    return problem, len(index), missing if problem else 0


def _problem(files: Files, shard: int, entry: ShardEntry | None, size: int, index: TarIndex) -> str:
    """What is wrong with one shard, or an empty string."""
    name = files.names[shard]
    if index.problem:
        told = f", {catalogue.FILE_NAME} says {mebibytes(entry.bytes)}" if entry else ""
        return f"{damage(name, index)} (file {mebibytes(size)}{told})"
    if not len(index):
        return f"{name} holds no samples ({size} bytes)"
    if entry is None:
        return ""
    if size != entry.bytes or len(index) != entry.samples:
        return (
            f"{name} has {len(index)} samples in {size} bytes, but {catalogue.FILE_NAME} says {entry.samples} in "
            f"{entry.bytes} bytes; if the shard was replaced on purpose, delete {catalogue.FILE_NAME}"
        )
    if _sha256(files, shard) != entry.sha256:
        return f"{name} was changed after it was written (its sha256 is not the one in {catalogue.FILE_NAME})"
    return ""


def _sha256(files: Files, shard: int) -> str:
    with open(files.open(shard), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(name: str, index: TarIndex) -> str:
    """What is wrong with a damaged shard, naming it and the sample."""
    sample = f", sample {index.problem_key}" if index.problem_key else ""
    return f"{name}{sample}: {index.problem}"


def mebibytes(size: int) -> str:
    """A size for messages."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**19 else f"{size / 2**10:.1f} KiB"


def _share(lost: int, total: int) -> str:
    """A fraction that would just accept the loss, rounded up to one digit."""
    share = lost / total
    digit = 10.0 ** np.floor(np.log10(share))
    return f"{min(np.ceil(share / digit) * digit, 1.0):g}"
