"""A folder of image files as a source of samples: class sub-folders, or plain files without classes."""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from datamodules.order import Ints, fingerprint
from datamodules.shards import BadSample
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
        self.classes: list[Counter[int]] | None = None
        if self.class_names:
            self.classes = [Counter(self._labels[name.split("/", 1)[0]] for name in self.files)]
        self.fingerprint = fingerprint(self.files, [1] * len(self.files), [0] * len(self.files))

    def key(self, sample: int) -> str:
        """Relative name without its extension."""
        return self.files[sample].rpartition(".")[0]

    def shard(self, sample: int) -> str:
        """Name of the folder."""
        return self.names[0]

    def extensions(self) -> tuple[str, ...]:
        """Members that samples have."""
        return (*IMAGE_EXTENSIONS, "cls") if self.class_names else IMAGE_EXTENSIONS

    def read(self, sample: int) -> dict[str, bytes]:
        """Bytes of the image, and its class as decimal text if it has one.

        Raises:
            BadSample: the file cannot be read.
        """
        name = self.files[sample]
        try:
            members = {name.rpartition(".")[2].lower(): (self.root / name).read_bytes()}
        except OSError as error:
            raise BadSample(f"{self.root / name}: {error.strerror or error}") from error
        if self.class_names:
            members["cls"] = str(self._labels[name.split("/", 1)[0]]).encode()
        return members

    def close(self) -> None:
        """Nothing is kept open."""


def _image_files(root: Path) -> list[str]:
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        inner = Path(folder).relative_to(root).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        found += [prefix + name for name in names if name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS]
    return found
