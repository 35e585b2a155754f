"""Causal language models that score generated text: one from a local folder, or a small one trained here."""

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from callbacks.features.text import scored_targets
from lightningmodules.shared import pretrained

CONFIG, WEIGHTS = "config.yaml", "weights.safetensors"  # names in a folder that ``weights export`` writes
CAUSAL = "lightningmodules.causal.module.Causal"  # the room of models that score


class Scorer(Protocol):
    """Scores text by its negative log-likelihood.

    Attributes:
        name: part of the metric's name, so that numbers of different scorers are never taken for one another.
        digest: hash of its weights.
    """

    name: str
    digest: str

    def score(self, samples: Sequence[Sequence[str]], device: torch.device) -> tuple[float, int]:
        """Sum of nats over all counted tokens, and their number.

        Args:
            samples: of every sample the texts between its marks; the scorer puts its own end-of-text between them.
            device: where the model runs.
        """
        ...


class Pretrained:
    """A causal language model in a local folder, as ``save_pretrained`` leaves it; nothing is downloaded.

    The text is cut into tokens again by the model's own tokenizer, and into pieces of ``length``; the first token of
    a piece is not scored, nor are end-of-text tokens behind the first.

    Args:
        folder: holds config.json, the weights and the tokenizer, e.g. a copy of gpt2-large.
        length: tokens per piece.
        batch: pieces per forward pass.

    Raises:
        ValueError: the folder or one of the files is missing.

    Source: generative perplexity of kuleshov-group/mdlm and s-sahoo/duo (gpt2-large, 1,024 tokens).
    """

    def __init__(self, folder: str, length: int = 1024, batch: int = 8) -> None:
        self.folder, self.length, self.batch = Path(folder).expanduser(), length, batch
        wanted = {"config.json": ["config.json"], "weights": ["model.safetensors", "model.safetensors.index.json"]}
        wanted["tokenizer"] = ["tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt"]
        absent = [what for what, names in wanted.items() if not any((self.folder / name).is_file() for name in names)]
        if absent:
            there = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else "no such folder"
            raise ValueError(
                f"callbacks.quality.scorer.folder={self.folder}: expected a causal language model with config.json,"
                f" model.safetensors and its tokenizer; {', '.join(absent)} missing. There is: {there}. Copy the model"
                " there, or set callbacks.quality.scorer=null."
            )
        self.name = self.folder.resolve().name
        self.digest = _digest(self.folder / next(name for name in wanted["weights"] if (self.folder / name).is_file()))
        self._loaded: tuple[nn.Module, Any] | None = None

    @torch.no_grad()
    def score(self, samples: Sequence[Sequence[str]], device: torch.device) -> tuple[float, int]:
        """Sum of nats over all counted tokens, and their number; see ``Scorer``."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._loaded is None:
            model = pretrained.load(AutoModelForCausalLM, self.folder)
            self._loaded = model, AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        model, tokenizer = self._loaded[0].to(device), self._loaded[1]
        texts = [(tokenizer.eos_token or "").join(parts) for parts in samples]
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        pieces = [row[at : at + self.length] for row in rows for at in range(0, len(row), self.length)]
        nats, count = 0.0, 0
        for tokens, valid in _padded([piece for piece in pieces if len(piece) > 1], self.batch):
            logits = model(input_ids=tokens.to(device), attention_mask=valid.to(device).long()).logits[:, :-1]
            counted = scored_targets(tokens, tokenizer.eos_token_id) & valid[:, 1:]
            nats += float((_nats(logits, tokens[:, 1:]) * counted).sum())
            count += int(counted.sum())
        return nats, count


class Trained:
    """A causal model trained here, from the folder that ``weights export`` wrote.

    Args:
        folder: holds config.yaml and weights.safetensors.
        tokenizer: the one the model was trained with, e.g. ``${data.tokenizer}``; None makes the one that config.yaml
            names.
        batch: rows per forward pass.

    Raises:
        ValueError: the folder holds no such weights, or another vocabulary.
    """

    def __init__(self, folder: str, tokenizer: Any = None, batch: int = 32) -> None:
        self.folder, self.batch = Path(folder).expanduser(), batch
        if not all((self.folder / name).is_file() for name in (CONFIG, WEIGHTS)):
            raise ValueError(
                f"callbacks.quality.scorer.folder={self.folder} has no {CONFIG} with {WEIGHTS}. Train and export one:"
                " python -m platform fit causal_pydoc, then python -m platform weights export runs/causal_pydoc --out"
                " weights/causal_pydoc, and give that folder"
            )
        self.name = self.folder.resolve().name
        self.digest = _digest(self.folder / WEIGHTS)
        self._config = yaml.safe_load((self.folder / CONFIG).read_text())
        room = str(self._config["module"]["_target_"])
        if room != CAUSAL:
            raise ValueError(
                f"callbacks.quality.scorer.folder={self.folder} holds weights of {room}; only a causal model scores"
                " texts. Train one (python -m platform fit causal_pydoc) and export it."
            )
        self.tokenizer = tokenizer or _build(self._config["data"]["tokenizer"])
        self._net: nn.Module | None = None

    @torch.no_grad()
    def score(self, samples: Sequence[Sequence[str]], device: torch.device) -> tuple[float, int]:
        """Sum of nats over all tokens, the first one included, and their number; see ``Scorer``."""
        net = (self._net or self._load()).to(device)
        self._net = net
        length = int(getattr(net, "length"))  # noqa: B009 - an attribute, not a submodule
        rows = [self._joined(parts) for parts in samples]
        pieces = [row[at : at + length] for row in rows for at in range(0, len(row), length)]
        nats, count = 0.0, 0
        for tokens, valid in _padded([piece for piece in pieces if piece], self.batch):
            nats += float((_nats(net(tokens.to(device)), tokens) * valid).sum())
            count += int(valid.sum())
        return nats, count

    def _joined(self, parts: Sequence[str]) -> list[int]:
        """Tokens of texts with this tokenizer's end-of-text between them, where it has one."""
        between = [] if self.tokenizer.eos is None else [self.tokenizer.eos]
        row: list[int] = []
        for number, part in enumerate(parts):
            row += (between if number else []) + self.tokenizer.encode(part).tolist()
        return row

    def check(self) -> None:
        """Refuse another vocabulary than that of the tokenizer, which the data has prepared by then."""
        known = self._config["module"]["net"].get("vocabulary")
        if known != self.tokenizer.size:
            raise ValueError(
                f"callbacks.quality.scorer.folder={self.folder} knows {known} tokens, data.tokenizer"
                f" has {self.tokenizer.size}. Give the scorer that was trained with this tokenizer."
            )

    def _load(self) -> nn.Module:
        from safetensors.torch import load_file

        self.check()
        net: nn.Module = _build(self._config["module"]["net"])
        tensors = load_file(self.folder / WEIGHTS)
        net.load_state_dict({key.removeprefix("net."): value for key, value in tensors.items()})
        return net.eval()


def _build(made: Mapping[str, Any]) -> Any:
    """What a part of a saved configuration describes."""
    settings = {name: _build(value) if isinstance(value, Mapping) else value for name, value in made.items()}
    if "_target_" not in settings:
        return settings
    settings.pop("_partial_", None)
    package, _, name = settings.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(package), name)(**settings)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T) float32 on the CPU."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(logits.device), reduction="none")
    return flat.view(targets.shape).cpu()


def _padded(rows: Sequence[Sequence[int]], batch: int) -> list[tuple[Tensor, Tensor]]:
    """Rows in batches of similar length, filled up with token 0: tokens (B, T) int64, and which of them are real."""
    made = []
    ordered = sorted(rows, key=len)
    for at in range(0, len(ordered), batch):
        some = ordered[at : at + batch]
        tokens = torch.zeros(len(some), len(some[-1]), dtype=torch.int64)
        valid = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (numbers, real) in zip(some, zip(tokens, valid, strict=True), strict=True):
            numbers[: len(row)] = torch.tensor(row)
            real[: len(row)] = True
        made.append((tokens, valid))
    return made


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    if file.suffix == ".json":  # an index of several files names them; their sizes tell versions apart
        names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        digest.update(str([(name, (file.parent / name).stat().st_size) for name in names]).encode())
    return digest.hexdigest()[:16]
