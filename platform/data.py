"""``data``: pack files into shards, check shards, look at them."""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platform.quantities import data_size
from platform.verbs import PROGRAM

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.1
SHOWN = 20  # classes, sizes, refused inputs in a summary

Rows = list[tuple[str, str]]


def run(args: argparse.Namespace) -> int:
    """Entry of the verb.

    Args:
        args: ``action``, ``paths``, ``workers`` and the options of the action.

    Returns:
        0; 2 if ``check`` found something wrong.
    """
    actions = {"pack": _pack, "check": _check, "show": _show, "stats": _stats, "index": _index}
    logging.captureWarnings(True)  # decoders warn about files that are refused or reported anyway
    try:
        with Bar() as bar:
            return actions[args.action](args, bar)
    finally:
        logging.captureWarnings(False)


class Bar:
    """Tells how far something is: a live bar on a terminal, a line every ten seconds elsewhere; on stderr."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._begin = self._shown = time.monotonic()
        self._first = 0

    def __enter__(self) -> "Bar":
        """Nothing is drawn before the first call."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal as it was."""
        self.close()

    def close(self) -> None:
        """Remove the bar, so that something else can be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def __call__(self, what: str, done: int, total: int, detail: str) -> None:
        """Show the state of a piece of work.

        Args:
            what: name of the work; another name begins another bar.
            done: how many parts are done.
            total: how many there are.
            detail: more to tell.
        """
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._begin, self._shown, self._first = what, now, now, done - 1
        wait = LIVE_SECONDS if self._live else PLAIN_SECONDS
        if now - self._shown < wait and (done < total or not self._live):
            return
        self._shown = now
        if self._live:
            self._draw(what, done, total, detail)
        else:
            rate = (done - self._first) / max(now - self._begin, 1e-9)
            left = f", {rate:.0f}/s, {(total - done) / rate:.0f} s left" if rate > 0 else ""
            print(f"{what}: {done} of {total}{left}; {detail}", file=sys.stderr, flush=True)

    def _draw(self, what: str, done: int, total: int, detail: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(
                *columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, detail=detail)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, detail=detail)


def _pack(args: argparse.Namespace, bar: Bar) -> int:
    module = importlib.import_module("datamodules.pack")
    source, out = (Path(path) for path in args.paths)
    recipe = module.Recipe(
        name=args.name or out.absolute().name,
        licence=args.licence,
        seed=args.seed,
        shuffle=args.shuffle,
        val=args.val,
        size=args.size,
        per_shard=args.per_shard,
        shard_mib=args.shard_mib,
        max_pixels=args.max_pixels,
        max_bytes=args.max_bytes,
        duplicates=args.duplicates,
        extensions=args.extensions,
        split_lines=args.split_lines,
        text_field=args.text_field,
    )
    begin = time.monotonic()
    packed = module.pack(
        source,
        out,
        recipe,
        kind=args.kind,
        workers=args.workers,
        strict=args.strict,
        fresh=args.fresh,
        progress=bar,
    )
    bar.close()
    if packed.was_there:
        print(f"{packed.folder} is packed already; --fresh makes it again")
    _print(_packed_rows(packed, time.monotonic() - begin))
    print(f"check it: {PROGRAM} data check {out}   look at it: {PROGRAM} data show {out}")
    return 0


def _packed_rows(packed: Any, seconds: float) -> Rows:
    """What a finished set holds and what became of the inputs, as labelled lines."""
    index, inputs = packed.index, packed.index.card["inputs"]
    refused: Mapping[str, int] = inputs["refused"]
    rows = [("packed", f"{index.dataset} ({index.card['pack']['kind']}) in {packed.folder}, {seconds:.1f} s")]
    if packed.continued:
        rows.append(("continued", f"{_many(packed.continued, 'shard')} finished by an earlier attempt"))
    splits: dict[str, list[int]] = {}
    for name, entry in index.shards.items():
        told = splits.setdefault(name.rpartition("-")[0], [0, 0, 0])
        told[0], told[1], told[2] = told[0] + entry.samples, told[1] + 1, told[2] + entry.bytes
    for split, (samples, shards, size) in splits.items():
        rows.append((split, f"{_many(samples, 'sample')} in {_many(shards, 'shard')}, {data_size(size)}"))
    total = sum(refused.values())
    rows.append(("inputs", f"{inputs['written']} written + {total} refused = {inputs['seen']} seen"))
    rows += [("refused", f"{count} {reason}") for reason, count in sorted(refused.items(), key=lambda pair: -pair[1])]
    if total:
        rows.append(("", f"each of them with its reason: {packed.folder / 'manifest.jsonl'}"))
    rows += [("stored anew", f"{count} {change}") for change, count in sorted(inputs["changed"].items())]
    if inputs["left_out"]:
        rows.append(("left out", f"{inputs['left_out']} other files, which this kind of source does not read"))
    names = index.card.get("classes", [])
    if names:
        rows.append(("classes", _listed([f"{number} {name}" for number, name in enumerate(names)])))
    return rows


def _check(args: argparse.Namespace, bar: Bar) -> int:
    module = importlib.import_module("datamodules.check")
    path = Path(args.paths[0])
    begin = time.monotonic()
    report = module.check(path, fraction=args.sample, classes=args.classes, workers=args.workers, progress=bar)
    bar.close()
    for problem in report.problems:
        print(problem)
    for note in report.notes:
        print(f"note: {note}")
    facts = report.facts
    bad = len({(problem.shard, problem.key) for problem in report.problems if problem.key})
    held = f"{_many(facts.samples, 'sample')} in {_many(facts.shards, 'shard')}, {data_size(facts.bytes)}"
    told = f"{held}; {report.decoded} decoded"
    wrong = f"{_many(len(report.problems), 'problem')}, {_many(bad, 'sample')} named"
    verdict = wrong if report.problems else "nothing wrong"
    print(f"{path}: {verdict} ({told}, {time.monotonic() - begin:.1f} s)")
    return 2 if report.problems else 0


def _stats(args: argparse.Namespace, bar: Bar) -> int:
    path = Path(args.paths[0])
    survey, catalogue = (importlib.import_module(f"datamodules.{name}") for name in ("survey", "catalogue"))
    paths = survey.find(path)
    found = survey.survey(paths, args.workers, bar)
    bar.close()
    index = catalogue.read(paths[0].parent)
    if index is not None:
        _print([("name", index.dataset), ("licence", index.licence)])
    names = index.card.get("classes", []) if index is not None else []
    for split, facts in found.items():
        _print([(split, _size_line(facts)), *_facts_rows(facts, names, index.card if index is not None else {})])
    return 0


def _size_line(facts: Any) -> str:
    mean = data_size(facts.bytes / facts.samples) if facts.samples else "nothing"
    held = f"{_many(facts.samples, 'sample')} in {_many(facts.shards, 'shard')}"
    return f"{held}, {data_size(facts.bytes)}, {mean} per sample"


def _facts_rows(facts: Any, names: list[str], card: Mapping[str, Any]) -> Rows:
    """Members, resolutions and classes of a split."""
    rows = []
    for name, (count, size) in sorted(facts.members.items()):
        more = f", {size // _token_bytes(card)} tokens" if name == "tok" else ""
        lacking = "" if count == facts.samples else f" (of {facts.samples} samples)"
        rows.append((f".{name}", f"{count}{lacking}, {data_size(size)}, {data_size(size / max(1, count))} each{more}"))
    if facts.shapes:
        rows.append(("sizes", _shapes(facts.shapes)))
    if facts.labels:
        ranked = sorted(facts.labels.items())
        told = [f"{names[label] if 0 <= label < len(names) else label}: {count}" for label, count in ranked]
        counts = [count for _, count in ranked]
        rows.append(("classes", f"{len(told)}, {min(counts)} to {max(counts)} samples each"))
        rows.append(("", _listed(told)))
        degree = facts.sortedness()
        if degree is not None:
            rows.append(("sorted", f"{degree:.2f} (0 mixed as by chance, 1 sorted by class along each shard)"))
    return rows


def _shapes(shapes: Mapping[tuple[int, int], int]) -> str:
    """The commonest resolutions, or the range where there are many."""
    ranked = sorted(shapes.items(), key=lambda pair: (-pair[1], pair[0]))
    listed = ", ".join(f"{width}x{height}: {count}" for (height, width), count in ranked[:5])
    if len(ranked) <= 5:
        return f"{listed} (width x height)"
    heights, widths = zip(*shapes, strict=True)
    span = f"width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}"
    common = ranked[0][1] * len(ranked) > 2 * sum(shapes.values())
    return f"{len(ranked)} resolutions, {span}{f'; commonest {listed}' if common else ''}"


def _token_bytes(card: Mapping[str, Any]) -> int:
    kind = card.get("tok", {})
    return 4 if isinstance(kind, dict) and kind.get("dtype") in ("uint32", "int32") else 2


def _show(args: argparse.Namespace, bar: Bar) -> int:
    path = Path(args.paths[0])
    survey, catalogue, contact = (
        importlib.import_module(f"datamodules.{name}") for name in ("survey", "catalogue", "contact")
    )
    paths = survey.find(path)
    _stats(args, bar)
    looks = contact.pick(paths, args.n)
    index = catalogue.read(paths[0].parent)
    card = index.card if index is not None else {}
    if not any(look.picture() is not None for look in looks):
        for look in looks:
            print("\n".join(contact.lines_of(look, card)))
        return 0
    name = index.dataset if index is not None else paths[0].parent.resolve().name
    size = sum(one.stat().st_size for one in paths)
    title = f"{_many(len(looks), 'sample')} spread evenly over {_many(len(paths), 'shard')} ({data_size(size)})"
    out = Path(args.out or f"{Path(name).name}.png").expanduser()
    sheet = contact.sheet(looks, name, title, card.get("classes", []))
    with _writable(out):
        sheet.save(out, format="PNG")
    print(f"contact sheet: {out}")
    return 0


def _index(args: argparse.Namespace, bar: Bar) -> int:
    module = importlib.import_module("datamodules.indexing")
    path = Path(args.paths[0])
    written, listed = module.write_indices(
        path, name=args.name, licence=args.licence, workers=args.workers, progress=bar
    )
    bar.close()
    print(f"{path}: {_many(written, 'index file')} written, index.json {'written' if listed else 'was there'}")
    return 0


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {out}: {error.strerror or error}. Name another file with --out FILE."
        ) from error


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def _print(rows: Rows) -> None:
    for label, fact in rows:
        print(f"{label:<12} {fact}")
