"""Speed of the data layer beside its limits and beside the usual loaders, on the same bytes in the same run."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

from datamodules.bench import parts, rivals, sets
from datamodules.bench.race import Contender, Report, batches_of
from datamodules.bench.rivals import BATCH
from datamodules.images import Images

SMALL = 64  # pixels to which the second image table shrinks


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
    paths = sets.files(folder)
    blobs = rivals.blobs(paths, "jpg")
    for size in dict.fromkeys((args.size, min(SMALL, args.size))):
        name = "decode" if size == args.size else f"decode and shrink to {size}"
        report.title(f"images, {name}", "images")
        report.race(_image_contenders(args, folder, classes, paths, blobs, size, name), args.repeats)


def _image_contenders(
    args: argparse.Namespace, folder: Path, classes: Path, paths: list[Path], blobs: list[bytes], size: int, name: str
) -> list[Contender]:
    few = paths[: max(1, len(paths) // 4)]  # the slow ones read a quarter
    limit = f"bare {name} loop"
    usual, same = "webdataset, PIL and transforms", "webdataset, same decoder"
    listed, fast = "ImageFolder, PIL and transforms", "ImageFolder, same decoder"
    usual_twice, fast_twice = f"{usual}, 2 processes", f"{fast}, 2 processes"
    whole = size == args.size  # what is wanted beside the usual way is wanted at 256 pixels

    def ours(workers: int, flip: bool = False) -> Callable[[], int]:
        data = Images(
            root=folder, train="train-*.tar", size=size, num_classes=sets.CLASSES, batch_size=BATCH,
            workers=workers, flip=flip,
        )  # fmt: skip
        return batches_of(data, args.images // BATCH)

    def read() -> int:
        rivals.read_files(paths)
        return len(blobs)

    return [
        Contender("raw read of the shards", read),
        Contender(limit, lambda: rivals.decode(blobs, args.size, size), {usual: 0.0}),
        Contender(usual, lambda: rivals.samples(rivals.webdataset_usual(few, size))),
        Contender(usual_twice, lambda: rivals.samples(rivals.in_processes(rivals.webdataset_usual(paths, size), 2))),
        Contender(same, lambda: rivals.samples(rivals.webdataset_fast(paths, size))),
        Contender(listed, lambda: rivals.samples(rivals.folder_usual(classes, size, len(blobs) // 4))),
        Contender(fast, lambda: rivals.samples(rivals.folder_fast(classes, size, 0))),
        Contender(fast_twice, lambda: rivals.samples(rivals.folder_fast(classes, size, 2))),
        Contender("ours, no thread", ours(0), {limit: 0.9}),
        Contender("ours, 1 thread", ours(1), {limit: 0.9, usual: 0.0, same: 1.0, listed: 1.0, fast: 1.0}),
        Contender(
            "ours, 2 threads",
            ours(2),
            {
                limit: 0.9,
                "wall:ours, 1 thread": 1.85,
                f"wall:{usual_twice}": 10.0 if whole else 1.0,
                f"wall:{fast_twice}": 1.0,
            },
        ),
        Contender("ours, 1 thread, mirrored at random", ours(1, flip=True)),
    ]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m platform bench data", description=__doc__)
    parser.add_argument("--images", type=int, default=2048, help="JPEG images, made once (default: 2048)")
    parser.add_argument("--size", type=int, default=256, help="their height and width, up to 427 (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each, the median counts (default: 5)")
    parser.add_argument("--quick", action="store_true", help="512 images and 2 repeats")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
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
