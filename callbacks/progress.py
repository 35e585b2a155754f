"""One line that says how training is going: live on a terminal, one per interval in a log."""

import logging
import re
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.live import Live
from rich.text import Text

from callbacks.pictures import short_count
from lightningmodules.base import GenerativeModule

REFRESH_SEC = 0.25
log = logging.getLogger(__name__)
MEASURED = ("val/", "metrics/")  # tags that belong to a validation


class Progress(L.Callback):
    """Replaces Lightning's bar.

    On a terminal one live line, with as much as fits its width; elsewhere (batch logs, pipes) one plain line per
    interval, without carriage returns or colour. Colour is also off where NO_COLOR is set. After a validation one line
    with its numbers stays.

    Args:
        every: updates between plain lines; None for ``trainer.log_every``.
        console: where to write; None for standard output.
    """

    def __init__(self, every: int | None = None, console: Console | None = None) -> None:
        self.every = every
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._started = self._drawn = self._saved = 0.0
        self._first = 0
        self._metric_step = 0
        self._before: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; it counts this attempt, not earlier ones."""
        assert isinstance(pl_module, GenerativeModule)
        self._started, self._first = time.monotonic(), pl_module.updates
        if trainer.is_global_zero and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the line when it is due."""
        assert isinstance(pl_module, GenerativeModule)
        if not trainer.is_global_zero or pl_module.micro_batches % trainer.accumulate_grad_batches:
            return
        now, last = time.monotonic(), pl_module.updates >= trainer.max_steps
        due = last or pl_module.updates % (self.every or pl_module.log_every) == 0
        if due:
            log.info("%s", self._line(trainer, pl_module, now))
        if self._live is not None:
            if now - self._drawn >= REFRESH_SEC or last:
                self._drawn = now
                self._live.update(self._styled(self._line(trainer, pl_module, now)), refresh=True)
        elif due:
            self._print(self._line(trainer, pl_module, now))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so: a validation with samples and metrics can take a while."""
        assert isinstance(pl_module, GenerativeModule)
        kept = pl_module.latest
        self._before = {tag: kept.pop(tag) for tag in list(kept) if tag.startswith(MEASURED)}
        if self._live is not None:
            line = self._line(trainer, pl_module, time.monotonic(), validating=True)
            self._live.update(self._styled(line), refresh=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One line with the numbers of this validation."""
        assert isinstance(pl_module, GenerativeModule)
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        latest = pl_module.latest
        told = [tag for tag in latest if tag == "val/loss" or (tag.startswith("metrics/") and not tag.endswith("_raw"))]
        pl_module.latest = {**self._before, **latest}  # what was not measured this time keeps its value
        if told:
            if any(tag.startswith("metrics/") for tag in told):
                self._metric_step = pl_module.updates
            parts = [f"{_short(tag)} {latest[tag]:.4g}" for tag in told]
            line = "  ".join([f"validation at {pl_module.updates}", *parts])
            self._print(line)
            log.info("%s", line)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember when."""
        self._saved = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the terminal as it was."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        self.console.print(self._styled(line))

    def _styled(self, line: str) -> Text:
        """Names pale, numbers plain; without colour the bare text."""
        text = Text(line, no_wrap=True, overflow="ellipsis")
        if not self.console.no_color:
            text.highlight_regex(r"(?<= )(img|rows|loss|grad|data|mem|mfu|ckpt|ago|eta|validating)\b", "dim")
            text.highlight_regex(r"^(step|validation at) [\d/.kMG]+", "bold")
        return text

    def _line(self, trainer: L.Trainer, module: GenerativeModule, now: float, validating: bool = False) -> str:
        """``step 1200/400k  307k img  loss 2.31  grad 0.42  812 img/s  data 2%  fd_digits 0.061@1000  eta 3d04h``."""
        parts = self._parts(trainer, module, now)
        if validating:
            parts[-1] = "validating"
        if self._live is not None:
            for dropped in DROPPED:
                if len("  ".join(parts)) > self.console.width:
                    parts = [part for part in parts if not re.search(dropped, part)]
        return "  ".join(parts)

    def _parts(self, trainer: L.Trainer, module: GenerativeModule, now: float) -> list[str]:
        step, total, values = module.updates, trainer.max_steps, module.latest
        parts = [f"step {step}/{short_count(total) if total >= 10_000 else total}"]
        unit = "rows" if hasattr(module.codec, "tokenizer") else "img"
        parts.append(f"{short_count(module.samples_seen)} {unit}")
        for tag, form in FORMS:
            if tag in values:
                parts.append(form.format(values[tag], unit=unit))
        distance = next((tag for tag in values if tag.startswith("metrics/f")), None)
        if distance is not None:
            parts.append(f"{_short(distance)} {values[distance]:.3g}@{self._metric_step}")
        if self._saved:
            parts.append(f"ckpt {duration(now - self._saved)} ago")
        done = step - self._first
        left = duration((now - self._started) / done * max(0, total - step)) if done > 0 else "?"
        return [*parts, f"eta {left}"]


FORMS = (
    ("train/loss", "loss {:.4g}"),
    ("train/grad_norm", "grad {:.3g}"),
    ("speed/samples_per_sec", "{:.0f} {unit}/s"),
    ("speed/mfu_percent", "mfu {:.0f}%"),
    ("speed/data_wait_percent", "data {:.0f}%"),
    ("speed/memory_gib", "mem {:.1f}G"),
)


# first to go on a narrow terminal
DROPPED = ("^mem ", "^mfu ", " (img|rows)$", "^ckpt ", "^grad ", "^data ", "@", " (img|rows)/s$")


def duration(seconds: float) -> str:
    """Two units at most: 40s, 12m30s, 4h05m, 3d04h."""
    whole = round(max(0.0, seconds))
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{name}"
    return f"{whole}s"


def _short(tag: str) -> str:
    return tag.removeprefix("metrics/")
