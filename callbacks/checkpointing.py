"""When to validate, when to save, when to stop: decided once per update, between updates, alike on every rank."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from callbacks.validations import AtValidations
from lightningmodules.base import GenerativeModule


class Schedule(Checkpoint):
    """Runs validation, saving and stopping at the end of an update.

    Lightning has a place for each of these, but only one that all of them can share: after an update everything that
    must be continued is at rest. Saving comes after validating, so a checkpoint of step k means that whatever belongs
    to step k is done.

    Args:
        folder: where checkpoints go, one folder ``step-<updates>`` each.
        save: ``save(path)`` writes one checkpoint and returns when it is committed; False if it could not be written.
        prune: called after each commit with the folder.
        should_stop: collective; asked once per update with this rank's wish to save by the clock; returns
            ``(stop, save)`` agreed by all ranks.
        val_every: updates between validations, 0 for none but the last.
        every: updates between checkpoints, 0 for none but the last.
        every_minutes: minutes between checkpoints, or None.
        milestones: updates after which a checkpoint is made besides the regular ones.
    """

    def __init__(
        self,
        folder: Path,
        *,
        save: Callable[[Path], bool],
        prune: Callable[[], None],
        should_stop: Callable[[bool], tuple[bool, bool]],
        val_every: int,
        every: int,
        every_minutes: float | None = None,
        milestones: Sequence[int] = (),
    ) -> None:
        self.folder, self._save, self._prune, self._should_stop = folder, save, prune, should_stop
        self.val_every, self.every, self.milestones = val_every, every, frozenset(milestones)
        self.every_seconds = None if every_minutes is None else 60.0 * every_minutes
        self.interrupted = False  # a stop was asked for, and the run is not at its end
        self._saved_at = time.monotonic()
        self._last_saved = -1
        self._last_validated = -1
        self._length: int | None = None  # of a run that is restored at its end, where only a validation is left
        self._validation_owed = False  # restored: the checkpoint was taken before its validation could finish

    def state_dict(self) -> dict[str, Any]:
        """Whether the validation of the saved step still has to be run."""
        return {"validation_owed": self._validation_owed}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember an owed validation, also when the run is otherwise at its end."""
        self._validation_owed = checkpoint["callbacks"][self.state_key]["validation_owed"]
        updates = checkpoint["counters"]["updates"]
        if self._validation_owed and updates >= trainer.max_steps:
            self._length = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = updates + 1  # otherwise Lightning has nothing left to start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pay an owed validation before the first update."""
        assert isinstance(pl_module, GenerativeModule)
        self._saved_at = time.monotonic()
        self._last_saved = pl_module.updates
        if self._length is not None:  # Lightning has started, and callbacks must see that this validation is the last
            trainer.fit_loop.epoch_loop.max_steps = self._length
        if self._validation_owed:
            self._validate(trainer, pl_module)
            if self._validation_owed:  # cut short again: no update may come before it, and the checkpoint still owes it
                self._stop(trainer, interrupted=True)
                return
            self._last_saved = -1
        if self._length is not None:
            self._checkpoint(pl_module.updates, needed=True)
            self._stop(trainer, interrupted=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two updates: validate, save, stop."""
        assert isinstance(pl_module, GenerativeModule)
        if pl_module.micro_batches % trainer.accumulate_grad_batches:
            return
        step = pl_module.updates
        last = step >= trainer.max_steps
        clock = self.every_seconds is not None and time.monotonic() - self._saved_at >= self.every_seconds
        stop, save = self._should_stop(clock)
        if last or (self.val_every and step % self.val_every == 0):
            self._validation_owed = True
            if not stop:
                self._validate(trainer, pl_module)
                stop = pl_module.stop_requested()
        due = bool(self.every) and step % self.every == 0
        if last or stop or save or due or step in self.milestones:
            self._checkpoint(step, needed=last or stop)
        if stop and (self._validation_owed or not last):
            self._stop(trainer, interrupted=True)

    def _stop(self, trainer: L.Trainer, interrupted: bool) -> None:
        self.interrupted = interrupted
        trainer.limit_val_batches = 0  # Lightning validates when told to stop; ours is done or owed
        trainer.should_stop = True

    def _checkpoint(self, step: int, needed: bool) -> None:
        if step == self._last_saved:
            return
        if not self._save(self.folder / f"step-{step:08d}"):
            if needed:
                raise ValueError(
                    f"Step {step} could not be saved: the disk of {self.folder} is full. The run stops at the"
                    " checkpoint before; free some space and type the same command to continue from there."
                )
            return
        self._last_saved, self._saved_at = step, time.monotonic()
        self._prune()

    def _validate(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        """One validation, exactly as Lightning's training loop runs it; owed when a stop cuts it short."""
        if module.updates == self._last_validated:
            return
        connector = trainer._logger_connector
        first = connector._first_loop_iter
        trainer.validating = True
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # a validation that was cut short begins anew, not at the batch it was left at
        with trainer.precision_plugin.forward_context():  # callbacks sample in the precision of training, too
            loop.run()
        trainer.training = True
        connector._first_loop_iter = first
        self._validation_owed = module.stop_requested()
        if not self._validation_owed:
            self._last_validated = module.updates
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AtValidations):
                callback.forget(module.updates)
