"""Every sample once and in order: runs that are killed and continued on other ranks and workers, against the ideal.

The ideal is what one process reads in one piece; that this in turn is each sample once per epoch is checked on its
own. The shards are of uneven sizes and fewer than ranks times workers.
"""

import itertools
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import pytest

from datamodules.latents import latent_card
from datamodules.writer import DatasetWriter
from tests.runner.ledger import Items, Runs, items_of
from tests.tars import picture, png, write_set, write_tar

Settings = dict[str, Any]
Batch = Mapping[str, Any]

GLOBAL = 12  # items per update: divisible by 1, 2, 3 and 4 ranks
SHARDS = (5, 1, 7, 2, 3)
SHAPES = ((8, 8), (16, 8), (8, 16))
LENGTH = 24  # tokens per row
EOS = 256  # of the byte tokenizer
UPDATES = 3  # of each combination of ranks, workers and micro-batches
IMAGES = {"_target_": "datamodules.images.Images", "size": 8, "channels": 1, "num_classes": 10, "flip": True}
TEXT = {
    "_target_": "datamodules.text.Text",
    "tokenizer": {"_target_": "datamodules.tokenizers.Bytes"},
    "length": LENGTH,
    "train": "train-*.tar",
}


def images(folder: Path) -> Settings:
    write_set(folder, SHARDS)
    return {**IMAGES, "train": "train-*.tar"}


def mixture(folder: Path) -> Settings:
    write_set(folder, (4, 1, 6), prefix="a")
    write_set(folder, (3, 2), prefix="b")
    return {**IMAGES, "train": {"a": {"path": "a-*.tar", "weight": 0.7}, "b": {"path": "b-*.tar", "weight": 0.3}}}


def buckets(folder: Path) -> Settings:
    numbers = itertools.count()
    for shard, count in enumerate(SHARDS):
        content = {}
        for number in islice(numbers, count):
            height, width = SHAPES[number * number % 3]
            pixels = np.tile(picture(number), (2, 2))[:height, :width]
            content[f"{number * number % 3}-{number:05d}"] = {"png": png(pixels), "cls": b"%d" % (number % 10)}
        write_tar(folder / f"train-{shard:06d}.tar", content)
    ratios = {"_target_": "datamodules.buckets.Buckets", "size": 8, "multiple": 4, "ratios": ["1:1", "1:2", "2:1"]}
    return {**IMAGES, "train": "train-*.tar", "buckets": ratios}


def captions(folder: Path) -> Settings:
    numbers = itertools.count()
    for shard, count in enumerate(SHARDS):
        content = {
            f"{number:05d}": {"png": png(picture(number)), "txt": b"one %d" % number, "new.txt": b"two %d" % number}
            for number in islice(numbers, count)
        }
        write_tar(folder / f"train-{shard:06d}.tar", content)
    chosen = {"txt": 0.6, "new.txt": 0.4}
    kind = {"_target_": "datamodules.image_text.ImageText", "size": 8, "channels": 1, "captions": chosen}
    return {**kind, "train": "train-*.tar"}


def document(number: int) -> bytes:
    return b"%02d" % number * (1 + number * 5 % 11)  # 2 to 22 bytes


def long_document(number: int) -> bytes:
    return bytes([65 + number]) * (5 + number * 37 % 80)  # every byte tells its document


def documents(folder: Path, mode: str, text: Callable[[int], bytes] = document) -> Settings:
    numbers = itertools.count()
    for shard, count in enumerate(SHARDS):
        content = {f"{number:05d}": {"txt": text(number)} for number in islice(numbers, count)}
        write_tar(folder / f"train-{shard:06d}.tar", content)
    return {**TEXT, "mode": mode}


def concat(folder: Path) -> Settings:
    return documents(folder, "concat")


def pack(folder: Path) -> Settings:
    return documents(folder, "pack")


def padded(folder: Path) -> Settings:
    return documents(folder, "padded")


def mixed_rows(folder: Path) -> Settings:
    for prefix, counts in (("a", (4, 1, 6)), ("b", (3, 2))):
        numbers = itertools.count()
        for shard, count in enumerate(counts):
            content = {f"{prefix}{number:05d}": {"txt": document(number)} for number in islice(numbers, count)}
            write_tar(folder / f"{prefix}-{shard:06d}.tar", content)
    parts = {"a": {"path": "a-*.tar", "weight": 2}, "b": {"path": "b-*.tar", "weight": 1}}
    return {**TEXT, "mode": "pack", "train": parts}


def latents(folder: Path) -> Settings:
    place = folder / "latents"  # the writer makes the folder itself
    draw = np.random.default_rng(0)
    card = latent_card(shape=(2, 4, 4), encoder="none", scale=1.0, flip=True)
    with DatasetWriter(place, dataset="latents", licence="none", sources={}, card=card) as writer:
        for shard, count in enumerate(SHARDS):
            rows = draw.standard_normal((count, 2, 2, 4, 4)).astype(np.float16)
            samples = [
                {"__key__": f"{shard}{row:04d}", "lat": plain.tobytes(), "lat.flip": mirrored.tobytes()}
                for row, (plain, mirrored) in enumerate(rows)
            ]
            writer.write(f"train{shard}", samples, count)
    return {"_target_": "datamodules.latents.Latents", "train": "latents/train*.tar", "flip": True}


def mixed_buckets(folder: Path) -> Settings:
    parts = {"a": {"path": "train-00000[0-2].tar", "weight": 0.6}, "b": {"path": "train-00000[34].tar", "weight": 0.4}}
    return {**buckets(folder), "train": parts}


MODES: list[Callable[[Path], Settings]] = [
    *(images, mixture, buckets, captions),
    *(concat, pack, padded, mixed_rows, latents, mixed_buckets),
]
WRITTEN = [pack, padded]


def made(mode: Callable[[Path], Settings], folder: Path) -> Settings:
    """Shards of a mode, and the settings of its data."""
    place = folder / "shards"
    place.mkdir()
    return {**mode(place), "root": str(place), "batch_size": GLOBAL, "window": 2, "seed": 3}


def module(settings: Settings, *, rank: int = 0, ranks: int = 1, seen: int | None = None, **changes: Any) -> Any:
    """A data module as one rank of so many has it."""
    data = hydra.utils.instantiate({**settings, **changes}, _convert_="all")
    module = SimpleNamespace() if seen is None else SimpleNamespace(samples_seen=seen)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, lightning_module=module)
    data.setup("fit")
    return data


def arrived(data: Any, batch: Batch) -> Batch:
    """A batch as the training step gets it."""
    done: Batch = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    return done


def ideal(settings: Settings, updates: int) -> list[Batch]:
    """What one process without threads and interruptions reads, an update at a time."""
    data = module(settings, workers=0)
    try:
        batches = (arrived(data, batch) for batch in islice(data.train_dataloader(), updates))
        return [{name: kept(value) for name, value in batch.items()} for batch in batches]
    finally:
        data.teardown("fit")


def kept(value: Any) -> Any:
    return value.clone() if hasattr(value, "clone") else value  # buffers come back when the loader goes on


def once_per_epoch(keys: list[str], expected: list[str]) -> None:
    """Epochs follow one another, each with every key once, whatever their order; the last may be partial."""
    assert len(keys) > 2 * len(expected)
    for begin in range(0, len(keys), len(expected)):
        part = keys[begin : begin + len(expected)]
        assert len(part) < len(expected) or sorted(part) == sorted(expected), f"epoch {begin // len(expected)}"
        assert max(Counter(part).values()) == 1, f"repeated within epoch {begin // len(expected)}"


@pytest.mark.parametrize("mode", [images, captions, latents])
def test_ideal_has_each_sample_once_per_epoch(mode: Callable[[Path], Settings], tmp_path: Path) -> None:
    settings = made(mode, tmp_path)
    keys = [key for batch in ideal(settings, 10) for key in batch["key"]]
    once_per_epoch(keys, sorted(set(keys)))
    assert len(set(keys)) == sum(SHARDS)
    first, second = keys[: sum(SHARDS)], keys[sum(SHARDS) : 2 * sum(SHARDS)]
    assert first != second


def test_ideal_mixture_has_each_sample_once_per_epoch_of_its_source(tmp_path: Path) -> None:
    keys = [key for batch in ideal(made(mixture, tmp_path), 10) for key in batch["key"]]
    sources = {name: [key for key in keys if key.startswith(name)] for name in "ab"}
    for own, size in zip(sources.values(), (11, 5), strict=True):
        assert len(set(own)) == size
        once_per_epoch(own, sorted(set(own)))
    assert abs(len(sources["a"]) - 0.7 * len(keys)) <= 1


def test_ideal_buckets_have_one_shape_per_update_and_each_sample_once(tmp_path: Path) -> None:
    batches = ideal(made(buckets, tmp_path), 18)
    shapes = {key[0]: tuple(batch["image"].shape[2:]) for batch in batches for key in batch["key"]}
    assert len(set(shapes.values())) == len(shapes) == 2  # squares modulo 3 are 0 or 1
    for batch in batches:
        assert len({key[0] for key in batch["key"]}) == 1
    for bucket in shapes:
        own = [key for batch in batches for key in batch["key"] if key[0] == bucket]
        once_per_epoch(own, sorted(set(own)))


@pytest.mark.parametrize("mode", WRITTEN)
def test_ideal_rows_hold_each_document_once_per_epoch(mode: Callable[[Path], Settings], tmp_path: Path) -> None:
    settings = made(mode, tmp_path)
    tokens: list[int] = []
    for batch in ideal(settings, 8):
        valid = batch.get("valid", np.ones_like(batch["tokens"], dtype=bool))
        tokens += [int(token) for row, real in zip(batch["tokens"], valid, strict=True) for token in row[real]]
    ends = [at for at, token in enumerate(tokens) if token == EOS]
    begins = [0, *(end + 1 for end in ends)]
    found = [bytes(tokens[begin:end]) for begin, end in zip(begins, ends, strict=False)]
    expected = [document(number) for number in range(sum(SHARDS))]
    once_per_epoch([text.decode() for text in found], [text.decode() for text in expected])


def test_ideal_shuffled_rows_hold_each_token_once_per_epoch(tmp_path: Path) -> None:
    """Rows are shuffled in blocks: after every block the stream is read up to some place, with nothing left out."""
    settings = made(lambda folder: documents(folder, "concat", long_document), tmp_path)
    block = module(settings).training_sequence()._rows.block
    texts = {number: [*long_document(number), EOS] for number in range(sum(SHARDS))}
    places = [(number, place) for number, text in texts.items() for place in range(len(text))]
    batches = ideal(settings, 16)
    rows = [row for batch in batches for row in zip(batch["key"], batch["tokens"].tolist(), strict=True)]
    assert block > 3
    assert len(rows) * LENGTH > 3 * len(places)
    met: Counter[tuple[int, int]] = Counter()
    for read, (key, tokens) in enumerate(rows, 1):
        number, begin = map(int, key.split("+"))
        at = 0
        while at < LENGTH:
            part = texts[number][begin : begin + LENGTH - at]
            assert tokens[at : at + len(part)] == part
            met.update((number, begin + place) for place in range(len(part)))
            at += len(part)
            number, begin = (tokens[at] - 65 if at < LENGTH else 0), 0
        if read % block == 0:
            epochs, more = divmod(read * LENGTH, len(places))
            assert Counter(met[place] for place in places) == +Counter({epochs: len(places) - more, epochs + 1: more})


def opened() -> tuple[set[str], set[str]]:
    """Files that this process holds open, and its threads."""
    files = set()
    for handle in Path("/proc/self/fd").iterdir():
        try:
            files.add(os.readlink(handle))
        except OSError:
            continue
    return {file for file in files if file.endswith(".tar")}, {thread.name for thread in threading.enumerate()}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_any_split_continues_exactly(mode: Callable[[Path], Settings], workers: int, tmp_path: Path) -> None:
    """One trajectory through all numbers of ranks and micro-batches, begun anew after each; nothing is left open."""
    settings = made(mode, tmp_path)
    files, threads = opened()
    combinations = [(ranks, micro) for ranks in (1, 2, 3, 4) for micro in (None, 1)]
    random.Random(workers).shuffle(combinations)
    wanted = [items_of(batch) for batch in ideal(settings, UPDATES * len(combinations))]
    state: Settings | None = None
    for number, (ranks, micro) in enumerate(combinations):
        position = number * UPDATES * GLOBAL
        modules = [
            module(settings, rank=rank, ranks=ranks, seen=position, workers=workers, micro_batch=micro)
            for rank in range(ranks)
        ]
        for data in modules:
            if state is not None:
                data.load_state_dict(state)
        streams = [iter(data.train_dataloader()) for data in modules]
        for update in range(UPDATES):
            found: Items = []
            for _ in range(modules[0].accumulation):
                for data, stream in zip(modules, streams, strict=True):
                    found += items_of(arrived(data, next(stream)))
            assert found == wanted[number * UPDATES + update], f"{ranks} ranks, micro-batch {micro}, update {update}"
        for data in modules:
            data.trainer.lightning_module.samples_seen = position + UPDATES * GLOBAL
        states = [data.state_dict() for data in modules]
        assert all(other == states[0] for other in states)
        state = states[0]
        assert state["next_key"]
        with ThreadPoolExecutor() as closing:  # each waits for its threads
            list(closing.map(lambda data: data.teardown("fit"), modules))
    left = opened()  # less than before is fine: what other tests left behind may go meanwhile
    assert not left[0] - files
    assert not left[1] - threads


def test_ledger_finds_what_is_lost_or_read_differently_again(tmp_path: Path) -> None:
    """Of an update made twice the last attempt counts; the ledger itself notices holes and contradictions."""
    runs = Runs(tmp_path, {}, steps=2)
    file = tmp_path / "lines" / "rank0.jsonl"

    def write(*made: tuple[int, int, str]) -> None:
        lines = [{"attempt": a, "update": u, "rank": 0, "micro": 0, "items": [item]} for a, u, item in made]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"attempt": 3, "upd')

    write((1, 0, "a"), (1, 1, "b"), (2, 1, "b"))
    assert runs.trained() == [["a"], ["b"]]
    write((1, 0, "a"), (1, 1, "b"), (2, 1, "c"))
    with pytest.raises(AssertionError, match="saw other samples"):
        runs.trained()
    write((1, 0, "a"))
    with pytest.raises(AssertionError, match="update 1 was not made"):
        runs.trained()
    write((1, 0, "a"), (1, 0, "a"), (1, 1, "b"))
    with pytest.raises(AssertionError, match="twice in one attempt"):
        runs.trained()


Attempts = list[tuple[int, int, int]]  # ranks, workers and micro-batch of each; all but the last are killed
QUICK: list[tuple[Callable[[Path], Settings], Attempts]] = [
    (images, [(2, 4, 6), (3, 0, 2)]),
    (pack, [(1, 1, 3), (2, 4, 6)]),
]
LONG: list[tuple[Callable[[Path], Settings], Attempts]] = [
    (images, [(1, 4, 12), (4, 1, 1), (2, 0, 3), (3, 4, 4)]),
    (images, [(3, 0, 2), (3, 1, 2), (3, 4, 4), (1, 0, 4)]),
    (mixture, [(2, 1, 3), (4, 0, 3), (1, 4, 6)]),
    (buckets, [(3, 1, 2), (1, 0, 12), (4, 4, 1)]),
    (captions, [(1, 0, 3), (2, 4, 6)]),
    (concat, [(4, 1, 3), (1, 4, 4), (3, 0, 1)]),
    (pack, [(2, 0, 1), (3, 1, 4), (4, 4, 3)]),
    (padded, [(1, 1, 2), (4, 1, 1)]),
    (mixed_rows, [(2, 4, 2), (1, 1, 6), (3, 0, 4)]),
    (latents, [(4, 0, 3), (2, 1, 6), (3, 4, 1)]),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mode", "attempts"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)],
    ids=lambda value: value.__name__ if callable(value) else "-".join(str(ranks) for ranks, _, _ in value),
)
def test_killed_runs_train_on_every_sample_once(
    mode: Callable[[Path], Settings], attempts: Any, tmp_path: Path
) -> None:
    """Real processes, killed at random moments, continued on other numbers of ranks and workers."""
    settings = made(mode, tmp_path)
    steps = 8 * len(attempts)
    (tmp_path / "copy").mkdir()
    runs = Runs(tmp_path / "copy", settings, steps=steps)
    for ranks, workers, micro in attempts:
        changes = [f"data.workers={workers}", f"data.micro_batch={micro}"]
        if runs.attempts < len(attempts) - 1:
            runs.kill(ranks=ranks, after=random.randint(1, 7), settings=changes)
        else:
            runs.finish(ranks=ranks, settings=changes)
    assert runs.trained() == [items_of(batch) for batch in ideal(settings, steps)]
