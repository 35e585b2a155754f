"""Networks whose weights are spread over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def whole(net: nn.Module) -> Iterator[None]:
    """Keep all weights of a network that FSDP2 shards on every rank for the time being; nothing else is changed.

    Ranks must enter and leave together, but may call the network as often as each likes between, and no call waits
    for others. It takes the memory of the whole network; nothing may be trained meanwhile.
    """
    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    inner = [part for part in parts if part is not net]  # the outermost stays whole after a call by itself
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()
