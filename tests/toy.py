"""The smallest room and data there can be, for tests of what all rooms share."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from torch import nn

from callbacks.checkpointing import Schedule
from lightningmodules.base import GenerativeModule
from lightningmodules.shared.codecs import Pixels
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import SampleNoise
from lightningmodules.shared.optim import warmup_cosine
from platform import config, weights
from platform.stopping import StopFlag
from platform.strategy import Sharded, shard


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(64, 32), nn.Linear(32, 64), nn.Dropout(0.1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.dropout(torch.tanh(self.inner(x))))


class Toy(GenerativeModule):
    needs = frozenset({"image"})

    def __init__(self, ema_decays: tuple[float, ...] = (0.9, 0.99)) -> None:
        super().__init__(
            codec=Pixels(8, 1),
            optimizer=partial(torch.optim.AdamW, lr=1e-2),
            schedule=partial(warmup_cosine, warmup_steps=3),
            ema_decays=ema_decays,
        )

    def build(self) -> None:
        self.net = Denoiser()

    def averaged(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def loss(self, batch: Any) -> dict[str, torch.Tensor]:
        x = self.codec.encode(batch).flatten(1)
        return {"loss": (self.net(x + 0.1 * torch.randn_like(x)) - x).square().mean()}

    def sample(self, seeds: Any, condition: Any = None, *, guidance: float = 1.0, noise: Any = None) -> torch.Tensor:
        draws = noise or SampleNoise(seeds)
        return self.net(draws.normal(64)).unflatten(1, (1, 8, 8))

    def null_condition(self, n: int) -> Condition:
        return Condition()


def pictures(first: int, count: int) -> dict[str, Any]:
    """Picture number i is a function of i."""
    draws = [torch.Generator().manual_seed(i) for i in range(first, first + count)]
    images = [torch.randint(0, 256, (1, 8, 8), generator=draw, dtype=torch.uint8) for draw in draws]
    return {"image": torch.stack(images), "key": [str(i) for i in range(first, first + count)]}


class Endless:
    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return self._start()


class ToyData(L.LightningDataModule):
    batch_size = 8

    def train_dataloader(self) -> Endless:
        trainer = self.trainer
        assert trainer is not None
        ranks, rank, accumulation = trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches
        rows = self.batch_size // (ranks * accumulation)
        start = trainer.lightning_module.samples_seen

        def batches() -> Iterator[Any]:
            position = start
            while True:
                for index in range(accumulation):
                    yield pictures(position + (index * ranks + rank) * rows, rows)
                position += self.batch_size

        return Endless(batches)

    def val_dataloader(self) -> "Held":
        return Held()


class Held:
    """Held-out batches; with a length, as real ones have."""

    def __iter__(self) -> Iterator[Any]:
        return iter([pictures(1000 + 4 * i, 4) for i in range(3)])

    def __len__(self) -> int:
        return 3


class Average(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if pl_module.micro_batches % trainer.accumulate_grad_batches == 0:
            pl_module.update_ema()


def fit(
    folder: Path,
    *callbacks: L.Callback,
    steps: int = 12,
    stop_at: int = 0,
    polls: int = 1,
    accumulation: int = 1,
    **schedule: Any,
) -> tuple[Toy, Schedule, list[Any]]:
    """Train the toy; continue from the newest checkpoint of ``folder`` if there is one.

    Returns:
        The module, its schedule, and what was logged as ``(phase, step, value)``.
    """
    room, built = Toy(), []
    asked: list[int] = []

    def stop() -> bool:
        if stop_at and room.updates >= stop_at:
            asked.append(room.updates)
        return len(asked) >= polls  # more than one poll: in the middle of a validation

    flag = StopFlag(stop)
    room.stop_requested, room.shard = flag.poll, shard
    settings = {"val_every": 5, "every": 4, **schedule}
    plan = Schedule(
        folder,
        save=lambda path: built[0].save_checkpoint(path) is None,
        prune=lambda: None,
        should_stop=flag.update,
        **settings,
    )
    built.append(
        L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=Sharded(),
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulation,
            val_check_interval=1 << 62,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=False,
            log_every_n_steps=1,
            callbacks=[Average(), *callbacks, plan],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            gradient_clip_val=1.0,
        )
    )
    logged: list[Any] = []
    log = room._log

    def spy(phase: str, terms: Any, reduce: bool = True) -> None:
        log(phase, terms, reduce)
        logged.append((phase, room.updates, room.latest[f"{phase}/loss"]))

    room._log = spy  # type: ignore[method-assign]
    newest = max(folder.glob("step-????????"), default=None)
    built[0].fit(room, datamodule=ToyData(), ckpt_path=newest, weights_only=False)
    return room, plan, logged


def state(room: Toy) -> dict[str, torch.Tensor]:
    """Every tensor a continued run must share with an uninterrupted one."""
    moments = {
        f"{index}.{name}": value
        for index, entry in enumerate(room.trainer.optimizers[0].state.values())
        for name, value in entry.items()
    }
    return {**room.state_dict(), **moments}


def untrained(name: str, folder: Path) -> Any:
    """The room of an experiment in miniature, whose weights are in ``folder`` now."""
    cfg = config.compose(name, [], tiny=True)
    room = hydra.utils.instantiate(cfg.module, _convert_="all")
    room.configure_model()
    weights._write(folder, room.weights("raw"), cfg, {"weights": "raw", "step": 0})
    return room
