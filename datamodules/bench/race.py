"""Things timed in turns, and the table that says how they compare."""

import contextlib
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datamodules.loader import Loader
from datamodules.order import Ints, micro_batches


@dataclass
class Contender:
    """Something to time.

    Attributes:
        name: what it is.
        run: does the work once and returns how many items it handled.
        goals: name of another contender to the least ratio to its speed per core that is wanted, 0 for no goal;
            "wall:NAME" compares wall-clock speed.
        floor: least speed per core that is wanted, items per second.
        after: called after each turn, outside the time.
        core: items per second of CPU time, one value per repeat.
        wall: items per second, one value per repeat.
    """

    name: str
    run: Callable[[], int]
    goals: dict[str, float] = field(default_factory=dict)
    floor: float = 0.0
    after: Callable[[], object] | None = None
    core: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


class Report:
    """Prints the table line by line and remembers which goals were missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def title(self, text: str, unit: str) -> None:
        """Begin a part of the table."""
        print(f"\n{text}\n{'':<46}{unit + '/core':>14}{unit + '/s':>14}  {'ratio to':<46}{'goal':>8}")

    def race(self, contenders: list[Contender], repeats: int, scale: float = 1.0) -> None:
        """Time everybody in turns and print medians.

        Args:
            contenders: in the order of the table.
            repeats: timings of each, after one that does not count.
            scale: divides the speeds for printing.
        """
        for round_ in range(repeats + 1):
            for contender in contenders:
                begin, cpu = time.perf_counter(), _cpu()
                count = contender.run()
                cpu, wall = _cpu() - cpu, time.perf_counter() - begin
                if contender.after is not None:
                    contender.after()
                if round_:
                    contender.core.append(count / max(cpu, 1e-9))
                    contender.wall.append(count / wall)
        named = {contender.name: contender for contender in contenders}
        for contender in contenders:
            self._lines(contender, named, scale)

    def value(self, name: str, text: str, goal: str, fine: bool) -> None:
        """One line that is not a speed."""
        line = f"{name:<46}{text:>30}{'':<46}" + (f"{goal:>8}{_mark(fine)}" if goal else "")
        print(line.rstrip(), flush=True)
        if not fine:
            self.missed.append(name)

    def _lines(self, contender: Contender, named: dict[str, Contender], scale: float) -> None:
        core, wall = statistics.median(contender.core), statistics.median(contender.wall)
        line = f"{contender.name:<46}{_number(core / scale):>14}{_number(wall / scale):>14}  "
        if contender.floor:
            fine = core >= contender.floor
            line += f"{'':<46}{_number(contender.floor / scale):>8}{_mark(fine)}"
            self.missed += [] if fine else [contender.name]
        print(line.rstrip(), flush=True)
        for goal, least in contender.goals.items():
            other = named[goal.removeprefix("wall:")]
            on_the_wall = goal.startswith("wall:")
            # paired by repeat, so that a machine that slows down for a while slows both
            pairs = zip(*((c.wall if on_the_wall else c.core) for c in (contender, other)), strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            fine = ratio >= least
            what = f"{ratio:7.2f} x {other.name}{' (wall)' if on_the_wall else ''}"
            wanted = f"{least:>8g}{_mark(fine)}" if least else ""
            print(f"{'':<76}{what:<46}{wanted}".rstrip(), flush=True)
            self.missed += [] if fine else [f"{contender.name} against {other.name}"]


class Batches:
    """Draws training batches from the position 0 on, and counts their items.

    Threads, buffers and files are those of training. The plans end with the last batch, so that no thread works on
    after a turn; the threads themselves end in ``close``, as that takes a tenth of a second whatever they have done.

    Args:
        data: the data module; it is set up here.
        count: number of batches in a turn.
    """

    def __init__(self, data: Any, count: int) -> None:
        data.setup("fit")
        self._data = data
        self._count = count
        self._running: Iterator[Any] = iter(())
        read = data.reader("train", data.training_sequence(), training=True)
        self._loader = Loader(self._plans, read, data.workers)

    def __call__(self) -> int:
        """Draw them."""
        self._running = iter(self._loader)
        for batch in islice(self._running, self._count):
            self._data.on_after_batch_transfer(batch, 0)
        return self._count * int(self._data.batch_size)

    def close(self) -> None:
        """End the threads."""
        for _ in self._running:
            pass

    def _plans(self) -> Iterator[Ints]:
        size = self._data.batch_size
        return islice(micro_batches(0, size, size, 0, 1), self._count)


def _cpu() -> float:
    """CPU seconds of this process with its threads, and of its child processes, running or ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = 0.0
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with contextlib.suppress(OSError):  # it has just ended
                living += time.clock_gettime(_clock(child.pid))
    return time.process_time() + ended.ru_utime + ended.ru_stime + living


def _clock(process: int) -> int:
    """Number of the clock that counts the CPU time of another process.

    Source: clock_getcpuclockid(3); Linux counts by the inverted process number, three bits to the left, and 2 for the
    time that the scheduler has measured.
    """
    return ~process << 3 | 2


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _mark(fine: bool) -> str:
    return "  ok" if fine else "  MISSED"
