"""Parts of the measurement beside images: reading alone, latents, text, start, memory, continuation, shuffling."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import shards
from datamodules.bench import rivals, sets
from datamodules.bench.race import Batches, Contender, Report
from datamodules.bench.rivals import BATCH
from datamodules.catalogue import FILE_NAME
from datamodules.images import Images
from datamodules.latents import Latents
from datamodules.order import InOrder, Ints, Lookup, Order
from datamodules.quality import measure
from datamodules.source import Source
from datamodules.text import Text
from datamodules.tokenizers import Bytes

ROOT = Path(__file__).resolve().parents[2]
START_SHARDS, START_SAMPLES = 1000, 64
START_GOAL = 0.5  # seconds to the first batch
RESUME_GOAL = 0.02  # share of a step
MEMORY_GOAL = 100  # bytes per sample of the open window
LATENT = (8, 32, 32)  # mean and log-variance of 4 channels: 16 KiB
LATENTS = 8192
LATENT_BATCH = 256
LENGTH = 1024  # tokens per row
DOCUMENTS = 8192
MILLION = 1e6


def index(report: Report, args: argparse.Namespace) -> None:
    """Bytes of samples without decoding, in order and in random order."""
    folder, _ = sets.images(args.images, args.size)
    paths = sets.files(folder)
    many = sets.small_shards(START_SHARDS, START_SAMPLES)
    source, wide = _open(folder, len(paths)), _open(many, START_SHARDS)
    order = np.arange(args.images)
    draw = np.random.default_rng(0)
    shuffled, scattered = draw.permutation(order), draw.permutation(int(wide.counts.sum()))[: args.images]
    windowed = Order(wide.counts, 0, 16)(np.arange(args.images))[1]
    report.title("samples as bytes, without decoding", "samples")
    report.race(
        [
            Contender("raw read of the shards", lambda: len(order) * bool(rivals.read_files(paths))),
            Contender("webdataset", lambda: rivals.members(rivals.webdataset_raw(paths))),
            Contender("ours, in order", _reading(source, order), {"webdataset": 1.0}, floor=25_000),
            Contender("ours, fully random", _reading(source, shuffled), floor=5_000),
            Contender(f"ours, {START_SHARDS} shards, windows of 16", _reading(wide, windowed), floor=5_000),
            Contender(f"ours, {START_SHARDS} shards, fully random", _reading(wide, scattered), floor=5_000),
        ],
        args.repeats,
    )
    source.close()
    wide.close()


def latents(report: Report, args: argparse.Namespace) -> None:
    """Latents beside a copy of the same rows from memory to memory."""
    folder = sets.latents(LATENTS, LATENT)
    data = Latents(root=folder, train="train-*.tar", batch_size=LATENT_BATCH, workers=0)
    ours = Batches(data, LATENTS // LATENT_BATCH)
    rows = np.stack([np.frombuffer(blob, np.float16) for blob in rivals.blobs(sets.files(folder), "lat")])
    chosen: Ints = data.training_sequence()(np.arange(LATENTS))[1]
    report.title(f"latents of {'x'.join(map(str, LATENT))} float16, batches of {LATENT_BATCH}", "samples")
    report.race(
        [
            Contender("memory copy, in file order", _copying(rows, np.arange(LATENTS), LATENT_BATCH)),
            Contender("memory copy of the same rows", _copying(rows, chosen, LATENT_BATCH)),
            Contender("webdataset, bytes alone", lambda: rivals.members(rivals.webdataset_raw(sets.files(folder)))),
            Contender(
                "ours, no thread",
                ours,
                {"memory copy of the same rows": 0.8, "webdataset, bytes alone": 10.0},
                floor=200_000,
            ),
        ],
        args.repeats,
    )


def text(report: Report, args: argparse.Namespace) -> None:
    """Rows of tokens from tokenised documents beside a widening copy of the same tokens."""
    folder = sets.tokens(DOCUMENTS)
    tokens = np.concatenate([np.frombuffer(blob, np.uint16) for blob in rivals.blobs(sets.files(folder), "tok")])
    updates = len(tokens) // (LENGTH * BATCH)

    def ours(mode: str) -> Callable[[], int]:
        data = Text(
            root=folder, train="train-*.tar", batch_size=BATCH, workers=0, length=LENGTH, mode=mode,
            tokenizer=Bytes(), member="tok", add_eos=False,
        )  # fmt: skip
        rows = Batches(data, updates)
        return lambda: rows() * LENGTH

    copy = "copy of the tokens to int64"
    report.title(f"tokenised documents as rows of {LENGTH}, batches of {BATCH}", "M tokens")
    report.race(
        [
            Contender(copy, _widening(tokens, updates)),
            Contender("ours, concat", ours("concat"), {copy: 0.8}, floor=50 * MILLION),
            Contender("ours, pack", ours("pack"), floor=50 * MILLION),
        ],
        args.repeats,
        scale=MILLION,
    )


def start(report: Report, args: argparse.Namespace) -> None:
    """Seconds from the data module's constructor to the first batch over 1,000 shards, in fresh processes."""
    listed = sets.small_shards(START_SHARDS, START_SAMPLES)
    written = sets.small_documents(START_SHARDS, START_SAMPLES)
    print(f"\nfirst batch of {BATCH} over {START_SHARDS} shards, fresh process, imports done, page cache dropped")
    with tempfile.TemporaryDirectory(dir=listed.parent) as folder:
        bare = Path(folder) / "bare"
        shutil.copytree(listed, bare, copy_function=os.link)
        for path in [bare / FILE_NAME, *bare.glob("*.npz")]:
            path.unlink()
        pictures = {"size": 32, "num_classes": sets.CLASSES}
        rows = {"length": LENGTH, "member": "tok", "add_eos": False}
        cases: dict[str, tuple[Path, dict[str, Any], str, float | None]] = {
            "written by data pack, index cache empty": (listed, pictures, "first", START_GOAL),
            "foreign shards, index cache empty": (bare, pictures, "second", None),
            "foreign shards, index cache present": (bare, pictures, "second", START_GOAL),
            "tokens written by data pack, concat": (written, {**rows, "mode": "concat"}, "third", START_GOAL),
            "tokens written by data pack, pack": (written, {**rows, "mode": "pack"}, "third", START_GOAL),
        }
        for name, (root, settings, cache, goal) in cases.items():
            found = []
            for repeat in range(min(args.repeats, 3)):
                _drop_cached(root)
                # an empty cache is a new folder each time, and the last case finds what the one before it left
                place = Path(folder) / f"{cache}-{repeat}"
                settings = {"root": str(root), "train": "train-*.tar", "batch_size": BATCH, "workers": 1, **settings}
                found.append(_probe("first", settings, PLATFORM_CACHE=str(place)))
            seconds = statistics.median(each["seconds"] for each in found)
            setup = statistics.median(each["setup"] for each in found)
            text = f"{seconds:.3f} s ({setup:.3f} s until opened)"
            report.value(name, text, f"{goal} s" if goal else "", goal is None or seconds <= goal)


def memory(report: Report, args: argparse.Namespace) -> None:
    """Growth of a fresh process that reads images, and what is kept per sample of the open window."""
    folder, _ = sets.images(args.images, args.size)
    settings = {"train": "train-*.tar", "num_classes": sets.CLASSES, "batches": 2 * sets.SHARDS, "workers": 2}
    print("\nmemory, fresh process, 2 threads")
    large = _probe("memory", {"root": str(folder), "size": args.size, "batch_size": BATCH, **settings})
    report.value(
        f"growth while reading {args.size}-pixel images",
        f"{large['growth'] / 2**20:.0f} MiB, buffers {large['buffers'] / 2**20:.0f}",
        "",
        True,
    )
    wide = sets.small_shards(16, 2048)
    small = _probe("memory", {"root": str(wide), "size": 32, "batch_size": BATCH, **settings})
    report.value(
        f"per sample, {small['window']:,.0f} of them in the window",
        f"{small['per_sample']:.0f} bytes",
        f"{MEMORY_GOAL}",
        small["per_sample"] <= MEMORY_GOAL,
    )


def bookkeeping(report: Report, args: argparse.Namespace) -> None:
    """What exact continuation costs per update beside decoding one batch: order, keys and state."""
    folder, _ = sets.images(args.images, args.size)
    data = Images(
        root=folder, train="train-*.tar", size=args.size, num_classes=sets.CLASSES, batch_size=BATCH, workers=0
    )
    data.setup("fit")
    lookup, source = data.training_sequence(), data.source_of("train")
    blobs = rivals.blobs(sets.files(folder)[:1], "jpg")
    updates = args.images // BATCH

    def book() -> None:
        for update in range(updates):
            _, samples = lookup(np.arange(update * BATCH, (update + 1) * BATCH, dtype=np.int64))
            for sample in samples.tolist():
                source.key(sample)
            data.state_dict()

    shares = []
    for _ in range(args.repeats + 1):
        spent = _seconds(book) / updates
        step = _seconds(lambda: rivals.decode(blobs, args.size, args.size)) / len(blobs) * BATCH
        shares.append(spent / step)
    share = statistics.median(shares[1:])
    print("\ncontinuation")
    name = f"order, keys and state_dict of every update of {BATCH}"
    report.value(name, f"{100 * share:.2f} % of decoding it", f"{100 * RESUME_GOAL:g} %", share <= RESUME_GOAL)
    data.teardown("fit")


def shuffle(report: Report, args: argparse.Namespace) -> None:
    """How well the order mixes a set that was written class by class, beside storage order and a full shuffle."""
    samples, classes, batch = 100_000, 100, 256
    labels = np.arange(samples, dtype=np.int64) * classes // samples
    orders: dict[str, Lookup] = {
        "storage order": InOrder(samples),
        **{f"window of {window} shards": Order([samples // 50] * 50, 0, window) for window in (1, 4, 16, 50)},
        "full shuffle": Order([samples], 0, 1),
    }
    print(
        f"\nshuffling of {samples:,} samples in 50 shards, sorted by {classes} classes, batches of {batch}: rank "
        "correlation of position and storage place, runs of one class per batch, distance from the set's class shares"
    )
    for name, lookup in orders.items():
        found = measure(name, lookup, labels, batch)
        text = f"{found.rank_correlation:.3f}, {found.runs:.0f} runs, distance {found.total_variation:.2f}"
        report.value(name, text, "", True)


def _open(folder: Path, window: int) -> Source:
    return shards.open_source("train-*.tar", folder, "data.train", window=window)


def _reading(source: Source, samples: Ints) -> Callable[[], int]:
    numbers = samples.tolist()

    def run() -> int:
        for number in numbers:
            source.read(number)
        return len(numbers)

    return run


def _copying(rows: np.ndarray, chosen: Ints, batch: int) -> Callable[[], int]:
    out = np.empty((batch, rows.shape[1]), rows.dtype)

    def run() -> int:
        for begin in range(0, len(chosen), batch):
            np.take(rows, chosen[begin : begin + batch], axis=0, out=out, mode="clip")
        return len(chosen)

    return run


def _widening(tokens: np.ndarray, updates: int) -> Callable[[], int]:
    out = np.empty(LENGTH * BATCH, np.int64)

    def run() -> int:
        for update in range(updates):
            np.copyto(out, tokens[update * len(out) : (update + 1) * len(out)])
        return updates * len(out)

    return run


def _seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _probe(name: str, settings: dict[str, Any], **environment: str) -> dict[str, float]:
    command = [sys.executable, "-m", "datamodules.bench.probes", name, json.dumps(settings)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _drop_cached(folder: Path) -> None:
    """Ask the system to forget the files' content, so that reading starts at the disk."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
