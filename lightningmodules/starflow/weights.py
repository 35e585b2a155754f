"""Between checkpoints of apple/ml-starflow and ours. The names agree; theirs also hold constants."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightningmodules.shared import dcp
from lightningmodules.shared.statedict import match as match  # the runner asks the room for it

CONSTANT = re.compile(r"var|feat_rope(_gen)?\.freqs_(cos|sin)|blocks\.\d+\.attn_mask")


def translate(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn an official state dict into ours: everything but the constants, which the authors' code never reads.

    Args:
        official: bare ``state_dict()`` of apple/ml-starflow.

    Returns:
        State dict of ``StarFlowNet``.
    """
    return {key: value for key, value in official.items() if not CONSTANT.fullmatch(key)}


def to_official(state: Mapping[str, Tensor], *, constants: tuple[int, int, int] | None = None) -> dict[str, Tensor]:
    """Turn our state dict into an official one; the inverse of ``translate``.

    Args:
        state: state dict of ``StarFlowNet``.
        constants: ``pt_seq_len``, ``txt_size`` and ``head_dim``, to add the constants, for a loader that insists on
            them; the authors' own does not.

    Returns:
        The same tensors.
    """
    official = dict(state)
    if constants is None:
        return official
    span, text, head_dim = constants
    length = span**2 + text
    dims = state["blocks.0.proj_in.weight"].shape[1]
    official["var"] = torch.ones(span**2, dims)
    if "blocks.0.pos_embed" not in state:
        official |= {f"feat_rope.freqs_{name}": torch.zeros(length, head_dim) for name in ("cos", "sin")}
    for block in sorted({key.split(".")[1] for key in state}, key=int):
        official[f"blocks.{block}.attn_mask"] = torch.ones(length, length).tril()
    return official


def read_start(path: str) -> dict[str, Tensor]:
    """Weights to begin a run with, on the CPU in float32.

    Args:
        path: exported weights (a folder, or its weights.safetensors), an official checkpoint (.pth, .safetensors), or a
            folder of torch.distributed.checkpoint.

    Returns:
        State dict of ``StarFlowNet``.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    place = Path(path).expanduser()
    file = place / "weights.safetensors" if (place / "weights.safetensors").is_file() else place
    if not file.exists() or (file.is_dir() and not (file / ".metadata").is_file()):
        raise ValueError(
            f"module.start={path}: {'no weights there' if file.exists() else 'no such file'}. Export the weights of the"
            " stage before (python -m platform weights export RUN --out DIR), give an official checkpoint, or type"
            " module.start=null for random weights."
        )
    try:
        if file.is_dir():
            found = dcp.read_folder(file)
        elif file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
        state = {key.removeprefix("net."): value.float() for key, value in translate(found).items()}
        infer(state)
    except pickle.UnpicklingError:
        raise ValueError(
            f"module.start={path} holds something else than tensors, or is damaged; nothing in it was executed."
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"module.start={path} cannot be read as named tensors: {reason}") from error
    except ValueError as error:
        raise ValueError(f"module.start={path}: {error}") from None
    return state


def fill(net: torch.nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Overwrite the weights of ``net`` with those of another stage.

    Rotary positions have no weights: another resolution continues in the same range of coordinates, as long as
    ``module.net.pt_seq_len`` stays. Learnt positions belong to one resolution.

    Raises:
        ValueError: they belong to another network; the message starts with ``path``.
    """
    own = net.state_dict()
    try:
        match(state, own)
    except ValueError as error:
        learnt = any(key.endswith("pos_embed") and state[key].shape != own[key].shape for key in state if key in own)
        more = " Learnt positions belong to one resolution: only a network with module.net.rope=true" if learnt else ""
        more += " continues at another one." if learnt else " Set module.net as in the run that the weights are of."
        raise ValueError(f"module.start={path}: {error}{more}") from None
    net.load_state_dict(state)


def infer(official: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read constructor arguments of ``StarFlowNet`` from names and shapes of a state dict.

    Returns:
        Those that can be told: channels, num_blocks, sos, rope, txt_dim, use_bias, use_final_norm, use_swiglu,
        use_qk_norm and use_post_norm.

    Raises:
        ValueError: keys are not those of a STARFlow.
    """
    try:
        blocks = sorted({int(found[1]) for key in official if (found := re.match(r"blocks\.(\d+)\.proj_in\.", key))})
        first = f"blocks.{blocks[0]}"
        channels = official[f"{first}.proj_in.weight"].shape[0]
        layer = f"{first}.attn_blocks.0"
        official[f"{layer}.attention.qkv.weight"]
    except (KeyError, IndexError, AttributeError):
        known = ", ".join(sorted(official)[:3])
        raise ValueError(
            f"This is no state dict of STARFlow ({len(official)} keys: {known}, ...). Expected the bare state_dict() of"
            " apple/ml-starflow with keys such as blocks.0.proj_in.weight and blocks.0.attn_blocks.0.mlp.norm.weight."
        ) from None
    text = official.get(f"blocks.{blocks[-1]}.proj_txt.weight")
    return {
        "channels": channels,
        "num_blocks": blocks[-1] + 1,
        "sos": f"{first}.sos_embed" in official,
        "rope": f"{first}.pos_embed" not in official,
        "txt_dim": 0 if text is None else text.shape[1],
        "use_bias": f"{layer}.attention.qkv.bias" in official,
        "use_final_norm": f"{first}.final_norm.weight" in official,
        "use_swiglu": f"{layer}.mlp.gate_proj.weight" in official,
        "use_qk_norm": f"{layer}.attention.query_norm.weight" in official,
        "use_post_norm": f"{layer}.attention.post_norm.weight" in official,
    }
