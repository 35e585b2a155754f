"""The contract every room keeps, and the only plumbing the rooms share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightningmodules.shared.codecs import Batch, Codec
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import Noise, fold_seed

RAW = "raw"


class GenerativeModule(L.LightningModule):
    """A generative method: it can compute its loss and draw samples, and may know likelihoods.

    A room implements :meth:`build`, :meth:`averaged`, :meth:`loss`, :meth:`sample` and :meth:`null_condition`; it may
    add ``log_likelihood(batch, *, seeds=None)`` (with ``likelihood = "exact"`` or ``"bound"``), ``classify(batch)`` and
    ``trajectory(seeds, condition, **settings)``, which callbacks use where they find them.

    Args:
        codec: between data space and model space.
        optimizer: takes the parameters, returns the optimiser.
        schedule: ``(step, total_steps) -> factor`` of the learning rate, or None for a constant one.
        ema_decays: one fp32 average of the weights per decay in (0, 1); the first is the one used for evaluation.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    num_classes: int = 0

    def __init__(
        self,
        *,
        codec: Codec,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float] | None = None,
        ema_decays: Sequence[float] = (),
    ) -> None:
        super().__init__()
        for decay in ema_decays:
            if not 0.0 < decay < 1.0:
                raise ValueError(f"module.ema_decays holds {decay}; each decay lies in (0, 1). Type e.g. [0.999].")
        self.codec = codec
        self.start: str | None = None  # weights that build() begins with; the runner clears it where others follow
        self._optimizer, self._schedule = optimizer, schedule
        self.ema_decays = tuple(ema_decays)
        self.run_seed = 0
        self.shard: Callable[[GenerativeModule], None] | None = None  # set by the runner: wraps networks for many ranks
        self.stop_requested: Callable[[], bool] = lambda: False  # set by the runner; long phases poll it and give up
        self.micro_batches = self.samples_seen = self.updates = 0
        self.latest: dict[str, float] = {}  # newest logged scalars, for progress lines
        self.active_weights = RAW
        self._only: str | None = None  # the one kind there is, for weights that came alone
        self._built = self._checked = False
        self._followed: list[tuple[str, nn.Parameter]] = []
        self._terms: dict[str, list[Tensor]] = {}
        self._val_sums: dict[str, Tensor] = {}

    # ---- what a room provides -------------------------------------------------------------------------------------

    def build(self) -> None:
        """Create the networks; called once, with the run's seed set."""
        raise TypeError(f"{type(self).__name__} must define build().")

    def averaged(self) -> dict[str, nn.Module]:
        """Networks that the averages follow and that exported weights hold."""
        raise TypeError(f"{type(self).__name__} must define averaged().")

    def shard_units(self) -> list[nn.Module]:
        """Blocks to shard and compile one by one; the networks themselves are added by the runner."""
        return []

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one batch; ``"loss"`` is minimised, the others are logged."""
        raise TypeError(f"{type(self).__name__} must define loss().")

    def sample(
        self,
        seeds: Sequence[int],
        condition: Condition | None = None,
        *,
        guidance: float = 1.0,
        noise: Noise | None = None,
    ) -> Tensor:
        """Draw one sample per seed, (len(seeds), *codec.shape)."""
        raise TypeError(f"{type(self).__name__} must define sample().")

    def null_condition(self, n: int) -> Condition:
        """The condition that means "nothing", n rows."""
        raise TypeError(f"{type(self).__name__} must define null_condition().")

    def condition(self, labels: Sequence[int]) -> Condition | None:
        """The condition that stands for classes, on the module's device; None for rooms without classes.

        A room conditioned on text overrides it with what it makes of the classes' names.
        """
        if not self.num_classes:
            return None
        return Condition(label=torch.tensor(list(labels), dtype=torch.int64)).to(self.device)

    def flops_per_sample(self) -> float:
        """Floating-point operations of one training sample, forward and backward; 0 when unknown."""
        return 0.0

    # ---- what the base does ---------------------------------------------------------------------------------------

    def generate(self, seeds: Sequence[int], condition: Condition | None = None, **settings: Any) -> Tensor:
        """Samples in data space: ``codec.decode(sample(...))``."""
        return self.codec.decode(self.sample(seeds, condition, **settings))

    def check_settings(self, settings: Mapping[str, Any], condition: Condition | None = None) -> None:
        """Refuse what ``sample`` could not draw with, before there is a network and anything is trained.

        Args:
            settings: keywords of ``sample``; those left out are as its signature says.
            condition: what it is asked for, such as a prompt.

        Raises:
            ValueError: settings that no sample could be drawn with. A room says here what it can tell by then.
        """

    def configure_model(self) -> None:
        """Build, shard, then copy the shadows; in this order, so that shadows are sharded like their weights."""
        if self._built:
            return
        self._built = True
        torch.manual_seed(fold_seed(self.run_seed))  # the same initial weights on every rank
        self.build()
        if self.shard is not None:
            self.shard(self)
        self._followed = [
            (f"{network}.{name}", parameter)
            for network, module in self.averaged().items()
            for name, parameter in module.named_parameters()
        ]
        self.shadows = nn.ModuleDict()
        for decay in self.ema_decays:
            copies = {_flat(name): _shadow(parameter) for name, parameter in self._followed}
            self.shadows[_flat(f"ema{decay:g}")] = nn.ParameterDict(copies)

    def configure_optimizers(self) -> Any:
        """One optimiser over everything trainable, its curve stepped every update."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        takes_names = getattr(getattr(self._optimizer, "func", None), "takes_names", False)
        optimizer = self._optimizer(named if takes_names else [parameter for _, parameter in named])
        if self._schedule is None:
            return optimizer
        total, schedule = int(self.trainer.max_steps), self._schedule
        curve = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": curve, "interval": "step"}}

    def on_train_start(self) -> None:
        """Put the learning rate on the curve of today's length; a checkpoint brings that of the length it had then."""
        for entry in self.trainer.lr_scheduler_configs:
            curve: Any = entry.scheduler
            for group, base, factor in zip(curve.optimizer.param_groups, curve.base_lrs, curve.lr_lambdas, strict=True):
                group["lr"] = base * factor(curve.last_epoch)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients together.

        Lightning refuses fused optimisers under mixed precision, as they might undo a scaling of gradients themselves;
        bfloat16 scales none.
        """
        if gradient_clip_val:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count, and make the noise of this micro-batch a function of its number, so a continued run repeats it.

        From here to the end of the batch ``updates`` is the number of the update being made, 1 for the first.
        """
        if not self._checked:
            self._check(batch)
        self._seed(fold_seed(self.run_seed, self.global_rank, self.micro_batches))
        self.micro_batches += 1
        self.samples_seen += _rows(batch) * self.trainer.world_size
        if self.micro_batches % self.trainer.accumulate_grad_batches == 0:
            self.updates += 1

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        terms = self.loss(batch)
        self.record(terms)
        return terms["loss"]

    def record(self, terms: Mapping[str, Tensor]) -> None:
        """Keep the scalars of a micro-batch; log the mean over an update every ``log_every`` updates.

        Rooms that override :meth:`training_step` call this themselves. It runs before the update is saved, so no
        checkpoint is ahead of its logs.
        """
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value.detach())
        if self.micro_batches % self.trainer.accumulate_grad_batches:
            return
        if self.updates % self.log_every == 0:
            self._log("train", {name: torch.stack(values).mean() for name, values in self._terms.items()})
        self._terms.clear()

    def on_validation_epoch_start(self) -> None:
        """Forget the previous validation."""
        self._val_sums = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss terms with the same noise at every validation, so the curve moves only because the weights did."""
        if self.stop_requested():
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self._seed(fold_seed(self.run_seed, self.global_rank, batch_idx, 1))
            terms = self.loss(batch)
        rows = _rows(batch)
        for name, value in {**terms, "rows": torch.ones_like(terms["loss"])}.items():
            self._val_sums[name] = self._val_sums.get(name, 0.0) + value.detach().double() * rows

    def on_validation_epoch_end(self) -> None:
        """Log means over all samples of all ranks."""
        if self._val_sums and not self.stop_requested():
            sums = self.trainer.strategy.reduce(torch.stack(list(self._val_sums.values())), reduce_op="sum")
            values = dict(zip(self._val_sums, sums, strict=True))
            rows = values.pop("rows")
            self._log("val", {name: value / rows for name, value in values.items()}, reduce=False)

    def _log(self, phase: str, terms: Mapping[str, Tensor], reduce: bool = True) -> None:
        values = torch.stack([value.detach().double() for value in terms.values()])
        if reduce and self.trainer.world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        scalars = dict(zip((f"{phase}/{name}" for name in terms), values.tolist(), strict=True))
        if phase == "train":
            scalars["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.latest.update(scalars)
        for logger in self.trainer.loggers:
            logger.log_metrics(scalars, step=self.updates)

    def _seed(self, seed: int) -> None:
        """Seed the default generators that the loss draws from.

        Without a GPU ``torch.manual_seed`` notes a stack trace for later at every call, a tenth of a small step.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _check(self, batch: Batch) -> None:
        self._checked = True
        missing = sorted(self.needs - set(batch))
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs {sorted(self.needs)} in every batch; the data gives {sorted(batch)}, so"
                f" {missing} is missing. Set data to shards that hold it, or switch conditioning off in module."
            )

    @property
    def log_every(self) -> int:
        """Updates between logged training values."""
        return int(getattr(self.trainer, "log_every_n_steps", 1))

    # ---- averages -------------------------------------------------------------------------------------------------

    @property
    def weight_kinds(self) -> list[str]:
        """Weights that can be evaluated: ``raw`` and one ``ema<decay>`` per horizon, the preferred one first."""
        return [self._only] if self._only else [RAW, *(f"ema{decay:g}" for decay in self.ema_decays)]

    def hold_only(self, kind: str) -> None:
        """Say which weights these are: they were loaded alone, and there is nothing to swap them with."""
        self._only = self.active_weights = kind

    def resolve_weights(self, kind: str) -> str:
        """``ema`` means the first horizon (or raw when there is none); other names must exist."""
        if kind == "ema":
            return self._only or (f"ema{self.ema_decays[0]:g}" if self.ema_decays else RAW)
        if kind not in self.weight_kinds:
            known = ", ".join(dict.fromkeys(["ema", *self.weight_kinds]))
            raise ValueError(f"weights={kind!r}: this run has {known}. Type one of them.")
        return kind

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move every average towards the weights; elementwise on local shards, so without communication.

        Early in a run the decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the initial weights are
        forgotten.

        Source: the warm-up rule of TensorFlow's ExponentialMovingAverage (``num_updates``).
        """
        weights = [_local(parameter) for _, parameter in self._followed]
        for decay in self.ema_decays:
            rate = 1.0 - min(decay, (1 + self.updates) / (10 + self.updates))
            shadows = [_local(shadow) for shadow in self._shadows_of(f"ema{decay:g}")]
            torch._foreach_lerp_(shadows, [weight.float() for weight in weights], rate)

    @contextmanager
    def use_weights(self, kind: str) -> Iterator[None]:
        """Evaluate with other weights: they are copied in place, and the active ones back on leaving.

        Args:
            kind: one of :attr:`weight_kinds`, or ``ema`` for the preferred average.
        """
        before = self.active_weights
        self.activate(kind)
        try:
            yield
        finally:
            self.activate(before)

    def activate(self, kind: str) -> None:
        """Copy the weights of ``kind`` in, and keep the raw ones at hand while others are active."""
        kind = self.resolve_weights(kind)
        if kind == self.active_weights:
            return
        if self.active_weights == RAW:
            self._raw_copy = [_local(parameter).detach().clone() for _, parameter in self._followed]
        self._copy_in(kind)
        if kind == RAW:
            self._raw_copy = []

    def _copy_in(self, kind: str) -> None:
        source = self._raw_copy if kind == RAW else [_local(shadow) for shadow in self._shadows_of(kind)]
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, FSDPModule):  # weights left unsharded by a forward without backward hide writes
                    module.reshard()
            for (_, parameter), value in zip(self._followed, source, strict=True):
                _local(parameter).copy_(value)
        self.active_weights = kind

    def _shadows_of(self, kind: str) -> list[Tensor]:
        stored = self.shadows[_flat(kind)]
        assert isinstance(stored, nn.ParameterDict)
        return [stored[_flat(name)] for name, _ in self._followed]

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Full state of the networks (``<network>.<key>``, CPU) with parameters of the given kind."""
        with self.use_weights(kind):
            return {
                f"{network}.{key}": (value.full_tensor() if isinstance(value, DTensor) else value)
                .detach()
                .cpu()
                .clone()
                for network, module in self.averaged().items()
                for key, value in module.state_dict().items()
            }

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters travel with the weights."""
        checkpoint["counters"] = {"updates": self.updates, "samples_seen": self.samples_seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Micro-batches are counted in today's accumulation, which may differ from the saved run's."""
        self.updates = checkpoint["counters"]["updates"]
        self.samples_seen = checkpoint["counters"]["samples_seen"]
        self.micro_batches = self.updates * self.trainer.accumulate_grad_batches


def _flat(name: str) -> str:
    return name.replace(".", "/")  # dots separate modules in a state dict


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shadow(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone().float(), requires_grad=False)


def _rows(batch: Batch) -> int:
    return next(len(value) for value in batch.values())
