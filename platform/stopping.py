"""One answer on all ranks to "shall we stop now?", without touching the accelerator."""

import os
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist


class StopFlag:
    """Agreement of all ranks on a signal that reached any of them, and on saving by rank 0's clock.

    Args:
        requested: whether this process has been asked to stop.
    """

    def __init__(self, requested: Callable[[], bool]) -> None:
        self._requested = requested
        self._stopped = False  # once agreed it stays so
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def poll(self) -> bool:
        """Ask all ranks now and wait for the answer; for long phases between updates."""
        if _alone():
            self._stopped = self._stopped or self._requested()
        else:
            votes, work = self._vote(False)
            work.wait()
            self._stopped = self._stopped or bool(votes[0])
        return self._stopped

    def update(self, clock: bool) -> tuple[bool, bool]:
        """Agree once per update; with several ranks the answer is the one asked for an update ago, so nobody waits.

        Args:
            clock: this rank finds that it is time to save.

        Returns:
            Whether to stop, and whether to save.
        """
        if _alone():
            return self.poll(), clock
        votes = torch.zeros(2, dtype=torch.int32)
        if self._pending is not None:
            votes, work = self._pending
            work.wait()
        self._pending = self._vote(clock and dist.get_rank() == 0)
        self._stopped = self._stopped or bool(votes[0])
        return self._stopped, bool(votes[1])

    def _vote(self, clock: bool) -> tuple[torch.Tensor, dist.Work]:
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        votes = torch.tensor([self._requested(), clock], dtype=torch.int32)
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        return votes, work


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def leave_with_parent(seconds: float = 1.0) -> None:
    """End this process when the one that started it is gone.

    Ranks that Lightning starts are children of rank 0. When rank 0 is killed they would wait for it in a collective,
    and might still be writing when the same command starts again.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()
