"""``weights``: the authors' files in, weights of a run out: for using a model, as checkpoints are for continuing it."""

import argparse
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from platform import config as configs
from platform.verbs import PROGRAM

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

OFFICIAL = (".pth", ".pt")
DISTRIBUTED = ".dcp"  # an export to this ending becomes a folder of torch.distributed.checkpoint


def run(args: argparse.Namespace) -> int:
    """Entry of the verb.

    Args:
        args: ``action`` (import or export), ``source`` (file or run folder), ``out``; for import ``experiment``, for
            export ``weights`` (kind or None). An export to a name ending in .pth or .dcp writes the authors' format,
            as one file or as a folder of torch.distributed.checkpoint.

    Returns:
        0.

    Raises:
        ValueError: the file cannot be read, does not fit the experiment, or ``out`` is taken.
    """
    out = Path(args.out)
    if args.action == "import":
        _import(Path(args.source), args.experiment, out)
    elif out.suffix in (*OFFICIAL, DISTRIBUTED):
        _export_official(args.source, args.weights or "ema", out)
    else:
        _export(args.source, args.weights or "ema", out)
    return 0


def read_official(file: Path) -> dict[str, "Tensor"]:
    """Tensors of an authors' file or folder, on the CPU; nothing in it but tensors is executed or built.

    Rooms whose authors hand out training checkpoints have a ``read`` of their own.

    Raises:
        ValueError: the file is missing, damaged, or holds something else than named tensors.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.is_dir():
        from lightningmodules.shared import dcp

        return dcp.read_folder(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file. Type the path of the authors' .pth or .safetensors file, or folder.")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds something else than tensors, or is damaged; nothing in it was executed. Expected the"
            " authors' bare state dict: take their model file, not a training checkpoint, and compare its size."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read as tensors: {reason} Is the copy complete?"
        ) from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        inside = sorted(map(str, found))[:5] if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{file} holds {inside}, not a bare state dict of named tensors. Optimiser files (..._opt_...) hold no"
            " weights; take the model file beside it."
        )
    return found


def _import(file: Path, experiment: str, out: Path) -> None:
    import torch

    from platform.assemble import blueprint

    cfg = configs.compose(experiment, [])
    room = _room(cfg)
    _check_free(out)
    read: Callable[[Path], dict[str, Tensor]] = getattr(room, "read", read_official)  # its own kind of checkpoint
    official = read(file)
    _check_shape(room, official, cfg, file)
    (name, network), *others = blueprint(cfg).averaged().items()
    assert not others, "a room whose file holds several networks names them in its own translate()"
    state = room.translate(official)
    try:
        room.match(state, network.state_dict())
    except ValueError as error:
        raise ValueError(f"{file} as {experiment}: {error}") from None
    tensors = {f"{name}.{key}": value.to(torch.float32).contiguous() for key, value in state.items()}
    facts = {"imported": str(file), "sha256": _digest(file), "experiment": experiment, "command": sys.argv}
    _write(out, tensors, cfg, facts)
    count = sum(value.numel() for value in network.parameters())
    print(f"{file}: {len(state)} tensors, {count:,} parameters, 0 missing, 0 unexpected -> {out}")
    print(f"next: {PROGRAM} sample {out}")


def _export(source: str, kind: str, out: Path) -> None:
    from platform.runs import load_module

    _check_free(out)
    module, cfg = load_module(source, kind)
    tensors = {key: value.contiguous() for key, value in module.weights(module.active_weights).items()}
    facts = {"exported": str(source), "weights": module.active_weights, "step": module.updates, "command": sys.argv}
    _write(out, tensors, cfg, facts)
    print(f"{source} at step {module.updates}, weights {module.active_weights}: {len(tensors)} tensors -> {out}")
    print(f"next: {PROGRAM} sample {out}")


def _export_official(source: str, kind: str, out: Path) -> None:
    import torch

    from platform.runs import load_module, make_out

    if out.exists():
        raise ValueError(f"--out {out} exists. Type another name, or delete it.")
    module, cfg = load_module(source, kind)
    (network,) = module.averaged().values()
    state = _room(cfg).to_official({key: value.contiguous() for key, value in network.state_dict().items()})
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    make_out(out.parent)
    if out.suffix == DISTRIBUTED:
        from lightningmodules.shared import dcp

        dcp.write_folder(state, aside)
    else:
        torch.save(state, aside)
    os.replace(aside, out)
    print(f"{source} at step {module.updates}, weights {module.active_weights}: {len(state)} tensors -> {out}")


def _room(cfg: "DictConfig") -> ModuleType:
    """``weights.py`` of the room an experiment trains."""
    package = str(cfg.module._target_).rpartition(".")[0].rpartition(".")[0]
    if importlib.util.find_spec(f"{package}.weights") is None:
        raise ValueError(f"{package} has no weights.py: the authors' files of this method cannot be read or written.")
    return importlib.import_module(f"{package}.weights")


def _check_shape(room: ModuleType, official: Mapping[str, "Tensor"], cfg: "DictConfig", file: Path) -> None:
    """Compare what the file's shapes say about the network with what the experiment says."""
    infer: Callable[..., dict[str, Any]] | None = getattr(room, "infer", None)
    if infer is None:
        return
    net = cfg.module.net
    told = [p.name for p in inspect.signature(infer).parameters.values() if p.kind is p.KEYWORD_ONLY]
    try:
        found = infer(official, **{name: net[name] for name in told if name in net})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    differ = [f"module.net.{name}={value}, here {net[name]}" for name, value in found.items() if net[name] != value]
    if differ:
        raise ValueError(
            f"{file} is not a model of {cfg.experiment}: the file has {'; '.join(differ)}."
            " Type --as with the experiment it belongs to."
        )


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not an empty folder. Type a new name.")


def _write(out: Path, tensors: Mapping[str, "Tensor"], cfg: "DictConfig", facts: dict[str, Any]) -> None:
    """Write the weights folder aside and give it its name in one step."""
    from safetensors.torch import save_file

    from platform.runs import CONFIG, PROVENANCE, WEIGHTS, make_out, provenance

    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    make_out(out)
    aside.mkdir()
    try:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
        save_file(dict(tensors), aside / WEIGHTS, metadata={"format": "pt", **texts})
        configs.save(cfg, aside / CONFIG)
        (aside / PROVENANCE).write_text(json.dumps([{**provenance(), **facts}], indent=1))
        if out.exists():
            out.rmdir()  # checked to be empty
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _digest(file: Path) -> str:
    """sha256 of a file, or of a folder's files in the order of their names."""
    digest = hashlib.sha256()
    for part in sorted(file.iterdir()) if file.is_dir() else [file]:
        with part.open("rb") as stream:
            inner = hashlib.file_digest(stream, "sha256")
        if not file.is_dir():
            return inner.hexdigest()
        digest.update(part.name.encode() + inner.digest())
    return digest.hexdigest()
