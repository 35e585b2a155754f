"""Networks of transformers from folders on this machine, whole or not at all."""

from pathlib import Path
from typing import Any

from torch import nn


def load(kind: Any, folder: Path, **options: Any) -> nn.Module:
    """A network with the weights of a folder, ready for use.

    Args:
        kind: class of transformers, e.g. ``AutoModelForCausalLM``.
        folder: what its ``save_pretrained`` wrote.
        options: further keywords of its ``from_pretrained``.

    Raises:
        ValueError: the weights lack some of the network's, which transformers would draw at random.
        OSError: the folder cannot be read.
    """
    net, told = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    if absent := sorted(told["missing_keys"]):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ValueError(
            f"{folder}: the weights lack {absent[0]}{more}, which {type(net).__name__} needs; they would be random."
            " Copy the whole model there."
        )
    whole: nn.Module = net.eval()
    return whole
