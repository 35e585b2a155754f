"""What a shard says of its own members, so that a shard that travels alone can be told from one made otherwise.

A shard of latents or of text features begins with a global header of the pax format (POSIX.1-2001, typeflag g), which
every tar reader passes over; its record ``PLATFORM.card`` holds JSON: for each member what index.json says about it.
"""

import contextlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules import catalogue, tarindex

KEY = "PLATFORM.card"
_BLOCK = 512
_ROOM = 64  # bytes that a value may grow by when a shard is stamped again
_LARGEST = 2**16
_ASKED = 2000  # shards at the start


def of(card: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a card that belong into every shard: those of members that an encoder made."""
    return {name: entry for name, entry in card.items() if isinstance(entry, Mapping) and "encoder" in entry}


def header(entries: Mapping[str, Any]) -> bytes:
    """First bytes of a shard, whole blocks of 512; nothing if there are no entries."""
    return _header(_text(entries)) if entries else b""


def read(file: int) -> dict[str, Any]:
    """What an open shard says of its members; empty if it says nothing.

    Raises:
        OSError: it cannot be read.
    """
    try:
        found = json.loads(_stored(file) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) and all(isinstance(entry, dict) for entry in found.values()) else {}


def agreed(files: Any, name: str, setting: str) -> dict[str, Any]:
    """Entry of a member from the cards of the folders, which the shards must not contradict; empty without one.

    Shards of this machine are all asked, unless they are thousands; ``compare`` asks the others when they are opened.

    Args:
        files: the shards, see :class:`datamodules.files.Files`.
        name: of the entry, e.g. a member.
        setting: name of the setting that chose them, for messages.

    Raises:
        ValueError: they disagree.
    """
    entry = catalogue.agreed(files.cards, name, setting)
    stated: dict[int, dict[str, Any]] = {}
    if entry and not files.verified and len(files.names) <= _ASKED:
        for shard in range(len(files.names)):
            with contextlib.suppress(OSError):  # whoever reads samples from it reports it
                stated[shard] = _closing(files.open(shard)).get(name, {})
    if any(stated.values()):  # else they were written without
        for shard, found in stated.items():
            _same(found, entry, name, f"{setting}: {files.names[shard]}")
    return entry


def together(paths: Sequence[Path]) -> dict[str, Any]:
    """The entries that all of some shards have.

    Raises:
        OSError: one cannot be read.
        ValueError: they disagree.
    """
    entries: dict[str, Any] | None = None
    for path in paths:
        found = _closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        entries = found if entries is None else entries
        for name in found.keys() | entries.keys():
            _same(found.get(name, {}), entries.get(name, {}), name, path.name)
    return entries or {}


def _closing(file: int) -> dict[str, Any]:
    try:
        return read(file)
    finally:
        os.close(file)


def compare(file: int, expected: Mapping[str, Mapping[str, Any]], shard: str) -> None:
    """Refuse an open shard whose stamp differs from the entries that the others have; say nothing of one without.

    Raises:
        OSError: it cannot be read.
        ValueError: it was made otherwise.
    """
    stated = read(file) if expected else {}
    for name in stated.keys() & expected.keys():
        _same(stated[name], expected[name], name, shard)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """In which fields an entry differs from the one expected; empty if in none."""
    fields = [field for field in {**expected, **found} if expected.get(field) != found.get(field)]
    return ", ".join(f"{field} {found.get(field)!r} instead of {expected.get(field)!r}" for field in fields)


def _same(found: Mapping[str, Any], expected: Mapping[str, Any], name: str, shard: str) -> None:
    if told := differences(found, expected):
        raise ValueError(
            f"{shard} was made otherwise than the rest: its header says of .{name} {told}. Take the shard out of the"
            " folder, or make it again as the others were made."
        )


def replace(path: Path, entries: Mapping[str, Any]) -> None:
    """Stamp a shard again, in its place; the new text must find room where the old one was.

    Raises:
        OSError: it cannot be written.
        ValueError: the shard has no stamp, or a shorter one.
    """
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        stored, text = _stored(file), _text(entries).rstrip()
        if len(text) > len(stored):
            raise ValueError(f"{path}: its stamp has room for {len(stored)} bytes, {len(text)} are needed.")
        os.pwrite(file, _header(text.ljust(len(stored))), 0)
        os.fsync(file)
    finally:
        os.close(file)


def _text(entries: Mapping[str, Any]) -> str:
    text = json.dumps(entries, sort_keys=True)
    return text.ljust(len(text) + _ROOM)


def _header(text: str) -> bytes:
    return tarfile.TarInfo.create_pax_global_header({KEY: text})


def _stored(file: int) -> str:
    """The JSON with the blanks behind it; empty if the shard does not begin with a stamp."""
    first = os.pread(file, _BLOCK, 0)
    if len(first) < _BLOCK or first[156:157] != b"g":
        return ""
    try:
        size = tarfile.TarInfo.frombuf(first, "utf-8", "surrogateescape").size
        return tarindex.pax_records(os.pread(file, min(size, _LARGEST), _BLOCK), 0).get(KEY, "")
    except (tarfile.TarError, tarindex.Damage):  # an index of the shard tells what is wrong with it
        return ""
