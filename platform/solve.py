"""``evaluate --problems``: programs that a model writes, run against the tests of a problem file, as pass@k."""

import argparse
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from callbacks.features.execution import Problem

TOO_LONG = "prompt too long"
AT_ONCE = 16  # answers drawn together; their logits over a large vocabulary fill memory


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot or must not be run, before a model is loaded.

    Raises:
        ValueError: execution is not allowed, pass@k is asked for more answers than are drawn, the file is no problem
            file, or something else is asked for that is not measured with it.
    """
    from callbacks.features import execution

    for name in ("metrics", "n", "scorer", "mauve"):
        if getattr(args, name, None) is not None:
            raise ValueError(f"--{name} is not measured together with --problems. Type them in two commands.")
    if not args.allow_execution:
        raise ValueError(
            f"--problems {args.problems} runs what a model wrote on this machine: each program in its own process, in a"
            " temporary folder, with limits and without network, but no cage is perfect. If that is what you want, add"
            " --allow-execution."
        )
    most = max(args.k)
    if most > args.answers:
        raise ValueError(f"--k {most} needs as many answers per problem, --answers is {args.answers}. Raise it.")
    execution.problems(Path(args.problems))


def run(module: Any, settings: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
    """Write answers to every problem, run them, and print pass@k.

    Args:
        module: a room that draws text, with the weights to measure active.
        settings: keywords of its ``sample``.
        args: ``problems`` (file), ``answers`` (per problem), ``k`` (list), ``timeout`` (seconds per program).
        folder: a file ``problems-...jsonl`` there says in its first line what was measured, and every answer and its
            outcome in the others. Until all are there they stand in a file beside it, where the same command goes on.
            Other settings have files of their own. pass@k is added to ``metrics.jsonl``.

    Raises:
        ValueError: the model draws no text, or the same command is running already.
    """
    from callbacks.features import execution
    from callbacks.features.text import pass_at_k
    from platform.runs import METRICS, device, make_out

    if getattr(module.codec, "tokenizer", None) is None:
        raise ValueError("--problems needs a model that writes text; this one does not. Leave --problems out.")
    module.to(device())
    problems = execution.problems(Path(args.problems))
    facts = {
        "settings": settings,
        "weights": module.active_weights,
        "step": module.updates,
        "answers": args.answers,
        "seeds": f"0 to {args.answers - 1}",
        "timeout": args.timeout,
        "problems": hashlib.sha256(Path(args.problems).read_bytes()).hexdigest(),
    }
    first = _line(facts)
    make_out(folder, "The folder for the answers,")
    file = folder / f"problems-{Path(args.problems).stem}-{hashlib.sha256(first).hexdigest()[:8]}.jsonl"
    if file.is_file():
        done, _ = _parsed(file.read_bytes().splitlines(keepends=True)[1:], args.answers)
        print(f"{file} holds them already")
    else:
        done = _measured(module, problems, settings, args, file, first)
    long = sum(rows[0]["status"] == TOO_LONG for rows in done)
    note = f", {long} of them with a prompt longer than the model reads" if long else ""
    print(f"{len(problems)} problems{note}, {args.answers} answers each; answers: {file}")
    passed = [sum(row["status"] == execution.PASSED for row in rows) for rows in done]
    with (folder / METRICS).open("ab") as stream:
        for k in args.k:
            value = sum(pass_at_k(args.answers, count, k) for count in passed) / len(passed)
            print(f"  pass@{k:<4} {value:.4f}")
            stream.write(_line({"tag": f"metrics/pass@{k}", "value": value, "file": file.name, **facts}))


def _measured(
    module: Any,
    problems: Sequence["Problem"],
    settings: dict[str, Any],
    args: argparse.Namespace,
    file: Path,
    first: bytes,
) -> list[list[dict[str, Any]]]:
    """Rows of all problems, which the file holds then."""
    aside = file.with_suffix(".part")
    with aside.open("a+b") as stream:
        done = _begun(stream, first, args.answers)
        if done:
            print(f"{len(done)} of {len(problems)} problems are in {aside}, going on behind them")
        for problem in problems[len(done) :]:
            rows = _rows(module, problem, settings, args)
            stream.write(b"".join(map(_line, rows)))
            stream.flush()
            done.append(rows)
        os.fsync(stream.fileno())
        os.replace(aside, file)
    return done


def _begun(stream: BinaryIO, first: bytes, answers: int) -> list[list[dict[str, Any]]]:
    """Rows of the problems that an earlier start finished; the file ends with them, or with a new first line."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{stream.name} is being written by the same command. Wait for it, or stop it.") from None
    except OSError as error:  # some network file systems are mounted without locks
        warnings.warn(f"{stream.name} cannot be locked ({error}); take care to start this once.", stacklevel=2)
    stream.seek(0)
    lines = [line for line in stream.read().splitlines(keepends=True) if line.endswith(b"\n")]
    if lines[:1] != [first]:
        stream.truncate(0)
        stream.write(first)
        return []
    done, left = _parsed(lines[1:], answers)
    stream.truncate(sum(map(len, lines[: len(lines) - left])))
    return done


def _parsed(lines: Sequence[bytes], answers: int) -> tuple[list[list[dict[str, Any]]], int]:
    """Rows of every whole problem, and how many rows are left of one that is not."""
    rows = [json.loads(line) for line in lines]
    done: list[list[dict[str, Any]]] = []
    while rows and (count := 1 if rows[0]["status"] == TOO_LONG else answers) <= len(rows):
        done.append(rows[:count])
        rows = rows[count:]
    return done, len(rows)


def _line(row: dict[str, Any]) -> bytes:
    return f"{json.dumps(row, ensure_ascii=False)}\n".encode()


def _rows(module: Any, problem: "Problem", settings: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per answer to a problem, or the one that says why there is none."""
    from callbacks.features import execution

    if len(module.codec.tokenizer.encode(problem.prompt)) >= module.codec.shape[0]:
        return [{"problem": problem.name, "status": TOO_LONG, "answer": "", "detail": ""}]
    answers = _answers(module, problem.prompt, args.answers, settings)
    outcomes = execution.run_all([problem.program(text) for text in answers], timeout_sec=args.timeout)
    return [
        {"problem": problem.name, "status": outcome.status, "answer": text, "detail": outcome.detail}
        for text, outcome in zip(answers, outcomes, strict=True)
    ]


def _answers(module: Any, prompt: str, answers: int, settings: dict[str, Any]) -> Sequence[str]:
    """Continuations of a prompt up to the end of the text, one per seed, without the prompt."""
    from callbacks.sampling import prompted

    eos = getattr(module.codec.tokenizer, "eos", None)
    texts: list[str] = []
    for first in range(0, answers, AT_ONCE):
        seeds = range(first, min(first + AT_ONCE, answers))
        condition = prompted(module, None, prompt, len(seeds), holes=False)
        assert condition.prompt is not None
        begin = condition.prompt.shape[1]
        for row in module.sample(list(seeds), condition, **settings):
            tokens = row[begin:].tolist()
            end = begin + tokens.index(eos) if eos in tokens else len(row)  # behind it stands another text
            # taken together, as some tokenizers drop a space that stands first; and a prompt may not come back the same
            asked, whole = (module.codec.decode(row[None, :until])[0] for until in (begin, end))
            texts.append(whole[len(asked) :])
    return texts
