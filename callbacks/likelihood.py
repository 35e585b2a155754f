"""Bits per dimension, token or character, and Bayes accuracy on held-out data."""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.records import scalars
from callbacks.sampling import plain
from callbacks.validations import AtValidations
from lightningmodules.base import GenerativeModule
from lightningmodules.shared.masking import Bound

TENTHS = 10
SUMS = 7  # see ``_sums``


class Likelihood(AtValidations):
    """Logs ``metrics/bpd``, and ``metrics/accuracy_bayes`` for rooms that can classify.

    For text it is ``metrics/bits_per_token`` and ``metrics/bits_per_character``, over the places that hold a token; the
    characters are those of the decoded text. For densities of another space, such as latents, it is
    ``metrics/nats_per_dim_<space>``: such a number compares with none of another autoencoder. Where the room knows a
    bound only, the row in ``metrics.jsonl`` says so.

    Rooms whose bound is an integral over time (those with ``bound``) also get what every tenth of the time adds to it:
    ``likelihood/bound_t0.0-0.1`` and so on, t = 0 being clean, in bits per token or dimension, so the ten add up to the
    whole. With a latent ``likelihood/cross_entropy_t...`` and ``likelihood/latent_t...`` are its two parts; neither
    alone bounds anything.

    The dequantisation noise of a sample is seeded by its key, so the value depends neither on batches nor on ranks,
    and it moves only because the weights did. Rooms without ``log_likelihood`` are left alone.

    Args:
        every: validations between measurements; the last validation always measures.
        conditional: log p(x | label) where the room knows classes; False is the class-free likelihood of the papers.
        classify: also classify by ``arg max_c log p(x | c)``; costs one likelihood per class.
        classify_settings: keywords of the room's ``classify``, for example ``{draws: 4}``.
        max_batches: per rank; None for all held-out data.
        options: more keywords of the room's ``log_likelihood`` or ``bound``, for example ``{draws: 16, steps: 64}``:
            the bound of a sampler of 64 steps instead of that in continuous time.

    Raises:
        ValueError: the room's likelihood has no such option.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        conditional: bool = True,
        classify: bool = True,
        classify_settings: Mapping[str, Any] | None = None,
        max_batches: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.conditional, self.options = conditional, plain(options or {})
        self.every, self.classify, self.max_batches = every, classify, max_batches
        self.classify_settings: dict[str, Any] = plain(classify_settings or {})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before anything is trained."""
        method = getattr(pl_module, "bound", getattr(pl_module, "log_likelihood", None))
        known = inspect.signature(method).parameters if method is not None else {}
        free = [name for name in known if name not in ("batch", "seeds", "conditional")]
        for name in self.options:
            if name not in free:
                raise ValueError(
                    f"callbacks.likelihood.options.{name}: the likelihood of {type(pl_module).__name__} has no such"
                    f" option; it has {', '.join(free) or 'none'}."
                )

    def at_validation(self, trainer: L.Trainer, module: GenerativeModule) -> bool:
        """Measure on all held-out data."""
        if not hasattr(module, "log_likelihood") or not self.due(trainer, module, self.every):
            return True
        with torch.no_grad():
            sums = self._sums(trainer, module)
        if sums is None:
            return False
        self._log(trainer, module, sums)
        return True

    def _log(self, trainer: L.Trainer, module: GenerativeModule, sums: Tensor) -> None:
        rows, nats, right, asked, infinite, places, characters = sums[:SUMS].tolist()
        protocol = {
            "n": round(rows),
            "weights": module.active_weights,
            "likelihood": getattr(module, "likelihood", "exact"),
            "conditional": self.conditional and module.num_classes > 0,
            "levels": getattr(module.codec, "levels", None),
            "noise": "seeded by key",
            "nonfinite": round(infinite),
            **({"options": self.options} if self.options else {}),
        }
        if not places:
            raise ValueError(
                "The held-out data (data.val) has not a single token to score: all is padding or given. Leave empty"
                " documents out."
            )
        bits = -nats / math.log(2) if not infinite else math.inf
        if characters:
            values = {"metrics/bits_per_token": bits / places, "metrics/bits_per_character": bits / characters}
        elif (space := getattr(module, "likelihood_space", "pixels")) != "pixels":  # a density, not a probability
            nats_per_dim = math.inf if infinite else -nats / places
            values, protocol["space"] = {f"metrics/nats_per_dim_{space.replace(' ', '_')}": nats_per_dim}, space
        else:
            values = {"metrics/bpd": bits / places}
        scalars(trainer, values | _tenths(sums[SUMS:] / (math.log(2) * max(1.0, places))), **protocol)
        if asked:
            settings = {
                "settings": self.classify_settings,
                "weights": module.active_weights,
                "n": round(asked),
                "noise": "seeded by key",
            }
            scalars(trainer, {"metrics/accuracy_bayes": right / asked}, **settings)

    def _sums(self, trainer: L.Trainer, module: GenerativeModule) -> Tensor | None:
        """Sums over all ranks, float64.

        Samples, nats, right answers, classified samples, samples without a finite likelihood, places (dimensions or
        tokens), characters; of rooms with a bound also the nats of its two parts in every tenth of the time.
        """
        likelihood: Callable[..., Tensor] = getattr(module, "log_likelihood")  # noqa: B009 - rooms may lack it
        bound: Callable[..., Bound] | None = getattr(module, "bound", None)
        classify: Callable[..., Tensor] | None = getattr(module, "classify", None)
        wanted = self.classify and classify is not None and module.num_classes > 1
        seeded = classify is not None and "seeds" in inspect.signature(classify).parameters

        def settings(batch: Mapping[str, Any]) -> dict[str, Any]:
            return {**({"seeds": seeds_of(batch)} if seeded else {}), **self.classify_settings}

        sums = torch.zeros(SUMS if bound is None else SUMS + 2 * TENTHS, dtype=torch.float64)
        for batch, counts in _in_step(trainer, self.max_batches):
            if module.stop_requested():
                return None
            batch = trainer.strategy.batch_to_device(batch)
            how = {**self.options, **({} if self.conditional else {"conditional": False})}
            found = None if bound is None else bound(batch, seeds=seeds_of(batch), **how)
            given = likelihood(batch, seeds=seeds_of(batch), **how) if found is None else found.log_likelihood()
            nats = given.double().cpu()
            finite = nats.isfinite()
            row = [len(nats), float(nats[finite].sum()), 0, 0, int((~finite).sum()), *_size(module, batch, len(nats))]
            if found is not None:
                row += found.over_time(TENTHS, finite.to(found.t.device)).flatten().tolist()
            if wanted and classify is not None and "label" in batch:
                right = classify(batch, **settings(batch)).cpu() == batch["label"].cpu()
                row[2:4] = [int(right.sum()), len(right)]
            if counts:
                sums += torch.tensor(row, dtype=torch.float64)
        if trainer.world_size == 1:
            return sums
        total: Tensor = trainer.strategy.reduce(sums.to(module.device), reduce_op="sum")
        return total.cpu()


def _tenths(parts: Tensor) -> dict[str, float]:
    """Scalars of the two parts of a bound by tenths of the time, (2 x 10,); none where there are none."""
    if not len(parts):
        return {}
    tokens, latent = parts.view(2, TENTHS)
    shown = {"bound": tokens + latent}
    if bool(latent.any()):
        shown |= {"cross_entropy": tokens, "latent": latent}
    names = [f"t{tenth / TENTHS:.1f}-{(tenth + 1) / TENTHS:.1f}" for tenth in range(TENTHS)]
    return {
        f"likelihood/{part}_{name}": value
        for part, values in shown.items()
        for name, value in zip(names, values.tolist(), strict=True)
    }


def _size(module: GenerativeModule, batch: Mapping[str, Any], rows: int) -> tuple[int, int]:
    """Places that the likelihood of a batch is about, and characters of its text (0 for anything else)."""
    if not hasattr(module.codec, "tokenizer"):
        return rows * math.prod(module.codec.shape), 0
    tokens, valid = module.codec.encode(batch).cpu(), batch["valid"].cpu()
    if "given" in batch:
        valid = valid & ~batch["given"].cpu()
    texts = [module.codec.decode(row[real][None])[0] for row, real in zip(tokens, valid, strict=True)]
    return int(valid.sum()), sum(map(len, texts))


def seeds_of(batch: Mapping[str, Any]) -> list[int]:
    """One seed in [0, 2**63) per sample, a function of its key alone."""
    return [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1 for key in batch["key"]]


def _in_step(trainer: L.Trainer, most: int | None) -> Iterator[tuple[Any, bool]]:
    """Held-out batches, equally many on every rank.

    A sharded network can only be called by all ranks together; a rank that runs out repeats its last batch.

    Yields:
        (batch, whether it counts).
    """
    batches = iter(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
    last, taken = None, 0
    while most is None or taken < most:
        batch = next(batches, None)
        busy = torch.tensor(float(batch is not None), device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            busy = trainer.strategy.reduce(busy, reduce_op="sum")
        if not float(busy):
            return
        last = batch if batch is not None else last
        if last is None:
            raise ValueError(
                f"Rank {trainer.global_rank} of {trainer.world_size} has no held-out sample. Give data.val more samples"
                f" than ranks, or set callbacks.likelihood=null."
            )
        taken += 1
        yield last, batch is not None
