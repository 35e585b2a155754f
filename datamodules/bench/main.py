"""Speed of the data layer beside its limits and beside the usual loaders, on the same bytes in the same run."""

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from datamodules.bench import packages, parts, rivals, sets
from datamodules.bench.race import Batches, Contender, Report
from datamodules.bench.rivals import BATCH
from datamodules.images import Images

SMALL = 64  # pixels to which the second image table shrinks

_BARE, _BARE_TWICE = "bare loop", "bare loop, 2 processes at once"
_WEBDATASET = "webdataset, PIL and transforms"
_PROCESSES = {0: "no process", 1: "1 process", 2: "2 processes"}


def main(argv: list[str]) -> int:
    """Measure and print one table.

    Args:
        argv: words after ``python -m platform bench data``.

    Returns:
        0, also when a goal is missed: the table says so; with ``--strict`` 1.
    """
    args = _parse(argv)
    torch.set_num_threads(1)
    report = Report()
    vision = rivals.torchvision()
    print(
        f"{args.images} JPEG of {args.size}x{args.size} pixels, quality {sets.QUALITY}, batches of {BATCH}, "
        f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, "
        f"{'torchvision ' + vision.__version__ if vision else 'no torchvision: its transforms with Pillow and torch'}\n"
        f"median of {args.repeats} rounds in which everything is measured in turn; page cache warm; /core: per second "
        "of CPU time of all threads and processes"
    )
    measures: dict[str, Callable[[], None]] = {
        "images": lambda: images(report, args),
        "index": lambda: parts.index(report, args),
        "latents": lambda: parts.latents(report, args),
        "text": lambda: parts.text(report, args),
        "start": lambda: parts.start(report, args),
        "memory": lambda: parts.memory(report, args),
        "resume": lambda: parts.bookkeeping(report, args),
        "shuffle": lambda: parts.shuffle(report, args),
    }
    for name in args.only or measures:
        measures[name]()
    print(f"\n{'all goals met' if not report.missed else 'goals missed: ' + '; '.join(report.missed)}")
    return int(args.strict and bool(report.missed))


def images(report: Report, args: argparse.Namespace) -> None:
    """Decoded batches at full size and shrunk, ours beside the bare loop and beside other loaders."""
    folder, classes = sets.images(args.images, args.size)
    blobs = rivals.blobs(sets.files(folder), "jpg")
    others = packages.installed() if args.rivals == "all" else {}
    for size in dict.fromkeys((args.size, min(SMALL, args.size))):
        name = "decode" if size == args.size else f"decode and shrink to {size}"
        report.title(f"images, {name}", "images")
        loaders = {} if args.rivals == "none" else _usual_loaders(folder, classes, len(blobs), size)
        for other, loader in others.items():
            loaders |= {f"{other}, {words}": loader(folder, size, count) for count, words in _PROCESSES.items()}
        contenders = [
            *_limits(sets.files(folder), blobs, args.size, size),
            *(Contender(name, functools.partial(rivals.samples, loader)) for name, loader in loaders.items()),
            *_ours(folder, len(blobs), args.size, size, list(loaders)),
        ]
        report.race(contenders, args.repeats)


def _limits(paths: list[Path], blobs: list[bytes], source: int, size: int) -> list[Contender]:
    def bare() -> int:
        return rivals.decode(blobs, source, size)

    return [
        Contender("raw read of the shards", lambda: len(blobs) * bool(rivals.read_files(paths))),
        Contender(_BARE, bare),
        Contender(_BARE_TWICE, rivals.AtOnce(bare, 2), {_BARE: 0.0}),
    ]


def _usual_loaders(folder: Path, classes: Path, images: int, size: int) -> dict[str, Any]:
    paths = sets.files(folder)
    few = paths[: max(1, len(paths) // 4)]  # the slow ones read a quarter
    return {
        _WEBDATASET: rivals.webdataset_usual(few, size),
        f"{_WEBDATASET}, 2 processes": rivals.in_processes(rivals.webdataset_usual(paths, size), 2),
        "webdataset, same decoder": rivals.webdataset_fast(paths, size),
        "webdataset, same decoder, 2 processes": rivals.in_processes(rivals.webdataset_fast(paths, size), 2),
        "ImageFolder, PIL and transforms": rivals.folder_usual(classes, size, images // 4),
        "ImageFolder, same decoder": rivals.folder_fast(classes, size, 0),
        "ImageFolder, same decoder, 2 processes": rivals.folder_fast(classes, size, 2),
    }


def _ours(folder: Path, images: int, source: int, size: int, others: list[str]) -> list[Contender]:
    """Ours beside the limits, and mirrored at random beside the loaders, which do that too."""

    def ours(name: str, workers: int, goals: dict[str, float], flip: bool = False) -> Contender:
        data = Images(
            root=folder, train="train-*.tar", size=size, num_classes=sets.CLASSES, batch_size=BATCH,
            workers=workers, flip=flip,
        )  # fmt: skip
        batches = Batches(data, images // BATCH)
        return Contender(name, batches, goals, after=batches.close)

    alone = {other: 1.0 for other in others if not other.endswith((_PROCESSES[1], _PROCESSES[2]))}
    in_two = {f"wall:{other}": 1.0 for other in others if other.endswith(_PROCESSES[2])}
    if size == source and others:  # at the smaller size resizing, the same for all, takes a large share
        in_two[f"wall:{_WEBDATASET}, {_PROCESSES[2]}"] = 10.0
    return [
        ours("ours, no thread", 0, {_BARE: 0.9}),
        ours("ours, 1 thread", 1, {_BARE: 0.9}),
        ours("ours, 2 threads", 2, {_BARE: 0.9, _BARE_TWICE: 0.0, "wall:ours, 1 thread": 1.85}),
        ours("ours, 1 thread, mirrored at random", 1, alone, flip=True),
        ours("ours, 2 threads, mirrored at random", 2, in_two, flip=True),
    ]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m platform bench data", description=__doc__)
    parser.add_argument("--images", type=int, default=2048, help="JPEG images, made once (default: 2048)")
    parser.add_argument("--size", type=int, default=256, help="their height and width, up to 427 (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each, the median counts (default: 5)")
    parser.add_argument("--quick", action="store_true", help="512 images and 2 repeats")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    kinds = "others: webdataset and ImageFolder, also all installed ones of %s, or none (default: usual)"
    names = ", ".join(dict.fromkeys(package.install for package in packages.PACKAGES))
    parser.add_argument("--rivals", choices=("usual", "all", "none"), default="usual", help=kinds % names)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a goal is missed")
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.repeats = 512, 2
    for name, low, high in (("images", 4 * BATCH, 10**7), ("size", 32, 427), ("repeats", 1, 1000)):
        value = getattr(args, name)
        if not low <= value <= high:
            raise ValueError(
                f"--{name} {value}: expected {low} to {high}. Type e.g. --{name} {parser.get_default(name)}"
            )
    args.images -= args.images % BATCH
    return args


PARTS = ("images", "index", "latents", "text", "start", "memory", "resume", "shuffle")
