"""Whether a folder of shards is whole: every count, size, hash, key, index and member, and every bad sample by name."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules import catalogue, manifest, overview, salvage, stamp, survey, tarindex
from datamodules.catalogue import ShardEntry
from datamodules.inputs.accept import whole
from datamodules.inputs.entries import Refused
from datamodules.overview import Overview
from datamodules.patterns import split_of
from datamodules.survey import Facts, Progress
from datamodules.tarindex import TarIndex
from datamodules.transforms import IMAGE_EXTENSIONS

SORTED = 0.5  # sortedness above which an order by windows mixes the classes badly
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1, "uint16": 2, "uint32": 4, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class Problem:
    """Something wrong: in a shard, or with one sample of it (``key`` not empty)."""

    shard: str
    key: str
    text: str

    def __str__(self) -> str:
        """One line that names the place."""
        return f"{self.shard}, sample {self.key}: {self.text}" if self.key else f"{self.shard}: {self.text}"


@dataclass
class Report:
    """Result of a check.

    Attributes:
        problems: all of them, shard by shard.
        notes: what is worth knowing, but not wrong.
        facts: what the shards hold.
        decoded: samples whose members were decoded.
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)
    decoded: int = 0


@dataclass
class _ShardReport:
    problems: list[Problem]
    facts: Facts
    decoded: int
    keys: NDArray[np.bytes_]


def check(
    path: Path,
    *,
    fraction: float = 1.0,
    classes: int | None = None,
    workers: int | None = None,
    progress: Progress = lambda what, done, total, detail: None,
) -> Report:
    """Check a folder of shards, one shard, or a pattern.

    Args:
        path: what to check.
        fraction: share of the samples that are decoded, chosen by a hash of their keys; everything else is always
            checked in full.
        classes: labels must lie in 0..classes-1; None takes the number of class names in index.json, if it has some.
        workers: threads, one shard each; None for the number of cores.
        progress: told (what, done, total, detail).

    Raises:
        ValueError: nothing is there to check.
    """
    paths = survey.find(path)
    known = survey.entries(paths)
    cards = {folder: found.card for folder in {p.parent for p in paths} if (found := catalogue.read(folder))}
    overviews = {folder: Overview(folder / overview.FILE_NAME) for folder in {p.parent for p in paths}}
    report = Report()

    def one(shard: Path) -> _ShardReport:
        beside = overviews[shard.parent]
        return _ShardCheck(shard, known[shard], cards.get(shard.parent, {}), beside, fraction, classes).run()

    keys: list[NDArray[np.bytes_]] = []
    for result in survey.in_parallel(one, paths, workers, progress, "checking"):
        report.problems += result.problems
        report.facts.add(result.facts)
        report.decoded += result.decoded
        keys.append(result.keys)
    report.problems += _unlisted(paths, known, cards)
    report.problems += _compare_manifests(paths, keys, known, cards, report)
    _compare_keys([p.name for p in paths], keys, report)
    _add_notes(report, known)
    return report


class _ShardCheck:
    """The check of one shard."""

    def __init__(
        self,
        path: Path,
        entry: ShardEntry | None,
        card: dict[str, Any],
        beside: Overview,
        fraction: float,
        classes: int | None,
    ) -> None:
        self.path = path
        self.entry = entry
        self.card = card
        self.beside = beside
        self.fraction = fraction
        self.classes = classes or len(card.get("classes", ())) or None
        self.problems: list[Problem] = []
        self._intact = False

    def run(self) -> _ShardReport:
        empty = np.zeros(0, dtype="S1")
        try:
            self._intact = self._check_file()
            index = tarindex.scan(self.path)
            labels = survey.labels(self.path, index)
            shapes = survey.shapes(self.path, index)
            self._check_index(index, shapes)
            self._check_stamp()
            hashed = self.entry.sha256 if self.entry is not None and self._intact else ""
            if overview.agrees(self.beside, self.path.name, hashed, index) is False:
                self._add("", f"{overview.FILE_NAME} says something else. Delete it and type data index")
            if told := _dotted(index.extensions):
                self._add("", told)
            self._check_labels(index, labels)
            decoded = self._check_samples(index)
            return _ShardReport(self.problems, survey.facts(self.path, index, labels, shapes), decoded, index.keys)
        except FileNotFoundError:
            self._add("", f"listed in {catalogue.FILE_NAME}, but missing" if self.entry else "missing")
            for key, _ in tarindex.written_sums(self.path):
                self._add(key, "is lost")
        except OSError as error:
            self._add("", f"cannot be read ({error.strerror or error})")
        return _ShardReport(self.problems, Facts(), 0, empty)

    def _add(self, key: str, text: str) -> None:
        self.problems.append(Problem(self.path.name, key, text))

    def _check_file(self) -> bool:
        """Size and hash; whether the shard is known to be as it was written."""
        size = self.path.stat().st_size
        if self.entry is None:
            return False
        if size != self.entry.bytes:
            self._add("", f"{size} bytes, {catalogue.FILE_NAME} says {self.entry.bytes}")
            return False
        if catalogue.sha256(self.path) != self.entry.sha256:
            self._add("", f"its sha256 is not the one in {catalogue.FILE_NAME}")
            return False
        return True

    def _check_index(self, index: TarIndex, shapes: NDArray[np.int64] | None) -> None:
        """Headers, counts, keys, and the index file."""
        named: set[str] = set()
        if index.problem:
            self._add(index.problem_key, index.problem)
            named.add(index.problem_key)
        if index.problem or (self.entry is not None and not self._intact):
            for key, text in self._lost(index):
                if key not in named:
                    self._add(key, text)
                    named.add(key)
        if not len(index):
            self._add("", "holds no sample")
        if self.entry is not None and len(index) != self.entry.samples:
            self._add("", f"{len(index)} samples, {catalogue.FILE_NAME} says {self.entry.samples}")
        if tarindex.sidecar(self.path).is_file() and not index.problem and not survey.agrees(self.path, index):
            self._add("", "the index file beside it says something else. Delete it and type data index")
        elif shapes is not None and tarindex.sidecar(self.path).is_file():
            wrong = (shapes != survey.header_shapes(self.path, index)).any(axis=1)
            for row in np.flatnonzero(wrong):
                self._add(index.key(int(row)), "its size is not the one in the index file beside the shard")

    def _check_stamp(self) -> None:
        """What the shard's header says of its members."""
        with self.path.open("rb") as file:
            stated = stamp.read(file.fileno())
        for name, found in stated.items() if self.card else ():
            if told := stamp.differences(found, self.card.get(name, {})):
                self._add("", f"its header says of .{name} {told} in {catalogue.FILE_NAME}")

    def _lost(self, index: TarIndex) -> Iterator[tuple[str, str]]:
        """Samples that the damage hides: repeated keys, what lies behind it, and what the index file knows."""
        met = {index.key(row) for row in range(len(index))}
        if index.problem:
            with self.path.open("rb") as file:
                for key, text in salvage.hidden(file.fileno(), index):
                    met.add(key)
                    yield key, text
        for key, _ in tarindex.written_sums(self.path):
            if key not in met:
                yield key, "is lost"

    def _check_labels(self, index: TarIndex, labels: NDArray[np.int64]) -> None:
        if self.classes is not None:
            known = labels != survey.NO_LABEL
            for row in np.flatnonzero(known & ((labels < 0) | (labels >= self.classes))):
                self._add(index.key(int(row)), f"class {labels[row]}, expected 0..{self.classes - 1}")
        if self.entry is None or not self.entry.classes or index.problem:
            return
        found = dict(zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True))
        found.pop(survey.NO_LABEL, None)
        told = dict(self.entry.histogram())
        if found != told:
            differ = sorted(label for label in {**found, **told} if found.get(label, 0) != told.get(label, 0))
            label = differ[0]
            more = f", and {len(differ) - 1} more classes differ" if len(differ) > 1 else ""
            self._add(
                "",
                f"{found.get(label, 0)} samples of class {label}, "
                f"{catalogue.FILE_NAME} says {told.get(label, 0)}{more}",
            )

    def _check_samples(self, index: TarIndex) -> int:
        """Members of every sample; decode the chosen ones. Returns how many those were."""
        decoded = 0
        common = {
            name
            for column, name in enumerate(index.extensions)
            if 2 * int((index.offsets[:, column] >= 0).sum()) > len(index)
        }
        pictures = {name for name in index.extensions if name in IMAGE_EXTENSIONS}
        written = {} if self._intact else {key: sums for key, sums in tarindex.written_sums(self.path) if sums}
        changed = self._changed(index, written)
        with self.path.open("rb") as file:
            for row in range(len(index)):
                key = index.key(row)
                chosen = _chosen(key, self.fraction)
                members = survey.read_row(file.fileno(), index, row, None if chosen else ("cls",))
                decoded += chosen
                present = {n for column, n in enumerate(index.extensions) if index.offsets[row, column] >= 0}
                lacking = common - present - (pictures if pictures & present else set())
                if self._intact or key in written:  # so it was written: a further caption is not for every image
                    lacking = {name for name in lacking if not name.endswith(".txt")}
                for name in sorted(lacking):
                    self._add(key, f"lacks .{name}, which other samples of the shard have")
                faults = {name: fault(name, data, self.card.get(name)) for name, data in members.items()}
                faults = {**changed.get(row, {}), **{name: wrong for name, wrong in faults.items() if wrong}}
                for name, wrong in faults.items():
                    if name not in lacking:
                        self._add(key, f".{name}: {wrong}")
        return decoded

    def _changed(self, index: TarIndex, written: dict[str, dict[str, int]]) -> dict[int, dict[str, str]]:
        """Members of each row that are not those for which the index file beside the shard was written."""
        found = tarindex.member_sums(self.path, index) if written else np.zeros((0, 0), dtype=np.uint32)
        changed: dict[int, dict[str, str]] = {}
        for row, (sums, places) in enumerate(zip(found.tolist(), index.offsets.tolist(), strict=False)):
            pairs = zip(index.extensions, sums, places, strict=True)
            now = {name: value for name, value, place in pairs if place >= 0}
            for name, value in written.get(index.key(row), now).items():
                if now.get(name) != value:
                    text = "has changed since it was written" if name in now else "is lost"
                    changed.setdefault(row, {})[name] = text
        return changed


def _dotted(extensions: Sequence[str]) -> str:
    """What is wrong if the keys had dots, so that several samples fell together to one, or nothing finds a member."""
    if not extensions or not all("." in name for name in extensions):
        return ""
    told = "a key ends at the first dot of the name. Write the shard again without dots in the keys"
    numbered: dict[str, list[str]] = {}
    for name in extensions:
        number, _, kind = name.partition(".")
        if number.isdigit():
            numbered.setdefault(kind, []).append(name)
    for names in numbered.values():
        if len(names) > 1:
            return f"its members .{names[0]} and .{names[1]} differ in a number only: {told}"
    unused = [name for name in extensions if name.rpartition(".")[2] in (*IMAGE_EXTENSIONS, "cls")]
    return f"no data module looks for its member .{unused[0]}: {told}" if unused else ""


def fault(extension: str, data: bytes, card: Any = None) -> str:
    """What is wrong with one member, or an empty string.

    Args:
        extension: its kind, e.g. "jpg", "cls", "caption2.txt".
        data: its content.
        card: what index.json says of the kind: {"dtype", "shape"} of raw arrays.
    """
    kind = extension.rpartition(".")[2]
    try:
        if extension in IMAGE_EXTENSIONS:
            whole(data)
        elif extension == "cls":
            int(data)
        elif kind in ("txt", "py"):
            data.decode("utf-8")
        elif extension == "json":
            json.loads(data)
        elif isinstance(card, dict) and card.get("dtype") in ITEM_BYTES:
            return _array_fault(data, card)
    except Refused as refusal:
        return str(refusal)
    except UnicodeDecodeError as error:
        return f"not utf-8 (byte {data[error.start]:#04x} at {error.start})"
    except ValueError:
        return f"{data[:20]!r} is not {'a whole number' if extension == 'cls' else 'JSON'}"
    return ""


def _array_fault(data: bytes, card: dict[str, Any]) -> str:
    item = ITEM_BYTES[card["dtype"]]
    shape = card.get("shape")
    if not isinstance(shape, list) or not all(isinstance(side, int) and side > 0 for side in shape):
        return f"{len(data)} bytes are no whole number of {card['dtype']}" if len(data) % item else ""
    expected = item * math.prod(shape)
    return f"{len(data)} bytes, expected {expected} for {card['dtype']} {shape}" if len(data) != expected else ""


def _chosen(key: str, fraction: float) -> bool:
    if fraction >= 1:
        return True
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _unlisted(
    paths: Sequence[Path], known: dict[Path, ShardEntry | None], cards: dict[Path, dict[str, Any]]
) -> list[Problem]:
    return [
        Problem(path.name, "", f"not listed in {catalogue.FILE_NAME}")
        for path in paths
        if known[path] is None and path.parent in cards
    ]


def _compare_manifests(
    paths: Sequence[Path],
    keys: Sequence[NDArray[np.bytes_]],
    known: dict[Path, ShardEntry | None],
    cards: dict[Path, dict[str, Any]],
    report: Report,
) -> list[Problem]:
    """What the manifests say otherwise, but for samples that are named already."""
    named = {(problem.shard, problem.key) for problem in report.problems if problem.key}
    found: list[Problem] = []
    for folder in dict.fromkeys(path.parent for path in paths):
        held = {p.name: part for p, part in zip(paths, keys, strict=True) if p.parent == folder}
        listed = [path for path in paths if path.parent == folder and known[path] is not None]
        index = catalogue.read(folder)
        whole = index is not None and len(listed) == len(index.shards)
        ours = held if index is None else {path.name: held[path.name] for path in listed}
        found += [Problem(*one) for one in manifest.compare(folder, cards.get(folder, {}), ours, whole)]
    return [problem for problem in found if (problem.shard, problem.key) not in named]


def _compare_keys(names: Sequence[str], keys: Sequence[NDArray[np.bytes_]], report: Report) -> None:
    """Name keys that stand in two shards of one split; note those that two splits share."""
    if not keys:
        return
    together = np.concatenate(keys)
    shard = np.repeat(np.arange(len(keys)), [len(part) for part in keys])
    order = np.argsort(together, kind="stable")
    again = np.flatnonzero(together[order][1:] == together[order][:-1])
    shared = 0
    for place in again:
        first, second = shard[order[place]], shard[order[place + 1]]
        if split_of(names[first]) != split_of(names[second]):
            shared += 1
        elif first != second:
            key = bytes(together[order[place]]).decode("utf-8", "surrogateescape")
            report.problems.append(Problem(names[second], key, f"{names[first]} has a sample of the same key"))
    if shared:
        report.notes.append(f"{shared} keys stand in more than one split")


def _add_notes(report: Report, known: dict[Path, ShardEntry | None]) -> None:
    for name, (count, _) in sorted(report.facts.members.items()):
        if name.endswith(".txt") and count < report.facts.samples:
            report.notes.append(f"{report.facts.samples - count} of {report.facts.samples} samples have no .{name}")
    degree = report.facts.sortedness()
    if degree is not None and degree > SORTED:
        report.notes.append(
            f"samples are sorted by class along the shards ({degree:.2f} of 1): shuffle while packing, "
            "or train with a large data.window"
        )
    without = sum(not tarindex.sidecar(path).is_file() for path in known if path.is_file())
    if without:
        report.notes.append(f"{without} shards have no index file beside them; data index writes them")
    if any(entry is None for entry in known.values()):
        report.notes.append(f"without an entry in {catalogue.FILE_NAME}, sizes and hashes cannot be compared")
