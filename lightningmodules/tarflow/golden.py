"""Replays reference numbers of apple/ml-tarflow and reports how far ours are from them."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightningmodules.shared import flow, replay
from lightningmodules.shared.statedict import match
from lightningmodules.tarflow import process
from lightningmodules.tarflow.network import TarFlowNet
from lightningmodules.tarflow.sampler import Guidance, invert
from lightningmodules.tarflow.weights import translate

METHODS: tuple[str, ...] = ("tarflow",)
LEVELS = 256  # pixel values of the bits-per-dimension reference
ARGUMENTS = (
    "in_channels",
    "img_size",
    "patch_size",
    "channels",
    "num_blocks",
    "layers_per_block",
    "head_dim",
    "expansion",
    "num_classes",
    "nvp",
)


def references(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the quantities that a file asks to be checked: all that start with ``out/``."""
    return {name for name in tensors if name.startswith("out/")}


def check(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Iterator[tuple[str, float, float]]:
    """Compute every reference quantity that this room knows.

    Args:
        tensors: ``state/<official key>``, ``in/*`` and ``out/*``; any subset of the outputs may be there.
        metadata: ``config`` (JSON), and where needed ``guided`` and ``param_order`` (JSON).
        path: the file, for messages.

    Yields:
        Name, largest absolute difference (infinite for another shape or a value that is not finite), tolerance.

    Raises:
        ValueError: the file lacks its configuration, its weights do not fit it, or a label names no class.
    """
    file = _Replay(tensors, metadata, path)
    for name in sorted(references(tensors)):
        compute = file.recipe(name.removeprefix("out/"))
        if compute is None:
            continue  # the caller reports it as not checked
        try:
            error = replay.distance(compute(), tensors[name])
        except (_Absent, RuntimeError):  # RuntimeError: a tensor of a shape that cannot be what its name says
            error = math.inf  # the others can still be compared
        yield name, error, replay.flow_tolerance(name, tensors[name])


class _Absent(ValueError):
    """An input that a quantity is computed from is not in the file."""


class _Replay:
    """One file: its network, its inputs, and how each output is computed."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
        self.tensors, self.metadata, self.path = tensors, metadata, path
        config = self._json("config")
        missing = [name for name in ARGUMENTS[:6] if name not in config]
        if missing:
            raise ValueError(f"{path}: the metadata 'config' lacks {', '.join(missing)}.")
        self.sigma = float(config.get("noise_std", 0.0))
        with torch.random.fork_rng(devices=[]):
            self.net = TarFlowNet(**{name: config[name] for name in ARGUMENTS if name in config})
        official = {name[6:]: value for name, value in tensors.items() if name.startswith("state/")}
        self.state = {"var": self.net.var, **translate(official)}
        match(self.state, self.net.state_dict())
        self.net.load_state_dict(self.state)
        self.y = tensors.get("in/y")
        for labels in (self.y, tensors.get("in/y_drop")):
            if labels is not None:
                self.net.check_labels(labels)
        self._passes: dict[str, Any] = {}

    def recipe(self, name: str) -> Callable[[], Tensor] | None:
        """What computes output ``name``; None for one this room does not know."""
        group, _, rest = name.partition("/")
        simple: dict[str, Callable[[], Tensor]] = {
            "z": lambda: self.forward("").z,
            "logdet": lambda: self.forward("").logdet,
            "loss": lambda: self.loss("").mean(),
            "z_drop": lambda: self.forward("drop").z,
            "logdet_drop": lambda: self.forward("drop").logdet,
            "loss_drop": lambda: self.loss("drop").mean(),
            "z_null": lambda: self.forward("null").z,
            "logdet_null": lambda: self.forward("null").logdet,
            "loss_null": lambda: self.loss("null").mean(),
            "grad_norms": self.grad_norms,
            "sample": lambda: self.samples(None)[-1],
            "denoised_x": lambda: self.denoised(self.input("x")),
            "denoised_sample": self.denoised_sample,
            "bpd": self.bits_per_dim,
            "var_after_update": self.variance,
            "train_losses": self.train_losses,
        }
        if not rest:
            return simple.get(name)
        if group == "block_out" and rest.isdigit() and int(rest) < len(self.net.blocks):
            return lambda: self.forward("").blocks[int(rest)]
        if group == "sample_seq" and rest.isdigit() and int(rest) < len(self.net.blocks):
            return lambda: self.samples(None)[int(rest)]
        if group == "sample_guided" and rest in self._json("guided", {}):
            return lambda: self.samples(rest)[-1]
        return None

    def input(self, name: str) -> Tensor:
        if f"in/{name}" not in self.tensors:
            raise _Absent(f"{self.path}: in/{name} is missing, so what depends on it cannot be computed.")
        return self.tensors[f"in/{name}"]

    def forward(self, labels: str) -> Any:
        """Forward pass of in/x with in/y ("") , in/y_drop ("drop") or no labels ("null")."""
        if labels not in self._passes:
            y = self.input("y_drop") if labels == "drop" else self.y if labels == "" else None
            with torch.no_grad():
                self._passes[labels] = self.net(self.input("x"), y)
        return self._passes[labels]

    def loss(self, labels: str) -> Tensor:
        out = self.forward(labels)
        return flow.nll(out.z, out.logdet)

    def samples(self, suffix: str | None) -> list[Tensor]:
        """Images after every inverted block, guided as the metadata says for ``suffix``."""
        key = f"samples/{suffix}"
        if key not in self._passes:
            guide = None
            if suffix is not None:
                said = self._json("guided")[suffix]
                g = max(0.0, float(said.get("guidance") or 0.0))  # their code guides for g > 0 only
                guide = Guidance(
                    1.0 + g,
                    float(said.get("attn_temp", 1.0)),
                    bool(said.get("annealed_guidance", False)),
                    said.get("guide_what", "ab") or "",
                )
            tokens = invert(self.net, self.input("z"), self.y, guide)
            self._passes[key] = [self.net.unpatchify(x) for x in tokens]
        images: list[Tensor] = self._passes[key]
        return images

    def denoised(self, x: Tensor) -> Tensor:
        noisy = x.clone().requires_grad_()
        out = self.net(noisy, self.y)
        (grad,) = torch.autograd.grad(flow.nll(out.z, out.logdet).sum(), noisy)
        return flow.tweedie(x, grad, self.sigma)

    def denoised_sample(self) -> Tensor:
        given = self.tensors.get("out/sample")  # the reference denoised its own sample
        return self.denoised(self.samples(None)[-1] if given is None else given.float())

    def grad_norms(self) -> Tensor:
        parameters = dict(self.net.named_parameters())
        order = self._json("param_order", list(parameters))
        if unknown := [name for name in order if name not in parameters]:
            raise ValueError(f"{self.path}: param_order names {unknown[0]}, which this network does not have.")
        out = self.net(self.input("x"), self.y)
        loss = flow.nll(out.z, out.logdet).mean()
        return torch.stack([grad.norm() for grad in torch.autograd.grad(loss, [parameters[name] for name in order])])

    def bits_per_dim(self) -> Tensor:
        x = 2.0 * (self.input("x_uint8").float() + self.input("dequant_u")) / LEVELS - 1.0
        with torch.no_grad():
            out = self.net(x)
        return flow.bits_per_dim(flow.nll(out.z, out.logdet), LEVELS)

    def variance(self) -> Tensor:
        given = self.tensors.get("out/z")
        z = self.forward("").z if given is None else given.float()
        return process.updated_variance(self.state["var"], z.square().mean(dim=0))

    def train_losses(self) -> Tensor:
        """Five AdamW updates on the fixed batch, undone afterwards."""
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
        losses = []
        for _ in range(len(self.tensors["out/train_losses"])):
            out = self.net(self.input("x"), self.y)
            loss = flow.nll(out.z, out.logdet).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        self.net.load_state_dict(self.state)
        return torch.stack(losses)

    def _json(self, key: str, default: Any = None) -> Any:
        return replay.read_json(self.metadata, key, self.path, default)
