"""Between checkpoints of kuleshov-group/mdlm, or of Qwen2 and Dream, and ours. The names agree but for a prefix."""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightningmodules.shared.statedict import match
from lightningmodules.shared.token_transformer import TokenTransformer

__all__ = ["flatten", "infer", "match", "read", "to_official", "translate"]

PREFIX = re.compile(r"^(?:module\.|model\.|_orig_mod\.|backbone\.)+")
EMBEDDING, ADAPTED = "vocab_embed.embedding", "embed_tokens.weight"  # where the rows of tokens are
POSITIONS = "position_embed"  # rows of positions, which the official network lacks
BUFFERS = ("rotary_emb.inv_freq",)
SHARDED = "model.safetensors.index.json"
NEW = ("latent_gate", "time_map.weight", "time_map.bias")  # what CADD adds to a masked-diffusion network


def translate(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn an official state dict into ours: prefixes are dropped, tensors outside the backbone too.

    Args:
        official: ``state_dict`` of a Lightning checkpoint, of the Hugging Face wrapper, or of the bare backbone.

    Returns:
        State dict of ``CaddNet``.

    Raises:
        ValueError: nothing in it belongs to such a network.
    """
    prefixed = any("backbone." in key for key in official)
    kept = {PREFIX.sub("", key): value for key, value in official.items() if not prefixed or "backbone." in key}
    if ADAPTED in kept:  # files whose output is the embedding leave it out
        kept.setdefault("lm_head.weight", kept[ADAPTED])
    elif EMBEDDING not in kept:
        some = ", ".join(sorted(official)[:3])
        raise ValueError(
            f"This is no state dict of a masked-diffusion network ({len(official)} keys: {some}, ...). Expected keys "
            f"of kuleshov-group/mdlm such as {EMBEDDING}, bare or after 'backbone.', or of Qwen2 such as"
            f" model.{ADAPTED}."
        )
    return kept


def flatten(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a whole training checkpoint: the averaged weights where it has them, the raw ones otherwise.

    Args:
        checkpoint: with ``state_dict``, and perhaps ``ema`` holding ``shadow_params``, a list in the order of the
            backbone's parameters.

    Returns:
        State dict for :func:`translate`.

    Raises:
        ValueError: the averages do not belong to the parameters.
    """
    state = translate(checkpoint["state_dict"])
    averages: Sequence[Tensor] | None = (checkpoint.get("ema") or {}).get("shadow_params")
    if averages is None:
        return state
    names = [name for name in _ordered(state) if name not in BUFFERS]
    shapes = [tuple(state[name].shape) for name in names]
    if [tuple(getattr(value, "shape", ())) for value in averages] != shapes:
        raise ValueError(
            f"The checkpoint averages {len(averages)} tensors, its backbone has {len(names)} parameters, and their "
            "shapes do not agree in order. Is it of kuleshov-group/mdlm?"
        )
    return {**state, **dict(zip(names, averages, strict=True))}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with the official prefix; without a latent and positions the authors' module loads it."""
    return {f"backbone.{key}": value for key, value in state.items()}


def infer(official: Mapping[str, Tensor], *, heads: int | None = None) -> dict[str, Any]:
    """Read the constructor arguments of ``CaddNet`` from the shapes of a state dict.

    Args:
        official: official or our state dict.
        heads: attention heads, which no shape tells if the table of rotary frequencies is missing.

    Returns:
        hidden, blocks, heads, cond_dim, expansion, num_classes, learned_positions; of ``AdaptedNet`` hidden, blocks and
        rows.

    Raises:
        ValueError: keys or shapes are not those of such a network.
    """
    state = translate(official)
    if ADAPTED in state:
        layers = {key.split(".")[1] for key in state if key.startswith("layers.")}
        return {"hidden": state[ADAPTED].shape[1], "blocks": len(layers), "rows": len(state[ADAPTED])}
    try:
        hidden = state["vocab_embed.embedding"].shape[1]
        blocks = 1 + max(int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key)))
        expanded = state["blocks.0.mlp.0.weight"].shape[0]
        cond_dim = state["blocks.0.adaLN_modulation.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"This is no complete state dict of a masked-diffusion network: {error} is missing.") from None
    frequencies = state.get("rotary_emb.inv_freq")
    if frequencies is not None:
        heads = hidden // (2 * len(frequencies))
    if heads is None:
        raise ValueError("The state dict holds no rotary_emb.inv_freq, so the number of heads must be given.")
    classes = state.get("cond_map.embedding_table.weight")
    return {
        "hidden": hidden,
        "blocks": blocks,
        "heads": heads,
        "cond_dim": cond_dim,
        "expansion": expanded // hidden,
        "num_classes": 0 if classes is None else len(classes) - 1,
        "learned_positions": POSITIONS in state,
    }


def continued(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """State of a masked-diffusion network completed by what ``net`` has besides, at its initial value.

    Raises:
        ValueError: the state belongs to another vocabulary or network.
    """
    own = net.state_dict()
    extra = {key: own[key] for key in (*NEW, POSITIONS, *BUFFERS) if key in own and key not in state}
    full = {**state, **extra}
    key = EMBEDDING if EMBEDDING in own else ADAPTED
    rows, expected = len(full.get(key, own[key])), len(own[key])
    if rows != expected:
        raise ValueError(
            f"The weights know {rows} tokens, mask included; the tokenizer of this run makes {expected}. Set "
            f"data.tokenizer to the one the weights were trained with{', and module.net.rows' * (key == ADAPTED)}."
        )
    match(full, own)
    return full


def load_start(net: nn.Module, path: str) -> None:
    """Fill a network with weights to start from.

    Args:
        net: whose parameters are overwritten; what the file lacks of CADD's additions stays as it is.
        path: what :func:`read` takes.

    Raises:
        ValueError: the file is missing or damaged, or belongs to another vocabulary or network.
    """
    if not Path(path).exists():
        raise ValueError(f"module.start={path}: no such file. Type the path of a checkpoint, or module.start=null.")
    try:
        net.load_state_dict(continued(read(Path(path)), net))
    except ValueError as error:
        raise ValueError(f"module.start={path}: {error}") from None


def read(file: Path) -> dict[str, Tensor]:
    """Weights of a masked-diffusion network under our keys, the averages where the file has them.

    Args:
        file: a training checkpoint or bare state dict of kuleshov-group/mdlm (.ckpt, .pth, .bin, .safetensors), or
            exported weights (a folder, or its weights.safetensors); or a folder with weights of Qwen2 or Dream, as
            ``save_pretrained`` leaves it.

    Raises:
        ValueError: the file is missing or damaged, or holds something else.
    """
    if (file / SHARDED).is_file() or (file / SHARDED.removesuffix(".index.json")).is_file():
        return translate(_shards(file))
    if file.is_dir() and not (file / "weights.safetensors").is_file():
        raise ValueError(
            f"{file} is a folder without weights.safetensors or {SHARDED}. Of a run, make one: python -m platform"
            " weights export RUN --out DIR"
        )
    file = file / "weights.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{file}: no such file. Type the path of a .ckpt, .pth, .bin or .safetensors file.")
    try:
        found: Any = load_file(file) if file.suffix == ".safetensors" else read_checkpoint(file)
    except Exception as error:  # a damaged pickle raises whatever it stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        size = file.stat().st_size
        raise ValueError(
            f"{file} ({size:,} bytes) cannot be read as weights: {reason}. Is the copy complete?"
        ) from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        inside = ", ".join(sorted(map(str, found))[:5]) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{file} holds {inside or 'nothing'}; expected a training checkpoint of kuleshov-group/mdlm (state_dict and"
            " ema) or its bare state dict of named tensors."
        )
    return flatten(found) if "state_dict" in found else translate(_without(found, "net."))


def _shards(folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder's safetensors files, in one or several parts."""
    names = [SHARDED.removesuffix(".index.json")]
    if (folder / SHARDED).is_file():
        names = sorted(set(json.loads((folder / SHARDED).read_text())["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder}: {absent[0]} is missing, one of {len(names)} parts. Copy the folder again, complete."
        )
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            state |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} cannot be read as weights: {error}. Is the copy complete?") from error
    return state


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Tensors and plain values of a training checkpoint; of anything else in it nothing is imported or executed."""
    return cast(dict[str, Any], torch.load(file, map_location="cpu", pickle_module=_Inert, weights_only=False))


class _Placeholder:
    """Stands for an object of a checkpoint that is no tensor, such as the run's configuration."""

    def __new__(cls, *_: Any, **__: Any) -> "_Placeholder":
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> "_Placeholder":
        """Stand for what it would have made as well."""
        return self

    def __setstate__(self, _: Any) -> None:
        """Forget."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Forget."""

    def append(self, _: Any) -> None:
        """Forget."""

    def extend(self, _: Any) -> None:
        """Forget."""


class _Inert:
    """A ``pickle`` that builds tensors and containers, and placeholders for everything else."""

    __name__ = "pickle"

    class Unpickler(pickle.Unpickler):
        """Refuses to import what is not on the list."""

        def find_class(self, module: str, name: str) -> Any:
            """A tensor's parts, or a placeholder."""
            if (module, name) in _HARMLESS or (module == "torch" and name.endswith("Storage")):
                return super().find_class(module, name)
            return _Placeholder

    @classmethod
    def load(cls, file: Any, **options: Any) -> Any:
        """What ``pickle.load`` does, with the unpickler above; files of old formats are read by it."""
        return cls.Unpickler(file, **options).load()


_HARMLESS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "device"),
}


def _without(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keys without a prefix that all of them have."""
    if not all(key.startswith(prefix) for key in state):
        return dict(state)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _ordered(state: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of the backbone's parameters, whatever order the file has."""
    with torch.device("meta"):
        net = TokenTransformer(len(state["vocab_embed.embedding"]), **infer(state, heads=1))  # heads change no name
    return [name for name, _ in net.named_parameters()]
