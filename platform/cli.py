"""The command line: finds the verb, runs it, and turns what went wrong into an exit code and a message."""

import contextlib
import dis
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

from platform import verbs
from platform.journal import rank_of_process
from platform.suggest import hint

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DONE, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, 75
STDLIB_WORDS = frozenset({"terse", "--terse", "nonaliased", "--nonaliased"})
PACKAGES = ("platform", "datamodules", "lightningmodules", "callbacks", "experiments")
ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: the words after ``python -m platform``.

    Returns:
        Exit code: 0 done, 1 bug, 2 user mistake, 75 interrupted and ready to be continued.
    """
    words = list(argv)
    if not os.environ.get("PLATFORM_CACHE", "unset"):
        del os.environ["PLATFORM_CACHE"]  # empty means not set, as everywhere
    if STDLIB_WORDS.issuperset(words):  # also without any word
        _answer_as_stdlib()
        if not words:
            sys.stderr.write("\n" + verbs.overview())
        return DONE
    if words[0] in ("-h", "--help", "help"):
        sys.stdout.write(verbs.overview())
        return DONE
    trace = "--trace" in words
    words = [word for word in words if word != "--trace"]
    if not words or words[0] not in verbs.VERBS:
        sys.stderr.write(_unknown_verb(words[0] if words else "--trace"))
        return MISTAKE
    return _run(words[0], words[1:], trace)


def _run(verb: str, words: list[str], trace: bool) -> int:
    try:
        args = verbs.parse(verb, words)
        args.trace = trace
        return _dispatch(verb)(args)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; the same command continues\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader went away, as in `show | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        message = user_mistake(error)
        if message is None or trace:
            traceback.print_exc()
        if message is None:
            return BUG
        sys.stderr.write(f"{_rank()}{message}\n")
        return MISTAKE


def _dispatch(verb: str) -> verbs.Run:
    """The function behind a verb, imported only now."""
    if verb == "fit":  # torch takes seconds to import, and a signal may arrive during them
        from platform import signals

        signals.install()
    import importlib

    run: verbs.Run = importlib.import_module(f"platform.{verb}").run
    return run


def user_mistake(error: BaseException) -> str | None:
    """What to tell the user about an exception, None when it is a bug.

    A mistake is a ``ValueError`` raised by a ``raise`` statement in one of our packages; those messages are written
    for users. A ``ValueError`` that Python or a library raised is a bug like any other exception. Hydra wraps what a
    constructor raises; its cause counts then. A missing dependency is the one other thing a user can put right.
    """
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in PACKAGES:
        return f"{error.name} is not installed for {sys.executable}. In the checkout, type: pip install -e ."
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return (
            f"The disk is full{f' ({error.filename})' if error.filename else ''}. What was complete is kept: a"
            " checkpoint appears under its name only when whole. Free some space and type the same command again."
        )
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ValueError) and _raised_by_us(cause.__traceback__):
            return str(cause)
        cause = cause.__cause__ if type(cause).__module__.partition(".")[0] == "hydra" else None
    return None


def _raised_by_us(trace: TracebackType | None) -> bool:
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    file = os.path.realpath(code.co_filename)
    ours = any(file.startswith(os.path.join(ROOT, package) + os.sep) for package in PACKAGES)
    return ours and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _rank() -> str:
    """Says which process speaks when it is not the first one, nothing otherwise."""
    rank = rank_of_process()
    return f"rank {rank}: " if rank else ""


def _unknown_verb(word: str) -> str:
    if os.path.isfile(os.path.join(ROOT, "experiments", f"{word}.yaml")):
        return f"{word!r} is an experiment, not a verb. Type {verbs.PROGRAM} fit {word}\n"
    return (
        f"{word!r} is not a verb.{hint(word, verbs.VERBS)}\n"
        f"Verbs: {', '.join(verbs.VERBS)}. Type {verbs.PROGRAM} --help.\n"
    )


def _answer_as_stdlib() -> None:
    """Print what the standard library's module prints when it is run, by running it."""
    import runpy

    with contextlib.suppress(SystemExit):
        runpy.run_path(os.path.join(os.path.dirname(os.__file__), "platform.py"), run_name="__main__")
    sys.stdout.flush()  # before the help on stderr
