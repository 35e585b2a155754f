"""How fast training goes, and how much of its time is spent waiting for data."""

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from callbacks.records import scalars, warn_once
from lightningmodules.base import GenerativeModule

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

GIB = 2.0**30
LONG_WAIT = 0.1  # of an update's time
MANY_UPDATES = 100
IDLE = 0.5  # of the reader threads' time
PEAKS = {  # dense bf16 operations per second, data sheets of the vendor
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Throughput(L.Callback):
    """Logs ``speed/*`` every ``trainer.log_every`` updates, without waiting for the device.

    =============================  ============================================================
    ``speed/samples_per_sec``      over all ranks
    ``speed/data_wait_percent``    share of time between the end of a batch and the start of the next
    ``speed/mfu_percent``          model operations per second over the device's dense bf16 peak
    ``speed/memory_gib``           highest device memory so far, or resident memory of the process
    ``speed/samples_seen``         counter of samples, since the x axis counts updates
    ``data/wait_share``            the same share, 0..1
    ``data/samples_per_s``         samples that reached this rank per second
    ``data/...``                   what the data module's ``health()`` says: epoch, bad samples, cache hits
    =============================  ============================================================

    After 100 updates on end that waited for data more than a tenth of their time, one warning says what is slow.

    Pauses for validation and checkpoints belong to neither training nor waiting and are left out.

    Args:
        peak_flops: operations per second of one device; None looks the device up and leaves mfu out if unknown.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak_flops = peak_flops
        self._flops = 0.0
        self._ended = 0.0
        self._restart(0)
        self._update = _Update(0.0)
        self._streak: _Streak | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks."""
        assert isinstance(pl_module, GenerativeModule)
        self._flops = pl_module.flops_per_sample()
        if self.peak_flops is None and pl_module.device.type == "cuda":
            name = torch.cuda.get_device_name(pl_module.device)
            self.peak_flops = next((peak for key, peak in PEAKS.items() if key in name), None)
        self._ended = time.perf_counter()
        self._restart(pl_module.samples_seen)
        self._paused = True
        self._update = _Update(self._ended)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is here: what passed since the last one was waiting, unless something else went on."""
        now = time.perf_counter()
        gap = now - self._ended
        if self._paused:
            self._away += gap
            self._update.paused = True
        else:
            self._waited += gap
            self._update.waited += gap
        self._paused = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the end of an interval."""
        assert isinstance(pl_module, GenerativeModule)
        self._ended = time.perf_counter()
        if pl_module.micro_batches % trainer.accumulate_grad_batches:
            return
        self._watch(trainer)
        if pl_module.updates % pl_module.log_every == 0:
            self._log(trainer, pl_module)
            self._restart(pl_module.samples_seen)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A pause."""
        self._paused = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A pause."""
        self._paused = True

    def _restart(self, samples: int) -> None:
        # An interval begins where the last one ended, as its first wait does; a later beginning would not hold it.
        self._since, self._samples = self._ended, samples
        self._waited = self._away = 0.0
        self._paused = False

    def _watch(self, trainer: L.Trainer) -> None:
        """Count updates on end that waited too long for data; warn once when there are many."""
        update, self._update = self._update, _Update(self._ended)
        if update.paused:
            return
        seconds = self._ended - update.begun
        if update.waited <= LONG_WAIT * seconds:
            self._streak = None
            return
        spent = getattr(trainer.datamodule, "spent", None)  # type: ignore[attr-defined]
        if self._streak is None:
            self._streak = _Streak(**(spent() if spent else {}))
        streak = self._streak
        streak.updates += 1
        streak.seconds += seconds
        streak.waited += update.waited
        if streak.updates == MANY_UPDATES:
            now = spent() if spent else {}
            warn_once("data wait", _bottleneck(streak, now, int(getattr(trainer.datamodule, "workers", 0))))  # type: ignore[attr-defined]

    def _log(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        seconds = max(self._ended - self._since - self._away, 1e-9)
        rate = (module.samples_seen - self._samples) / seconds
        values = {
            "speed/samples_per_sec": rate,
            "speed/data_wait_percent": 100.0 * self._waited / seconds,
            "speed/memory_gib": _memory(module.device) / GIB,
            "speed/samples_seen": float(module.samples_seen),
            "data/wait_share": self._waited / seconds,
            "data/samples_per_s": rate / trainer.world_size,
        }
        health = getattr(trainer.datamodule, "health", None)  # type: ignore[attr-defined]
        if health is not None:
            values |= health()
        if self._flops and self.peak_flops:
            values["speed/mfu_percent"] = 100.0 * rate * self._flops / (self.peak_flops * trainer.world_size)
        scalars(trainer, values)


@dataclass
class _Update:
    """One update: when it began, and for how many seconds it waited for data."""

    begun: float
    waited: float = 0.0
    paused: bool = False


@dataclass
class _Streak:
    """Updates on end that waited long, and what the reader threads had spent when it began; all in seconds."""

    busy: float = 0.0
    reading: float = 0.0
    updates: int = 0
    seconds: float = 0.0
    waited: float = 0.0


def _bottleneck(streak: _Streak, now: dict[str, float], workers: int) -> str:
    """What keeps training waiting, and what to do about it."""
    begin = (
        f"Training waited for data {streak.waited / streak.seconds:.0%} of the time over the last {streak.updates}"
        " updates."
    )
    busy = now.get("busy", 0.0) - streak.busy
    reading = now.get("reading", 0.0) - streak.reading
    if not busy:
        return f"{begin} The data module does not say why."
    if not workers:
        return f"{begin} It reads in the training thread: set data.workers=2."
    load = busy / (workers * streak.seconds)
    if load < IDLE:
        return (
            f"{begin} The {workers} reader threads were idle {1 - load:.0%} of it, so the bottleneck is the transfer of"
            " batches to the device, or callbacks between updates."
        )
    if "reading" not in now:
        return f"{begin} The bottleneck is reading and preparing batches. Set data.workers={2 * workers}."
    if reading > busy / 2:
        return (
            f"{begin} The bottleneck is reading: {reading / busy:.0%} of the reader threads' time. Put the shards on a"
            f" faster disk, or read with more threads: data.workers={2 * workers}."
        )
    cores = os.cpu_count() or 1
    more = f"set data.workers={min(2 * workers, cores)}" if cores > workers else "use a machine with more cores"
    return (
        f"{begin} The bottleneck is decoding: {1 - reading / busy:.0%} of the reader threads' time. {more[0].upper()}"
        f"{more[1:]} ({cores} here), or store the images in the size that is trained on."
    )


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1.0 if sys.platform == "darwin" else 1024.0)  # macOS counts bytes, Linux KiB
