"""Which files a setting names: wildcards, braces, lists and folders, and what is missing among them."""

import difflib
import fnmatch
import logging
import re
from collections.abc import Iterable
from glob import glob, has_magic
from pathlib import Path

from webdataset.shardlists import expand_urls

from datamodules import catalogue

log = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.*?)(\d+)\.tar$")
_SPLIT = re.compile(r"(train|training|val|valid|validation|test)(?![a-zA-Z])")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


def find(patterns: str | Iterable[str], root: Path, setting: str, allow_missing: bool = False) -> list[Path]:
    """Files (or one folder) that a setting names.

    Args:
        patterns: names relative to ``root`` or absolute, with ``*``, ``?``, ``[..]`` or braces as in
            ``train-{000000..001023}.tar``; a list of them; or a folder, of which ``of_split`` says what is meant.
        root: folder that relative names start from.
        setting: name of the setting, for messages, e.g. "data.train".
        allow_missing: accept that some of the named files are absent.

    Returns:
        Existing paths, sorted, each once.

    Raises:
        ValueError: nothing is found, or some of the files are missing.
    """
    wanted: dict[Path, None] = {}
    texts = [patterns] if isinstance(patterns, str) else list(patterns)
    for text in texts:
        matches = [path for name in braces(text, setting) for path in _expand(root / Path(name).expanduser(), setting)]
        if not any(path.exists() for path in matches):
            raise ValueError(_nothing_found(text, root, setting))
        wanted.update(dict.fromkeys(matches))
    paths = sorted(wanted)
    missing = [path for path in paths if not path.exists()]
    if missing and not allow_missing:
        shown = str(root / texts[0]) if len(texts) == 1 else f"{len(texts)} patterns in {root}"
        raise ValueError(
            f"{setting}='{shown}': {len(missing)} of {len(paths)} files are missing, first: {missing[0].name}. "
            "Copy them, or accept the rest with data.allow_missing=true."
        )
    if missing:
        log.warning("%s: %d of %d files are missing, first: %s", setting, len(missing), len(paths), missing[0].name)
    return [path for path in paths if path.exists()]


def braces(text: str, setting: str) -> list[str]:
    """Names that a pattern with braces stands for.

    Raises:
        ValueError: the braces cannot be understood.
    """
    try:
        return list(expand_urls(text))
    except ValueError as error:
        raise ValueError(f"{setting}='{text}': {error}. Write ranges as in train-{{000000..001023}}.tar.") from error


def of_split(names: Iterable[str], place: str, setting: str) -> list[str]:
    """Shards of a folder that are meant by the setting that names the folder, sorted.

    That is all of them, unless their names tell of several splits (train-000000.tar, val-000000.tar): then those of the
    split the setting is about, so that nobody trains on held-out samples by naming a folder.

    Raises:
        ValueError: none of several splits is the setting's.
    """
    splits: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _SPLIT.match(name)
        splits.setdefault(match[1] if match else "", []).append(name)
    if len(splits.keys() - {""}) < 2:
        return sorted(names)
    own = [*setting.split("."), ""][1]
    chosen = [name for split, part in splits.items() if _SPLITS.get(split) == own for name in part]
    if not chosen:
        raise ValueError(
            f"{setting}='{place}': the folder holds shards of several splits ({', '.join(filter(None, splits))}), but "
            f"none named {own}-*.tar. Name the shards, e.g. {setting}='{place}/{next(filter(None, splits))}-*.tar'."
        )
    log.info("%s: %d of %d shards in %s, by their names", setting, len(chosen), sum(map(len, splits.values())), place)
    return chosen


def split_of(name: str) -> str:
    """Split of a shard by its name: "train" of "train-000012.tar", or the name without numbers."""
    return name.removesuffix(".tar").rstrip("0123456789").rstrip("-_.") or "all"


def _expand(path: Path, setting: str) -> list[Path]:
    """Files that one name stands for, absent ones included where their absence can be known."""
    if path.is_dir():
        index = catalogue.read(path)
        there = {name.name for name in path.glob("*.tar")}
        listed = (
            there.union(index.shards) if index else there.union(gap.name for gap in _gaps(list(path.glob("*.tar"))))
        )
        return [path / name for name in of_split(listed, str(path), setting)] if there else [path]
    if not has_magic(str(path)):
        return [path]
    found = [Path(name) for name in glob(str(path))]
    index = catalogue.read(path.parent) if found and not has_magic(str(path.parent)) else None
    if index is not None:
        return [*found, *(path.parent / name for name in fnmatch.filter(index.shards, path.name))]
    return [*found, *_gaps(found)]


def _gaps(found: list[Path]) -> list[Path]:
    """Files whose absence shows as a gap in an otherwise dense numbering."""
    groups: dict[tuple[Path, str, int], set[int]] = {}
    for path in found:
        match = _NUMBERED.match(path.name)
        if match:
            groups.setdefault((path.parent, match[1], len(match[2])), set()).add(int(match[2]))
    gaps: list[Path] = []
    for (folder, stem, width), numbers in groups.items():
        span = max(numbers) - min(numbers) + 1
        if len(numbers) < span <= 2 * len(numbers):
            absent = set(range(min(numbers), max(numbers))) - numbers
            gaps += [folder / f"{stem}{number:0{width}d}.tar" for number in absent]
    return gaps


def _nothing_found(text: str, root: Path, setting: str) -> str:
    path = root / text
    folder = path.parent
    if has_magic(str(folder)) or "{" in str(folder):
        folder = root
    if not folder.is_dir():
        nearest = next(parent for parent in folder.absolute().parents if parent.is_dir())
        return (
            f"{setting}='{path}' matches no file: the folder {folder} does not exist, only {nearest} does. "
            "Set data.root to the folder of the shards."
        )
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and not entry.name.endswith((".idx.npz", ".safetensors"))
    )
    close = difflib.get_close_matches(Path(text).name, names, n=3, cutoff=0.4) or names[:3]
    there = f"Nearest names there: {', '.join(close)}." if close else "The folder is empty."
    return f"{setting}='{path}' matches no file. {there} Set {setting} and data.root to your shards."
