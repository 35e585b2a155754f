"""What a STARFlow is told: a class as a one-hot token, a caption as text features, or nothing."""

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningmodules.shared.codecs import Batch
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.text_encoders import TextEncoder

NO_CLASS = -1  # the label of a row whose class is unknown


class Classes:
    """A class is one prefix token, one-hot over K + 1 entries; the last one means "no class".

    Args:
        num_classes: K.

    Source: apple/ml-starflow, label embedder.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def of_batch(self, batch: Batch) -> Tensor:
        """Tokens of a batch's labels, (B, 1, K + 1)."""
        if "label" not in batch:
            raise ValueError(
                f"A network of {self.num_classes} classes (module.net.txt_dim - 1) needs labels; the batch holds"
                f" {sorted(batch)}. Point data at labelled shards, or set module.condition=none."
            )
        return self._tokens(batch["label"])

    def of_request(self, condition: Condition | None, rows: int, device: torch.device, ratio: str = "1:1") -> Tensor:
        """Tokens of what was asked for; no condition means no class."""
        label = None if condition is None else condition.label
        label = torch.full((rows,), NO_CLASS) if label is None else label
        return self._tokens(label.to(device))

    def null(self, rows: int, device: torch.device, ratio: str = "1:1") -> Tensor:
        """Tokens that mean "no class", whatever the picture's ratio."""
        return self._tokens(torch.full((rows,), NO_CLASS, device=device))

    def null_condition(self, rows: int) -> Condition:
        """No class, ``rows`` rows."""
        return Condition(label=torch.full((rows,), NO_CLASS))

    def _tokens(self, label: Tensor) -> Tensor:
        if label.device.type == "cpu":  # elsewhere reading the values would make the device wait
            wrong = (label < NO_CLASS) | (label >= self.num_classes)
            if bool(wrong.any()):
                raise ValueError(
                    f"Label {int(label[wrong][0])} came, but this network knows -1 (no class) or 0.."
                    f"{self.num_classes - 1}. Ask for one of these, or set module.net.txt_dim and train anew."
                )
        known = torch.where(label < 0, self.num_classes, label)
        return F.one_hot(known, self.num_classes + 1).float().unsqueeze(1)


class Captions(nn.Module):
    """A caption is a sequence of text features; padding is zeros, and is not masked.

    Features come with the data, or from a frozen encoder. A data set that has classes but no captions can give every
    class a name.

    Args:
        length: text tokens.
        width: features per token.
        encoder: builds what turns captions into features, when it is first needed; None if features come with the data.
        class_names: caption of every class; empty where captions come with the data.
        null_caption: what "nothing" is; ``{ratio}`` in it becomes the picture's aspect ratio, e.g. "16:9".

    Source: apple/ml-starflow, text encoding (last hidden state times the mask; an empty caption means "nothing").
    """

    def __init__(
        self,
        length: int,
        width: int,
        encoder: Callable[[], TextEncoder] | None,
        class_names: Sequence[str] = (),
        null_caption: str = "",
    ) -> None:
        super().__init__()
        if class_names and encoder is None:
            raise ValueError("module.class_names needs a module.text_encoder that turns them into features.")
        self.length, self.width, self._make, self.class_names = length, width, encoder, list(class_names)
        self._encoder: TextEncoder | None = None
        self.num_classes, self.null_caption = len(self.class_names), null_caption
        self._known: dict[str, Tensor] = {}  # features of the class names and of "nothing", (1, length, width) each
        self._kept = False  # whether ``nothing`` says anything
        # features of the empty caption may come with the data; they are saved with the run
        from_data = not class_names and not null_caption
        self.register_buffer("nothing", torch.zeros(length, width) if from_data else None)
        if from_data:
            self.register_load_state_dict_post_hook(Captions._look)

    nothing: Tensor | None

    def keep(self, features: Tensor) -> None:
        """Let features, (rows, width), stand for the empty caption; where another one means "nothing" they do not."""
        if self.nothing is not None:
            self.nothing.copy_(self._padded(features.unsqueeze(0).to(self.nothing), None)[0])
            self._look()

    def _look(self, _: Any = None) -> None:
        self._kept = self.nothing is not None and bool(self.nothing.any())

    def of_batch(self, batch: Batch) -> Tensor:
        """Features of a batch, (B, length, width)."""
        if "text_features" in batch:
            return self._padded(batch["text_features"], batch.get("text_mask"))
        if "text" in batch and self._make is not None:
            return self.encode(batch["text"], _device_of(batch))
        if "label" in batch and self.class_names:
            return self._named(batch["label"])
        raise ValueError(
            f"module.condition=text needs text_features, or captions or labels with a module.text_encoder; the batch"
            f" holds {sorted(batch)}. Make features with python -m platform prepare text-features."
        )

    def of_request(self, condition: Condition | None, rows: int, device: torch.device, ratio: str = "1:1") -> Tensor:
        """Features of what was asked for; no condition means the null caption."""
        if condition is not None and condition.text is not None:
            mask = None if condition.text_mask is None else condition.text_mask.to(device)
            return self._padded(condition.text.to(device), mask)
        if condition is not None and condition.label is not None:
            return self._named(condition.label.to(device))
        return self.null(rows, device, ratio)

    def encode(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """Features of captions, (n, length, width).

        Raises:
            ValueError: there is no encoder, or it makes features of another width.
        """
        if self._make is None:
            raise ValueError(
                "Captions need a text encoder, and this run has none: it was trained on stored features. Name one as"
                " module.text_encoder in its config.yaml, the one that made them."
            )
        if self._encoder is None:
            self._encoder = self._make()
            if self._encoder.length != self.length:
                raise ValueError(
                    f"module.text_encoder makes {self._encoder.length} tokens, module.net.txt_size is {self.length}."
                    " Set both alike."
                )
        return self._padded(*self._encoder.encode(captions, device))

    def null(self, rows: int, device: torch.device, ratio: str = "1:1") -> Tensor:
        """Features of the null caption: those of the data, else the encoder's, else zeros."""
        if self.nothing is not None and (self._make is None or self._kept):
            return self.nothing.to(device).expand(rows, -1, -1)
        if self._make is None:
            return torch.zeros(rows, self.length, self.width, device=device)
        return self._features(self.null_caption.replace("{ratio}", ratio), device).expand(rows, -1, -1)

    def null_condition(self, rows: int) -> Condition:
        """The empty caption, ``rows`` rows."""
        return Condition(text=self.null(rows, torch.device("cpu")))

    def _named(self, label: Tensor) -> Tensor:
        if not self.class_names:
            raise ValueError(
                "A class was asked for, but this model is told captions and knows no names of classes"
                " (module.class_names is empty). Give a caption."
            )
        highest = int(label.max()) if label.device.type == "cpu" else 0
        if highest >= self.num_classes:
            raise ValueError(f"Label {highest} came, but module.class_names holds {self.num_classes} names.")
        table = [self._features(name, label.device) for name in self.class_names]
        return torch.cat([*table, self.null(1, label.device)])[torch.where(label < 0, self.num_classes, label)]

    def _features(self, caption: str, device: torch.device) -> Tensor:
        """Features of a caption that comes again and again."""
        known = self._known.get(caption)
        if known is None or known.device != device:
            known = self._known[caption] = self.encode([caption], device)
        return known

    def _padded(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Cut or fill up to ``length`` tokens, with zeros where nothing is said."""
        if features.shape[-1] != self.width:
            raise ValueError(
                f"Text features of width {features.shape[-1]} came, module.net.txt_dim is {self.width}. They belong to"
                " another text encoder; set module.net.txt_dim, or make the features anew."
            )
        features = features.float()
        if mask is not None:
            features = features * mask.unsqueeze(-1)
        missing = self.length - features.shape[1]
        return F.pad(features, (0, 0, 0, missing)) if missing > 0 else features[:, : self.length]


def _device_of(batch: Batch) -> torch.device:
    tensors = (value for value in batch.values() if isinstance(value, Tensor))
    return next((value.device for value in tensors), torch.device("cpu"))


def empty_caption(described: Callable[[str], Mapping[str, Any]], member: str) -> Tensor | None:
    """Features of the empty caption that ``prepare text-features`` left with stored features.

    Args:
        described: gives an entry of the data's card by its name.
        member: which features the data is read with.

    Returns:
        (rows, width) float32; None where the card has none.
    """
    stored, card = described("empty_caption").get(member), described(member)
    if stored is None:
        return None
    raw = bytearray(base64.b64decode(stored))
    kind = torch.bfloat16 if card["dtype"] == "bfloat16" else torch.float16
    values = torch.frombuffer(raw, dtype=kind) if raw else torch.zeros(0)
    return values.view(-1, card["shape"][1]).float()
