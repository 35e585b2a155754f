"""What a run will need, worked out on tensors without memory: parameters, arithmetic, bytes."""

from dataclasses import dataclass
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightningmodules.base import GenerativeModule

FLOAT_BYTES = 4  # weights, gradients, optimiser state and averages are float32 whatever the precision


@dataclass(frozen=True)
class Estimate:
    """Needs of one run.

    Args:
        trainable: parameters with gradients.
        frozen: parameters without.
        averages: running averages of the weights.
        flops: floating-point operations of one training sample, forward and backward; 0 when unknown.
        moments: optimiser values per trainable parameter (2 for Adam).
        activation_bytes: kept for the backward pass, per sample; None when it could not be worked out.
    """

    trainable: int
    frozen: int
    averages: int
    flops: float
    moments: float
    activation_bytes: float | None

    def state_bytes(self, ranks: int) -> dict[str, float]:
        """Bytes per device that do not depend on the batch, sharded over all ranks."""
        weights = FLOAT_BYTES * self.trainable / ranks
        return {
            "weights": weights + FLOAT_BYTES * self.frozen / ranks,
            "gradients": weights,
            "optimiser": self.moments * weights,
            "averages": self.averages * weights,
        }


def estimate(cfg: DictConfig) -> Estimate:
    """Needs of a composed configuration; allocates nothing.

    Args:
        cfg: from ``platform.config.compose``.
    """
    half = "bf16" in str(cfg.trainer.precision)
    # unlike tensors on the meta device these still say "cpu", so autocast and device checks work as in training
    with FakeTensorMode(allow_non_fake_inputs=True), _AllZero():
        room: GenerativeModule = hydra.utils.instantiate(cfg.module, _convert_="all")
        room.start = None  # a plan has no values
        room.build()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            activations = _activation_bytes(room)
    trainable = [parameter for parameter in room.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in room.parameters())
    count = sum(parameter.numel() for parameter in trainable)
    return Estimate(
        trainable=count,
        frozen=total - count,
        averages=len(room.ema_decays),
        flops=float(room.flops_per_sample()),
        moments=_moments(cfg, trainable),
        activation_bytes=activations,
    )


class _AllZero(TorchDispatchMode):
    """Answers 0 where code reads a value that is not there: labels and pixels are zeros here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype is torch.bool else 0
        return func(*args, **(kwargs or {}))


def _moments(cfg: DictConfig, parameters: list[nn.Parameter]) -> float:
    """Optimiser values per parameter, counted after one step on stand-ins of a few values each."""
    try:
        shapes = [(2,) * parameter.ndim for parameter in parameters[:8]]
        few = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = hydra.utils.instantiate(cfg.module.optimizer, _convert_="all")(few)
        for parameter in few:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        moments = sum(value.numel() for value in kept if value.ndim)
        return moments / sum(parameter.numel() for parameter in few)
    except Exception:  # an optimiser of another calling convention: say what is usual rather than fail a display
        return 2.0


def _activation_bytes(room: GenerativeModule) -> float | None:
    """Bytes that autograd keeps for one more sample, by running the loss without data."""
    if not room.needs <= {"image", "label"} or len(room.codec.shape) != 3:
        return None
    try:
        few, more = _kept_bytes(room, 2), _kept_bytes(room, 4)
    except Exception:  # a loss that lives on values cannot run without any
        return None
    return (more - few) / 2  # the difference leaves out bfloat16 copies of weights, which do not grow with the batch


def _kept_bytes(room: GenerativeModule, samples: int) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in (*room.parameters(), *room.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not used again while counting
        return tensor

    batch = {
        "image": torch.zeros((samples, *room.codec.shape), dtype=torch.uint8),
        "label": torch.zeros(samples, dtype=torch.int64),
        "key": [""] * samples,
    }
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = room.loss(batch)
    del terms
    return sum(storage.nbytes() for storage in kept.values())
