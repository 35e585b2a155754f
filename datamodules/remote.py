"""Shards that lie elsewhere: fetched whole into a bounded cache on this machine, ahead of their use."""

import contextlib
import dataclasses
import errno
import hashlib
import logging
import math
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datamodules import catalogue, download, overview, tarindex
from datamodules.catalogue import Catalogue, ShardEntry
from datamodules.download import Absent, Closed, Lock, beside, file_name
from datamodules.order import Ints
from datamodules.overview import Notes, Overview
from datamodules.patterns import braces, of_split
from datamodules.tarindex import TarIndex, cache_folder

log = logging.getLogger(__name__)

_GIB = 2**30
_ATTEMPTS = 4
_BACKOFF_SECONDS = 1.0
_FAILED_SECONDS = 60.0  # a shard that could not be fetched is not asked for again before that


@dataclasses.dataclass
class _Shard:
    """One remote shard.

    Attributes:
        url: where it is.
        name: its file name.
        entry: what the index.json beside it says, or None.
        sidecar: whether an index file beside it may exist.
    """

    url: str
    name: str
    entry: ShardEntry | None
    sidecar: bool = True

    def identity(self) -> str:
        """Stands for its content as far as that is known."""
        known = f"{self.entry.bytes}\0{self.entry.sha256}" if self.entry else ""
        return f"{self.url}\0{known}"


class RemoteFiles:
    """Remote shards as files of this machine.

    A shard is fetched when it is opened, or before that when it is expected. It gets its name in the cache when it has
    arrived whole: with the bytes and sha256 of index.json, or else with the blocks that end a tar. One process per
    machine fetches a shard, the others wait for it. The cache keeps the shards used last; one that is removed while it
    is open can still be read, and its room is free when it is closed.

    Args:
        shards: what to fetch.
        setting: name of the setting, for messages.
        cache_bytes: room for all shards in the cache folder, of this set and others.
        cards: what index.json says about the members, once per address that has one.

    Raises:
        ValueError: the first shard cannot be fetched and no index.json describes it.
    """

    verified = True

    def __init__(
        self, shards: Sequence[_Shard], setting: str, cache_bytes: int, cards: Sequence[dict[str, Any]] = ()
    ) -> None:
        self._shards = list(shards)
        self.setting = setting
        self.cache_bytes = cache_bytes
        self.cards = list(cards)
        self.folder = cache_folder() / "shards"
        self.names = [shard.name for shard in self._shards]
        self.entries = [shard.entry for shard in self._shards]
        self.place = beside(self._shards[0].url, "")
        self._stop = threading.Event()
        self._lock, self._fetching = threading.Lock(), threading.Lock()
        self._failed: dict[int, tuple[float, OSError]] = {}
        self._expected: list[int] = []
        self._thread: threading.Thread | None = None
        self._new: set[int] = set()
        self._hits = self._misses = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{setting} needs a folder for copies of remote shards, but {self.folder} cannot be made "
                f"({error.strerror}). Set PLATFORM_CACHE to a folder with space."
            ) from error
        self.sizes = [entry.bytes if entry else 0 for entry in self.entries]  # 0 for what is not known
        self._notes = Notes([s.url for s in shards], [entry.sha256 if entry else None for entry in self.entries])
        self._overviews: dict[str, Overview] = {}
        self._measure()

    @staticmethod
    def find(patterns: Sequence[str], setting: str, allow_missing: bool, cache_bytes: int) -> "RemoteFiles":
        """Shards that addresses with braces stand for, described by the index.json beside them where there is one.

        Raises:
            ValueError: an address is malformed, or names shards that index.json does not have.
        """
        named = (url for pattern in patterns for url in braces(pattern, setting))
        urls = list(dict.fromkeys(shard for url in named for shard in _inside(url, setting)))
        for url in urls:
            download.check(url, setting)
            if not url.startswith("pipe:") and re.search(r"[*\[\]]", url.split("?")[0]):
                raise ValueError(
                    f"{setting}='{url}': addresses cannot have wildcards, as nobody can list what matches. "
                    "Write ranges as in train-{000000..001023}.tar."
                )
        listed: dict[str, Catalogue | None] = {}
        for url in urls:
            if (place := beside(url, catalogue.FILE_NAME)) not in listed:
                listed[place] = _fetch_catalogue(place, setting)
        shards, missing = [], []
        for url in urls:
            index, name = listed[beside(url, catalogue.FILE_NAME)], file_name(url)
            if index is not None and name not in index.shards:
                missing.append(name)
            else:
                shards.append(_Shard(url, name, index.shards[name] if index else None))
        if missing and (not allow_missing or not shards):
            raise ValueError(
                f"{setting}='{patterns[0]}': {len(missing)} of {len(urls)} shards are not in the "
                f"{catalogue.FILE_NAME} beside them, first: {missing[0]}. Correct the address"
                + (", or accept the rest with data.allow_missing=true." if shards else ".")
            )
        return RemoteFiles(shards, setting, cache_bytes, [index.card for index in listed.values() if index])

    def column(self, folder: str, allow_missing: bool = False) -> "RemoteFiles":
        """The shards of the same names in a folder beside these, or at another address."""
        join = f"{folder.rstrip('/')}/" if "://" in folder else ""
        urls = [join + s.name if join else beside(s.url, f"{folder}/{s.name}") for s in self._shards]
        return RemoteFiles.find(urls, f"{self.setting} (column {folder})", allow_missing, self.cache_bytes)

    def open(self, shard: int) -> int:
        """A descriptor of the copy; fetches it first if it is not there."""
        file = self._cached(shard)
        fresh = shard in self._new
        self._new.discard(shard)
        if file is None:
            file = self._obtain(shard, self._stop)
            with self._lock:
                self._misses += 1
        elif not fresh:
            with self._lock:
                self._hits += 1
        return file

    def index(self, shard: int) -> TarIndex:
        """What the shard holds: from the cache, from beside it, or from its headers once it is here."""
        known, entry = self._shards[shard], self.entries[shard]
        kept = tarindex.cache_file(known.identity())
        size = entry.bytes if entry else None
        index = tarindex.read(kept, size)
        if index is None and self._fetch_sidecar(shard):
            index = tarindex.read(kept, size)
        if index is None:
            index = self.scan(shard)
            tarindex.keep(kept, index)
        return index

    def scan(self, shard: int) -> TarIndex:
        """What the shard holds, from its bytes alone."""
        file = self._cached(shard)
        if file is None:
            file = self._obtain(shard, self._stop)
            with self._lock:
                self._misses += 1
                self._new.add(shard)
        try:
            return tarindex.scan_open(file)
        finally:
            os.close(file)

    def recall(self, shard: int, name: str, shape: tuple[int, ...]) -> Ints | None:
        """A column of the overview beside the shard, which is fetched once, or of that in the cache, or None."""
        known, found = self._shards[shard], None
        if known.entry is not None:
            overviewed = self._overview(beside(known.url, overview.FILE_NAME))
            found = overviewed.column(name, known.name, known.entry.sha256, shape)
        return self._notes.column(shard, name, shape) if found is None else found

    def note(self, shard: int, name: str, table: Ints) -> None:
        """Remember a column that ``recall`` did not know."""
        self._notes.add(shard, name, table)

    def stored(self, shard: int, name: str, shape: tuple[int, int]) -> Ints | None:
        """A measured column from beside the shard or from the cache, or None."""
        found = self.recall(shard, f"{overview.MEASURED}{name}", shape)
        if found is not None:
            return found
        known = self._shards[shard]
        kept = tarindex.cache_file(known.identity())
        if not kept.exists():
            self._fetch_sidecars()
        found = tarindex.read_measured(kept, self.sizes[shard], name, shape)
        if found is None:
            kept = tarindex.cache_file(known.identity(), name)
            found = tarindex.read_measured(kept, self.sizes[shard], name, shape)
        if found is not None:
            self.note(shard, f"{overview.MEASURED}{name}", found)
        return found

    def store(self, shard: int, name: str, table: Ints) -> None:
        """Put a measured column into the cache."""
        self.note(shard, f"{overview.MEASURED}{name}", table)
        kept = tarindex.cache_file(self._shards[shard].identity(), name)
        tarindex.keep_measured(kept, self.sizes[shard], name, table)

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, in this order, as far as there is room; replaces what was expected."""
        with self._lock:
            self._expected = list(shards)
            if self._thread is None and self._next_expected():
                self._thread = threading.Thread(target=self._prefetch, args=(self._stop,), name="prefetch", daemon=True)
                self._thread.start()

    def health(self) -> dict[str, float]:
        """Shards that were here when they were opened, and those that had to be waited for."""
        return {"cache_hits": float(self._hits), "cache_misses": float(self._misses)}

    def close(self) -> None:
        """End the background thread, and give up every fetch under way; later reads fetch again."""
        with self._lock:
            stop, self._stop = self._stop, threading.Event()
            thread, self._expected = self._thread, []
        stop.set()
        if thread is not None:
            thread.join()

    def needed(self, window: int) -> int:
        """Bytes of the largest two windows of ``window`` shards."""
        return sum(sorted(self.sizes)[-2 * window :])

    # Fetching

    def _measure(self) -> None:
        """Find out the sizes that no index.json states: from the index files, or by fetching each shard once."""
        unknown = [shard for shard, entry in enumerate(self.entries) if entry is None]
        if unknown:
            self._fetch_sidecars()
        absent = [i for i in unknown if not tarindex.cache_file(self._shards[i].identity()).exists()]
        if absent:
            told = "%s: no %s and no index files at %s: each of %d shards is fetched and indexed once"
            log.info(told, self.setting, catalogue.FILE_NAME, self.place, len(absent))
        for shard in unknown:
            try:
                self.sizes[shard] = self.index(shard).size
            except OSError as error:
                if shard == unknown[0]:
                    raise _unreachable(self.setting, self._shards[shard].url, error) from error

    def _path(self, shard: int) -> Path:
        digest = hashlib.sha256(self._shards[shard].identity().encode()).hexdigest()[:16]
        return self.folder / f"{digest}-{self.names[shard]}"

    def _cached(self, shard: int) -> int | None:
        """A descriptor of the copy if it is there."""
        path, size = self._path(shard), self.sizes[shard]
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if size and os.fstat(file).st_size != size:
            os.close(file)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(file)  # what was used last is removed last
        return file

    def _obtain(self, shard: int, stop: threading.Event, wait: bool = True) -> int:
        """Fetch a shard, unless somebody else is at it and that is not waited for; see ``open``.

        Raises:
            BlockingIOError: somebody else is at it.
            OSError: it cannot be had.
        """
        when, error = self._failed.get(shard, (-_FAILED_SECONDS, OSError()))
        if time.monotonic() - when < _FAILED_SECONDS:
            raise OSError(error.errno, error.strerror or str(error))
        lock = Lock(self._path(shard))
        if not lock.acquire(wait, stop):
            raise BlockingIOError(errno.EAGAIN, "another process fetches it")
        try:
            there = self._cached(shard)
            return self._attempts(shard, lock, stop) if there is None else there
        except Closed:
            raise
        except OSError as failure:
            self._failed[shard] = (time.monotonic(), failure)
            raise
        finally:
            lock.release()

    def _attempts(self, shard: int, lock: Lock, stop: threading.Event) -> int:
        """Try several times, waiting longer each time."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._download(shard, lock, stop)
            except OSError as error:
                hopeless = isinstance(error, Absent | Closed | FileNotFoundError) or error.errno == errno.ENOSPC
                if hopeless or attempt + 1 == _ATTEMPTS:
                    raise
                log.warning("%s: %s; trying again", self.names[shard], error.strerror or error)
                lock.touch()
                stop.wait(_BACKOFF_SECONDS * 2**attempt)
        raise AssertionError

    def _download(self, shard: int, lock: Lock, stop: threading.Event) -> int:
        """Fetch, compare and publish one shard; returns its descriptor."""
        path, entry, known = self._path(shard), self.entries[shard], self.sizes[shard]
        part = path.with_name(f"{path.name}.{download.owner()}.{threading.get_ident()}.part")
        file = self._reserve(part, known, stop)
        size, digest = 0, hashlib.sha256()
        try:
            for data in download.chunks(self._shards[shard].url, stop):
                download.write_all(file, data)
                digest.update(data)
                size += len(data)
                lock.touch()
            if known and size != known:
                replaced = f"; if it was replaced, delete {tarindex.cache_file(self._shards[shard].identity())}"
                told = f"{catalogue.FILE_NAME} says {known}" if entry else f"its index says {known}{replaced}"
                raise OSError(errno.EIO, f"the download has {size} bytes, {told}")
            download.check_whole(size, digest.hexdigest(), entry, file)
            os.fsync(file)
            part.replace(path)
            if not known:
                self._make_room(0)
        except BaseException:
            os.close(file)
            part.unlink(missing_ok=True)
            raise
        return file

    def _reserve(self, part: Path, size: int, stop: threading.Event) -> int:
        """Make room for a file and open it with its final size, so that others take it into account."""
        room = Lock(self.folder / "room")
        room.acquire(True, stop)
        try:
            self._make_room(size)
            file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.ftruncate(file, size)
            return file
        finally:
            room.release()

    def _make_room(self, size: int) -> None:
        """Remove copies until ``size`` more bytes fit: what is not expected first, then what was used longest ago."""
        expected = {self._path(shard) for shard in self._expected}
        used, copies = size, []
        for path in self.folder.iterdir():
            if path.suffix == ".part" and download.abandoned(path):
                path.unlink(missing_ok=True)
            elif path.suffix != ".lock":
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                used += stat.st_size
                if path.suffix != ".part":
                    copies.append((path in expected, stat.st_mtime_ns, path, stat.st_size))
        for _, _, path, freed in sorted(copies):
            if used <= self.cache_bytes:
                return
            with contextlib.suppress(OSError):
                path.unlink()
                used -= freed

    def _prefetch(self, stop: threading.Event) -> None:
        """Body of the background thread; ends when nothing expected is left to fetch."""
        while True:
            with self._lock:
                todo = [] if stop.is_set() else self._next_expected()
                if not todo:
                    if self._thread is threading.current_thread():
                        self._thread = None
                    return
            busy = True
            for shard in todo:
                try:
                    os.close(self._obtain(shard, stop, wait=False))
                    busy = False
                    break  # what is expected may have changed
                except BlockingIOError:
                    continue
                except OSError as error:
                    log.debug("%s: %s", self.names[shard], error)  # told when somebody reads it
            if busy:
                stop.wait(0.2)

    def _next_expected(self) -> list[int]:
        """Expected shards that are not here, in order, as far as all of them fit into the cache together."""
        todo, room, now = [], self.cache_bytes, time.monotonic()
        for shard in self._expected:
            room -= self.sizes[shard]
            if room < 0:
                break
            failed = now - self._failed.get(shard, (-_FAILED_SECONDS, None))[0] < _FAILED_SECONDS
            if not failed and not self._path(shard).exists():
                todo.append(shard)
        return todo

    def _overview(self, url: str) -> Overview:
        """The copy of an overview; as good as absent if it cannot be had."""
        with self._fetching:
            if url not in self._overviews:
                content = "".join(entry.sha256 for entry in self.entries if entry)
                kept = tarindex.cache_file(f"{url}\0{content}").with_suffix(".safetensors")
                with contextlib.suppress(OSError):
                    if not kept.exists():
                        tarindex.keep_file(kept, download.small(url, self._stop))
                self._overviews[url] = Overview(kept)
            return self._overviews[url]

    def _fetch_sidecars(self) -> None:
        """Fetch the index files of all shards, several at once: plans need them all."""
        missing = [i for i, s in enumerate(self._shards) if not tarindex.cache_file(s.identity()).exists()]
        if missing and self._fetch_sidecar(missing[0]):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(self._fetch_sidecar, missing[1:]))

    def _fetch_sidecar(self, shard: int) -> bool:
        """Fetch the index file beside a shard into the cache of indices, unless there is none; False then."""
        known = self._shards[shard]
        if not known.sidecar:
            return False
        url = beside(known.url, tarindex.sidecar(Path(known.name)).name)
        try:
            content = download.small(url, self._stop)
        except Closed:
            raise
        except OSError:
            for other in self._shards:
                other.sidecar = False
            return False
        tarindex.keep_file(tarindex.cache_file(known.identity()), content)
        return True


def check_room(sets: Sequence[RemoteFiles], window: int) -> None:
    """Refuse a cache that cannot hold two shuffle windows of all these sets.

    Raises:
        ValueError: it is too small; says how much is needed.
    """
    need, room = sum(files.needed(window) for files in sets), sets[0].cache_bytes
    if need <= room:
        return
    smaller = next((w for w in range(window - 1, 0, -1) if sum(files.needed(w) for files in sets) <= room), 0)
    other = f", or data.window={smaller}" if smaller else ""
    enough = math.ceil(need / _GIB * 1000) / 1000
    raise ValueError(
        f"data.cache_gib={room / _GIB:.3g} is too small for {sets[0].setting}: two windows of data.window={window} "
        f"shards take up to {need / _GIB:.3g} GiB. Set data.cache_gib={enough:g}{other}."
    )


def _inside(url: str, setting: str) -> list[str]:
    """Shards of a folder, an address that ends with a slash, as its index.json lists them; else the address itself."""
    if url.startswith("pipe:") or not url.endswith("/"):
        return [url]
    if (index := _fetch_catalogue(url + catalogue.FILE_NAME, setting)) is None:
        raise ValueError(
            f"{setting}='{url}': no {catalogue.FILE_NAME} lists its shards. Name them: train-{{000000..001023}}.tar"
        )
    return [url + name for name in of_split(index.shards, url.rstrip("/"), setting)]


def _fetch_catalogue(url: str, setting: str) -> Catalogue | None:
    """The index.json at an address, or None where there is none."""
    for attempt in range(_ATTEMPTS):
        try:
            return catalogue.parse(download.small(url, threading.Event()), url)
        except OSError as error:
            if isinstance(error, Absent) or not download.tells_absent(url):
                return None
            if isinstance(error, FileNotFoundError) or attempt + 1 == _ATTEMPTS:
                raise _unreachable(setting, url, error) from error
            time.sleep(_BACKOFF_SECONDS * 2**attempt)
    raise AssertionError


def _unreachable(setting: str, url: str, error: OSError) -> ValueError:
    told = f"{setting}: {url} cannot be fetched: {error.strerror or error}"
    return ValueError(f"{told}. Check the address, and that this machine may read it.")
