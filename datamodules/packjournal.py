"""The folder in which a pack is under way: finished shards, what is known about them, and the step to its name.

For a set ``photos`` it is ``.photos.pack`` beside it: ``out/`` becomes ``photos`` by one rename, ``journal.jsonl``
lists the finished shards, ``parts/`` holds the piece of the manifest that belongs to each, ``settings.json`` what was
asked for. A pack that was killed finds all of it, checks the shards by their hashes and goes on behind the last sound
one.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules import catalogue, overview, tarindex
from datamodules.catalogue import Catalogue, ShardEntry
from datamodules.writer import sync_folder, write_text

MANIFEST = "manifest.jsonl"
LISTING = "(listing)"  # part of the manifest with what was refused before anything was read
_SETTINGS = "settings.json"
_JOURNAL = "journal.jsonl"

Line = dict[str, Any]


@dataclass(frozen=True)
class Done:
    """One finished shard.

    Attributes:
        shard: its file name.
        split: its split.
        position: inputs of the split consumed when it was closed.
        entry: its entry of index.json.
        manifest: sha256 of its part of the manifest.
    """

    shard: str
    split: str
    position: int
    entry: ShardEntry
    manifest: str


class Workplace:
    """The folder of a pack under way, used by one process at a time. A context manager.

    Args:
        out: where the finished set goes.
        settings: what decides the bytes; a pack is only continued with the same.
        fresh: begin again, and replace a finished set made by an earlier pack.

    Attributes:
        folder: where shards are written.
        done: finished shards, in order.

    Raises:
        ValueError: another process is at it, it was begun with other settings, or ``out`` is not to be replaced.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.out = out
        self.home = _home(out)
        self.folder = self.home / "out"
        self.parts = self.home / "parts"
        self.done: list[Done] = []
        self._settings = dict(settings)
        self._fresh = fresh
        self._lock = -1

    def __enter__(self) -> "Workplace":
        """Take the folder over, or make it."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._begin()
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise unwritable(self.out, error) from error
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Leave what there is for the next attempt."""
        self._release()

    def finish(self, done: Done, lines: Iterable[Line]) -> None:
        """Note a finished shard; only from here on it counts."""
        digest = self.write_part(done.shard, lines)
        done = Done(done.shard, done.split, done.position, done.entry, digest)
        sync_folder(self.folder)
        with (self.home / _JOURNAL).open("a") as file:
            file.write(json.dumps(asdict(done)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.append(done)

    def write_part(self, name: str, lines: Iterable[Line]) -> str:
        """Write one part of the manifest and return its sha256."""
        path = self._part(name)
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        return catalogue.sha256(path)

    def lines(self, splits: Iterable[str]) -> Iterator[Line]:
        """The manifest so far: what the listing refused, then shard by shard."""
        for path in self._part_files(splits):
            with path.open() as file:
                yield from map(json.loads, file)

    def publish(self, index: Catalogue, splits: Iterable[str]) -> None:
        """Give the finished set its name in one step, and remove what only the pack needed."""
        manifest = self.folder / MANIFEST
        try:
            with manifest.open("wb") as whole:
                for path in self._part_files(splits):
                    whole.write(path.read_bytes())
                whole.flush()
                os.fsync(whole.fileno())
            overview.describe(self.folder, index.shards)
            write_text(self.folder / catalogue.FILE_NAME, index.to_json())
            sync_folder(self.folder)
            if self._fresh and self.out.is_dir() and any(self.out.iterdir()):
                self.out.rename(self.home / "replaced")
            self.folder.rename(self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            raise unwritable(self.out, error) from error
        shutil.rmtree(self.home, ignore_errors=True)

    def discard(self) -> None:
        """Remove the folder; there is nothing in it worth continuing."""
        shutil.rmtree(self.home, ignore_errors=True)

    def _part(self, name: str) -> Path:
        return self.parts / f"{name}.jsonl"

    def _part_files(self, splits: Iterable[str]) -> list[Path]:
        names = [LISTING]
        for split in splits:
            names += [done.shard for done in self.done if done.split == split] + [split]
        return [path for path in map(self._part, names) if path.is_file()]

    def _take_lock(self) -> None:
        self._lock = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a file system without locks
            raise ValueError(
                f"{self.out} is being packed by another process (its work is in {self.home}). Wait until it has ended."
            ) from error

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _begin(self) -> None:
        path = self.home / _SETTINGS
        if self._fresh:
            self._clear()
        if path.is_file():
            self._compare(path)
            self.done = self._sound()
        else:
            self._clear()
            write_text(path, json.dumps(self._settings, indent=1) + "\n")
        self.folder.mkdir(exist_ok=True)
        self.parts.mkdir(exist_ok=True)
        kept = {name for done in self.done for name in (done.shard, tarindex.sidecar(Path(done.shard)).name)}
        for entry in self.folder.iterdir():
            if entry.name not in kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_text(self.home / _JOURNAL, "".join(json.dumps(asdict(done)) + "\n" for done in self.done))

    def _clear(self) -> None:
        for entry in self.home.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _compare(self, path: Path) -> None:
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        for name in {**self._settings, **before}:
            old, new = before.get(name), self._settings.get(name)
            if old != new:
                what = f"{name} was {_shown(old)}, now it is {_shown(new)}"
                raise ValueError(
                    f"{self.out} was begun in another way: {what}. Type the command as it was to go on, "
                    "or add --fresh to begin again."
                )

    def _sound(self) -> list[Done]:
        """Shards of the journal that are as they were written, up to the first that is not."""
        found: list[Done] = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a line cut by a power failure is the last
            for line in (self.home / _JOURNAL).read_text().splitlines():
                content = json.loads(line)
                found.append(Done(**{**content, "entry": ShardEntry(**content["entry"])}))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            whole = list(pool.map(self._is_whole, found))
        return found[: whole.index(False)] if False in whole else found

    def _is_whole(self, done: Done) -> bool:
        try:
            return (
                catalogue.sha256(self.folder / done.shard) == done.entry.sha256
                and catalogue.sha256(self._part(done.shard)) == done.manifest
                and tarindex.sidecar(self.folder / done.shard).is_file()
            )
        except OSError:
            return False


def ours(out: Path) -> Catalogue | None:
    """Catalogue of a set that an earlier pack made, and that holds nothing else; None if there is nothing.

    Raises:
        ValueError: the folder is of another making.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ValueError(f"{out} is a file. Type the folder that the shards go to, new or empty.")
    names = {path.name for path in out.iterdir()}
    if not names:
        return None
    index = catalogue.read(out)
    if index is None or "pack" not in index.card:
        raise ValueError(
            f"{out} holds other files ({', '.join(sorted(names)[:3])}), and data pack writes over nothing. "
            "Type a new or empty folder."
        )
    expected = {
        catalogue.FILE_NAME,
        overview.FILE_NAME,
        MANIFEST,
        *index.shards,
        *(f"{shard}.idx.npz" for shard in index.shards),
    }
    if names - expected:
        raise ValueError(
            f"{out} holds a packed set and other files ({', '.join(sorted(names - expected)[:3])}). "
            "Move those away, or type another folder."
        )
    return index


def clear_leftovers(out: Path) -> None:
    """Remove the work of a pack that was killed just after it had published ``out``."""
    if not (_home(out) / "out").exists():
        shutil.rmtree(_home(out), ignore_errors=True)


def unwritable(out: Path, error: OSError) -> ValueError | OSError:
    """What to tell about a folder that cannot be written; a full disk is told elsewhere."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(error.errno, error.strerror, str(out))
    return ValueError(f"cannot write to {out}: {error.strerror or error}. Type a folder that you may write to.")


def _home(out: Path) -> Path:
    return out.parent / f".{out.name}.pack"


def _shown(value: object) -> str:
    return "not set" if value in (None, "", [], ()) else str(value)
