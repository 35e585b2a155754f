"""A small room, data and callback with every kind of argument, and an experiments folder that uses them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lightningmodules.shared.codecs import Codec

REAL = Path(__file__).resolve().parents[2] / "experiments"


def scale(value: float) -> float:
    """A default that yaml cannot hold."""
    return value


def level(step: int, total_steps: int) -> float:
    return 1.0


class Net:
    def __init__(self, channels: int, width: int = 8, *, dropout: float = 0.0) -> None:
        self.width = width


class Room:
    def __init__(
        self,
        *,
        net: Callable[..., Net],
        codec: Codec | None = None,
        optimizer: Callable[..., Any] | None = None,
        schedule: Callable[[int, int], float] | None = None,
        noise_std: float = 0.05,
        noise_type: Literal["gaussian", "uniform"] = "gaussian",
        layers: int = 4,
        betas: tuple[float, float] = (0.9, 0.95),
        decays: Sequence[float] = (),
        extra: Mapping[str, int] | None = None,
        transform: Callable[[float], float] = scale,
        vp: bool = False,
        untyped=3,
    ) -> None:
        self.noise_std = noise_std

    def sample(
        self,
        seeds: Sequence[int],
        condition: Any = None,
        *,
        guidance: float = 1.0,
        steps: int | None = None,
        noise: Any = None,
    ) -> None: ...


class Data:
    def __init__(self, root: str, *, size: int = 8, channels: int = 1, workers: int = 2, seed: int = 0) -> None: ...


class OtherData:
    def __init__(self, *, side: int = 16, channels: int = 3, size: int = 16) -> None: ...


class Meter:
    def __init__(self, every: int = 10, settings: Mapping[str, Any] | None = None) -> None: ...


TOY = """
defaults:
  - base
  - data: toy
  - hardware: cpu
  - _self_
about: a toy
source: {paper: none}
module:
  _target_: tests.unit.config_rooms.Room
  net: {_target_: tests.unit.config_rooms.Net, _partial_: true, channels: "${data.channels}"}
  optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 1.0e-3}
  schedule: {_target_: lightningmodules.shared.optim.warmup_cosine, _partial_: true, warmup_steps: 10}
  noise_std: 0.1
sampling: {guidance: 2.0}
trainer: {max_steps: 100}
tiny:
  data: {_target_: tests.unit.config_rooms.OtherData}
  module: {noise_std: 0.2}
  trainer: {max_steps: 2}
"""
DATA = """
_target_: tests.unit.config_rooms.Data
root: ${oc.env:TOY_ROOT,/nowhere}/toy
seed: ${seed}
"""


def write(folder: Path, **files: str) -> Path:
    """An experiments folder; each keyword is one more file, ``data__other`` meaning ``data/other.yaml``."""
    base = yaml.safe_load((REAL / "base.yaml").read_text())
    base["callbacks"] = {
        "meter": {"_target_": "tests.unit.config_rooms.Meter", "settings": "${sampling}"},
        "off": None,
    }
    content = {"base": yaml.safe_dump(base, sort_keys=False), "toy": TOY, "data__toy": DATA}
    for file in (REAL / "hardware").glob("*.yaml"):
        content[f"hardware__{file.stem}"] = file.read_text()
    for name, text in (content | files).items():
        target = folder / "experiments" / f"{name.replace('__', '/')}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return folder / "experiments"
