"""What each verb accepts: one line, its options with ranges and defaults, and one real example.

Only the standard library is imported here, so that help and mistakes on the command line answer at once.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from platform.suggest import hint

_STARTED = sys.argv[0].rstrip("/")
# As it was started: outside the checkout, and without installation, "python -m platform" is the standard library's.
PROGRAM = f"python {shlex.quote(_STARTED)}" if os.path.basename(_STARTED) == "platform" else "python -m platform"
DEFAULT_EXPERIMENT = "quickstart"
Run = Callable[[argparse.Namespace], int]  # the function behind a verb: `platform.<verb>.run`


class Parser(argparse.ArgumentParser):
    """Options and ``key=value`` words in any order; a mistake ends with code 2, a reason and a way on."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, with the nearest option where one was misspelt."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            message += f".{hint(unknown[1], self._option_string_actions)}"
        self.exit(2, f"{message}\nType {self.prog} --help.\n")


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        about: what it does, in one line.
        example: words after ``python -m platform`` that work as they stand (given such a run or file).
        arguments: adds the verb's arguments to its parser.
        finish: checks and rearranges what was parsed.
    """

    about: str
    example: str
    arguments: Callable[[Parser], None]
    finish: Callable[[Parser, argparse.Namespace], None] = lambda parser, args: None


def parse(name: str, words: Sequence[str]) -> argparse.Namespace:
    """Read the words after a verb.

    Args:
        name: a key of :data:`VERBS`.
        words: the rest of the command line, without ``--trace``.

    Raises:
        SystemExit: 0 after ``--help``, 2 after a mistake.
    """
    parser = parser_of(name)
    if name == "bench" and words and not words[0].startswith("-"):  # the words after the room belong to the room
        return argparse.Namespace(room=words[0], args=list(words[1:]))
    args = parser.parse_intermixed_args(words)
    VERBS[name].finish(parser, args)
    return args


def parser_of(name: str) -> Parser:
    """The parser of one verb."""
    verb = VERBS[name]
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=verb.about,
        epilog=f"example: {PROGRAM} {verb.example}",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        allow_abbrev=False,
    )
    verb.arguments(parser)
    parser.add_argument("--trace", action="store_true", help="show the traceback of a mistake too (default: off)")
    return parser


def overview() -> str:
    """The help of the program as a whole."""
    rows = [f"  {name:<9} {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB ...",
            "",
            "Trains generative models, draws samples from them and measures them.",
            "",
            *rows,
            "",
            f"options of a verb: {PROGRAM} VERB --help",
            "exit codes: 0 done, 1 bug, 2 mistake on the command line or in the configuration,",
            "            75 interrupted (the same command continues)",
            f"example: {PROGRAM} fit {DEFAULT_EXPERIMENT}",
            "",
        ]
    )


def seeds(text: str) -> list[int]:
    """Read ``0-63,70`` as a list of integers, each once, in the order given."""
    found: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds. Type for example 0-63 or 0-7,20,30-31.")
        found.update(dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1)))
    return list(found)


def weights_kind(text: str) -> str:
    """Accept ``raw``, ``ema`` and ``ema<decay>``."""
    if text in ("raw", "ema"):
        return text
    if re.fullmatch(r"ema0\.\d+", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} names no weights. Type raw, ema, or ema with a decay: ema0.999.")
    return text


def at_least(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """An integer type for argparse with a range."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < smallest or (largest is not None and number > largest):
            span = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest}"
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer {span}.")
        return number

    return read


def _words(parser: Parser, text: str = "settings of the configuration, e.g. trainer.max_steps=200 tag=wide") -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=text)


def _experiment_first(parser: Parser, args: argparse.Namespace) -> None:
    """Take the experiment off the front of the words; a first word with ``=`` means it was left out."""
    named = bool(args.overrides) and "=" not in args.overrides[0]
    args.experiment = args.overrides.pop(0) if named else DEFAULT_EXPERIMENT
    _only_settings(parser, args)


def _experiment_needed(parser: Parser, args: argparse.Namespace) -> None:
    if not args.overrides or "=" in args.overrides[0]:
        parser.error(f"no experiment was named. {PROGRAM} show lists them.")
    _experiment_first(parser, args)


def _only_settings(parser: Parser, args: argparse.Namespace) -> None:
    stray = [word for word in args.overrides if "=" not in word]
    if stray:
        parser.error(f"{stray[0]!r} is neither an option nor of the form key=value.")


def _show_finish(parser: Parser, args: argparse.Namespace) -> None:
    named = bool(args.overrides)
    _experiment_first(parser, args)
    if not named and not args.tiny:
        args.experiment = None  # list them all


def _experiment_words(parser: Parser) -> None:
    # argparse fills positionals from the left, but the experiment may be left out: one list holds all words
    parser.usage = f"{parser.prog} [EXPERIMENT] [KEY=VALUE ...] [options]"
    _words(parser, f"the experiment first (default: {DEFAULT_EXPERIMENT}), then settings, e.g. tag=wide")


def _tiny(parser: Parser) -> None:
    parser.add_argument(
        "--tiny", action="store_true", help="the experiment's miniature, seconds on a laptop (default: off)"
    )


def _kind(parser: Parser, default: str | None = None) -> None:
    parser.add_argument(
        "--weights",
        metavar="KIND",
        type=weights_kind,
        default=default,
        help="raw, ema, or ema with its decay, e.g. ema0.999 (default: ema where the run has averages, else raw)",
    )


def _fit(parser: Parser) -> None:
    _experiment_words(parser)
    _tiny(parser)


def _decoder(parser: Parser) -> None:
    parser.add_argument(
        "--decoder",
        metavar="DIR",
        help="autoencoder whose decoder turns latents into pictures; its encoder must be the run's (default: its own)",
    )


def _sample(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, weights folder or weights file")
    _words(parser, "settings of the sampler, e.g. guidance=1.5")
    parser.add_argument(
        "--seeds", type=seeds, default="0-63", metavar="LIST", help="seeds, one sample each (default: 0-63)"
    )
    parser.add_argument(
        "--label", type=at_least(-1), metavar="N", help="class, 0 to classes - 1, or -1 for none (default: all in turn)"
    )
    parser.add_argument(
        "--prompt",
        action=_Once,
        metavar="TEXT",
        help="how every text begins, <mask> or <mask:20> for tokens to be drawn between what is given; or caption of"
        " every picture (default: none)",
    )
    gap = parser.add_argument_group("filling in a part of a picture, where the method can")
    gap.add_argument("--image", metavar="FILE", help="the picture, as sample writes them (default: none)")
    gap.add_argument("--mask", metavar="FILE", help="as large, white where to fill in (default: none)")
    _decoder(parser)
    _kind(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write (default: a folder named by the settings in RUN/sampled)"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=64, metavar="N", help="samples at a time, >= 1 (default: 64)"
    )
    parser.add_argument(
        "--grid",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write one file of all (default: --grid)",
    )


class _Once(argparse.Action):
    """An option that cannot be given twice, where the first would be lost without a word."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} came twice. Type one, and a command for each of the others.")
        setattr(namespace, self.dest, values)


def _sample_finish(parser: Parser, args: argparse.Namespace) -> None:
    if (args.image is None) != (args.mask is None):
        parser.error("--image and --mask go together: the picture, and where it is to be filled in.")
    _only_settings(parser, args)


def _evaluate(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, weights folder or weights file")
    _words(parser, "settings of the sampler, e.g. guidance=1.5")
    parser.add_argument(
        "--n", type=at_least(2), metavar="N", help="number of samples, >= 2 (default: as the experiment's metrics say)"
    )
    _decoder(parser)
    _kind(parser)
    parser.add_argument(
        "--metrics",
        type=lambda text: text.split(","),
        metavar="LIST",
        help="which to measure, of fid, likelihood and quality (default: those the run was trained with)",
    )
    parser.add_argument(
        "--scorer",
        metavar="DIR",
        help="causal model whose perplexity texts get, a folder as transformers or weights export write it"
        " (default: the experiment's callbacks.quality.scorer)",
    )
    parser.add_argument(
        "--mauve",
        metavar="DIR",
        help="model whose features MAUVE compares, as transformers saves it (default: callbacks.quality.mauve)",
    )
    code = parser.add_argument_group("programs, instead of the metrics")
    code.add_argument("--problems", metavar="FILE", help="HumanEval or MBPP file to measure pass@k on (default: none)")
    code.add_argument(
        "--allow-execution", action="store_true", help="let what the model wrote run on this machine (default: off)"
    )
    code.add_argument(
        "--answers", type=at_least(1), default=10, metavar="N", help="answers per problem, >= 1 (default: 10)"
    )
    code.add_argument("--k", type=_numbers, default="1", metavar="LIST", help="the k of pass@k, e.g. 1,10 (default: 1)")
    code.add_argument(
        "--timeout", type=at_least(1), default=5, metavar="SEC", help="seconds per program, >= 1 (default: 5)"
    )


def _evaluate_finish(parser: Parser, args: argparse.Namespace) -> None:
    for name in ("allow_execution", "answers", "k", "timeout"):
        default = parser.get_default(name)
        if args.problems is None and getattr(args, name) != (_numbers(default) if name == "k" else default):
            parser.error(f"--{name.replace('_', '-')} goes with --problems FILE, the programs to be written.")
    _only_settings(parser, args)


def _numbers(text: str) -> list[int]:
    return [at_least(1)(part) for part in text.split(",")]


def _prepare(parser: Parser) -> None:
    from platform import prepareverb  # as with data

    _words(parser, "an experiment and its settings; or latents or text-features, shards, and the folder to write")
    _tiny(parser)
    prepareverb.arguments(parser)


def _prepare_finish(parser: Parser, args: argparse.Namespace) -> None:
    from platform import prepareverb

    if not prepareverb.finish(parser, args):
        _experiment_needed(parser, args)


def _verify(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="safetensors files of reference numbers")


def _board(parser: Parser) -> None:
    parser.add_argument(
        "runs", nargs="?", default="runs", metavar="RUNS", help="folder of runs, or one run (default: runs)"
    )
    parser.add_argument(
        "--port", type=at_least(1, 65535), metavar="N", help="1 to 65535 (default: the first free one from 6006)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )


def _bench(parser: Parser) -> None:
    parser.usage = f"{parser.prog} ROOM [ARGS ...]"
    parser.add_argument("room", metavar="ROOM", help="a folder of lightningmodules that has a bench.py")
    parser.add_argument("args", nargs="*", metavar="ARGS", help="passed on to the room; try ROOM --help")


def _weights(parser: Parser) -> None:
    parser.usage = f"{parser.prog} import FILE --as EXPERIMENT --out DIR\n"
    parser.usage += f"       {parser.prog} export RUN [--weights KIND] --out DIR"
    parser.add_argument("action", choices=["import", "export"], help="from the authors' file, or out of a run")
    parser.add_argument(
        "source",
        metavar="FILE|RUN",
        help="file to import (.pth, .ckpt, .safetensors or a folder of distributed checkpoints), or run to export",
    )
    parser.add_argument(
        "--as", dest="experiment", metavar="EXPERIMENT", help="import: the experiment the file belongs to"
    )
    _kind(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write, new or empty; export to NAME.pth or NAME.dcp: the authors' format",
    )


def _weights_finish(parser: Parser, args: argparse.Namespace) -> None:
    if args.out is None:
        parser.error(f"weights {args.action} needs a folder to write. Add --out DIR.")
    if args.action == "import" and args.experiment is None:
        parser.error("weights import needs to know what the file is. Add --as EXPERIMENT.")
    if args.action == "import" and args.weights is not None:
        parser.error("--weights belongs to weights export; an imported file holds one kind.")
    if args.action == "export" and args.experiment is not None:
        parser.error("--as belongs to weights import; a run knows its experiment.")


def _data(parser: Parser) -> None:
    from platform import dataverb  # thirty options, looked at only when they are needed

    dataverb.arguments(parser)


def _data_finish(parser: Parser, args: argparse.Namespace) -> None:
    from platform import dataverb

    dataverb.finish(parser, args)


VERBS: dict[str, Verb] = {
    "fit": Verb(
        "Train an experiment, or continue it: the same command goes on where it stopped.",
        "fit quickstart trainer.max_steps=500 tag=short",
        _fit,
        _experiment_first,
    ),
    "sample": Verb(
        "Draw samples from a run: one picture or text per seed, and all in one file.",
        "sample runs/quickstart --seeds 0-15 --label 3 guidance=1.5",
        _sample,
        _sample_finish,
    ),
    "evaluate": Verb(
        "Measure a run with the metrics of its experiment.",
        "evaluate runs/quickstart --weights ema --n 1800",
        _evaluate,
        _evaluate_finish,
    ),
    "prepare": Verb(
        "Build the data of an experiment without training, or encode shards as latents or text features.",
        "prepare latents photo-shards photo-latents --encoder vae --size 256",
        _prepare,
        _prepare_finish,
    ),
    "data": Verb(
        "Pack files into shards, check them, and look at them.",
        "data pack photos photo-shards --val 0.05 --size 256",
        _data,
        _data_finish,
    ),
    "verify": Verb(
        "Replay files of reference numbers and compare each quantity.",
        "verify tests/golden/tarflow_class.safetensors",
        _verify,
    ),
    "show": Verb(
        "List the experiments, or print one in full with its size and cost.",
        "show quickstart module.net.channels=96",
        _fit,
        _show_finish,
    ),
    "board": Verb(
        "Start TensorBoard on this machine, keeping every picture.",
        "board runs --port 6007",
        _board,
    ),
    "doctor": Verb(
        "Check this machine: one line per prerequisite, ok or how to fix it.",
        "doctor",
        lambda parser: None,
    ),
    "bench": Verb(
        "Measure the speed of a method on this machine.",
        "bench tarflow",
        _bench,
    ),
    "weights": Verb(
        "Import the authors' weights, or export those of a run as safetensors.",
        "weights export runs/quickstart --weights ema --out digits-weights",
        _weights,
        _weights_finish,
    ),
}
