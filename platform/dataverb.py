"""The words that ``data`` accepts: five actions on shards, and the options of each. Standard library only."""

import argparse

from platform.verbs import Parser, at_least

# The kinds of datamodules/inputs/detect.py; this file imports nothing that is not in the standard library.
KINDS = ("folder", "captions", "cifar", "mnist", "edm-zip", "huggingface", "text", "jsonl", "code")
_OWN = {"check": ("sample", "classes"), "show": ("n", "out"), "index": ("name", "licence"), "stats": ()}
_SHARED = ("help", "workers", "trace")
ACTIONS = ("pack", *_OWN)


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1. Type for example 0.05.")
    return number


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0.")
    return number


def endings(text: str) -> tuple[str, ...]:
    """Read ``.py,.pyi`` or ``py,pyi`` as file endings with their dots."""
    return tuple(f".{part.strip().lstrip('.').lower()}" for part in text.split(",") if part.strip(" ."))


def arguments(parser: Parser) -> None:
    """Add the arguments of all actions."""
    parser.usage = f"{parser.prog} pack SOURCE OUT [options]\n"
    parser.usage += "".join(f"       {parser.prog} {action} PATH [options]\n" for action in _OWN)
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="pack: files into shards; check: name every bad sample; show: a summary and a contact sheet; "
        "stats: counts, sizes, classes; index: index files for shards that others wrote",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="pack: the source and the folder to write; else a folder of shards, one shard, or a quoted pattern",
    )
    parser.add_argument(
        "--workers", type=at_least(1, 1024), metavar="N", help="threads, >= 1 (default: number of cores, at most 32)"
    )
    _source(parser)
    _shards(parser)
    check = parser.add_argument_group("check")
    check.add_argument(
        "--sample",
        type=fraction,
        default=1.0,
        metavar="SHARE",
        help="share of the samples to decode, 0 to 1; all else is checked in full (default: 1)",
    )
    check.add_argument(
        "--classes",
        type=at_least(1),
        metavar="N",
        help="classes must lie in 0..N-1 (default: as many as index.json names, if it does)",
    )
    show = parser.add_argument_group("show")
    show.add_argument("--n", type=at_least(1, 400), default=24, metavar="N", help="samples, 1 to 400 (default: 24)")
    show.add_argument("--out", metavar="FILE", help="contact sheet to write (default: NAME.png in this folder)")


def _source(parser: Parser) -> None:
    source = parser.add_argument_group("pack: what is read")
    source.add_argument("--kind", choices=KINDS, help="kind of the source (default: found out)")
    source.add_argument(
        "--extensions",
        type=endings,
        default=(),
        metavar="LIST",
        help="endings of documents, e.g. .py,.pyi (default: .txt for text, .py for code)",
    )
    source.add_argument(
        "--split-lines", action="store_true", help="each line of a text file is a document (default: each file)"
    )
    source.add_argument(
        "--text-field", default="text", metavar="NAME", help="field or column of the document (default: text)"
    )
    source.add_argument(
        "--max-pixels",
        type=at_least(1, 178_956_970),
        default=178_956_970,
        metavar="N",
        help="largest height x width of an image (default: 178956970, which is also the most)",
    )
    source.add_argument(
        "--max-bytes",
        type=at_least(1, 2**31 - 1),
        default=64 * 2**20,
        metavar="N",
        help="largest file or document in bytes (default: 67108864)",
    )
    source.add_argument(
        "--duplicates",
        choices=["auto", "refuse", "keep"],
        default="auto",
        help="inputs of the same content; auto keeps them in published archives only (default: auto)",
    )
    source.add_argument(
        "--strict", action="store_true", help="publish nothing if any input is refused, exit code 2 (default: off)"
    )


def _shards(parser: Parser) -> None:
    shards = parser.add_argument_group("pack: what is written")
    shards.add_argument(
        "--val",
        type=fraction,
        default=0.0,
        metavar="SHARE",
        help="share that goes into val shards, by a hash of the names, 0 to 1 (default: 0)",
    )
    shards.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of the shuffle (default: 0)")
    shards.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mix all inputs once, so that no shard is sorted by class (default: --shuffle)",
    )
    shards.add_argument(
        "--size",
        type=at_least(1, 16384),
        metavar="PIXELS",
        help="resize the shorter side and crop the centre, as training would (default: images stay as they are)",
    )
    shards.add_argument(
        "--per-shard", type=at_least(1), metavar="N", help="samples per shard at most, >= 1 (default: no limit)"
    )
    shards.add_argument(
        "--shard-mib", type=positive, default=128.0, metavar="MIB", help="close a shard at this size (default: 128)"
    )
    shards.add_argument("--name", metavar="TEXT", help="name of the data set (default: name of the output folder)")
    shards.add_argument("--licence", default="unknown", metavar="TEXT", help="its licence (default: unknown)")
    shards.add_argument(
        "--fresh", action="store_true", help="begin again, and replace a set that pack made before (default: off)"
    )


def finish(parser: Parser, args: argparse.Namespace) -> None:
    """Check that the paths and the options belong to the action."""
    wanted = 2 if args.action == "pack" else 1
    if len(args.paths) != wanted:
        needs = "a source and a folder to write" if wanted == 2 else "one path"
        parser.error(f"data {args.action} takes {needs}, but {len(args.paths)} came: {' '.join(args.paths)}.")
    for option in parser._actions:
        name = option.dest
        if not option.option_strings or name in _SHARED or getattr(args, name) == option.default:
            continue
        if name not in _OWN.get(args.action, ("name", "licence")) and (args.action != "pack" or _owner(name) != "pack"):
            parser.error(f"{option.option_strings[0]} belongs to data {_owner(name)}, not to data {args.action}.")


def _owner(name: str) -> str:
    """Action that an option belongs to; what no other claims is for packing."""
    return next((action for action, names in _OWN.items() if action != "index" and name in names), "pack")
