"""What every kind of source looks like to the packer: numbered inputs with a name, a split and a content."""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LONGEST_NAME = 1024  # characters of a name; longer ones come from damaged or hostile archives


class Refused(ValueError):
    """An input that is not written.

    Args:
        reason: the few words under which it is counted.
        detail: more about this one, may be empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Item:
    """Content of one input.

    Attributes:
        content: bytes of the image file or of the document.
        captions: member name ("txt", "caption2.txt") to text.
        label: class, at least 0; None without one.
    """

    content: bytes
    captions: dict[str, str] = field(default_factory=dict)
    label: int | None = None


@dataclass(frozen=True)
class Choices:
    """How a source is to be read.

    Attributes:
        max_bytes: largest input in bytes.
        extensions: endings (with the dot, lower case) of the files that are documents; empty for the usual ones.
        split_lines: whether every line of a text file is a document.
        text_field: field or column that holds the document.
    """

    max_bytes: int = 64 * 2**20
    extensions: tuple[str, ...] = ()
    split_lines: bool = False
    text_field: str = "text"


class Inputs(ABC):
    """A numbered list of inputs. Subclasses set the attributes; ``read`` is safe to call from several threads.

    Attributes:
        kind: name of the kind, as ``--kind`` takes it.
        member: "image", or the extension under which documents are written ("txt", "py").
        class_names: names of the classes 0, 1, ...; empty where classes have none.
        refused: what was seen while listing and can be no input: name, reason.
        left_out: files that this kind of source does not read.
        published: the set is a published archive, whose count is part of its definition.
    """

    kind = ""
    member = "image"
    published = False

    def __init__(self) -> None:
        self.class_names: list[str] = []
        self.refused: list[tuple[str, Refused]] = []
        self.left_out = 0

    @abstractmethod
    def __len__(self) -> int:
        """Number of inputs, those of ``refused`` not counted."""

    @abstractmethod
    def name(self, number: int) -> str:
        """Name of an input, unique in the source: its relative path, with a line or row number where needed."""

    def part(self, number: int) -> str:
        """Split that the source itself puts an input in: "train", "val", "test", or empty."""
        return ""

    @abstractmethod
    def mark(self, number: int) -> object:
        """Something that changes, as a rule, when the input changes, and can be told without reading it all."""

    def group(self, number: int) -> str:
        """Inputs of one group stay in one split."""
        return self.name(number)

    @abstractmethod
    def read(self, number: int) -> Item:
        """Content of an input.

        Raises:
            Refused: it cannot be used.
        """

    def identity(self) -> str:
        """Hash over names and marks, to notice that a source has changed; the same for a copy of it elsewhere."""
        digest = hashlib.sha256(self.kind.encode())
        for number in range(len(self)):
            text = f"{self.name(number)}\0{self.mark(number)}\0"
            digest.update(text.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    def close(self) -> None:  # noqa: B027 - most kinds keep nothing open
        """Close what is open."""


class Folder:
    """Files below one folder that may be read: regular files, and links that stay inside.

    Args:
        root: the folder.
        hidden: whether folders whose name begins with a dot are entered.

    Attributes:
        files: relative names, sorted.
        refused: links that lead out of the folder, links to folders, and what is no regular file.
    """

    def __init__(self, root: Path, hidden: bool = True) -> None:
        self.root = root.resolve()
        self.files: list[str] = []
        self.refused: list[tuple[str, Refused]] = []
        for at, folders, names in os.walk(self.root, onerror=self._unreadable):
            if not hidden:
                folders[:] = [name for name in folders if not name.startswith(".")]
            inner = os.path.relpath(at, self.root)
            prefix = "" if inner == "." else inner.replace(os.sep, "/") + "/"
            for name in folders:
                if os.path.islink(os.path.join(at, name)):
                    self.refused.append((prefix + name, Refused("link to a folder")))
            self.files += [prefix + name for name in names]
        self.files.sort()
        self.refused.sort(key=lambda pair: pair[0])

    def size(self, name: str) -> int:
        """Bytes of a file; -1 where it has none that could be told."""
        try:
            return os.stat(self.root / name).st_size
        except (OSError, ValueError):
            return -1

    def _unreadable(self, error: OSError) -> None:
        name = os.path.relpath(str(error.filename), self.root)
        self.refused.append((name, Refused("cannot be read", str(error.strerror))))

    def read(self, name: str, max_bytes: int) -> bytes:
        """Bytes of a file.

        Raises:
            Refused: it is missing, too large, no regular file, or leads out of the folder.
        """
        safe_name(name)
        path = self.root / name
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(self.root):
                raise Refused("link out of the source", f"to {real}")
            status = real.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                raise Refused("not a regular file")
            if status.st_size > max_bytes:
                raise too_large(status.st_size, max_bytes)
            with real.open("rb") as file:
                return within(file.read(max_bytes + 1), max_bytes)
        except FileNotFoundError as error:
            raise Refused("missing file") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
            raise Refused("cannot be read", str(getattr(error, "strerror", None) or error)) from error


def safe_name(name: str) -> str:
    """The name itself, if it stays below the folder it is relative to.

    Raises:
        Refused: it is absolute, contains "..", or is no usable name.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or "\0" in name or len(name) > LONGEST_NAME:
        raise Refused("unsafe name", f"{name[:60]!r}")
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise Refused("unsafe name", f"{name[:200]!r} leads out of the source")
    return name


def within(data: bytes, max_bytes: int) -> bytes:
    """The data, if they are not more than the limit.

    Raises:
        Refused: they are.
    """
    if len(data) > max_bytes:
        raise too_large(len(data), max_bytes)
    return data


def too_large(size: int, max_bytes: int) -> Refused:
    """The refusal of an input by its size."""
    return Refused("too large", f"{size} bytes or more, --max-bytes is {max_bytes}")


def ending(name: str) -> str:
    """Lower-case extension of a path with its dot, e.g. ".jpg"; empty without one."""
    return PurePosixPath(name).suffix.lower()


def numbering(names: Iterable[str]) -> dict[str, int]:
    """Class of each class name: names that are all numbers keep them, others are numbered in sorted order."""
    found = sorted(set(names))
    if found and all(name.isascii() and name.isdigit() for name in found):
        return {name: int(name) for name in found}
    return {name: rank for rank, name in enumerate(found)}


def names_of(classes: dict[str, int]) -> list[str]:
    """Names of the classes 0, 1, ... where they are more than numbers."""
    return [] if all(name.isdigit() for name in classes) else sorted(classes)


def tally(names: Sequence[str]) -> str:
    """How many files of each extension, as text: "120 .png, 3 .txt"."""
    counts: dict[str, int] = {}
    for name in names:
        key = ending(name) or "without extension"
        counts[key] = counts.get(key, 0) + 1
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    more = f" and {len(ordered) - 6} more kinds" if len(ordered) > 6 else ""
    return ", ".join(f"{count} {key}" for key, count in ordered[:6]) + more
