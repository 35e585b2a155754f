"""A folder of image files as a source of samples: class sub-folders, or plain files without classes."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import tarindex
from datamodules.order import Ints, fingerprint
from datamodules.source import BadSample, Bytes, Measure, Members, measure_rows
from datamodules.transforms import IMAGE_EXTENSIONS


class ImageFolder:
    """Image files below one folder, in the order of their relative names.

    With sub-folders, the first path part is the class: folders named by numbers keep them as labels, other names are
    numbered 0, 1, ... in sorted order. Files directly in the folder have no class. The whole folder counts as one
    shard, so a shuffled order mixes all of it.

    Args:
        root: the folder.
        setting: name of the setting that chose it, for messages, e.g. "data.train".

    Raises:
        ValueError: there is no image, or files with and without a class are mixed.
    """

    def __init__(self, root: Path, setting: str) -> None:
        self.root = root
        self.files = sorted(_image_files(root))
        if not self.files:
            kinds = ", ".join(f".{kind}" for kind in IMAGE_EXTENSIONS)
            raise ValueError(
                f"{setting}='{root}' is a folder without shards (.tar) and without images ({kinds}). "
                f"Set {setting} to the shards, or to a folder with one sub-folder per class."
            )
        flat = [name for name in self.files if "/" not in name]
        if flat and len(flat) < len(self.files):
            raise ValueError(
                f"{setting}='{root}' mixes {len(flat)} files without a class, first: {flat[0]}, with class folders. "
                f"Move them into a class folder, or set {setting} to the folder of one kind."
            )
        self.class_names = [] if flat else sorted({name.split("/", 1)[0] for name in self.files})
        numeric = all(name.isdigit() for name in self.class_names)
        self._labels = {name: int(name) if numeric else rank for rank, name in enumerate(self.class_names)}
        self.names = [root.name]
        self.counts: Ints = np.array([len(self.files)], dtype=np.int64)
        self.starts: Ints = np.array([0, len(self.files)], dtype=np.int64)
        self.classes: list[Counter[int]] | None = None
        if self.class_names:
            self.classes = [Counter(self._labels[name.split("/", 1)[0]] for name in self.files)]
        self.fingerprint = fingerprint(self.files, [1] * len(self.files), [0] * len(self.files))
        self.lost = 0

    def key(self, sample: int) -> str:
        """Relative name without its extension."""
        return self.files[sample].rpartition(".")[0]

    def shard(self, sample: int) -> str:
        """Name of the folder."""
        return self.names[0]

    def extensions(self) -> tuple[str, ...]:
        """Members that samples have."""
        return (*IMAGE_EXTENSIONS, "cls") if self.class_names else IMAGE_EXTENSIONS

    def read(self, sample: int) -> Members:
        """Bytes of the image, and its class as decimal text if it has one.

        Raises:
            BadSample: the file cannot be read.
        """
        name = self.files[sample]
        try:
            members = {_kind(name): (self.root / name).read_bytes()}
        except OSError as error:
            raise BadSample(f"{self.root / name}: {error.strerror or error}") from error
        if self.class_names:
            members["cls"] = str(self._labels[name.split("/", 1)[0]]).encode()
        return members

    def sizes(self, shard: int, extension: str) -> Ints:
        """Bytes of every file with this extension, 0 for the others and for what has gone; int64 (n,)."""
        sizes = [self._stat(name)[0] if _kind(name) == extension else 0 for name in self.files]
        return np.array(sizes, dtype=np.int64)

    def described(self, name: str) -> dict[str, Any]:
        """Nothing: a folder of images has no card."""
        return {}

    def measured(self, shard: int, name: str, measure: Measure, width: int) -> Ints:
        """Numbers about every image, int64 (n, width): from the cache while no file changes, else measured once."""
        count = len(self.files)
        stats = [self._stat(file) for file in self.files]
        total, newest = sum(size for size, _ in stats), max(changed for _, changed in stats)
        known_as = f"{self.root.absolute()}\0{self.fingerprint}\0{total}\0{newest}"
        kept = tarindex.cache_file(known_as, name)
        table = tarindex.read_measured(kept, total, name, (count, width))
        if table is None:
            table, lasting = measure_rows(self.read, count, measure, width)
            if lasting:
                tarindex.keep_measured(kept, total, name, table)
        return table

    def gather(self, samples: Ints, extension: str, out: Bytes) -> None:
        """Copy files of equal size into the rows of ``out``, uint8 (n, size).

        Raises:
            BadSample: a file is missing, unreadable or of another size; ``row`` says which.
        """
        size = out.shape[1]
        for row, data in enumerate(self._contents(samples, extension)):
            if len(data) != size:
                where = self.root / self.files[int(samples[row])]
                raise BadSample(f"{where}: it has {len(data)} bytes, expected {size}", row=row)
            out[row] = np.frombuffer(data, dtype=np.uint8)

    def pieces(self, samples: Ints, extension: str, begins: Ints, lengths: Ints, out: Bytes, at: Ints) -> None:
        """Copy a part of each of several files to places in ``out``.

        Raises:
            BadSample: a file is missing, unreadable or too short; ``row`` says which.
        """
        flat = out.reshape(-1)
        for row, data in enumerate(self._contents(samples, extension)):
            part = data[int(begins[row]) : int(begins[row] + lengths[row])]
            if len(part) != lengths[row]:
                raise BadSample(f"{self.root / self.files[int(samples[row])]}: it has {len(data)} bytes", row=row)
            flat[int(at[row]) : int(at[row]) + len(part)] = np.frombuffer(part, dtype=np.uint8)

    def expect(self, samples: Ints) -> None:
        """Nothing to do: they are here."""

    def health(self) -> dict[str, float]:
        """Nothing to count."""
        return {}

    def close(self) -> None:
        """Nothing is kept open."""

    def _contents(self, samples: Ints, extension: str) -> Iterator[bytes]:
        for row, sample in enumerate(samples.tolist()):
            members = self.read(sample)
            if extension not in members:
                raise BadSample(f"{self.root / self.files[sample]}: it is no .{extension} file", row=row)
            yield members[extension]

    def _stat(self, name: str) -> tuple[int, int]:
        """Bytes and time of change of a file; zeros if it has gone."""
        try:
            stat = (self.root / name).stat()
        except OSError:
            return 0, 0
        return stat.st_size, stat.st_mtime_ns


def _kind(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _image_files(root: Path) -> list[str]:
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        inner = Path(folder).relative_to(root).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        found += [prefix + name for name in names if _kind(name) in IMAGE_EXTENSIONS]
    return found
