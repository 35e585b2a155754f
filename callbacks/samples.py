"""Pictures of samples during training, from the same seeds for the whole life of a run."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from callbacks.pictures import animation, encode_png, even_columns, film_strip, grid, read_tiles, short_count, to_tiles
from callbacks.records import SAMPLES_FOLDER, picture, picture_path, scalars, warn_once
from callbacks.sampling import draw, guidance_of, plain
from callbacks.validations import AtValidations
from lightningmodules.base import GenerativeModule
from lightningmodules.shared.codecs import Pixels

LARGE = 32  # samples with longer sides are shown 4 by 4
STRIP_COLUMNS = 12
FRAMES = 24


class Samples(AtValidations):
    """Grids of samples at every validation, to TensorBoard and to ``samples/step_*/`` in the run folder.

    ============================  ==============================================================================
    ``samples/ema/g1.5``          averaged weights, the experiment's guidance
    ``samples/raw/g1.5``          the same seeds and labels with the weights being trained
    ``samples/classes``           one row per class, at most ten classes
    ``samples/guidance``          one row per guidance value, same seeds
    ``samples/trajectory``        animated path from noise to picture, for rooms that have ``trajectory``
    ``samples/progress``          the same seeds at up to twelve moments of the run, rebuilt from the files
    ``samples/reconstruction``    data through the model and back, for rooms that have ``reconstruct``
    ``samples/data``              the first training batch as the network sees it, at step 0
    ============================  ==============================================================================

    A picture that fails is reported once and never stops training. All ranks sample together (a sharded network
    needs every rank), rank 0 writes.

    Args:
        settings: keywords of the room's ``sample``; the experiment's ``sampling`` block.
        weights: kinds to show; ``ema`` is the first average. The first is used for all other pictures.
        guidances: rows of ``samples/guidance``.
        guidance_every: draw that picture at every n-th validation, and at the last; 0 for never.
        trajectory_every: the same for the path and the reconstruction.
        first_seed: seeds are ``first_seed, first_seed + 1, ...``.
        chunk: samples per call of the network.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        weights: Sequence[str] = ("ema", "raw"),
        guidances: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
        guidance_every: int = 4,
        trajectory_every: int = 8,
        first_seed: int = 0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = plain(settings or {})
        self.weights, self.guidances = tuple(weights), tuple(guidances)
        self.guidance_every, self.trajectory_every = guidance_every, trajectory_every
        self.first_seed, self.chunk = first_seed, chunk

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before anything is trained."""
        assert isinstance(pl_module, GenerativeModule)
        for kind in self.weights:
            pl_module.resolve_weights(kind)
        pl_module.check_settings(self.settings)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the first batch of the run; runs before the module counts it."""
        assert isinstance(pl_module, GenerativeModule)
        if pl_module.micro_batches:
            return
        with _survive("samples/data"), torch.no_grad():
            images = pl_module.codec.decode(pl_module.codec.encode(batch))
            shown = _show(pl_module, images[: 64 if _size(pl_module) <= LARGE else 16])
            details = ["as the network sees it", f"{len(shown)} of {len(images)} in the first batch"]
            drawn = grid(shown, even_columns(len(shown), 8), heading="data", details=details)
            picture(trainer, "samples/data", encode_png(drawn))
        if hasattr(pl_module, "reconstruct"):  # before anything is learnt, the way there and back must fit already
            with _survive("samples/reconstruction", trainer.world_size == 1), torch.no_grad():
                self._reconstruct(trainer, pl_module, {name: value[:8] for name, value in batch.items()})

    def at_validation(self, trainer: L.Trainer, module: GenerativeModule) -> bool:
        """Draw everything that is due; give up between two pictures when a stop is asked for."""
        jobs: list[tuple[str, Callable[[L.Trainer, GenerativeModule], None]]] = [("samples", self._main)]
        if module.num_classes > 1:
            jobs.append(("samples/classes", self._classes))
            if self.guidances and self.due(trainer, module, self.guidance_every):
                jobs.append(("samples/guidance", self._guidance))
        if self.due(trainer, module, self.trajectory_every):
            if hasattr(module, "trajectory"):
                jobs.append(("samples/trajectory", self._trajectory))
            if hasattr(module, "reconstruct"):
                jobs.append(("samples/reconstruction", self._reconstruction))
        jobs.append(("samples/progress", self._progress))
        for tag, job in jobs:
            if module.stop_requested():
                return False
            # With several ranks a sampling error must surface: the others would wait for this rank for ever.
            with _survive(tag, trainer.world_size == 1), torch.no_grad():
                job(trainer, module)
        return True

    # ---- the pictures ---------------------------------------------------------------------------------------------

    def _main(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        columns, labels, names = _arrangement(module)
        seeds = self._seeds(len(labels))
        health: dict[str, float] = {}
        for kind in dict.fromkeys(module.resolve_weights(kind) for kind in self.weights):
            with module.use_weights(kind):
                x = draw(module, seeds, labels, self.settings, self.chunk)
                health = health or _health(module, x)
                draw_grid = functools.partial(
                    grid,
                    _tiles(module, x),
                    columns,
                    heading=kind,
                    details=self._details(module, seeds),
                    column_labels=names,
                )
                self._publish(trainer, f"samples/{_group(kind)}/g{guidance_of(self.settings)}", draw_grid)
        scalars(trainer, health)

    def _classes(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        rows, columns = min(10, module.num_classes), 8 if _size(module) <= LARGE else 4
        classes = [row * module.num_classes // rows for row in range(rows)]
        seeds = self._seeds(columns)
        labels = [label for label in classes for _ in seeds]
        with module.use_weights(self.weights[0]):
            tiles = _tiles(module, draw(module, seeds * rows, labels, self.settings, self.chunk))
            details = [module.active_weights, *self._details(module, seeds)]
        names = [str(label) for label in classes]
        self._publish(
            trainer,
            "samples/classes",
            lambda: grid(tiles, columns, heading="classes", details=details, row_labels=names),
        )

    def _guidance(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        columns, labels, _ = _arrangement(module)
        columns = min(8, columns)
        seeds, labels = self._seeds(columns), labels[:columns]
        parts = []
        with module.use_weights(self.weights[0]):
            for guidance in self.guidances:
                settings = {**self.settings, "guidance": guidance}
                parts.append(_tiles(module, draw(module, seeds, labels, settings, self.chunk)))
            details = [module.active_weights, *self._details(module, seeds, guidance=False)]
        names = [str(float(guidance)) for guidance in self.guidances]
        self._publish(
            trainer,
            "samples/guidance",
            lambda: grid(np.concatenate(parts), columns, heading="guidance", details=details, row_labels=names),
        )

    def _trajectory(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        _, labels, _ = _arrangement(module)
        seeds = self._seeds(4)
        path: Callable[..., list[Tensor]] = getattr(module, "trajectory")  # noqa: B009 - rooms may lack it
        with module.use_weights(self.weights[0]):
            states = path(seeds, module.condition(labels[:4]), **self.settings)
        picked = _evenly(len(states), FRAMES)
        frames = [_tiles(module, states[index]) for index in picked]
        captions = [f"step {module.updates}   {index} / {len(states) - 1}" for index in picked]
        self._publish(trainer, "samples/trajectory", lambda: animation(frames, 2, captions))

    def _reconstruction(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
        batch = trainer.strategy.batch_to_device({name: value[:8] for name, value in batch.items()})
        self._reconstruct(trainer, module, batch)

    def _reconstruct(self, trainer: L.Trainer, module: GenerativeModule, batch: Mapping[str, Any]) -> None:
        back: Callable[..., tuple[Tensor, Tensor]] = getattr(module, "reconstruct")  # noqa: B009 - rooms may lack it
        with module.use_weights(self.weights[0]):
            x, again = back(batch)
        error = float((x - again).abs().max())
        scalars(trainer, {"health/reconstruction_error": error})
        tiles = np.concatenate([_tiles(module, x), _tiles(module, again)])
        details = [f"step {module.updates}", f"largest error {error:.2g}"]
        self._publish(
            trainer,
            "samples/reconstruction",
            lambda: grid(tiles, len(x), heading="reconstruction", details=details, row_labels=["in", "out"]),
        )

    def _progress(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        kind = _group(module.resolve_weights(self.weights[0]))
        tag = f"samples/{kind}/g{guidance_of(self.settings)}"
        columns, _, _ = _arrangement(module)
        self._publish(trainer, "samples/progress", lambda: _strip(trainer, tag, columns, module.updates, kind))

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _seeds(self, count: int) -> list[int]:
        return list(range(self.first_seed, self.first_seed + count))

    def _details(self, module: GenerativeModule, seeds: Sequence[int], guidance: bool = True) -> list[str]:
        parts = [f"step {module.updates}", f"{short_count(module.samples_seen)} images"]
        if guidance:
            parts.append(f"guidance {guidance_of(self.settings)}")
        return [*parts, f"seeds {seeds[0]}-{seeds[-1]}"]

    def _publish(self, trainer: L.Trainer, tag: str, build: Callable[[], Any]) -> None:
        if not trainer.is_global_zero:
            return
        with _survive(tag):
            drawn = build()
            picture(trainer, tag, drawn if isinstance(drawn, bytes) else encode_png(drawn))


@contextmanager
def _survive(what: str, active: bool = True) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not active:
            raise
        warn_once(
            what, f"The picture {what} failed and is left out ({type(error).__name__}: {error}). Training goes on."
        )


def _size(module: GenerativeModule) -> int:
    return int(getattr(module.codec, "size", module.codec.shape[-1]))


def _group(kind: str) -> str:
    return "raw" if kind == "raw" else "ema"


def _arrangement(module: GenerativeModule) -> tuple[int, list[int], list[str]]:
    """Columns, labels and column names of the main grid: a class per column when the classes are few."""
    small, classes = _size(module) <= LARGE, module.num_classes
    columns, rows = (8, 8) if small else (4, 4)
    if 4 <= classes <= (10 if small else 4):
        return classes, [index % classes for index in range(classes * rows)], [str(index) for index in range(classes)]
    count = columns * rows
    if classes >= count:
        return columns, [index * classes // count for index in range(count)], []
    return columns, [index % max(1, classes) for index in range(count)], []


def _tiles(module: GenerativeModule, x: Tensor) -> np.ndarray:
    return _show(module, module.codec.decode(x.nan_to_num(nan=-1.0) if x.is_floating_point() else x))


def _show(module: GenerativeModule, images: Tensor) -> np.ndarray:
    return to_tiles(images, int(getattr(module.codec, "white", 255)))


def _health(module: GenerativeModule, x: Tensor) -> dict[str, float]:
    flat = x.flatten(1)
    finite = flat.isfinite().all(1)
    values = {"health/nonfinite_samples": float((~finite).sum())}
    if isinstance(module.codec, Pixels):  # other spaces have no range to leave
        # Not >: a room that clips by itself leaves values of exactly 1 behind.
        values["health/clipped_fraction"] = float((flat[finite].abs() >= 1.0).double().mean()) if finite.any() else 1.0
    return values


def _evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``range(count)``, evenly spread, first and last included."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def _strip(trainer: L.Trainer, tag: str, rows: int, now: int, kind: str) -> Any:
    """Film strip over the saved grids up to step ``now``; later ones belong to an attempt that was cut off."""
    folder = Path(trainer.default_root_dir) / SAMPLES_FOLDER
    steps = sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))
    steps = [step for step in steps if step <= now and picture_path(trainer, tag, step).is_file()]
    steps = [steps[index] for index in _evenly(len(steps), STRIP_COLUMNS)]
    columns = {short_count(step): read_tiles(picture_path(trainer, tag, step))[:rows] for step in steps}
    shape = columns[short_count(now)].shape  # a grid of another arrangement cannot stand in the same strip
    columns = {label: column for label, column in columns.items() if column.shape == shape}
    return film_strip(list(columns.values()), list(columns), "progress", [kind, "same seeds, step above each column"])
