"""What a folder of shards holds, from its indices alone: samples, sizes, resolutions, classes and their order."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls

from datamodules import catalogue, tarindex
from datamodules.catalogue import Catalogue, ShardEntry
from datamodules.patterns import split_of
from datamodules.tarindex import TarIndex
from datamodules.transforms import IMAGE_EXTENSIONS
from datamodules.writer import image_shape

Progress = Callable[[str, int, int, str], None]
T = TypeVar("T")

NO_LABEL = -(2**62)  # stands for a class that is absent or no number
_HEADER = 2**16  # bytes in which an image usually tells its size


@dataclass
class Facts:
    """What was found in one shard or several.

    Attributes:
        samples: number of samples.
        bytes: size of the files.
        shards: number of files.
        members: per extension, number of members and their bytes.
        labels: samples per class.
        shapes: images per (height, width); (0, 0) where the header cannot be read.
        alike: pairs of samples that follow one another in a shard and have the same class.
        chance: how many there would be if each shard were shuffled.
        most: how many if each shard were sorted by class.
    """

    samples: int = 0
    bytes: int = 0
    shards: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: Counter[int] = field(default_factory=Counter)
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    alike: int = 0
    chance: float = 0.0
    most: int = 0

    def add(self, other: "Facts") -> None:
        """Count another part in."""
        self.samples += other.samples
        self.bytes += other.bytes
        self.shards += other.shards
        for name, (count, size) in other.members.items():
            before = self.members.get(name, (0, 0))
            self.members[name] = (before[0] + count, before[1] + size)
        self.labels += other.labels
        self.shapes += other.shapes
        self.alike += other.alike
        self.chance += other.chance
        self.most += other.most

    def sortedness(self) -> float | None:
        """0 if classes follow one another as by chance, 1 if each shard is sorted by class; None without classes."""
        room = self.most - self.chance
        return max(0.0, (self.alike - self.chance) / room) if room >= 1 else None


def find(path: Path) -> list[Path]:
    """Shards that a path names: a folder, a shard, or a pattern; also missing ones that index.json or braces name.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        listed = catalogue.read(path)
        found = {*path.glob("*.tar"), *(path / name for name in (listed.shards if listed else ()))}
    elif "{" in str(path):
        found = _named_by_braces(str(path))
    elif has_magic(str(path)):
        found = {Path(name) for name in glob(str(path))}
    else:
        found = {path} if path.is_file() else set()
    if not found:
        told = f"{path} does not exist" if not path.exists() and not has_magic(str(path)) else f"{path} names no shard"
        raise ValueError(
            f"{told}. Type a folder of shards (.tar), one shard, or a quoted pattern such as 'x/val-*.tar'."
        )
    return sorted(found)


def _named_by_braces(pattern: str) -> set[Path]:
    try:
        found = {Path(name) for name in expand_urls(pattern)}
    except ValueError as error:
        raise ValueError(f"{pattern}: {error}. Write ranges as in 'x/train-{{000000..001023}}.tar'.") from error
    return found if any(path.is_file() for path in found) else set()


def entries(paths: Sequence[Path]) -> dict[Path, ShardEntry | None]:
    """Entries of index.json of the shards; None where it does not list one."""
    folders: dict[Path, Catalogue | None] = {folder: catalogue.read(folder) for folder in {p.parent for p in paths}}
    return {path: found.shards.get(path.name) if (found := folders[path.parent]) else None for path in paths}


def in_parallel(
    function: Callable[[Path], T], paths: Sequence[Path], workers: int | None, progress: Progress, what: str
) -> Iterator[T]:
    """Results of a function of a shard, in order, from several threads."""
    with ThreadPoolExecutor(workers or min(32, os.cpu_count() or 1)) as pool:
        for number, result in enumerate(pool.map(function, paths), 1):
            progress(what, number, len(paths), paths[number - 1].name)
            yield result


def survey(paths: Sequence[Path], workers: int | None, progress: Progress) -> dict[str, Facts]:
    """Facts per split.

    Raises:
        ValueError: a shard is missing.
    """
    found: dict[str, Facts] = {}
    facts = in_parallel(_survey_shard, paths, workers, progress, "reading indices")
    for path, one in zip(paths, facts, strict=True):
        found.setdefault(split_of(path.name), Facts()).add(one)
    return found


def _survey_shard(path: Path) -> Facts:
    try:
        index = tarindex.load(path)
        return facts(path, index, labels(path, index), shapes(path, index))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}. Copy it again, or check with data check.") from error


def facts(path: Path, index: TarIndex, classes: NDArray[np.int64], sizes: NDArray[np.int64] | None) -> Facts:
    """Facts of one shard.

    Args:
        path: the shard.
        index: its index.
        classes: class of each sample (n,), ``NO_LABEL`` without one.
        sizes: (n, 2) height and width of each image; None without images.
    """
    present = index.offsets >= 0
    members = {
        name: (int(present[:, column].sum()), int(index.sizes[:, column].sum()))
        for column, name in enumerate(index.extensions)
    }
    known = classes[classes != NO_LABEL]
    counts = Counter(
        {int(label): int(count) for label, count in zip(*np.unique(known, return_counts=True), strict=True)}
    )
    chance = sum(count * (count - 1) for count in counts.values()) / max(1, len(known))
    shapes = Counter(map(tuple, sizes.tolist())) if sizes is not None else Counter()
    return Facts(
        samples=len(index),
        bytes=path.stat().st_size,
        shards=1,
        members=members,
        labels=counts,
        shapes=shapes,
        alike=int((known[1:] == known[:-1]).sum()),
        chance=chance,
        most=len(known) - len(counts),
    )


def labels(path: Path, index: TarIndex) -> NDArray[np.int64]:
    """Stored class of every sample (n,); ``NO_LABEL`` where there is none or it is no number."""
    found = np.full(len(index), NO_LABEL, dtype=np.int64)
    if "cls" not in index.extensions:
        return found
    column = index.extensions.index("cls")
    with path.open("rb") as file:
        for row in np.flatnonzero(index.offsets[:, column] >= 0):
            text = os.pread(file.fileno(), int(index.sizes[row, column]), int(index.offsets[row, column])).strip()
            if text.removeprefix(b"-").isdigit() and len(text) < 18:
                found[row] = int(text)
    return found


def shapes(path: Path, index: TarIndex) -> NDArray[np.int64] | None:
    """Height and width of the image of every sample (n, 2), from the index file or the images' headers."""
    if not any(name in IMAGE_EXTENSIONS for name in index.extensions):
        return None
    kept = tarindex.read_measured(tarindex.sidecar(path), path.stat().st_size, "shape", (len(index), 2))
    return kept if kept is not None else header_shapes(path, index)


def header_shapes(path: Path, index: TarIndex) -> NDArray[np.int64]:
    """Height and width of every image (n, 2), read from the images' headers; zeros where there is none."""
    columns = [index.extensions.index(name) for name in IMAGE_EXTENSIONS if name in index.extensions]
    found = np.zeros((len(index), 2), dtype=np.int64)
    with path.open("rb") as file:
        for row in range(len(index)):
            for column in columns:
                offset, size = int(index.offsets[row, column]), int(index.sizes[row, column])
                if offset < 0:
                    continue
                shape = image_shape(os.pread(file.fileno(), min(size, _HEADER), offset))
                if shape == (0, 0) and size > _HEADER:  # a long EXIF block in front
                    shape = image_shape(os.pread(file.fileno(), size, offset))
                found[row] = shape
                break
    return found


def read_row(file: int, index: TarIndex, row: int, wanted: Sequence[str] | None = None) -> dict[str, bytes]:
    """Members of one sample of an open shard by extension."""
    return {
        name: os.pread(file, int(index.sizes[row, column]), int(index.offsets[row, column]))
        for column, name in enumerate(index.extensions)
        if index.offsets[row, column] >= 0 and (wanted is None or name in wanted)
    }


def agrees(path: Path, index: TarIndex) -> bool:
    """Whether the index file beside a shard is there and says what a scan finds."""
    try:
        with np.load(tarindex.sidecar(path), allow_pickle=False) as table:
            return (
                int(table["bytes"]) == index.size
                and tuple(table["extensions"].tolist()) == index.extensions
                and all(np.array_equal(table[name], getattr(index, name)) for name in ("keys", "offsets", "sizes"))
            )
    except Exception:  # absent or unreadable
        return False
