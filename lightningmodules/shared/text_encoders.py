"""Frozen encoders that turn captions into features; never trained, averaged or saved."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lightningmodules.shared import pretrained

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
_FAMILIES = {  # model_type in config.json -> class of transformers that holds the encoder alone
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "gemma": "AutoModel",
    "gemma2": "AutoModel",
    "gemma3_text": "AutoModel",
}
_BYTE_MARKS = 2  # tokens of RandomBytes in front of the bytes: padding and end


class TextEncoder(Protocol):
    """Captions to features.

    Attributes:
        width: features per token, D.
        length: tokens per caption, L; longer captions are cut.
        fingerprint: hash of weights, tokenizer and length; stored with prepared features.
    """

    width: int
    length: int

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and length."""
        ...

    def encode(self, texts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Features (B, L, D) float32, zero where there is no text, and (B, L) bool, True where there is."""
        ...


class Pretrained:
    """A T5, CLIP or Gemma text encoder in a local folder, as ``save_pretrained`` leaves it; nothing is downloaded.

    Features are the last hidden states, or the embeddings of the tokens; zero at padding.

    Args:
        folder: holds config.json, the weights and the tokenizer.
        length: tokens per caption.
        dtype: "float32" or "bfloat16", of the encoder; features come back as float32.
        states: "last", or "embeddings", what the first layer of a Gemma reads.

    Raises:
        ValueError: files are missing, or the model is of another family.

    Source: text encoding of apple/ml-starflow (last hidden state times mask).
    """

    def __init__(self, folder: str, length: int = 128, dtype: str = "float32", states: str = "last") -> None:
        self.folder, self.length = Path(folder).expanduser(), length
        self._check_files()
        self._config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.family = str(self._config.get("model_type"))
        if self.family not in _FAMILIES:
            raise ValueError(
                f"text encoder {self.folder}: config.json says model_type={self.family!r}; known are"
                f" {', '.join(sorted(_FAMILIES))}. Give the folder of a T5, CLIP or Gemma text encoder."
            )
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"text encoder dtype={dtype!r}: expected float32 or bfloat16.")
        if states not in ("last", "embeddings") or (states == "embeddings" and not self.family.startswith("gemma")):
            raise ValueError(
                f"text encoder {self.folder}: states={states!r} of a {self.family}; expected last, or embeddings of a"
                " Gemma."
            )
        self.states = states
        self.dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        inner = self._config.get("text_config", self._config)
        self.width = int(inner.get("d_model") or inner["hidden_size"])
        self._loaded: tuple[nn.Module, Any] | None = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and length; read once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(str(self.length).encode())
            digest.update(b"" if self.states == "last" else self.states.encode())
            names = sorted(
                path.name for path in self.folder.iterdir() if path.suffix in (".safetensors", ".bin", ".model")
            )
            for name in [*names, *(name for name in _TOKENIZER if (self.folder / name).is_file())]:
                with (self.folder / name).open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    @torch.no_grad()
    def encode(self, texts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Features of captions.

        Args:
            texts: B captions; the empty one stands for "no caption".
            device: where the encoder runs and the result lies.

        Returns:
            Features (B, length, width) float32, zero at padding, and (B, length) bool, True at tokens.
        """
        model, tokenizer = self._load()
        model.to(device)
        tokens = tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(device)
        mask = tokens["attention_mask"].bool()
        if self.states == "embeddings":
            table = cast(Any, model).get_input_embeddings()
            states = table(tokens["input_ids"])
            if not hasattr(table, "embed_scale"):  # before transformers 5 the model scales them, not the table
                states = states * self.width**0.5
        else:
            states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return states.float() * mask.unsqueeze(-1), mask

    def _load(self) -> tuple[nn.Module, Any]:
        if self._loaded is None:
            import transformers

            family = getattr(transformers, _FAMILIES[self.family])
            model = pretrained.load(family, self.folder, dtype=self.dtype)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            tokenizer.padding_side = "right"
            self._loaded = model.requires_grad_(False), tokenizer
        return self._loaded

    def _check_files(self) -> None:
        wanted = {"config.json": ("config.json",), "the weights": _WEIGHTS, "the tokenizer": _TOKENIZER}
        absent = [
            f"{what} ({' or '.join(names)})" if len(names) > 1 else what
            for what, names in wanted.items()
            if not any((self.folder / name).is_file() for name in names)
        ]
        if absent:
            there = ", ".join(sorted(path.name for path in self.folder.iterdir())) if self.folder.is_dir() else ""
            raise ValueError(
                f"text encoder {self.folder}: {'; '.join(absent)} missing. "
                + (f"There is: {there}. " if there else "There is no such folder. " if not self.folder.is_dir() else "")
                + "Copy the encoder there (huggingface-cli download NAME --local-dir FOLDER, on a machine with a"
                " network), or set the folder in the experiment."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretrained":
        return self  # frozen: copies of a room share it


class RandomBytes:
    """A small encoder with random weights that reads utf-8 bytes: features that tell captions apart, nothing more.

    It needs no files, so that text conditioning can be tried and tested on any machine. The same seed gives the same
    features everywhere.

    Args:
        width: features per token.
        length: tokens per caption; the text's bytes and an end mark.
        layers: transformer layers of the T5 encoder.
        seed: of the weights.
    """

    def __init__(self, width: int = 64, length: int = 32, layers: int = 2, seed: int = 0) -> None:
        self.width, self.length, self.layers, self.seed = width, length, layers, seed
        self._model: nn.Module | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the weights."""
        text = f"random bytes {self.width} {self.length} {self.layers} {self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Features (B, length, width) float32, zero at padding, and (B, length) bool, True at tokens."""
        tokens = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            numbers = [*(byte + _BYTE_MARKS for byte in text.encode()[: self.length - 1]), 1]
            row[: len(numbers)] = torch.tensor(numbers)
        tokens = tokens.to(device)
        mask = tokens > 0
        model = (self._model or self._build()).to(device)
        self._model = model
        states: Tensor = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return states * mask.unsqueeze(-1), mask

    def _build(self) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        config = T5Config(
            vocab_size=256 + _BYTE_MARKS,
            d_model=self.width,
            d_kv=self.width // 4,
            d_ff=2 * self.width,
            num_layers=self.layers,
            num_heads=4,
            dropout_rate=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return T5EncoderModel(config).eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RandomBytes":
        return self  # frozen: copies of a room share it
