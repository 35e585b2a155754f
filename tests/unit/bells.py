"""A room for callback tests: one Gaussian per class over the 8x8 digits, with everything a room can offer."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn

from callbacks.records import JsonlLogger
from lightningmodules.base import GenerativeModule
from lightningmodules.shared.codecs import Pixels
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import SampleNoise

LEVELS = 17


class Bell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_sd = nn.Parameter(torch.zeros(10, 64)), nn.Parameter(torch.zeros(10, 64) - 0.5)

    def forward(self, x: Tensor, label: Tensor, inverse: bool = False) -> Tensor:
        if inverse:
            return self.mean[label] + x * self.log_sd[label].exp()
        z = (x - self.mean[label]) * (-self.log_sd[label]).exp()
        return (-0.5 * z.square() - self.log_sd[label] - 0.5 * math.log(2 * math.pi)).sum(1)


class Bells(GenerativeModule):
    needs = frozenset({"image", "label"})
    num_classes = 10
    likelihood = "exact"

    def __init__(self, ema_decays: Sequence[float] = (0.9,)) -> None:
        codec = Pixels(8, 1, levels=LEVELS, white=240)
        super().__init__(codec=codec, optimizer=partial(torch.optim.Adam, lr=0.05), ema_decays=ema_decays)

    def build(self) -> None:
        self.net = Bell()

    def averaged(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def loss(self, batch: Any) -> dict[str, Tensor]:
        x = self.codec.dequantize(batch, torch.rand(batch["image"].shape)).flatten(1)
        return {"loss": -self.net(x, batch["label"]).mean() / 64}

    def sample(self, seeds: Any, condition: Any = None, *, guidance: float = 1.0, noise: Any = None) -> Tensor:
        assert len(condition) == len(seeds)
        draws = (noise or SampleNoise(seeds)).normal(64)
        x = self.net(draws / guidance, condition.label, inverse=True)
        return ((x + 1) * LEVELS / (LEVELS - 1) - 1).unflatten(1, (1, 8, 8))

    def trajectory(self, seeds: Any, condition: Any, **settings: Any) -> list[Tensor]:
        last = self.sample(seeds, condition, **settings)
        return [last * step / 30 for step in range(31)]

    def reconstruct(self, batch: Any) -> tuple[Tensor, Tensor]:
        x = self.codec.encode(batch)
        return x, x + 1e-3

    def null_condition(self, n: int) -> Condition:
        return Condition(label=torch.full((n,), -1))

    def log_likelihood(self, batch: Any, *, seeds: Any = None) -> Tensor:
        x = self.codec.dequantize(batch, SampleNoise(seeds).uniform(1, 8, 8)).flatten(1)
        return self.net(x, batch["label"]) + 64 * math.log(2 / LEVELS)

    def classify(self, batch: Any, *, draws: int = 1) -> Tensor:
        x = self.codec.dequantize(batch, torch.full(batch["image"].shape, 0.5)).flatten(1)
        scores = [self.net(x, torch.full((len(x),), label)) for label in range(10)]
        return torch.stack(scores, 1).argmax(1)

    def flops_per_sample(self) -> float:
        return 1e3


class DigitData(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        self.images = torch.tensor(digits.images * 15).to(torch.uint8)[:, None]
        self.labels = torch.tensor(digits.target)

    def _batch(self, rows: slice) -> dict[str, Any]:
        keys = [f"{row:06d}" for row in range(len(self.labels))[rows]]
        return {"image": self.images[rows], "label": self.labels[rows], "key": keys}

    def train_dataloader(self) -> Any:
        return _Loader(lambda: (self._batch(slice(64 * n, 64 * n + 64)) for _ in count() for n in range(21)))

    def val_dataloader(self) -> Any:
        return _Loader(lambda: (self._batch(slice(start, start + 50)) for start in range(1400, 1550, 50)))

    def reference_images(self, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        return self.images[:1400][:limit], self.labels[:1400][:limit]


class _Loader:  # Lightning takes a list for several loaders
    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return self._start()


def trainer(folder: Path, callbacks: Sequence[L.Callback], room: Bells, **settings: Any) -> L.Trainer:
    board = TensorBoardLogger(folder / "board", name="", version="")
    defaults: dict[str, Any] = {"max_steps": 20, "val_check_interval": 10, "log_every_n_steps": 5}
    return L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, max_epochs=-1, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, logger=[board, JsonlLogger(folder / "metrics.jsonl", lambda: room.samples_seen)],
        callbacks=list(callbacks), use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **{**defaults, **settings},
    )  # fmt: skip


def fit(
    folder: Path,
    *callbacks: L.Callback,
    room: Bells | None = None,
    data: L.LightningDataModule | None = None,
    **settings: Any,
) -> Bells:
    room = room or Bells()
    trainer(folder, callbacks, room, **settings).fit(room, datamodule=data or DigitData())
    return room
