"""Before the start: how many samples every shard of a set holds, and what is wrong with it."""

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from datamodules import catalogue, tarindex
from datamodules.catalogue import ShardEntry
from datamodules.files import Files, LocalFiles
from datamodules.order import Ints
from datamodules.patterns import split_of
from datamodules.salvage import hidden
from datamodules.source import BadSample, Members
from datamodules.tarindex import TarIndex, cache_folder

log = logging.getLogger(__name__)

_ANNOUNCED_BYTES = 2**30  # without index.json, more than this takes long enough to say so


@dataclass
class Stock:
    """What a set holds.

    Attributes:
        counts: samples per shard, int64: what index.json says, else what is there.
        lost: samples known to be lost that have no number, as they are not among the counts.
        repeats: rows of a shard whose key stands in an earlier shard of the same split, and which that is.
        keys: keys of the shards of a small set as far as they were looked at and are whole, bytes (n,).
    """

    counts: Ints
    lost: int = 0
    repeats: dict[int, dict[int, str]] = field(default_factory=dict)
    keys: dict[int, NDArray[np.bytes_]] = field(default_factory=dict)


def take_stock(files: Files, setting: str, max_bad_fraction: float, checked_bytes: int) -> Stock:
    """Count the samples of every shard, and judge the damage found on the way.

    Args:
        files: the shards.
        setting: name of the setting that chose them, for messages, e.g. "data.train".
        max_bad_fraction: accepted share of lost samples.
        checked_bytes: sets up to this size are compared with their sha256, and the keys of their shards with one
            another.

    Returns:
        What there is.

    Raises:
        ValueError: a shard is damaged, empty or not what index.json says, beyond the accepted share.
    """
    counts: Ints = np.zeros(len(files.names), dtype=np.int64)
    stock = Stock(counts)
    every = sum(files.sizes)
    found: list[str] = []
    named: list[str] = []
    lost = total = 0
    sound: set[int] = set()
    if every > _ANNOUNCED_BYTES and None in files.entries:
        log.info("%s: indexing %s of shards once, for %s", setting, mebibytes(every), cache_folder())
    for shard, (entry, size) in enumerate(zip(files.entries, files.sizes, strict=True)):
        if entry is not None:
            counts[shard] = entry.samples
            if files.verified or _passes(files, shard, entry, every <= checked_bytes):
                total += entry.samples
                sound.add(shard)
                continue
        problem, kept, missing = _examine(files, shard, entry, size)
        if entry is None:
            counts[shard] = kept
            unread = _hidden(files, shard) if problem else []
            named += unread
            missing = max(missing, len(unread))
            stock.lost += missing
        if problem:
            found.append(problem)
            lost += missing
        total += entry.samples if entry else kept + missing
    repeated = _compare_keys(files, stock, sound) if every <= checked_bytes else []
    if isinstance(files, LocalFiles):
        files.keep()
    total = max(total, lost)
    if lost + len(repeated) > max_bad_fraction * total:
        more = f" ({len(found)} of {len(counts)} shards are damaged.)" if len(found) > 1 else ""
        cure = f"Copy the shard again ({files.place})" if found else "Pack them again with a key for every sample"
        raise ValueError(
            f"{setting}: {[*found, *repeated][0]}.{more} {cure}, "
            f"or accept the loss with data.max_bad_fraction={_share(lost + len(repeated), total)}."
        )
    for text in found + named + repeated:
        log.warning("%s: %s", setting, text)
    return stock


def _compare_keys(files: Files, stock: Stock, sound: set[int]) -> list[str]:
    """Note the keys of all shards, and those that stand in an earlier shard of the same folder and split.

    Args:
        files: the shards.
        stock: where to note it.
        sound: shards that are not read for this, if no index file tells their keys.

    Returns:
        One line per sample whose key does.
    """
    met: dict[tuple[str, bytes], str] = {}
    if not isinstance(files, LocalFiles):
        return []
    for shard, path in enumerate(files.paths):
        split = f"{path.parent}/{split_of(path.name)}"
        try:
            keys = files.keys_before(shard) if shard in sound else files.index(shard).keys
        except OSError:
            continue
        keys = keys[: int(stock.counts[shard])]
        if len(keys) == stock.counts[shard]:
            stock.keys[shard] = keys
        for row, key in enumerate(keys.tolist()):
            first = met.setdefault((split, key), path.name)
            if first != path.name:
                text = f"sample {key.decode('utf-8', 'surrogateescape')}: {first} has a sample of the same key"
                stock.repeats.setdefault(shard, {})[row] = text
    return [f"{files.names[shard]}, {text}" for shard, rows in stock.repeats.items() for text in rows.values()]


def _hidden(files: Files, shard: int) -> list[str]:
    """Every sample of a damaged shard that can be named, but not be read."""
    found: list[tuple[str, str]] = []
    have: set[str] = set()
    with contextlib.suppress(OSError), open(files.open(shard), "rb") as file:
        index = tarindex.scan_open(file.fileno())
        found = list(hidden(file.fileno(), index))
        have = {index.key(row) for row in range(len(index))}.union(key for key, _ in found)
    before = files.keys_before(shard).tolist() if isinstance(files, LocalFiles) else []
    known = [key.decode("utf-8", "surrogateescape") for key in before]
    found += [(key, "is lost") for key in known if key not in have]
    return [f"{files.names[shard]}, sample {key}: {text}" for key, text in found]


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


def count_classes(
    files: Files, counts: Ints, read: Callable[[int], Members], checked_bytes: int
) -> list[Counter[int]] | None:
    """Samples per class of each shard, from index.json; a small set without one is read through.

    Args:
        files: the shards.
        counts: samples of each.
        read: number of a sample to its members.
        checked_bytes: sets up to this size are small.

    Returns:
        One counter per shard; None if there are no classes, or they are not known.
    """
    if all(entry is not None for entry in files.entries):
        listed = [entry.histogram() for entry in files.entries if entry is not None]
        return listed if all(listed) else None
    if files.verified or sum(files.sizes) > checked_bytes:
        return None
    shards = np.repeat(np.arange(len(counts)), counts).tolist()
    found = [Counter[int]() for _ in files.names]
    for sample, shard in enumerate(shards):
        try:
            text = read(sample).get("cls", b"").strip()
        except BadSample:
            continue
        if text.lstrip(b"-").isdigit():  # anything else is reported with its key when it is used
            found[shard][int(text)] += 1
    return found if any(found) else None


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
