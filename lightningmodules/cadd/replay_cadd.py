"""One file of the exact CADD oracle: its distribution, its draws, and how each quantity is computed; float64."""

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightningmodules.cadd import process
from lightningmodules.cadd.oracle import Oracle

NODES = 201  # of the Gauss-Hermite quadrature
ALL_MASKED = 5  # this row of the batch is masked throughout
FUNCTIONS = {"cos": torch.cos, "sin": torch.sin, "exp": torch.exp, "sqrt": torch.sqrt, "log": torch.log}
Curve = Callable[[Tensor], Tensor]  # of t


class CaddReplay:
    """Quantities of one file.

    Args:
        tensors: of the file.
        metadata: T and the formulas ``alpha`` and ``gamma_bar`` of t.
        path: the file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
        self.tensors = tensors
        for name in ("emb", "prob", "states"):
            if name not in tensors:
                raise ValueError(f"{path} holds no {name}, so there is no distribution to replay.")
        self.oracle = Oracle(tensors["states"], tensors["prob"], tensors["emb"])
        self.mask_id = int(metadata.get("mask_index", self.oracle.vocabulary))
        self.steps = int(float(metadata.get("T", len(tensors.get("t", torch.zeros(9))) - 1)))
        self.alpha = self._curve("alpha", metadata, path)
        self.gamma = self._curve("gamma_bar", metadata, path)

    def _curve(self, name: str, metadata: Mapping[str, str], path: Path) -> Curve:
        """A function of t: the metadata's formula, or the file's own table where that is no formula."""
        table = self.tensors.get(name)
        try:
            return _formula(metadata.get(name, "1-t"), path)
        except ValueError:
            if table is None:
                raise
            return lambda t: table[(t * (len(table) - 1)).round().long()]

    def recipes(self) -> dict[str, Callable[[], Tensor]]:
        """What computes each quantity."""
        kinds: tuple[process.Estimator, ...] = ("soft", "hard")
        found: dict[str, Callable[[], Tensor]] = {
            "t": self._grid,
            "alpha": lambda: self.alpha(self._grid()),
            "gamma_bar": lambda: self.gamma(self._grid()),
            "coef.rho_flip": lambda: self._flip()[0],
            "coef.rho_keep": lambda: self._flip()[1],
            "coef.z0": lambda: self._step().z0,
            "coef.zt": lambda: self._step().zt,
            "coef.var": lambda: self._step().std.square(),
            "coef.kl_weight": self._weight,
            "batch.mask": lambda: self._mask().to(self.tensors["batch.mask"].dtype),
            "batch.x_t": self._tokens,
            "batch.z_t": self._latent,
            "post.joint": self._joint,
            "post.marginal": lambda: self.oracle.marginal(self._joint()),
            "post.marginal_mdm": lambda: self._log_probs_mdm().exp(),
            "est.argmax": lambda: self._log_probs().argmax(dim=-1),
            "loss.ce": lambda: self._cross_entropy(self._log_probs()),
            "loss.ce_mdm": lambda: self._cross_entropy(self._log_probs_mdm()),
            "loss.cadd_uniform": lambda: self._objective(weighted=False),
            "loss.cadd_elbo_ct": lambda: self._objective(weighted=True),
            "rev.q_xs": self._reverse,
            "rev.std": lambda: self._row(self._step().std).expand(self._tokens().shape),
            "step.x_s": self._next_tokens,
            "elbo1d.table_H_ce_cont": self._one_token_bound,
        }
        for kind in kinds:
            found |= {
                f"est.z0_{kind}": functools.partial(self._estimate, kind),
                f"loss.sqerr_{kind}": functools.partial(self._squared_error, kind),
                f"loss.nelbo_{kind}": functools.partial(self._bound, kind),
                f"rev.mean_{kind}": functools.partial(self._mean, kind),
                f"step.z_s_{kind}": functools.partial(self._next_latent, kind),
            }
        return found

    # ---- schedule -------------------------------------------------------------------------------------------------

    def _grid(self) -> Tensor:
        return torch.arange(self.steps + 1, dtype=torch.float64) / self.steps

    def _flip(self) -> tuple[Tensor, Tensor]:
        alpha = self.alpha(self._grid())
        return (alpha[:-1] - alpha[1:]) / (1.0 - alpha[1:]), (1.0 - alpha[:-1]) / (1.0 - alpha[1:])

    def _step(self) -> process.Step:
        gamma = self.gamma(self._grid())
        return process.reverse_step(gamma[1:], gamma[:-1])

    def _weight(self) -> Tensor:
        gamma = self.gamma(self._grid())
        return process.squared_error_weight(gamma[1:], gamma[:-1])

    def _row(self, values: Tensor) -> Tensor:
        """One of T values per row of the batch, (B, 1)."""
        return values[self.tensors["batch.k"] - 1].unsqueeze(1)

    # ---- forward --------------------------------------------------------------------------------------------------

    def _mask(self) -> Tensor:
        lost = self._row(1.0 - self.alpha(self._grid()[1:]))
        masked = self.tensors["batch.u_mask"] < lost
        masked[ALL_MASKED : ALL_MASKED + 1] = True
        return masked

    def _tokens(self) -> Tensor:
        return self.tensors["batch.x0"].masked_fill(self._mask(), self.mask_id)

    def _clean(self) -> Tensor:
        return self.oracle.table[self.tensors["batch.x0"]]

    def _latent(self) -> Tensor:
        gamma = self._row(self.gamma(self._grid()[1:])).unsqueeze(-1)
        noisy = process.noisy_latent(self._clean(), self.tensors["batch.eps"], gamma)
        return torch.where(self._mask().unsqueeze(-1), noisy, self._clean())

    # ---- prediction and objective ---------------------------------------------------------------------------------

    @functools.cache  # noqa: B019 - lives as long as the file is compared
    def _joint(self) -> Tensor:
        return self.oracle.joint(self._tokens(), self._latent(), self._row(self.gamma(self._grid()[1:])).squeeze(1))

    def _log_probs(self) -> Tensor:
        return self.oracle.marginal(self._joint()).clamp(min=1e-300).log()

    def _log_probs_mdm(self) -> Tensor:
        return self.oracle.log_probs(self._tokens(), None, None)

    def _estimate(self, kind: process.Estimator) -> Tensor:
        return process.estimate(self._log_probs().flatten(0, 1), self.oracle.table, kind).view_as(self._clean())

    def _cross_entropy(self, log_probs: Tensor) -> Tensor:
        picked = log_probs.gather(-1, self.tensors["batch.x0"].unsqueeze(-1)).squeeze(-1)
        return -picked * self._mask()

    def _squared_error(self, kind: process.Estimator) -> Tensor:
        return (self._clean() - self._estimate(kind)).square().sum(-1) * self._mask()

    def _bound(self, kind: process.Estimator) -> Tensor:
        flip, keep = (self._row(values) for values in self._flip())
        ce = self._cross_entropy(self._log_probs())
        return process.step_bound(flip, keep, self._row(self._weight()), ce, self._squared_error(kind))

    def _objective(self, weighted: bool) -> Tensor:
        per_row = self._cross_entropy(self._log_probs()).sum(dim=1)
        if weighted:
            t = self._grid().requires_grad_()
            (slope,) = torch.autograd.grad(self.alpha(t).sum(), t)
            weight = -slope[1:] / (1.0 - self.alpha(self._grid()[1:]))
            per_row = per_row * self._row(weight).squeeze(1)
        return per_row.mean().view(1)

    # ---- reverse --------------------------------------------------------------------------------------------------

    def _reverse(self) -> Tensor:
        flip, keep = (self._row(values) for values in self._flip())
        masked = self._mask().unsqueeze(-1)
        probs = self._log_probs().exp() * flip.unsqueeze(-1)
        law = torch.cat([probs, keep.expand_as(self._tokens()).unsqueeze(-1)], dim=-1)
        held = torch.nn.functional.one_hot(self._tokens(), self.oracle.vocabulary + 1).to(law.dtype)
        return torch.where(masked, law, held)

    def _mean(self, kind: process.Estimator) -> Tensor:
        step = self._step()
        moved = (
            self._row(step.z0).unsqueeze(-1) * self._estimate(kind) + self._row(step.zt).unsqueeze(-1) * self._latent()
        )
        return torch.where(self._mask().unsqueeze(-1), moved, self._clean())

    def _next_tokens(self) -> Tensor:
        return (self._reverse() / -self.tensors["step.u"].log()).argmax(dim=-1)

    def _next_latent(self, kind: process.Estimator) -> Tensor:
        tokens = self._next_tokens()
        std = self._row(self._step().std).unsqueeze(-1)
        moved = self._mean(kind) + std * self.tensors["step.eps"]
        known = self.oracle.table[tokens.clamp(max=self.oracle.vocabulary - 1)]
        return torch.where((tokens == self.mask_id).unsqueeze(-1), moved, known)

    def _one_token_bound(self) -> Tensor:
        """Entropy, cross-entropy and continuous part of the bound of one token with a one-dimensional latent."""
        table = [
            [one_token_bound(self.tensors["elbo1d.p"], self.tensors["elbo1d.w"], steps, kind, self.alpha, self.gamma)
             for steps in self.tensors["elbo1d.T"].tolist()]
            for kind in ("soft", "hard")
        ]  # fmt: skip
        return torch.tensor(table, dtype=torch.float64)


def one_token_bound(
    prob: Tensor,
    table: Tensor,
    steps: int,
    kind: process.Estimator,
    alpha: Curve,
    gamma: Curve,
) -> tuple[float, float, float]:
    """The bound of a single token under the exact denoiser, by quadrature.

    Args:
        prob: probabilities of the tokens, (V,) float64.
        table: one-dimensional latent of each, (V,).
        steps: T of the reverse process.
        kind: of the estimate.
        alpha: share of tokens kept, of t.
        gamma: signal of the latent left, of t.

    Returns:
        Entropy, cross-entropy part, continuous part; nats.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    node, weight = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    kept, left = alpha(grid), gamma(grid)
    error_weight = process.squared_error_weight(left[1:], left[:-1])
    ce = squared = torch.zeros((), dtype=torch.float64)
    for k in range(steps):
        signal, spread = process.signal_and_noise(left[k + 1])
        z = signal * table.unsqueeze(1) + spread * node  # (V, nodes): rows are the true token
        logs = -0.5 * ((z.unsqueeze(-1) - signal * table) / spread).square() + prob.log()
        log_probs = logs.log_softmax(dim=-1)
        true = torch.diagonal(log_probs, dim1=0, dim2=2).t()  # (V, nodes)
        guess = process.estimate(log_probs.flatten(0, 1), table.unsqueeze(1), kind).view_as(z)
        mean_ce = (prob.unsqueeze(1) * weight * -true).sum()
        mean_square = (prob.unsqueeze(1) * weight * (table.unsqueeze(1) - guess).square()).sum()
        ce = ce + (kept[k] - kept[k + 1]) * mean_ce
        squared = squared + (1.0 - kept[k]) * error_weight[k] * mean_square
    return float(-(prob * prob.log()).sum()), float(ce), float(squared)


def _formula(text: str, path: Path) -> Curve:
    """A function of t from text such as ``(1-t)^2``, ``cos^2(pi t/2)`` or ``np.cos(np.pi*t/2)**2``.

    Nothing but arithmetic is understood; a product needs no sign.
    """
    curve = _Formula(re.sub(r"\b(math|np|numpy|torch)\.", "", text.strip()))
    try:
        whole = curve.sum()
        if curve.words:
            raise ValueError(curve.words[0])
    except (ValueError, IndexError):
        raise ValueError(f"{path}: {text!r} in the metadata is no formula of t that is understood here.") from None
    return lambda t: whole(t) + torch.zeros_like(t)


class _Formula:
    """Reads a formula from left to right; each method takes off the words of its part and returns a function of t."""

    def __init__(self, text: str) -> None:
        self.words = re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|[a-z]+|\*\*|\S", text.replace("\u03c0", "pi"))

    def _take(self, *words: str) -> str:
        """The next word if it is one of these, or nothing."""
        return self.words.pop(0) if self.words and self.words[0] in words else ""

    def _expect(self, word: str) -> None:
        if not self._take(word):
            raise ValueError(word)

    def sum(self) -> Curve:
        value = self._product()
        while sign := self._take("+", "-"):
            value = _joined(operator.add if sign == "+" else operator.sub, value, self._product())
        return value

    def _product(self) -> Curve:
        value = self._signed()
        while self.words and self.words[0] not in ("+", "-", ")", ","):
            over = self._take("*", "/") == "/"
            value = _joined(operator.truediv if over else operator.mul, value, self._signed())
        return value

    def _signed(self) -> Curve:
        sign = self._take("+", "-")
        if not sign:
            return self._power()
        value = self._signed()
        return value if sign == "+" else lambda t: -value(t)

    def _power(self) -> Curve:
        value = self._atom()
        return _joined(operator.pow, value, self._signed()) if self._take("^", "**") else value

    def _atom(self) -> Curve:
        word = self.words.pop(0)
        if word == "t":
            return lambda t: t
        if word == "(":
            value = self.sum()
        elif word in FUNCTIONS:
            power = self._signed() if self._take("^", "**") else None
            self._expect("(")
            inside, function = self.sum(), FUNCTIONS[word]
            value = lambda t: function(inside(t))  # noqa: E731 - a short function of t like the others
            value = value if power is None else _joined(operator.pow, value, power)
        elif word == "pow":
            self._expect("(")
            base = self.sum()
            self._expect(",")
            value = _joined(operator.pow, base, self.sum())
        else:
            number = torch.tensor(math.pi if word == "pi" else float(word), dtype=torch.float64)
            return lambda t: number
        self._expect(")")
        return value


def _joined(operation: Callable[[Tensor, Tensor], Tensor], first: Curve, second: Curve) -> Curve:
    return lambda t: operation(first(t), second(t))
