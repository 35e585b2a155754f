"""``index.json``: what a folder of shards holds, written beside them once and read before anything else."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "index.json"
FORMAT = 1

_DELETE = "Delete it: the shards are then counted directly."


@dataclass(frozen=True)
class ShardEntry:
    """One shard: number of samples, size in bytes, sha256 of the file, samples per class (empty if unlabelled)."""

    samples: int
    bytes: int
    sha256: str
    classes: dict[str, int] = field(default_factory=dict)

    def histogram(self) -> Counter[int]:
        """Samples per class with integer classes."""
        return Counter({int(name): count for name, count in self.classes.items()})


@dataclass(frozen=True)
class Catalogue:
    """All shards of one folder, and where they come from.

    Attributes:
        dataset: name of the data set, e.g. "digits8".
        licence: licence text or name.
        sources: versions of what the data was made from, e.g. {"scikit-learn": "1.9.1"}.
        shards: file name to entry.
        card: how members are to be understood, per extension, e.g. {"lat": {"dtype": "float16", "shape": [8, 4, 4]}};
            empty where nothing needs saying.
    """

    dataset: str
    licence: str
    sources: dict[str, str]
    shards: dict[str, ShardEntry]
    card: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Text of the file; equal catalogues give equal bytes."""
        content = {"format": FORMAT, **asdict(self)}
        if not self.card:
            del content["card"]
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read(folder: Path) -> Catalogue | None:
    """Catalogue of a folder, or None where there is none.

    Raises:
        ValueError: the file is there but cannot be understood.
    """
    path = folder / FILE_NAME
    try:
        return parse(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}). {_DELETE}") from error


def parse(text: bytes, path: Path | str) -> Catalogue:
    """Catalogue from the content of its file.

    Args:
        text: the content.
        path: where it comes from, for messages.

    Raises:
        ValueError: it cannot be understood.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}). {_DELETE}") from error
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"{path} has format {content['format']}, this version reads {FORMAT}. Make it again.")
        shards = {name: ShardEntry(**entry) for name, entry in content["shards"].items()}
        card = content.get("card", {})
        if not isinstance(card, dict):
            raise TypeError("card is not a mapping")
        return Catalogue(content["dataset"], content["licence"], content["sources"], shards, card)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a shard index ({type(error).__name__}: {error}). {_DELETE}") from error


def agreed(cards: Sequence[Mapping[str, Any]], name: str, setting: str) -> dict[str, Any]:
    """Entry of the cards of several folders; empty where they say nothing.

    Args:
        cards: of the folders.
        name: of the entry, e.g. a member.
        setting: name of the setting that joins the folders, for messages.

    Raises:
        ValueError: they disagree.
    """
    found = [card.get(name, {}) for card in cards]
    if any(entry != found[0] for entry in found):
        raise ValueError(
            f"{setting} joins folders whose {FILE_NAME} disagree about {name}: {', '.join(map(str, found))}. "
            "Name shards that were made alike."
        )
    return dict(found[0]) if found else {}


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
