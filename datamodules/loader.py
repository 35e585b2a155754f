"""Batches from positions: worker threads map one list of positions to one batch, in order, without saved state."""

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torchdata.nodes import IterableWrapper, ParallelMapper

from datamodules.memory import empty

P = TypeVar("P")
B = TypeVar("B")


class Loader(Generic[P, B]):
    """Iterable over batches; every ``iter`` starts at the first plan again.

    Threads suffice because the decoders release the interpreter lock, and they map a whole batch at a time because a
    hop between threads costs more than decoding a small image. There is deliberately no ``state_dict``: whoever
    makes the plans knows the position, and a loader that prefetches knows it wrongly. torchdata sets its threads to
    one core each, so that resizing in several of them does not crowd the machine.

    Args:
        plans: returns an iterator over plans, one per batch.
        read: turns one plan into one batch; called from several threads at once.
        workers: number of threads; 0 reads in the caller's thread. Up to 2 * workers finished batches wait in memory.

    Attributes:
        busy: seconds that all threads together have spent on making batches.
    """

    def __init__(self, plans: Callable[[], Iterable[P]], read: Callable[[P], B], workers: int) -> None:
        self.busy = 0.0
        self._plans = plans
        self._made = read
        self._workers = workers
        self._running: weakref.WeakSet[_Threads[Any, B]] = weakref.WeakSet()

    def __iter__(self) -> Iterator[B]:
        """Yield batches; threads end when the iterator is exhausted, closed or dropped."""
        if not self._workers:
            yield from map(self._read, self._plans())
            return
        threads = _Threads(self._plans(), self._read, self._workers)
        self._running.add(threads)
        try:
            yield from threads
        finally:
            threads.close()

    def _read(self, plan: P) -> B:
        begin = time.perf_counter()
        batch = self._made(plan)
        self.busy += time.perf_counter() - begin
        return batch

    def close(self) -> None:
        """Stop and join the threads of all iterators of this loader."""
        for threads in list(self._running):
            threads.close()


class SizedLoader(Loader[P, B]):
    """A loader over a list of plans, with a length."""

    def __init__(self, plans: list[P], read: Callable[[P], B], workers: int) -> None:
        super().__init__(lambda: plans, read, workers)
        self._length = len(plans)

    def __len__(self) -> int:
        """Number of batches."""
        return self._length


class Buffers:
    """Recycled arrays: one comes back by itself when the last tensor or array over it is gone.

    Writing to fresh memory costs ten times as much as to recycled memory, because of the page faults.

    Args:
        limit: how many free arrays of one shape and type are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: dict[tuple[tuple[int, ...], np.dtype[Any]], list[NDArray[Any]]] = {}

    def take(self, shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """A contiguous array with arbitrary content that nobody else holds.

        Args:
            shape: its shape.
            dtype: its type.
        """
        kind = np.dtype(dtype)
        try:
            memory = self._free.get((shape, kind), []).pop()
        except IndexError:
            memory = empty(shape, kind)
        view = memory.view()
        weakref.finalize(view, self._give_back, memory).atexit = False
        return view

    def _give_back(self, memory: NDArray[Any]) -> None:
        free = self._free.setdefault((memory.shape, memory.dtype), [])
        if len(free) < self._limit:
            free.append(memory)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a thread to the consumer; torchdata would wrap its traceback into the message."""

    error: Exception


class _Threads(Generic[P, B]):
    """One running torchdata pipeline and its orderly end."""

    def __init__(self, plans: Iterable[P], read: Callable[[P], B], workers: int) -> None:
        self._stop = threading.Event()

        def guarded_plans() -> Iterator[P | _Failure]:
            try:
                for plan in plans:
                    if self._stop.is_set():
                        return
                    yield plan
            except Exception as error:
                yield _Failure(error)

        def guarded_read(plan: P | _Failure) -> B | _Failure:
            if isinstance(plan, _Failure):
                return plan
            try:
                return read(plan)
            except Exception as error:
                return _Failure(error)

        self._node: ParallelMapper[B | _Failure] | None = ParallelMapper(
            IterableWrapper(guarded_plans()),
            guarded_read,
            num_workers=workers,
            in_order=True,
            method="thread",
            snapshot_frequency=0,
        )
        _live.add(self)

    def __iter__(self) -> Iterator[B]:
        while self._node is not None:
            try:
                item = next(self._node)
            except StopIteration:
                return
            if isinstance(item, _Failure):
                raise item.error
            yield item

    def close(self) -> None:
        """End the threads: stop the source, drain what is in flight, then drop the node, which joins them.

        Threads that still run when the interpreter ends would abort the process.
        """
        node, self._node = self._node, None
        if node is None:
            return
        self._stop.set()
        for _ in node:
            pass
        del node


_live: "weakref.WeakSet[_Threads[Any, Any]]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for threads in list(_live):
        threads.close()
