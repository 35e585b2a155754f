"""The words that ``prepare`` accepts: an experiment, or one of two encodings of shards. Standard library only."""

import argparse
import os
import re

from platform.suggest import closest
from platform.verbs import PROGRAM, Parser, at_least, weights_kind

ACTIONS = {"latents": "images", "text-features": "captions"}
_SHARED = ("encoder", "dtype", "batch", "workers", "device", "skip_bad")
_OWN = {
    "latents": ("size", "white", "flip", "scale", "shift", "weights"),
    "text-features": ("length", "member", "name"),
}
_EXPERIMENTS = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "experiments")


def scale(text: str) -> float | str:
    """A number above 0, or ``measure``."""
    if text == "measure":
        return text
    number = _number(text)
    if number is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0. Type for example 0.18215, or measure.")
    return number


def shift(text: str) -> float:
    """A number."""
    number = _number(text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number.")
    return number


def member_name(text: str) -> str:
    """The last part of a member's name."""
    if not re.fullmatch(r"[a-z0-9_-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of a-z, 0-9, - and _. Type for example t5.")
    return text


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def arguments(parser: Parser) -> None:
    """Add the options of the two encodings."""
    parser.usage = f"{parser.prog} EXPERIMENT [KEY=VALUE ...] [--tiny]\n"
    parser.usage += "".join(
        f"       {parser.prog} {action} SOURCE OUT --encoder PATH [options]\n" for action in ACTIONS
    )
    both = parser.add_argument_group("latents and text-features")
    both.add_argument(
        "--encoder",
        metavar="PATH",
        help="folder of the encoder. latents: in diffusers' format, or a run of an autoencoder; text-features: as"
        " transformers saves it, embeddings:PATH for a Gemma's embeddings, or random:WIDTHxLENGTH (default: none, it"
        " must be given)",
    )
    both.add_argument(
        "--dtype",
        choices=["float16", "bfloat16"],
        default="float16",
        help="number format in the shards; latents take float16 only (default: float16)",
    )
    both.add_argument("--batch", type=at_least(1), default=32, metavar="N", help="samples at a time (default: 32)")
    both.add_argument(
        "--workers", type=at_least(1, 1024), metavar="N", help="threads that decode (default: cores, at most 8)"
    )
    both.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:N or mps (default: auto, a GPU if there is)",
    )
    both.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out samples that cannot be used; the keys then differ from those of the source, so that the"
        " shards cannot be joined to it with data.columns (default: end with a message)",
    )
    latents = parser.add_argument_group("latents")
    latents.add_argument(
        "--size",
        type=at_least(1, 16384),
        metavar="PIXELS",
        help="resize the shorter side and crop the centre (default: images must all have the size of the first)",
    )
    latents.add_argument(
        "--white",
        type=at_least(1, 255),
        metavar="VALUE",
        help="stored value of white, which the encoder sees as 1 (default: as the run was trained, else 255)",
    )
    latents.add_argument("--flip", action="store_true", help="also encode the mirrored images (default: off)")
    latents.add_argument(
        "--scale",
        type=scale,
        metavar="S",
        help="factor noted for the model: (latent - shift) x scale has about unit variance; measure takes 1 / standard"
        " deviation of these latents; what is stored is not scaled (default: the encoder's own; measure for a run)",
    )
    latents.add_argument(
        "--shift", type=shift, metavar="T", help="what is subtracted before it (default: the encoder's)"
    )
    latents.add_argument(
        "--weights",
        type=weights_kind,
        metavar="KIND",
        help="of a run: raw, ema, or ema with its decay, e.g. ema0.999 (default: ema where it has averages)",
    )
    texts = parser.add_argument_group("text-features")
    texts.add_argument(
        "--length",
        type=at_least(1, 65536),
        metavar="N",
        help="tokens per caption; longer ones are cut (default: 128, or as many as the encoder reads)",
    )
    texts.add_argument(
        "--member", default="txt", metavar="NAME", help="member with the caption, or json:ENTRY (default: txt)"
    )
    texts.add_argument("--name", type=member_name, metavar="NAME", help="store as emb.NAME, e.g. t5 (default: as emb)")


def finish(parser: Parser, args: argparse.Namespace) -> bool:
    """Take the action and its two paths off the words, and check that the options belong to it.

    Returns:
        Whether there is an action; otherwise the words are an experiment and its settings.
    """
    words: list[str] = args.overrides
    first = words[0] if words else ""
    args.action = first if first in ACTIONS else None
    _check_options(parser, args)
    if args.action is None:
        _check_spelling(parser, first)
        return False
    paths = words[1:]
    if args.tiny:
        parser.error(f"--tiny belongs to prepare EXPERIMENT, not to prepare {args.action}.")
    if len(paths) != 2:
        parser.error(
            f"prepare {args.action} takes a source (shards of {ACTIONS[args.action]}) and a folder to write, but"
            f" {len(paths)} came{': ' if paths else ''}{' '.join(paths)}."
        )
    args.source, args.out = paths
    if args.encoder is None:
        parser.error(f"prepare {args.action} needs an encoder. Add --encoder PATH.")
    if args.action == "latents" and args.dtype != "float16":
        parser.error(f"--dtype {args.dtype}: latents are stored as float16, which data of latents reads. Leave it out.")
    return True


def _check_options(parser: Parser, args: argparse.Namespace) -> None:
    allowed = (*_SHARED, *_OWN[args.action]) if args.action else ()
    foreign = {name for names in (_SHARED, *_OWN.values()) for name in names}.difference(allowed)
    for option in parser._actions:
        if option.dest in foreign and getattr(args, option.dest) != option.default:
            owner = next((action for action, names in _OWN.items() if option.dest in names), " and ".join(ACTIONS))
            other = args.action or "EXPERIMENT"
            parser.error(f"{option.option_strings[0]} belongs to prepare {owner}, not to prepare {other}.")


def _check_spelling(parser: Parser, word: str) -> None:
    """A misspelt action is not taken for an experiment."""
    experiments = {name.removesuffix(".yaml") for name in os.listdir(_EXPERIMENTS) if name.endswith(".yaml")}
    meant = closest(word, [*ACTIONS, *experiments]) if word and "=" not in word and word not in experiments else None
    if meant in ACTIONS:
        parser.error(
            f"{word!r} is neither an experiment nor something else to prepare. Did you mean {meant}? Experiments:"
            f" {PROGRAM} show"
        )
