"""Text drawn during training, from the same seeds for the whole life of a run."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.features.text import unigram_entropy
from callbacks.records import scalars, text
from callbacks.sampling import asked_for, guidance_of, plain, prompted
from callbacks.validations import AtValidations
from lightningmodules.base import GenerativeModule

FILM_LINES = 40
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


class Texts(AtValidations):
    """Tables of generated text at every validation, to TensorBoard and to ``samples/step_*/`` in the run folder.

    ==========================  ================================================================================
    ``samples/ema/g1.0``        averaged weights: seed, prompt, text, entropy and network evaluations of every sample
    ``samples/raw/g1.0``        the same seeds with the weights being trained
    ``samples/film``            one sequence being drawn, one line per reveal (rooms that have ``trajectory``)
    ``health/sample_entropy``   mean entropy of the samples' own tokens in nats; falls when the text repeats itself
    ==========================  ================================================================================

    All ranks sample together (a sharded network needs every rank), rank 0 writes.

    Args:
        settings: keywords of the room's ``sample``; the experiment's ``sampling`` block.
        n: samples per table.
        weights: kinds to show; ``ema`` is the first average. The first is used for the film.
        prompts: beginnings that the samples continue, used in turn; empty for none.
        film_every: draw the film at every n-th validation, and at the last; 0 for never.
        first_seed: seeds are ``first_seed, first_seed + 1, ...``.
        chunk: samples per call of the network.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        n: int = 8,
        weights: Sequence[str] = ("ema", "raw"),
        prompts: Sequence[str] = (),
        film_every: int = 4,
        first_seed: int = 0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = plain(settings or {})
        self.n, self.weights, self.prompts = n, tuple(weights), tuple(prompts)
        self.film_every, self.first_seed, self.chunk = film_every, first_seed, chunk

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before anything is trained."""
        assert isinstance(pl_module, GenerativeModule)
        for kind in self.weights:
            pl_module.resolve_weights(kind)
        for name, least in (("n", 1), ("chunk", 1), ("film_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"callbacks.samples.{name}={getattr(self, name)}: expected at least {least}. For no samples set"
                    " callbacks.samples=null."
                )
        for prompt in self.prompts or [None]:
            condition = None
            if prompt is not None:
                condition = asked_for(pl_module, prompt, f"callbacks.samples.prompts: {prompt!r}")
            pl_module.check_settings(self.settings, condition)

    def at_validation(self, trainer: L.Trainer, module: GenerativeModule) -> bool:
        """Draw everything that is due; give up between two tables when a stop is asked for."""
        jobs: list[Callable[[], None]] = [
            lambda kind=kind: self._table(trainer, module, kind)  # type: ignore[misc]
            for kind in dict.fromkeys(module.resolve_weights(kind) for kind in self.weights)
        ]
        if hasattr(module, "trajectory") and self.due(trainer, module, self.film_every):
            jobs.append(lambda: self._film(trainer, module))
        for job in jobs:
            if module.stop_requested():
                return False
            with torch.no_grad():
                job()
        return True

    def _table(self, trainer: L.Trainer, module: GenerativeModule, kind: str) -> None:
        seeds = list(range(self.first_seed, self.first_seed + self.n))
        with module.use_weights(kind):
            tokens, prompts, calls = self._draw(module, seeds)
        samples, entropies = module.codec.decode(tokens), unigram_entropy(tokens).tolist()
        rows = [
            {"seed": seed, "prompt": prompt, "text": sample, "entropy": round(entropy, 3)}
            for seed, prompt, sample, entropy in zip(seeds, prompts, samples, entropies, strict=True)
        ]
        for row, count in zip(rows, calls, strict=False):  # none where the room does not count them
            row["evaluations"] = count
        group = "raw" if kind == "raw" else "ema"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        head = f"{kind}, step {module.updates}, guidance {guidance_of(self.settings)}"
        text(trainer, f"samples/{group}/g{guidance_of(self.settings)}", table(rows, head), lines, "jsonl")
        if group == "ema" or len(self.weights) == 1:
            scalars(trainer, {"health/sample_entropy": sum(float(str(row["entropy"])) for row in rows) / len(rows)})

    def _draw(self, module: GenerativeModule, seeds: Sequence[int]) -> tuple[Tensor, list[str], list[int]]:
        """Samples, the prompt of each and its evaluations; prompts differ in length, so each is drawn by itself."""
        prompts = [self.prompts[index % len(self.prompts)] if self.prompts else "" for index in range(len(seeds))]
        size = 1 if self.prompts else self.chunk
        rows: list[Tensor] = []
        calls: list[int] = []
        for first in range(0, len(seeds), size):
            part = seeds[first : first + size]
            condition = module.condition([seed % max(1, module.num_classes) for seed in part])
            if self.prompts:
                condition = prompted(module, condition, prompts[first])
            rows.append(module.sample(part, condition, **self.settings))
            counted = getattr(module, "evaluations", None)
            calls += [] if counted is None else counted.tolist()
        return torch.cat(rows), prompts, calls

    def _film(self, trainer: L.Trainer, module: GenerativeModule) -> None:
        trajectory: Callable[..., list[Tensor]] = getattr(module, "trajectory")  # noqa: B009 - rooms may lack it
        condition = module.condition([self.first_seed % max(1, module.num_classes)])
        with module.use_weights(self.weights[0]):
            states = trajectory([self.first_seed], condition, **self.settings)
        lines = film([state[0] for state in states], module.codec)
        text(trainer, "samples/film", _block(lines), "".join(line + "\n" for line in lines), "txt")


def film(states: Sequence[Tensor], codec: Any) -> list[str]:
    """One line per state that differs from the one before, at most about forty; the codec shows what is not drawn yet.

    Args:
        states: (L,) int64 each.
        codec: turns (1, L) into one text.
    """
    kept = [state for index, state in enumerate(states) if not index or not torch.equal(state, states[index - 1])]
    if len(kept) > FILM_LINES:
        kept = [kept[round(index * (len(kept) - 1) / (FILM_LINES - 1))] for index in range(FILM_LINES)]
    return [_visible(codec.decode(state[None])[0]) for state in kept]


def _visible(shown: str) -> str:
    """Text in one line: ends of lines and other characters that print nothing as Python writes them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in shown)


def table(rows: Sequence[Mapping[str, Any]], head: str) -> str:
    """Markdown table that a browser shows with the text's own line breaks."""
    names = list(rows[0])
    lines = [head, "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_cell(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    shown = "\n".join(map(_visible, str(value).replace("\r\n", "\n").expandtabs(4).split("\n")))
    shown = "".join(
        _ENTITIES.get(character) or (f"\\{character}" if character in "\\`*_{}[]()#+-.!~" else character)
        for character in shown
    )
    return shown.replace("  ", " &nbsp;").replace("\n", "<br>")


def _block(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)
