"""A zip of images with their classes in ``dataset.json``, as the EDM and StyleGAN tools write it."""

import json
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

from datamodules.inputs.entries import Choices, Inputs, Item, Refused, safe_name, too_large, within

LABELS = "dataset.json"
_LARGEST_LABELS = 2**30


class EdmZip(Inputs):
    """One input per file in the zip; ``dataset.json`` holds {"labels": [[name, class], ...]} or null.

    Args:
        source: the zip.
        choices: the size limit is used.

    Raises:
        ValueError: it is no zip, or its labels cannot be understood.
    """

    kind = "edm-zip"
    published = True

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__()
        self._max_bytes = choices.max_bytes
        try:
            self._zip = zipfile.ZipFile(source)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{source} is not a whole zip ({error}). Copy it again.") from error
        self._labels = _labels(self._zip, source)
        self._members: list[zipfile.ZipInfo] = []
        seen: set[str] = set()
        for member in self._zip.infolist():
            if member.is_dir() or member.filename == LABELS:
                continue
            try:
                _acceptable(member, seen)
            except Refused as refusal:
                self.refused.append((member.filename, refusal))
                continue
            self._members.append(member)
        self._members.sort(key=lambda member: member.filename)

    def __len__(self) -> int:
        """Number of files."""
        return len(self._members)

    def name(self, number: int) -> str:
        """Name in the zip."""
        return self._members[number].filename

    def mark(self, number: int) -> object:
        """Class, and the checksum that the zip lists."""
        member = self._members[number]
        return (self._labels or {}).get(member.filename), member.CRC

    def read(self, number: int) -> Item:
        """Bytes of the file, and its class."""
        member = self._members[number]
        if member.file_size > self._max_bytes:
            raise too_large(member.file_size, self._max_bytes)
        try:
            with self._zip.open(member) as file:
                data = within(file.read(self._max_bytes + 1), self._max_bytes)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, zlib.error) as error:
            raise Refused("cannot be read", str(error)) from error
        if self._labels is None:
            return Item(data)
        if member.filename not in self._labels:
            raise Refused("no class", f"not in {LABELS}")
        label = self._labels[member.filename]
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise Refused("bad class", f"{label!r}, expected a whole number of 0 or more"[:200])
        return Item(data, label=label)

    def close(self) -> None:
        """Close the zip."""
        self._zip.close()


def _acceptable(member: zipfile.ZipInfo, seen: set[str]) -> None:
    safe_name(member.filename)
    if stat.S_ISLNK(member.external_attr >> 16):
        raise Refused("link in the archive")
    if member.flag_bits & 1:
        raise Refused("cannot be read", "it is encrypted")
    if member.filename in seen:
        raise Refused("name twice in the archive")
    seen.add(member.filename)


def _labels(archive: zipfile.ZipFile, source: Path) -> dict[str, object] | None:
    """Class by name, or None where there are none."""
    if LABELS not in archive.namelist():
        return None
    if archive.getinfo(LABELS).file_size > _LARGEST_LABELS:
        raise ValueError(f"{source}: {LABELS} has more than 1 GiB.")
    try:
        content: Any = json.loads(archive.read(LABELS))
        labels = content["labels"]
        found = None if labels is None else {str(name): label for name, label in labels}
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: {LABELS} cannot be understood ({type(error).__name__}: {error}). "
            'Expected {"labels": [["00000/img00000000.png", 3], ...]} or {"labels": null}.'
        ) from error
    return found
