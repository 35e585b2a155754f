"""What callbacks that measure or draw at validations share: which validation this is, and what is due."""

from typing import Any

import lightning as L

from lightningmodules.base import GenerativeModule


class AtValidations(L.Callback):
    """A callback with expensive work at validations; subclasses implement :meth:`at_validation`.

    Validations are counted over the whole life of a run, so that a continued run does the same work at the same steps.
    One that a stop cuts short is not counted and happens again, also in callbacks that had finished theirs, as its rows
    are dropped when the run continues; one that was finished before a resume does not.
    """

    def __init__(self) -> None:
        self._shown = 0  # validations so far
        self._done = -1  # step of the last of them

    def at_validation(self, trainer: L.Trainer, module: GenerativeModule) -> bool:
        """Do what is due.

        Returns:
            False when given up because a stop was asked for; rows written so far are dropped when the run continues.
        """
        raise TypeError(f"{type(self).__name__} must define at_validation().")

    def due(self, trainer: L.Trainer, module: GenerativeModule, every: int) -> bool:
        """Whether it is the turn of what happens at every n-th validation, at the last and outside ``fit``.

        0 means never.
        """
        last = trainer.state.fn != "fit" or module.updates >= trainer.max_steps
        return bool(every) and (last or self._shown % every == 0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Work once per validation."""
        assert isinstance(pl_module, GenerativeModule)
        if trainer.sanity_checking or (trainer.state.fn == "fit" and self._done == pl_module.updates):
            return
        if self.at_validation(trainer, pl_module):
            self._shown, self._done = self._shown + 1, pl_module.updates

    def forget(self, step: int) -> None:
        """Count the validation of this step no longer: it was cut short, and all of it happens again."""
        if self._done == step:
            self._shown, self._done = self._shown - 1, -1

    def state_dict(self) -> dict[str, Any]:
        """Which validation comes next."""
        return {"shown": self._shown, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._shown, self._done = state_dict["shown"], state_dict["done"]
