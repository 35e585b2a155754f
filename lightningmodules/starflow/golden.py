"""Replays reference numbers of apple/ml-starflow and reports how far ours are from them."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightningmodules.shared import flow, replay
from lightningmodules.shared.statedict import match
from lightningmodules.starflow import process
from lightningmodules.starflow.network import FlowOutput, StarFlowNet
from lightningmodules.starflow.sampler import Guidance, Windows, invert
from lightningmodules.starflow.weights import translate

METHODS: tuple[str, ...] = ("starflow",)
LATENT_NORM = 1e-4  # weight of the latent-norm penalty in the reference training, unless the file says otherwise
# what the authors' constructor assumes where a file is silent; ours assumes the released models instead
THEIRS: dict[str, Any] = {
    "rope": False,
    "sos": False,
    "cond_top_only": False,
    "use_softplus": False,
    "use_final_norm": False,
    "soft_clip": 0.0,
    "seq_order": "R2L",
}
NEEDED = ("in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block")


def references(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the quantities that a file asks to be checked: all that start with ``out/``."""
    return {name for name in tensors if name.startswith("out/")}


def check(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Iterator[tuple[str, float, float]]:
    """Compute every reference quantity that this room knows.

    Args:
        tensors: ``state/<official key>``, ``in/*`` and ``out/*``; any subset of the outputs may be there.
        metadata: ``config`` (JSON), and where needed ``param_order`` (JSON).
        path: the file, for messages.

    Yields:
        Name, largest absolute difference (infinite for another shape or a value that is not finite), tolerance.

    Raises:
        ValueError: the file lacks its configuration, or its weights do not fit it.
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


def arguments(model: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the authors' ``Model`` as those of ``StarFlowNet``.

    Args:
        model: theirs; what concerns video, checkpointing or sharding has no meaning here and is left out.
    """
    known = set(inspect.signature(StarFlowNet).parameters)
    given = {name: value for name, value in model.items() if name in known}
    for name, default in THEIRS.items():
        given[name] = type(default)(given.get(name, default))  # flags may be written as 0 and 1
    for name in ("use_swiglu", "use_bias", "use_qk_norm", "use_post_norm", "hf_style_rope"):
        if name in given:
            given[name] = bool(given[name])
    return given


class _Absent(ValueError):
    """An input that a quantity is computed from is not in the file."""


class _Replay:
    """One file: its network, its inputs, and how each output is computed."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
        self.tensors, self.metadata, self.path = tensors, metadata, path
        self.config: dict[str, Any] = self._json("config")
        model = self.config.get("model", self.config)
        missing = [name for name in NEEDED if name not in model]
        if missing:
            raise ValueError(f"{path}: the metadata 'config' lacks {', '.join(missing)} below 'model'.")
        self.sigma = float(self.config.get("noise_std", 0.0))
        self.penalty = float(self.config.get("latent_norm_regularization", LATENT_NORM))
        with torch.random.fork_rng(devices=[]):
            self.net = StarFlowNet(**arguments(model))
        official = {name[6:]: value for name, value in tensors.items() if name.startswith("state/")}
        self.state = translate(official)
        match(self.state, self.net.state_dict())
        self.net.load_state_dict(self.state)
        self.y = tensors.get("in/y_cond", tensors.get("in/y"))
        self.null = tensors.get("in/y_null")
        self._passes: dict[str, Any] = {}

    def recipe(self, name: str) -> Callable[[], Tensor] | None:
        """What computes output ``name``; None for one this room does not know."""
        group, _, rest = name.partition("/")
        simple: dict[str, Callable[[], Tensor]] = {
            "z": lambda: self.image(self.forward("").z),
            "z_null": lambda: self.image(self.forward("null").z),
            "loss": lambda: self.nll("").mean(),
            "loss_null": lambda: self.nll("null").mean(),
            "loss_z": lambda: 0.5 * self.forward("").z.square().mean(),
            "loss_logdet": lambda: -process.log_det(self.forward("").scales).mean(),
            "loss_total": lambda: self.training_loss(),
            "grad_norms": self.grad_norms,
            "sample": lambda: self.samples(None)[-1],
            "denoised_x": lambda: self.denoised(self.input("x")),
            "denoised_sample": self.denoised_sample,
            "train_losses": self.train_losses,
        }
        if not rest:
            temperature = re.fullmatch(r"sample_attn_temp([\d.]+)", name)
            if temperature:
                return lambda: self.samples(None, float(temperature[1]))[-1]
            if name.startswith("sample_jacobi"):
                return lambda: self.samples(None, windows=True)[-1]
            return simple.get(name)
        return self.numbered(group, rest)

    def numbered(self, group: str, rest: str) -> Callable[[], Tensor] | None:
        """What computes ``group/rest``."""
        if rest.isdigit() and int(rest) < len(self.net.blocks):
            k = int(rest)
            if group == "block_out":
                return lambda: self.rows(self.block_outputs()[k])
            if group == "logdet":
                return lambda: self.scale(k)
            if group == "sample_seq":
                return lambda: self.samples(None)[k]
        weight = re.fullmatch(r"w([\d.]+)", rest)
        if group == "sample_guided" and weight:
            return lambda: self.samples(float(weight[1]))[-1]
        return None

    def input(self, name: str) -> Tensor:
        if f"in/{name}" not in self.tensors:
            raise _Absent(f"{self.path}: in/{name} is missing, so what depends on it cannot be computed.")
        return self.tensors[f"in/{name}"]

    def rows(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) as the authors lay them out, (B, h, w, D)."""
        return tokens.unflatten(1, self.net.grid(self.input("x")))

    def image(self, tokens: Tensor) -> Tensor:
        return self.net.unpatchify(tokens, self.net.grid(self.input("x")))

    def forward(self, condition: str) -> FlowOutput:
        """Forward pass of in/x with in/y_cond ("") or in/y_null ("null")."""
        if condition not in self._passes:
            y = self.input("y_null") if condition == "null" else self.y
            with torch.no_grad():
                self._passes[condition] = self.net(self.input("x"), y)
        out: FlowOutput = self._passes[condition]
        return out

    def block_outputs(self) -> list[Tensor]:
        out = self.forward("")
        return [*out.inputs[1:], out.z]

    def scale(self, k: int) -> Tensor:
        """-log sigma of block k; of a block without layers the authors keep one zero per image."""
        scale = self.forward("").scales[k]
        return scale if self.net.steps[k].layers else scale.new_zeros(len(scale))

    def nll(self, condition: str) -> Tensor:
        out = self.forward(condition)
        return flow.nll(out.z, process.log_det(out.scales))

    def samples(self, omega: float | None, temperature: float = 1.0, windows: bool = False) -> list[Tensor]:
        """Images after every inverted block, guided by the authors' omega."""
        key = f"samples/{omega}/{temperature}/{windows}"
        if key not in self._passes:
            z = self.input("z")
            guide = Guidance(1.0 + omega) if omega else None
            null = self.input("y_null") if guide and self.net.txt_dim else None
            how = Windows(8, 1e-6, "all") if windows else Windows()
            size = self.net.grid(z)
            tokens = invert(
                self.net,
                self.net.patchify(z),
                self.y,
                null,
                guide,
                size=size,
                temperature=temperature,
                windows=how,
            )
            self._passes[key] = [self.net.unpatchify(x, size) for x in tokens]
        images: list[Tensor] = self._passes[key]
        return images

    def denoised(self, x: Tensor) -> Tensor:
        noisy = x.clone().requires_grad_()
        out = self.net(noisy, self.y)
        (grad,) = torch.autograd.grad(flow.nll(out.z, process.log_det(out.scales)).sum(), noisy)
        return flow.tweedie(x, grad, self.sigma)

    def denoised_sample(self) -> Tensor:
        given = self.tensors.get("out/sample")  # the reference denoised its own sample
        return self.denoised(self.samples(None)[-1] if given is None else given.float())

    def training_loss(self, penalty: bool = True) -> Tensor:
        out = self.net(self.input("x"), self.y)
        loss = flow.nll(out.z, process.log_det(out.scales)).mean()
        return loss + self.penalty * process.latent_norm(out.inputs) if penalty else loss

    def grad_norms(self) -> Tensor:
        parameters = dict(self.net.named_parameters())
        order = self._json("param_order", list(parameters))
        if unknown := [name for name in order if name not in parameters]:
            raise ValueError(f"{self.path}: param_order names {unknown[0]}, which this network does not have.")
        loss = self.training_loss(penalty=False)
        grads = torch.autograd.grad(loss, [parameters[name] for name in order], allow_unused=True)
        return torch.stack([loss.new_zeros(()) if grad is None else grad.norm() for grad in grads])

    def train_losses(self) -> Tensor:
        """Five AdamW updates on the fixed batch, undone afterwards."""
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
        losses = []
        for _ in range(len(self.tensors["out/train_losses"])):
            loss = self.training_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        self.net.load_state_dict(self.state)
        return torch.stack(losses)

    def _json(self, key: str, default: Any = None) -> Any:
        return replay.read_json(self.metadata, key, self.path, default)
