"""Where numbers and pictures go: TensorBoard, and plain files in the run folder that hold the same.

Everything here writes from rank 0 only and is on disk when the call returns, so a killed run loses nothing.
"""

import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from lightningmodules.base import GenerativeModule

SAMPLES_FOLDER = "samples"
LARGEST_PNG = 512  # pixels per side; larger pictures go to TensorBoard as JPEG, four times smaller and twenty faster

log = logging.getLogger(__name__)
_warned: set[str] = set()


class JsonlLogger(Logger):
    """Lightning logger that appends every scalar to a file, one JSON object per line.

    A row holds ``step`` (updates), ``samples_seen``, ``time`` (seconds since 1970), ``tag``, ``value`` and, for
    metrics, the settings that produced the value. A value that is not finite is null, and ``nonfinite`` names it.

    Args:
        path: the file, ``metrics.jsonl`` in a run folder.
        samples_seen: asked for the counter of every row.
    """

    def __init__(self, path: str | Path, samples_seen: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self.path, self._samples_seen = Path(path), samples_seen

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Empty: a run has one file for its whole life."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds the complete configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row per scalar."""
        self.write(metrics, step or 0, {})

    @rank_zero_only
    def write(self, metrics: Mapping[str, float], step: int, protocol: Mapping[str, Any]) -> None:
        """Append one row per scalar, all with the same ``protocol`` fields."""
        seen, now = self._samples_seen(), round(time.time(), 3)
        lines = []
        for tag, value in metrics.items():
            number = float(value)
            row = {"step": step, "samples_seen": seen, "time": now, "tag": tag, "value": number, **protocol}
            if not math.isfinite(number):
                row |= {"value": None, "nonfinite": str(number)}
            lines.append(json.dumps(row) + "\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:  # opened each time: on resume the file is cut, and no handle may outlive that
            file.write("".join(lines))


def scalar(trainer: L.Trainer, tag: str, value: float, **protocol: Any) -> None:
    """Log one number with the settings that produced it.

    Args:
        trainer: its module gives the step, its loggers take the number.
        tag: for example ``metrics/fd_digits``.
        value: the number, equal on all ranks.
        protocol: further fields of the row in ``metrics.jsonl``; anything JSON can hold.
    """
    scalars(trainer, {tag: value}, **protocol)


def scalars(trainer: L.Trainer, values: Mapping[str, float], **protocol: Any) -> None:
    """Log several numbers of one step; see :func:`scalar`.

    Rows written during a validation say so: when it was cut short they go, and the continued run writes them anew.
    """
    module = trainer.lightning_module
    assert isinstance(module, GenerativeModule)
    numbers = {tag: float(value) for tag, value in values.items()}
    module.latest.update(numbers)
    for logger in trainer.loggers:
        if isinstance(logger, JsonlLogger):
            logger.write(numbers, module.updates, {"validation": True, **protocol} if trainer.validating else protocol)
        else:
            logger.log_metrics(numbers, step=module.updates)
            _flush(logger)


def picture(trainer: L.Trainer, tag: str, image: bytes | np.ndarray) -> Path | None:
    """Log one picture.

    Args:
        trainer: its module gives the step, its loggers take the picture.
        tag: for example ``samples/ema/g1.5``.
        image: an encoded PNG or animated PNG, or a uint8 array (H, W, 3).

    Returns:
        The file ``<run>/samples/step_000001200/ema_g1.5.png``; None on ranks above 0.
    """
    if not trainer.is_global_zero:
        return None
    module = trainer.lightning_module
    assert isinstance(module, GenerativeModule)
    encoded = image if isinstance(image, bytes) else _png(image)
    path = picture_path(trainer, tag, module.updates)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_bytes(encoded)
    os.replace(aside, path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _to_board(logger, tag, encoded, module.updates)
    return path


def text(trainer: L.Trainer, tag: str, markdown: str, plain: str, kind: str) -> None:
    """Log a text: to TensorBoard as markdown, and as a file ``<run>/samples/step_000001200/ema_g1.0.jsonl``.

    Args:
        trainer: its module gives the step, its loggers take the text.
        tag: for example ``samples/ema/g1.0``.
        markdown: what TensorBoard shows.
        plain: content of the file.
        kind: the file's extension.
    """
    if not trainer.is_global_zero:
        return
    module = trainer.lightning_module
    assert isinstance(module, GenerativeModule)
    path = picture_path(trainer, tag, module.updates)
    path = path.with_name(f"{path.name.removesuffix('.png')}.{kind}")  # a tag may hold dots
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(plain, encoding="utf-8")
    os.replace(aside, path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown, module.updates)
            _flush(logger)


def picture_path(trainer: L.Trainer, tag: str, step: int) -> Path:
    """File of a picture; the tag's group ``samples/`` is the folder, further slashes become underscores."""
    name = tag.removeprefix(f"{SAMPLES_FOLDER}/").replace("/", "_")
    return Path(trainer.default_root_dir) / SAMPLES_FOLDER / f"step_{step:09d}" / f"{name}.png"


@rank_zero_only
def warn_once(key: str, message: str) -> None:
    """Warn the first time ``key`` comes up in this process; from rank 0 only."""
    if key not in _warned:
        _warned.add(key)
        log.warning(message)


def _flush(logger: Logger) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.flush()  # does nothing above rank 0


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _to_board(logger: TensorBoardLogger, tag: str, encoded: bytes, step: int) -> None:
    with Image.open(io.BytesIO(encoded)) as opened:
        width, height = opened.size
        if max(width, height) > LARGEST_PNG and not getattr(opened, "is_animated", False):
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
            encoded = buffer.getvalue()
    content = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    # The public add_image decodes and encodes again, which would lose animation and change the bytes.
    logger.experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=content)]), step)
    _flush(logger)
