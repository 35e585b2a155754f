"""From shards to shards of the same names and keys: every sample encoded, shard by shard, nothing done twice.

A shard appears under its name when it is whole, with a record of it in ``.prepare``. A killed process leaves these
behind, and the same command goes on with the rest. Processes share the work without talking to one another: each takes
every n-th shard, and whoever finds that all records are there writes ``index.json``, which ends the work. Batches never
reach over the end of a shard, so neither interruptions nor the number of processes can be seen in the result.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from platform.verbs import PROGRAM

WORK, SETTINGS, SKIPPED = ".prepare", "settings.json", "skipped.jsonl"
ENTRY = "prepare"  # of the card in index.json
AHEAD = 3  # batches that are read while one is encoded

Sums = NDArray[np.float64]
Progress = Callable[[str, int, int, str], None]


class Encoder(Protocol):
    """Turns samples into the members that are stored.

    Attributes:
        name: where it comes from, for the card.
        settings: everything that decides the bytes it makes; JSON values.
        stamp: what every shard is to say of its members, as far as it is known before all are encoded.
    """

    name: str
    settings: dict[str, Any]
    stamp: dict[str, Any]

    def read(self, members: Mapping[str, bytes]) -> Any:
        """What is needed of a sample; called from several threads.

        Raises:
            ValueError: the sample cannot be used; the message does not name it.
        """

    def encode(self, items: Sequence[Any]) -> tuple[list[dict[str, bytes]], Sums]:
        """Members to store for some samples, and numbers that are added up over all of them.

        Raises:
            ValueError: the results cannot be stored.
        """

    def card(self, sums: Sums) -> dict[str, Any]:
        """Entries of the card in index.json, from the sums over all samples."""


@dataclass(frozen=True)
class Choices:
    """What changes the work, but not its result.

    Attributes:
        batch: samples encoded at a time.
        workers: threads that read and decode.
        skip_bad: leave samples out that cannot be used, instead of ending with a message.
        rank: number of this process.
        world: number of processes.
    """

    batch: int = 32
    workers: int = 4
    skip_bad: bool = False
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Outcome:
    """What one process did.

    Attributes:
        index: the finished set's catalogue; None while other processes have shards to do.
        encoded: shards this process made.
        kept: shards of its share that were there from an earlier attempt.
        skipped: samples left out over the whole set.
    """

    index: Any
    encoded: int = 0
    kept: int = 0
    skipped: int = 0


class Encoding:
    """The encoding of one source.

    Args:
        source: the samples.
        encoder: what is done with them.
        out: folder to write.
        choices: how the work is done.
        origin: name and licence of the source.
    """

    def __init__(self, source: Any, encoder: Encoder, out: Path, choices: Choices, origin: tuple[str, str]) -> None:
        self.source, self.encoder, self.out, self.choices, self.origin = source, encoder, out, choices, origin
        self.work = out / WORK
        self.settings = {**encoder.settings, "source": source.fingerprint}
        parts = (import_module(f"datamodules.{name}") for name in ("writer", "catalogue", "stamp", "overview"))
        self._writer, self._catalogue, self._stamp, self._overview = parts

    def check(self) -> Any:
        """See whether the folder can be used, before anything expensive is done.

        Returns:
            Its catalogue if the work was finished before, else None.

        Raises:
            ValueError: the folder holds something else, or the same made with other settings.
        """
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file. Type the folder that the shards go to.")
        found = self._catalogue.read(self.out)
        if found is not None:
            self._compare(found.card.get(ENTRY))
            self._check_shards(found)
            if found.card[ENTRY]["skipped"] and not self.choices.skip_bad:
                raise ValueError(
                    f"{self.out} was made with --skip-bad and lacks {found.card[ENTRY]['skipped']} samples. Add"
                    f" --skip-bad to take it as it is. Which ones, and why: {self.out / SKIPPED}"
                )
            return found
        others = [path.name for path in self.out.iterdir() if path.name != WORK] if self.out.is_dir() else []
        settings = self._recorded()
        if settings is not None or others:  # settings are written before anything else
            self._compare(settings)
        return None

    def run(self, progress: Progress) -> Outcome:
        """Encode this process's share of the shards, or go on where an earlier attempt was stopped.

        Args:
            progress: told (what, samples done, samples in all, shard).

        Raises:
            ValueError: see ``check``; or a sample cannot be used; or another process is at work in the folder.
        """
        if (found := self.check()) is not None:
            return self._ended(found)
        with _writing(self.out):
            self.work.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if (found := self.check()) is not None:  # other processes may have ended meanwhile
                    shutil.rmtree(self.work, ignore_errors=True)
                    return self._ended(found)
                _write(self.work / SETTINGS, json.dumps(self.settings, indent=1, sort_keys=True))
                mine = range(self.choices.rank, len(self.source.names), self.choices.world)
                todo = [shard for shard in mine if self._record(shard) is None]
                self._encode(todo, progress)
                index = self._publish(progress)
        return self._ended(index, len(todo), len(mine) - len(todo))

    # The folder

    def _compare(self, before: Mapping[str, Any] | None) -> None:
        """Refuse a folder that was not made by this very work."""
        if before is None:
            raise ValueError(
                f"{self.out} is not empty, and what is there was not made by prepare. Type a new folder for the shards."
            )
        changed = [name for name in self.settings if before.get(name) != self.settings[name]]
        if changed:
            told = ", ".join(f"{name} was {before.get(name)}, is {self.settings[name]}" for name in changed)
            raise ValueError(
                f"{self.out} was made with other settings: {told}. Type the former settings to go on with it, or"
                " another folder."
            )

    def _check_shards(self, found: Any) -> None:
        for name, entry in found.shards.items():
            path = self.out / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise ValueError(
                    f"{path} is missing or not the file that {self._catalogue.FILE_NAME} lists. Copy it again, or"
                    f" delete {self.out} and type this command again."
                )

    def _recorded(self) -> dict[str, Any] | None:
        try:
            settings: dict[str, Any] = json.loads((self.work / SETTINGS).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        return settings

    def _record(self, shard: int) -> dict[str, Any] | None:
        """What is known of a finished shard; None if it has to be made."""
        name = self.source.names[shard]
        try:
            record: dict[str, Any] = json.loads((self.work / f"{name}.json").read_text())
            whole = (self.out / name).stat().st_size == record["entry"]["bytes"]
        except FileNotFoundError:
            return None
        return record if whole and (self.choices.skip_bad or not record["skipped"]) else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep a second process of the same rank away; the system lets go when this one ends, however it ends."""
        with (self.work / f"lock-{self.choices.rank}").open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise ValueError(
                    f"{self.out} is being written by process {stream.read() or 'unknown'} of another start. Wait for"
                    " it, or stop it: the same command goes on."
                ) from None
            except OSError as error:  # some network file systems are mounted without locks
                warnings.warn(f"{stream.name} cannot be locked ({error}); take care to start this once.", stacklevel=3)
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield

    # The work

    def _encode(self, shards: Sequence[int], progress: Progress) -> None:
        counts = self.source.counts
        total, done = int(sum(counts[shard] for shard in shards)), 0
        waiting: deque[tuple[int, list[int], list[Future[Any]]]] = deque()
        tasks = self._tasks(shards)
        pool = ThreadPoolExecutor(self.choices.workers, thread_name_prefix="prepare")
        current: _Shard | None = None
        try:
            while True:
                while len(waiting) <= AHEAD and (task := next(tasks, None)) is not None:
                    shard, samples = task
                    waiting.append((shard, samples, [pool.submit(self._read, sample) for sample in samples]))
                if not waiting:
                    return
                shard, samples, futures = waiting.popleft()
                current = current or _Shard(self, shard)
                current.add(samples, [future.result() for future in futures])
                done += len(samples)
                if not waiting or waiting[0][0] != shard:
                    current.close()
                    current = None
                progress("encoding", done, total, self.source.names[shard])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if current is not None:
                current.discard()

    def _tasks(self, shards: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Shard and samples of every batch."""
        for shard in shards:
            first, end = int(self.source.starts[shard]), int(self.source.starts[shard + 1])
            for begin in range(first, end, self.choices.batch):
                yield shard, list(range(begin, min(begin + self.choices.batch, end)))

    def _read(self, sample: int) -> Any:
        """What the encoder needs of a sample, or a ValueError that says why it cannot be used."""
        try:
            return self.encoder.read(self.source.read(sample))
        except ValueError as error:
            return error

    def _publish(self, progress: Progress) -> Any:
        """Write index.json if all shards are there; None if other processes still work."""
        records = {name: self._record(shard) for shard, name in enumerate(self.source.names)}
        index = self._catalogue.read(self.out)
        if index is None and all(records.values()):
            found = {name: record for name, record in records.items() if record is not None}
            index = self._listed(found, progress)
            skipped = [{"shard": name, **one} for name, record in found.items() for one in record["skipped"]]
            if skipped:
                _write(self.out / SKIPPED, "".join(f"{json.dumps(one)}\n" for one in skipped))
            self._overview.describe(self.out, index.shards)
            _write(self.out / self._catalogue.FILE_NAME, index.to_json())
        if index is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            self._writer.sync_folder(self.out)
        return index

    def _listed(self, records: Mapping[str, dict[str, Any]], progress: Progress) -> Any:
        sums: Sums = np.array([record["sums"] for record in records.values()], dtype=np.float64).sum(axis=0)
        skipped = sum(len(record["skipped"]) for record in records.values())
        name, licence = self.origin
        members = self.encoder.card(sums)
        card = {**members, ENTRY: {**self.settings, "encoder_name": self.encoder.name, "skipped": skipped}}
        shards = {name: self._catalogue.ShardEntry(**record["entry"]) for name, record in records.items()}
        if (entries := self._stamp.of(members)) != self.encoder.stamp:  # a scale is measured over all samples
            for done, (shard, entry) in enumerate(shards.items()):
                progress("stamping", done, len(shards), shard)
                self._stamp.replace(self.out / shard, entries)
                shards[shard] = replace(entry, sha256=self._catalogue.sha256(self.out / shard))
        sources = {name: self.source.fingerprint}
        return self._catalogue.Catalogue(self.out.absolute().name, licence, sources, shards, card)

    def _ended(self, index: Any, encoded: int = 0, kept: int = 0) -> Outcome:
        return Outcome(index, encoded, kept, index.card[ENTRY]["skipped"] if index is not None else 0)


class _Shard:
    """One shard while it is being made.

    Args:
        job: what it belongs to.
        shard: its number.
    """

    def __init__(self, job: Encoding, shard: int) -> None:
        self.job, self.name = job, job.source.names[shard]
        self._sums: Any = 0.0
        self._skipped: list[dict[str, str]] = []
        self._file = job._writer.ShardFile(job.out / self.name, entries=job.encoder.stamp)

    def add(self, samples: Sequence[int], items: Sequence[Any]) -> None:
        """Encode a batch and write it; an item that is a ValueError says why its sample cannot be used."""
        job = self.job
        keys = [job.source.key(sample) for sample in samples]
        good = [(key, item) for key, item in zip(keys, items, strict=True) if not isinstance(item, ValueError)]
        for key, item in zip(keys, items, strict=True):
            if isinstance(item, ValueError):
                self._skip(key, item)
        if not good:
            return
        try:
            encoded, sums = job.encoder.encode([item for _, item in good])
        except ValueError as error:
            place = f"{self.name}, one of the {len(good)} samples from {good[0][0]} on"
            raise ValueError(f"{place}: {error}.") from None
        self._sums = self._sums + sums
        for (key, _), members in zip(good, encoded, strict=True):
            self._file.write({"__key__": key, **members})

    def _skip(self, key: str, error: ValueError) -> None:
        place = f"{self.name}, sample {key}: "
        reason = str(error).removeprefix(place)
        if not self.job.choices.skip_bad:
            raise ValueError(
                f"{place}{reason}. Put it right, or add --skip-bad to leave such samples out. The same command goes on"
                " from the shards that are finished."
            )
        self._skipped.append({"key": key, "reason": reason})

    def close(self) -> None:
        """Finish the shard under its name, and record it.

        Raises:
            ValueError: every sample was left out.
        """
        if not self._file.samples:
            self.discard()
            raise ValueError(
                f"{self.name}: none of its {len(self._skipped)} samples can be used; the first one:"
                f" {self._skipped[0]['reason']}. Take the shard out of the source. What it holds:"
                f" {PROGRAM} data check"
            )
        entry = self._file.close()
        record = {"entry": asdict(entry), "skipped": self._skipped, "sums": self._sums.tolist()}
        _write(self.job.work / f"{self.name}.json", json.dumps(record))

    def discard(self) -> None:
        """Remove what was written so far."""
        (self.job.out / f"{self.name}.part").unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Tell in one sentence that a folder cannot be written; a full disk has a message of its own."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"cannot write to {out}: {error.strerror or error}. Type a folder you may write to."
        ) from error


def _write(file: Path, text: str) -> None:
    """Write a file that appears under its name only when its text is on the disk; several processes may do so."""
    aside = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
