"""When weight averages move, and when they stand in for the weights."""

from contextlib import ExitStack
from typing import Any

import lightning as L

from lightningmodules.base import GenerativeModule


class EMA(L.Callback):
    """Moves the module's averages after every update and swaps them in for validation.

    Everything that judges quality runs during validation and so sees averaged weights without knowing of them.

    Args:
        use: weights for validation: ``ema`` (the first average, or raw when the module keeps none), ``raw``, or one
            average by name, for example ``ema0.999``.
    """

    def __init__(self, use: str = "ema") -> None:
        self.use = use
        self._swap = ExitStack()
        self._followed = 0  # updates the averages have seen

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse weights that do not exist."""
        assert isinstance(pl_module, GenerativeModule)
        pl_module.resolve_weights(self.use)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue after the updates that a restored run has made."""
        assert isinstance(pl_module, GenerativeModule)
        self._followed = pl_module.updates

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the averages per update, none per micro-batch."""
        assert isinstance(pl_module, GenerativeModule)
        if pl_module.updates != self._followed:
            self._followed = pl_module.updates
            pl_module.update_ema()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Averages in."""
        assert isinstance(pl_module, GenerativeModule)
        self._swap.enter_context(pl_module.use_weights(self.use))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Weights back."""
        self._swap.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Weights back, so that whatever is saved after the error is what was trained."""
        self._swap.close()
