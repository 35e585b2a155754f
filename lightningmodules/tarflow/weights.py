"""Between checkpoints of apple/ml-tarflow and ours. The names agree; theirs also hold a constant mask per block."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightningmodules.shared.statedict import match as match  # the runner asks the room for it

MASK = re.compile(r"blocks\.\d+\.attn_mask")


def translate(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn an official state dict into ours: everything but the constant masks.

    Args:
        official: bare ``state_dict()`` of apple/ml-tarflow.

    Returns:
        State dict of ``TarFlowNet``.

    Raises:
        ValueError: a mask is not lower-triangular ones, so leaving it out would change the model.
    """
    for key, value in official.items():
        if MASK.fullmatch(key) and not torch.equal(value.cpu().float(), _mask(len(value))):
            raise ValueError(f"{key} is not the causal mask of TarFlow (lower-triangular ones); is this another model?")
    return {key: value for key, value in official.items() if not MASK.fullmatch(key)}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn our state dict into an official one; the inverse of ``translate``.

    Args:
        state: state dict of ``TarFlowNet``.

    Returns:
        The same tensors with the masks, in the order of the official file.
    """
    official: dict[str, Tensor] = {}
    last = "class_embed" if any(key.endswith("class_embed") for key in state) else "pos_embed"  # then come buffers
    for key, value in state.items():
        official[key] = value
        block, _, name = key.rpartition(".")
        if name == last:
            official[f"{block}.attn_mask"] = _mask(len(state[f"{block}.pos_embed"]))
    return official


def infer(official: Mapping[str, Tensor], *, in_channels: int | None = None, head_dim: int = 64) -> dict[str, Any]:
    """Read the constructor arguments of ``TarFlowNet`` from the shapes of a state dict.

    Args:
        official: official or our state dict.
        in_channels: image channels; None picks 1 or 3, whichever makes patches square (never both do).
        head_dim: features per attention head, which no shape tells; official models use 64.

    Returns:
        in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, head_dim, expansion, num_classes and
        nvp.

    Raises:
        ValueError: keys or shapes are not those of a TarFlow.
    """
    try:
        tokens, channels = official["blocks.0.pos_embed"].shape
        dims = official["blocks.0.proj_in.weight"].shape[1]
        hidden = official["blocks.0.attn_blocks.0.mlp.main.0.weight"].shape[0]
        outputs = official["blocks.0.proj_out.weight"].shape[0]
    except (KeyError, ValueError) as error:
        known = ", ".join(sorted(official)[:3])
        raise ValueError(
            f"This is no state dict of TarFlow: {error} ({len(official)} keys: {known}, ...). Expected the bare "
            "state_dict() of apple/ml-tarflow with keys such as blocks.0.pos_embed."
        ) from None
    in_channels = in_channels or (1 if _root(dims) else 3)
    patch, side = _root(dims // in_channels), _root(tokens)
    if not patch or not side or dims % in_channels:
        raise ValueError(
            f"{tokens} tokens of {dims} values are no square image of {in_channels} channels cut into square patches. "
            "Name an experiment of the same image channels with --as."
        )
    table = official.get("blocks.0.class_embed")
    return {
        "in_channels": in_channels,
        "img_size": patch * side,
        "patch_size": patch,
        "channels": channels,
        "num_blocks": _count(official, r"blocks\.(\d+)\."),
        "layers_per_block": _count(official, r"blocks\.0\.attn_blocks\.(\d+)\."),
        "head_dim": head_dim,
        "expansion": hidden // channels,
        "num_classes": 0 if table is None else len(table),
        "nvp": outputs == 2 * dims,
    }


def _mask(tokens: int) -> Tensor:
    return torch.tril(torch.ones(tokens, tokens))


def _root(number: int) -> int:
    """Integer square root, or 0 when there is none."""
    root = math.isqrt(number)
    return root if root * root == number else 0


def _count(keys: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for key in keys if (found := re.match(pattern, key)))
