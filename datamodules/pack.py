"""From a source of any kind to a folder of shards: checked, shuffled once, counted, the same bytes every time.

The inputs are put into an order that depends on the seed and their names alone. Threads read, check and encode them
some way ahead; one thread takes the results in that order, drops duplicates and fills one shard after the other. So
the number of workers cannot be seen in the result, and a position in the order is all that a continued pack needs.
"""

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import packjournal
from datamodules.catalogue import Catalogue
from datamodules.inputs.accept import MAX_PIXELS, document, picture
from datamodules.inputs.detect import detect, open_inputs
from datamodules.inputs.entries import Choices, Inputs, Refused
from datamodules.order import Ints
from datamodules.packjournal import LISTING, Done, Line, Workplace
from datamodules.writer import ShardFile

Progress = Callable[[str, int, int, str], None]

_CHUNK = {"image": 8, "document": 128}  # inputs per task of a worker
_WORDS = 2.0**64
_SHOWN = 10
_SPLIT = re.compile(r"\w+([.-]\w+)*")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a packed set.

    Attributes:
        name: name of the data set.
        licence: its licence.
        seed: seed of the shuffle.
        shuffle: whether inputs are shuffled before they are cut into shards.
        val: share of the inputs that goes into val shards, by a hash of their names; 0 for none.
        size: height and width of the images in pixels; None keeps them as they are.
        per_shard: samples per shard; None for no limit.
        shard_mib: size after which a shard is closed, in MiB.
        max_pixels: largest height x width of an image.
        max_bytes: largest input in bytes.
        duplicates: "refuse" or "keep" inputs of the same content; "auto" keeps them in published archives.
        extensions: endings of the files that are documents.
        split_lines: whether each line of a text file is a document.
        text_field: JSON field or column that holds the document.
    """

    name: str
    licence: str = "unknown"
    seed: int = 0
    shuffle: bool = True
    val: float = 0.0
    size: int | None = None
    per_shard: int | None = None
    shard_mib: float = 128.0
    max_pixels: int = MAX_PIXELS
    max_bytes: int = Choices.max_bytes
    duplicates: str = "auto"
    extensions: tuple[str, ...] = ()
    split_lines: bool = False
    text_field: str = Choices.text_field

    def choices(self) -> Choices:
        """The part that concerns reading."""
        return Choices(self.max_bytes, self.extensions, self.split_lines, self.text_field)


@dataclass(frozen=True)
class Packed:
    """A finished set.

    Attributes:
        folder: where it is.
        index: its catalogue; ``index.card["inputs"]`` counts what was seen, written and refused.
        continued: shards that were there from an earlier attempt.
        was_there: nothing had to be done.
    """

    folder: Path
    index: Catalogue
    continued: int = 0
    was_there: bool = False


@dataclass(frozen=True)
class _Outcome:
    """What became of one input: members to write, or why not."""

    number: int
    members: dict[str, bytes] = field(default_factory=dict)
    sha1: str = ""
    identity: bytes = b""
    change: str = ""
    refusal: Refused | None = None


def pack(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    kind: str | None = None,
    workers: int | None = None,
    strict: bool = False,
    fresh: bool = False,
    progress: Progress = lambda what, done, total, detail: None,
) -> Packed:
    """Pack a source into shards, or go on where an earlier attempt was stopped.

    Args:
        source: a file or a folder; it is only read.
        out: folder of the shards; it appears when all is done.
        recipe: what to make of it.
        kind: kind of the source; None to find out.
        workers: threads that read and check; None for as many as there are cores, at most 32.
        strict: publish nothing if any input is refused.
        fresh: begin again, and replace a set that an earlier pack made.
        progress: told (what, done, total, detail) from time to time.

    Raises:
        ValueError: the source cannot be packed, ``out`` is in use, or ``strict`` and something was refused.
    """
    source, out = source.expanduser(), out.expanduser().absolute()
    _apart(source, out)
    found = packjournal.ours(out)
    kind = kind or (detect(source, recipe.choices()) if source.exists() else None)
    inputs = open_inputs(source, kind, recipe.choices())
    try:
        settings = {"kind": inputs.kind, **asdict(recipe), "extensions": list(recipe.extensions)}
        settings["content"] = f"{len(inputs)} inputs, {inputs.identity()}"
        if found is not None and not fresh:
            return _already(out, found, settings)
        with Workplace(out, settings, fresh) as workplace:
            continued = len(workplace.done)
            packer = _Packer(inputs, recipe, workplace, workers or _cores(), progress)
            try:
                index = packer.run(strict, settings)
            except OSError as error:
                raise packjournal.unwritable(out, error) from error
            return Packed(out, index, continued)
    finally:
        inputs.close()


def plan(inputs: Inputs, recipe: Recipe) -> dict[str, Ints]:
    """Numbers of the inputs of each split, in the order in which they are written.

    Raises:
        ValueError: there is none, or the source has splits of its own and ``val`` is set.
    """
    total = len(inputs)
    parts = np.array([inputs.part(number) for number in range(total)], dtype=np.object_)
    own = sorted(set(parts.tolist()) - {""})
    if own and recipe.val:
        raise ValueError(
            f"--val {recipe.val:g}: the source has its own splits ({', '.join(own)}). Leave --val out, "
            "or pack one of them alone."
        )
    strange = next((split for split in own if not _SPLIT.fullmatch(split)), None)
    if strange is not None:
        raise ValueError(f"the source has a split named {strange!r}, which cannot be part of a file name. Rename it.")
    if "test" in own and "val" not in own:
        parts[parts == "test"] = "val"
    parts[parts == ""] = "train"
    if recipe.val:
        draws = [_hash("split", inputs.group(number)) for number in range(total)]
        parts[np.array(draws, dtype=np.float64) < recipe.val * _WORDS] = "val"
    keys = np.arange(total, dtype=np.uint64)
    if recipe.shuffle:
        words = (_hash(f"shuffle {recipe.seed}", inputs.name(number)) for number in range(total))
        keys = np.fromiter(words, dtype=np.uint64, count=total)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    ranked = sorted(set(parts.tolist()), key=lambda split: (split != "train", split))
    return {split: order[parts[order] == split] for split in ranked}


class _Packer:
    """One pack under way."""

    def __init__(self, inputs: Inputs, recipe: Recipe, workplace: Workplace, workers: int, progress: Progress) -> None:
        self.inputs = inputs
        self.recipe = recipe
        self.workplace = workplace
        self.workers = workers
        self.progress = progress
        self.keep = recipe.duplicates == "keep" or (recipe.duplicates == "auto" and inputs.published)
        self.width = max(6, len(str(max(0, len(inputs) - 1))))
        self.seen: dict[bytes, int] = {}
        self.written = self.refused = self.handled = 0

    def run(self, strict: bool, settings: dict[str, Any]) -> Catalogue:
        """Write what is missing, and publish."""
        splits = plan(self.inputs, self.recipe)
        listed = [self._refusal(name, refusal) for name, refusal in self.inputs.refused]
        self.workplace.write_part(LISTING, listed)
        self.refused = len(listed)
        if not self.keep:
            self._remember()
        with ThreadPoolExecutor(self.workers, "pack") as pool:
            for split, numbers in splits.items():
                self._split(pool, split, numbers)
        index = self._catalogue(settings, list(splits))
        told = _told(index.card["inputs"])
        if not index.shards:
            first = self._first_refusals(list(splits))
            self.workplace.discard()
            raise ValueError(f"nothing to pack: {told}.\n{first}")
        if strict and index.card["inputs"]["refused"]:
            raise ValueError(
                f"--strict: {told}. Nothing was published.\n{self._first_refusals(list(splits))}\n"
                "Put them right, or leave out --strict: the same command then publishes the rest at once."
            )
        self.workplace.publish(index, list(splits))
        return index

    def _split(self, pool: ThreadPoolExecutor, split: str, numbers: Ints) -> None:
        done = [shard for shard in self.workplace.done if shard.split == split]
        begin = done[-1].position if done else 0
        self.handled += begin
        shard: ShardFile | None = None
        lines: list[Line] = []
        outcomes = self._examined(pool, numbers[begin:])
        for position, outcome in enumerate(map(self._judge, outcomes), begin + 1):
            self.handled += 1
            if outcome.refusal is not None:
                self.refused += 1
                lines.append(self._refusal(self.inputs.name(outcome.number), outcome.refusal))
            else:
                if shard is None:
                    shard = ShardFile(self.workplace.folder / f"{split}-{len(done):06d}.tar")
                lines.append(self._add(shard, outcome))
            if shard is not None and (self._full(shard) or position == len(numbers)):
                done.append(Done(shard.path.name, split, position, shard.close(), ""))
                self.workplace.finish(done[-1], lines)
                shard, lines = None, []
            self.progress("packing", self.handled, len(self.inputs), self._detail())
        self.workplace.write_part(split, lines)  # refused behind the last shard

    def _full(self, shard: ShardFile) -> bool:
        return shard.samples == self.recipe.per_shard or shard.bytes >= self.recipe.shard_mib * 2**20

    def _add(self, shard: ShardFile, outcome: _Outcome) -> Line:
        key = f"{outcome.number:0{self.width}d}"
        shard.write({"__key__": key, **outcome.members})
        self.written += 1
        line = {"key": key, "shard": shard.path.name, "source": self.inputs.name(outcome.number), "sha1": outcome.sha1}
        if outcome.identity:
            line["content"] = outcome.identity.hex()
        return {**line, "change": outcome.change} if outcome.change else line

    def _judge(self, outcome: _Outcome) -> _Outcome:
        """Refuse what was there before; this runs in the order of the shards."""
        if outcome.refusal is not None or self.keep:
            return outcome
        identity = outcome.identity or bytes.fromhex(outcome.sha1)
        first = self.seen.setdefault(identity, outcome.number)
        if first == outcome.number:
            return outcome
        refusal = Refused("duplicate", f"same content as {self.inputs.name(first)}")
        return _Outcome(outcome.number, sha1=outcome.sha1, refusal=refusal)

    def _remember(self) -> None:
        """Contents that are in finished shards already."""
        for line in self.workplace.lines(dict.fromkeys(done.split for done in self.workplace.done)):
            if "key" in line:
                self.seen[bytes.fromhex(str(line.get("content", line["sha1"])))] = int(line["key"])

    def _examined(self, pool: ThreadPoolExecutor, numbers: Ints) -> Iterator[_Outcome]:
        """Outcomes of the inputs in the order given, worked out by threads some way ahead."""
        step = _CHUNK["image" if self.inputs.member == "image" else "document"]
        waiting: deque[Future[list[_Outcome]]] = deque()
        try:
            for begin in range(0, len(numbers), step):
                waiting.append(pool.submit(self._examine_all, numbers[begin : begin + step].tolist()))
                if len(waiting) > self.workers + 1:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _examine_all(self, numbers: Sequence[int]) -> list[_Outcome]:
        return [self._examine(number) for number in numbers]

    def _examine(self, number: int) -> _Outcome:
        """Read, check and encode one input; runs in a worker."""
        try:
            item = self.inputs.read(number)
            sha1 = hashlib.sha1(item.content, usedforsecurity=False)
            change = ""
            if self.inputs.member == "image":
                image = picture(item.content, self.recipe.max_pixels, self.recipe.size)
                members, change = {image.extension: image.data}, image.change
            else:
                members = {self.inputs.member: document(item.content)}
            captions = {name: _encode(text) for name, text in item.captions.items()}
        except Refused as refusal:
            return _Outcome(number, refusal=refusal)
        if item.label is not None:
            members["cls"] = str(item.label).encode()
        digest = sha1.hexdigest()
        for name in sorted(captions):
            sha1.update(b"\0" + name.encode() + b"\0" + captions[name])
        return _Outcome(number, {**members, **captions}, digest, sha1.digest() if captions else b"", change)

    def _refusal(self, name: str, refusal: Refused) -> Line:
        return {"source": name, "refused": refusal.reason, "detail": refusal.detail}

    def _detail(self) -> str:
        told = f"{len(self.workplace.done)} shards"
        return f"{told}, {self.refused} refused" if self.refused else told

    def _first_refusals(self, splits: list[str]) -> str:
        lines = [line for line in self.workplace.lines(splits) if "refused" in line]
        texts = [f"  {line['source']}: {Refused(line['refused'], line['detail'])}" for line in lines[:_SHOWN]]
        return "\n".join([*texts, f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else texts)

    def _catalogue(self, settings: dict[str, Any], splits: list[str]) -> Catalogue:
        """index.json; what it counts is counted in the manifest."""
        refused: Counter[str] = Counter()
        changed: Counter[str] = Counter()
        written = 0
        for line in self.workplace.lines(splits):
            if "refused" in line:
                refused[line["refused"]] += 1
            else:
                written += 1
                changed[line.get("change", "")] += 1
        del changed[""]
        seen = len(self.inputs) + len(self.inputs.refused)
        shards = {done.shard: done.entry for done in self.workplace.done}
        if written + refused.total() != seen or written != sum(entry.samples for entry in shards.values()):
            raise RuntimeError(
                f"{written} written and {refused.total()} refused of {seen} inputs: not all accounted for"
            )
        counts = {"seen": seen, "written": written, "refused": dict(refused), "left_out": self.inputs.left_out}
        card: dict[str, Any] = {"pack": settings, "inputs": {**counts, "changed": dict(changed)}}
        if self.inputs.class_names:
            card["classes"] = self.inputs.class_names
        if self.inputs.member == "image":
            card["image"] = {"size": self.recipe.size, "policy": _policy(self.recipe)}
        sources = {name: version(name) for name in ("numpy", "pillow", "simplejpeg", "webdataset")}
        return Catalogue(self.recipe.name, self.recipe.licence, sources, shards, card)


def _policy(recipe: Recipe) -> str:
    kept = "files as they came; turned by EXIF or in another format than JPEG, PNG, WebP: PNG"
    if recipe.size is None:
        return kept
    return f"shorter side to {recipe.size}, bicubic antialiased, centre crop, PNG; of that size already: {kept}"


def _already(out: Path, found: Catalogue, settings: dict[str, Any]) -> Packed:
    before = found.card["pack"]
    for name in settings:
        if before.get(name) != settings[name]:
            raise ValueError(
                f"{out} is packed already, with {name} {before.get(name)}, and now it is {settings[name]}. "
                "Type another folder, or add --fresh to replace it."
            )
    packjournal.clear_leftovers(out)
    return Packed(out, found, was_there=True)


def _apart(source: Path, out: Path) -> None:
    real, target = source.resolve(), out.resolve()
    if target == real or target.is_relative_to(real) or real.is_relative_to(target):
        raise ValueError(f"{out} and {source} lie inside one another. Type an output folder outside the source.")


def _told(counts: dict[str, Any]) -> str:
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(counts["refused"].items()))
    total = sum(counts["refused"].values())
    return f"{total} of {counts['seen']} inputs were refused ({refused})" if total else f"{counts['seen']} inputs"


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused("not utf-8", error.reason) from error


def _hash(purpose: str, name: str) -> int:
    """Uniform 64-bit number of a name."""
    content = f"{purpose}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _cores() -> int:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(32, here or 1)
