"""``evaluate --problems``: programs that a model writes, run against the tests of a problem file, as pass@k."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROBLEMS = "problems.jsonl"
AT_ONCE = 16  # answers drawn together; their logits over a large vocabulary fill memory


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot or must not be run, before a model is loaded.

    Raises:
        ValueError: execution is not allowed, or pass@k is asked for more answers than are drawn.
    """
    if not args.allow_execution:
        raise ValueError(
            f"--problems {args.problems} runs what a model wrote on this machine: each program in its own process, in a"
            " temporary folder, with limits and without network, but no cage is perfect. If that is what you want, add"
            " --allow-execution."
        )
    most = max(args.k)
    if most > args.answers:
        raise ValueError(f"--k {most} needs as many answers per problem, --answers is {args.answers}. Raise it.")


def run(module: Any, settings: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
    """Write answers to every problem, run them, and print pass@k.

    Args:
        module: a room that draws text, with the weights to measure active.
        settings: keywords of its ``sample``.
        args: ``problems`` (file), ``answers`` (per problem), ``k`` (list), ``timeout`` (seconds per program).
        folder: every answer and its outcome go to ``problems.jsonl`` there.

    Raises:
        ValueError: the model draws no text, or the file is no problem file.
    """
    from callbacks.features import execution
    from callbacks.features.text import pass_at_k
    from platform.runs import device

    tokenizer = getattr(module.codec, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("--problems needs a model that writes text; this one does not. Leave --problems out.")
    module.to(device())
    problems = execution.problems(Path(args.problems))
    rows: list[dict[str, Any]] = []
    solved: list[tuple[int, int]] = []
    for problem in problems:
        if len(tokenizer.encode(problem.prompt)) >= module.codec.shape[0]:
            solved.append((args.answers, 0))
            rows.append({"problem": problem.name, "status": "prompt too long", "answer": "", "detail": ""})
            continue
        answers = _answers(module, problem.prompt, args.answers, settings)
        outcomes = execution.run_all([problem.program(text) for text in answers], timeout_sec=args.timeout)
        solved.append((args.answers, sum(outcome.status == execution.PASSED for outcome in outcomes)))
        rows += [
            {"problem": problem.name, "status": outcome.status, "answer": text, "detail": outcome.detail}
            for text, outcome in zip(answers, outcomes, strict=True)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{PROBLEMS}.{os.getpid()}.tmp"
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, folder / PROBLEMS)
    long = sum(row["status"] == "prompt too long" for row in rows)
    note = f", {long} of them with a prompt longer than the model reads" if long else ""
    print(f"{len(problems)} problems{note}, {args.answers} answers each; answers: {folder / PROBLEMS}")
    for k in args.k:
        print(f"  pass@{k:<4} {sum(pass_at_k(n, c, k) for n, c in solved) / len(solved):.4f}")


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
