"""How good generated text is: entropy, diversity, perplexity under another model, and whether code parses."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.features.scorer import Scorer
from callbacks.features.text import distinct, unigram_entropy
from callbacks.records import scalars, warn_once
from callbacks.sampling import guidance_of, plain, shares
from callbacks.validations import AtValidations
from lightningmodules.base import GenerativeModule

GRAMS = (1, 2, 3, 4)
ENOUGH = 1000  # texts below which MAUVE says little


class TextQuality(AtValidations):
    """Numbers about generated text at every n-th validation.

    ``metrics/entropy`` (mean entropy of each sample's own tokens, nats), ``metrics/distinct_<n>`` (share of different
    n-grams over all samples; ``_mean``: mean of each sample's own), ``metrics/gen_ppl_<scorer>``, ``metrics/<rule>``
    (share of samples that keep a rule, and ``metrics/<rule>_data`` of held-out rows), ``metrics/mauve``, and
    ``metrics/evaluations`` (network calls per sample). ``metrics/entropy_data`` is the entropy of held-out rows: a
    perplexity bought with less than that is none. ``metrics/entropy_corpus`` and ``metrics/entropy_corpus_data`` are of
    the counts over all samples or rows together. Sample i has seed ``first_seed + i``, and the seeds are dealt out to
    the ranks, so the numbers do not depend on how many ranks there are.

    Args:
        settings: keywords of the room's ``sample``; the experiment's ``sampling`` block.
        n: samples.
        every: validations between measurements; the last validation always measures.
        weights: kinds to measure; ``ema`` is the first average. Others than the first carry a suffix.
        scorer: what scores the texts, from ``callbacks.features.scorer``; None for no perplexity.
        rules: name to a function of a text that says whether it is right, e.g. ``{parses: {_target_:
            callbacks.features.text.parses, _partial_: true}}`` for code; nothing is executed.
        mauve: folder of a model whose features MAUVE compares with held-out text (package mauve-text, extra
            ``mauve``); None for no MAUVE.
        first_seed: seed of the first sample.
        chunk: samples per call of the network.

    Raises:
        ValueError: MAUVE is asked for, but it is not installed or the folder is not one it knows how to use.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        n: int = 64,
        every: int = 1,
        weights: Sequence[str] = ("ema",),
        scorer: Scorer | None = None,
        rules: Mapping[str, Callable[[str], bool]] | None = None,
        mauve: str | None = None,
        first_seed: int = 0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        if mauve is not None:
            _check_mauve(mauve)
        self.settings: dict[str, Any] = plain(settings or {})
        self.n, self.every, self.weights, self.scorer = n, every, tuple(weights), scorer
        self.rules = dict(rules or {})
        self.mauve = None if mauve is None else str(Path(mauve).expanduser())
        self.first_seed, self.chunk = first_seed, chunk

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before anything is trained."""
        assert isinstance(pl_module, GenerativeModule)
        for kind in self.weights:
            pl_module.resolve_weights(kind)
        if self.n < trainer.world_size:
            raise ValueError(f"callbacks.quality.n={self.n} is less than the {trainer.world_size} ranks. Raise n.")
        pl_module.check_settings(self.settings)
        check = getattr(self.scorer, "check", None)
        if check is not None:
            check()

    def at_validation(self, trainer: L.Trainer, module: GenerativeModule) -> bool:
        """Measure, for every kind of weights."""
        if not self.due(trainer, module, self.every):
            return True
        rows: list[tuple[dict[str, float], dict[str, Any]]] = []
        for position, kind in enumerate(dict.fromkeys(module.resolve_weights(kind) for kind in self.weights)):
            with module.use_weights(kind), torch.no_grad():
                drawn = self._draw(trainer, module)
            if drawn is None:
                return False
            tokens, calls = drawn
            values = self._values(trainer, module, tokens)
            if calls is not None:
                values["metrics/evaluations"] = calls
            suffix = f"_{kind}" if position else ""
            rows.append(({f"{tag}{suffix}": value for tag, value in values.items()}, self._protocol(kind)))
        for values, protocol in rows:
            scalars(trainer, values, **protocol)
        return True

    def _draw(self, trainer: L.Trainer, module: GenerativeModule) -> tuple[Tensor, float | None] | None:
        """Tokens of all samples in the order of their seeds, (n, L) on the CPU, and network calls per sample."""
        parts, calls = [], []
        for numbers, _ in shares(self.n, trainer.global_rank, trainer.world_size, self.chunk):
            if module.stop_requested():
                return None
            labels = [number % max(1, module.num_classes) for number in numbers]
            seeds = [self.first_seed + number for number in numbers]
            parts.append(module.sample(seeds, module.condition(labels), **self.settings))
            counted = getattr(module, "evaluations", None)
            calls += [] if counted is None else [counted]
        count = float(self._together(trainer, calls).double().mean()) if calls else None
        return self._together(trainer, parts), count

    def _together(self, trainer: L.Trainer, parts: list[Tensor]) -> Tensor:
        """What all ranks have, (n, ...) in the order of the samples, on the CPU."""
        rows = torch.cat(parts)
        if trainer.world_size > 1:  # (ranks, longest share, ...): sample i is row i // ranks of i % ranks
            gathered = trainer.strategy.all_gather(rows)
            rows = gathered.transpose(0, 1).flatten(0, 1)
        return rows[: self.n].cpu()

    def _values(self, trainer: L.Trainer, module: GenerativeModule, tokens: Tensor) -> dict[str, float]:
        texts: list[str] = list(module.codec.decode(tokens))
        rows = tokens.tolist()
        values = _entropies(tokens, "")
        data = self._data(trainer, module)
        if data is not None:
            values |= _entropies(data, "_data")
        for n in GRAMS:
            values[f"metrics/distinct_{n}"], values[f"metrics/distinct_{n}_mean"] = distinct(rows, n)
        if self.scorer is not None:
            nats, count = self.scorer.score([_documents(module.codec, row) for row in rows], module.device)
            mean = torch.tensor(nats / count if count else math.nan)  # empty texts have none, least of all the best
            values[f"metrics/gen_ppl_{self.scorer.name}"] = float(mean.exp())
        held_out: list[str] = []
        if data is not None and (self.rules or self.mauve is not None):
            held_out = list(module.codec.decode(data))
        for name, rule in self.rules.items():
            values[f"metrics/{name}"] = sum(map(rule, texts)) / len(texts)
            if held_out:
                values[f"metrics/{name}_data"] = sum(map(rule, held_out)) / len(held_out)
        if self.mauve is not None and not held_out:
            warn_once(
                "mauve rows",
                "metrics/mauve: no held-out row is full, so there is nothing to compare with. Lower data.length.",
            )
        elif self.mauve is not None:
            values["metrics/mauve"] = self._mauve(texts, held_out, module.device)
        return values

    def _data(self, trainer: L.Trainer, module: GenerativeModule) -> Tensor | None:
        """As many full held-out rows as there are samples, or all there are; this rank's share stands for all."""
        parts, count = [], 0
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            found = module.codec.encode(batch).cpu()
            if "valid" in batch:
                found = found[batch["valid"].all(dim=1).cpu()]  # padding would count as a token
            parts.append(found)
            count += len(found)
            if count >= self.n:
                break
        return torch.cat(parts)[: self.n] if count else None

    def _mauve(self, texts: list[str], data: list[str], device: torch.device) -> float:
        import mauve

        if min(len(texts), len(data)) < ENOUGH:
            few = f"{len(texts)} samples and {len(data)} held-out rows"
            warn_once("mauve size", f"metrics/mauve of {few} is rough; papers take 5,000. Raise n.")
        number = -1 if device.type != "cuda" else device.index or 0
        result = mauve.compute_mauve(
            p_text=data, q_text=texts, featurize_model_name=self.mauve, device_id=number, seed=25, verbose=False
        )
        return float(result.mauve)

    def _protocol(self, kind: str) -> dict[str, Any]:
        scorer = None if self.scorer is None else {"name": self.scorer.name, "digest": self.scorer.digest}
        return {
            "n": self.n,
            "weights": kind,
            "guidance": guidance_of(self.settings),
            "settings": self.settings,
            "seeds": f"{self.first_seed}-{self.first_seed + self.n - 1}",
            "scorer": scorer,
        }


def _check_mauve(folder: str) -> None:
    if importlib.util.find_spec("mauve") is None:
        raise ValueError(
            "callbacks.quality.mauve needs a package, the extra mauve. Type: pip install mauve-text, or set it to null."
        )
    if not (Path(folder).expanduser() / "config.json").is_file():
        raise ValueError(
            f"callbacks.quality.mauve={folder}: expected a folder with config.json, the weights and the tokenizer of a"
            " language model, e.g. a copy of gpt2-large; nothing is downloaded. Copy it there, or set it to null."
        )
    if not any(kind in folder for kind in ("gpt2", "bert")):  # the package decides by the name how to read a model
        raise ValueError(
            f"callbacks.quality.mauve={folder}: the package mauve takes models whose path says gpt2 or bert. Rename the"
            " folder, e.g. gpt2-large."
        )


def _documents(codec: Any, row: list[int]) -> list[str]:
    """Texts between the marks of a row, in which the codec's text would run into one another."""
    marks = {getattr(codec.tokenizer, name) for name in ("bos", "eos", "pad")}
    parts: list[list[int]] = [[]]
    for token in row:
        if token not in marks:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return [str(codec.tokenizer.decode(part)) for part in parts if part]


def _entropies(tokens: Tensor, suffix: str) -> dict[str, float]:
    """Mean entropy of each row's own tokens, and that of all rows (n, L) together; nats."""
    return {
        f"metrics/entropy{suffix}": float(unigram_entropy(tokens).mean()),
        f"metrics/entropy_corpus{suffix}": float(unigram_entropy(tokens.reshape(1, -1))),
    }
