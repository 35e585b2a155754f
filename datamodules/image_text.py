"""Images with captions: as text, as tokens, as features of a text encoder, and as latents instead of pixels."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.buckets import Buckets
from datamodules.imagereader import Batch, Columns, Items, Members
from datamodules.images import Images
from datamodules.loader import Buffers
from datamodules.order import CAPTION, Ints, choose, sample_bits
from datamodules.source import Source, first_dots
from datamodules.tokenizers import Tokenizer

_JSON = "json:"
_RATIO = "{ratio}"
_TYPES = {"float16": (np.float16, torch.float16), "bfloat16": (np.uint16, torch.bfloat16)}


class ImageText(Images):
    """Train and validation images with captions.

    A batch is a dict with "key" and, as the settings ask for them:

    =================  =============================================================================
    ``image``          uint8 (B, C, H, W), and ``flip`` and ``bucket`` as in ``Images``
    ``label``          int64 (B,)
    ``text``           list of B captions
    ``tokens``         int64 (B, length) of the caption, cut or padded; ``valid`` bool (B, length), True for tokens
    ``text_features``  float16 or bfloat16 (B, feature_length, width), zeros behind the text; ``text_mask`` bool
                       (B, feature_length), True for the text
    ``latent``         float16, as stored: mean and log-variance (B, 2C, h, w)
    =================  =============================================================================

    Leaving captions out now and then, for guidance, is the model's business.

    Args:
        root: folder that relative names start from.
        train: shards, as a name with wildcards or braces, a URL, or a list of them; or a mixture
            {name: {path, weight or repeat}} of such.
        val: held-out samples, given alike but not as a mixture; None for none.
        source: called with ``root`` before anything is read, to make the shards if they are not there.
        image: decode images. False where latents or features are all that is wanted.
        size: height and width in pixels; other sizes are resized (shorter side, bicubic) and centre-cropped.
        channels: 1 (grey) or 3 (RGB).
        num_classes: number of classes; 0 for data without labels.
        captions: member that holds the caption, or {member: probability}: one is drawn per sample and epoch, a pure
            function of (seed, epoch, sample), of those that the sample has. ``json:NAME`` is the entry NAME of the
            member ``json``. Validation takes the first that the sample has. None for no captions.
        caption_suffix: added to every caption; ``{ratio}`` in it becomes the ratio of the batch's images, e.g. "16:9".
        tokenizer: turns captions into tokens; None for no tokens.
        length: tokens per caption.
        add_eos: end the tokens of every caption with the tokenizer's mark for that, if it has one.
        features: member with features of the caption, e.g. "emb.t5", of as many rows as the text has tokens; None for
            none. They belong to one caption, whichever is drawn.
        feature_length: rows per caption; longer ones are cut.
        feature_width: numbers per row; None takes it from the card in index.json.
        feature_type: number format of the features; None takes it from the card, and float16 without one.
        latents: member with a latent, e.g. "lat"; None for none.
        latent_shape: its shape; None takes it from the card.
        batch_size: G, samples per update over all ranks and micro-batches.
        micro_batch: samples per rank and forward pass; None for batch_size / ranks.
        val_batch_size: validation samples per batch over all ranks; None for as many as a training pass takes.
        workers: reader threads per rank; 0 reads in the training thread.
        window: shards whose samples are mixed with one another.
        flip: mirror half of the training images; captions that speak of left and right then lie.
        buckets: shapes for training images of several aspect ratios; None for squares.
        seed: seed of the order, of the flips and of the choice of captions.
        label_offset: added to every stored class.
        allow_missing: accept that some of the named shards are absent.
        max_bad_fraction: accepted share of unusable samples, 0..1; each is logged with shard and key.
        columns: folders below ``root`` with shards of the same names and keys, whose members join the samples.
        cache_gib: size of the local cache for shards that come from elsewhere, in GiB.

    Raises:
        ValueError: a setting is out of its range, or does not go with another.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
        val: str | Sequence[str] | None = None,
        source: Callable[[Path], object] | None = None,
        image: bool = True,
        size: int,
        channels: int = 3,
        num_classes: int = 0,
        captions: str | Mapping[str, float] | None = "txt",
        caption_suffix: str | None = None,
        tokenizer: Tokenizer | None = None,
        length: int = 128,
        add_eos: bool = True,
        features: str | None = None,
        feature_length: int = 128,
        feature_width: int | None = None,
        feature_type: Literal["float16", "bfloat16"] | None = None,
        latents: str | None = None,
        latent_shape: Sequence[int] | None = None,
        batch_size: int,
        micro_batch: int | None = None,
        val_batch_size: int | None = None,
        workers: int = 2,
        window: int = 16,
        flip: bool = False,
        buckets: Buckets | None = None,
        seed: int = 0,
        label_offset: int = 0,
        allow_missing: bool = False,
        max_bad_fraction: float = 0.0,
        columns: Sequence[str] = (),
        cache_gib: float = 64.0,
    ) -> None:
        super().__init__(
            root=root,
            train=train,
            val=val,
            source=source,
            size=size,
            channels=channels,
            num_classes=num_classes,
            batch_size=batch_size,
            micro_batch=micro_batch,
            val_batch_size=val_batch_size,
            workers=workers,
            window=window,
            flip=flip,
            buckets=buckets,
            seed=seed,
            label_offset=label_offset,
            allow_missing=allow_missing,
            max_bad_fraction=max_bad_fraction,
            columns=columns,
            cache_gib=cache_gib,
        )
        self.image = image
        self.captions = {captions: 1.0} if isinstance(captions, str) else dict(captions or {})
        self.caption_suffix = caption_suffix or ""
        self.tokenizer = tokenizer
        self.length = length
        self.add_eos = add_eos
        self.features = features
        self.feature_length = feature_length
        self.feature_width = feature_width
        self.feature_type = feature_type
        self.latents = latents
        self.latent_shape = latent_shape
        self._check_settings()

    def filled(self, split: str, training: bool) -> list[Columns]:
        """What fills the entries of a batch."""
        columns = super().filled(split, training)[0 if self.image else 1 :]
        if self.captions:
            columns.append(self._texts(training))
        source = self.source_of(split)
        if self.features:
            columns.append(self._features(source))
        if self.latents:
            columns.append(self._latents(source))
        return columns

    def reference_images(self, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Images of a split as metrics compare with them; see ``Images``.

        Raises:
            ValueError: the split is not set, or has no images.
        """
        self.check_images(self.source_of(split), f"data.{split}")
        return super().reference_images(split, limit)

    def reference_columns(self, split: str) -> list[Columns]:
        """Images and classes only: metrics want no captions."""
        return super().filled(split, training=False)

    def check_source(self, source: Source, setting: str) -> None:
        """Refuse a source without the members that the settings name."""
        if self.image:
            self.check_images(source, setting)
        self.check_classes(source, setting)
        members = source.extensions()
        listed = ", ".join(f".{name}" for name in members)
        wanted = {("json" if name.startswith(_JSON) else name): "captions" for name in self.captions}
        wanted |= {name: key for key in ("features", "latents") if (name := getattr(self, key))}
        for name, key in wanted.items():
            if name not in members:
                raise ValueError(
                    f"{setting}: the samples of {source.names[0]} have {listed}, but data.{key} wants .{name}. "
                    f"Set data.{key} to a member that is there or to null, or add the folder with it to data.columns."
                    + first_dots(members, [name])
                )

    def _check_settings(self) -> None:
        self.check_limits(
            {
                "length": (self.length >= 1, "at least 1 token", "128"),
                "feature_length": (self.feature_length >= 1, "at least 1 row", "128"),
                "feature_width": (self.feature_width is None or self.feature_width >= 1, "null or at least 1", "null"),
            }
        )
        if self.captions:
            choose(np.zeros(1, dtype=np.uint64), list(self.captions.values()))
        elif self.tokenizer is not None:
            raise ValueError("data.tokenizer is set, but data.captions is null. Set data.captions=txt.")
        if not (self.image or self.captions or self.features or self.latents):
            raise ValueError("data.image=false leaves nothing to read. Set data.image=true.")
        if self.buckets is not None and not self.image:
            raise ValueError("data.buckets gives images their shape, but data.image=false. Set data.buckets=null.")
        if self.buckets is not None and self.latents:
            raise ValueError("data.buckets resizes images, but data.latents are stored. Set data.buckets=null.")
        if self.flip and (self.latents or not self.image):
            raise ValueError("data.flip=true mirrors images only, not data.latents. Set data.flip=false.")

    def _texts(self, training: bool) -> Columns:
        names = list(self.captions)
        if training:  # the order they are written in decides nothing but the one for validation
            names = sorted(name for name, share in self.captions.items() if share > 0)

        def draw(epochs: Ints, samples: Ints, among: list[str]) -> list[int]:
            shares = [self.captions[name] for name in among]
            bits = sample_bits(self.seed, epochs, samples, CAPTION)
            found: list[int] = choose(bits, [share / sum(shares) for share in shares]).tolist()
            return found

        def column(items: Items) -> Captions:
            suffix = self.caption_suffix.replace(_RATIO, self.shape_for(items)[1])

            first = items.samples.tolist()
            drawn = draw(items.epochs, items.samples, names) if training else []

            def pick(row: int, sample: int, members: Members) -> str:
                there = names if len(names) == 1 else [name for name in names if has_caption(members, name)]
                if not training or len(there) < 2:
                    return (there or names)[0]
                if len(there) == len(names) and sample == first[row]:
                    return names[drawn[row]]
                return there[draw(items.epochs[row : row + 1], np.array([sample], dtype=np.int64), there)[0]]

            return Captions(items, pick, suffix, self._encoder())

        return column

    def _encoder(self) -> "Callable[[list[str]], Batch] | None":
        tokenizer = self.tokenizer
        if tokenizer is None:
            return None
        end = [tokenizer.eos] if self.add_eos and tokenizer.eos is not None else []

        def encode(texts: list[str]) -> Batch:
            tokens = np.full((len(texts), self.length), tokenizer.pad or 0, dtype=np.int64)
            counts = np.zeros(len(texts), dtype=np.int64)
            for row, found in enumerate(tokenizer.encode_batch(texts)):
                count = min(len(found), self.length - len(end))
                tokens[row, :count] = found[:count]
                tokens[row, count : count + len(end)] = end
                counts[row] = count + len(end)
            valid = np.arange(self.length) < counts[:, None]
            return {"tokens": torch.from_numpy(tokens), "valid": torch.from_numpy(valid)}

        return encode

    def _features(self, source: Source) -> Columns:
        name = self.features or ""
        card = source.described(name)
        width = self.feature_width or (card.get("shape") or [0])[-1]
        kind = self.feature_type or card.get("dtype") or "float16"
        if not width or kind not in _TYPES:
            raise ValueError(
                f"data.features={name}: index.json does not say how many numbers a row has, or their type is {kind}. "
                "Set data.feature_width, and data.feature_type to float16 or bfloat16."
            )
        buffers = Buffers(self.buffers)
        return lambda items: Features(items, name, (self.feature_length, int(width)), kind, buffers)

    def _latents(self, source: Source) -> Columns:
        name = self.latents or ""
        shape = tuple(self.latent_shape or source.described(name).get("shape") or ())
        if not shape:
            raise ValueError(
                f"data.latents={name}: index.json does not say which shape they have. Set data.latent_shape, e.g. to "
                "[8,32,32] for 4 channels of 32x32 with their log-variances."
            )
        buffers = Buffers(self.buffers)
        return lambda items: Latents(items, name, tuple(int(side) for side in shape), buffers)


class Captions:
    """The columns "text", a list of captions, and those that ``encode`` makes of it.

    Args:
        items: the batch's items.
        pick: from a row, its sample and the members of that to the one that holds the caption.
        suffix: added to every caption.
        encode: from all captions to more entries; None for none.
    """

    def __init__(
        self,
        items: Items,
        pick: Callable[[int, int, Members], str],
        suffix: str,
        encode: Callable[[list[str]], Batch] | None,
    ) -> None:
        self._pick = pick
        self._suffix = suffix
        self._encode = encode
        self._texts = [""] * len(items.samples)

    def take(self, row: int, sample: int, members: Members) -> None:
        """Read the caption of one sample; white space around it is dropped."""
        self._texts[row] = caption_of(members, self._pick(row, sample, members)) + self._suffix

    def entries(self) -> Batch:
        """The captions and their tokens."""
        return {"text": self._texts, **(self._encode(self._texts) if self._encode else {})}


class Features:
    """The columns "text_features" and "text_mask" of one member with a row of numbers per token.

    Args:
        items: the batch's items.
        name: the member.
        shape: rows per caption and numbers per row.
        kind: "float16" or "bfloat16".
        buffers: where the memory comes from.
    """

    def __init__(self, items: Items, name: str, shape: tuple[int, int], kind: str, buffers: Buffers) -> None:
        self._name = name
        self._stored, self._type = _TYPES[kind]
        self._values = buffers.take((len(items.positions), *shape), self._stored)
        self._counts = np.zeros(len(items.positions), dtype=np.int64)

    def take(self, row: int, sample: int, members: Members) -> None:
        """Copy the rows of one sample."""
        data = _member(members, self._name)
        _, rows, width = self._values.shape
        if not data or len(data) % (2 * width):
            raise ValueError(f".{self._name} has {len(data)} bytes, expected rows of {2 * width}")
        found = np.frombuffer(data, dtype=self._stored).reshape(-1, width)[:rows]
        self._values[row, : len(found)] = found
        self._values[row, len(found) :] = 0
        self._counts[row] = len(found)

    def entries(self) -> Batch:
        """Features and mask."""
        mask = np.arange(self._values.shape[1]) < self._counts[:, None]
        return {
            "text_features": torch.from_numpy(self._values).view(self._type),
            "text_mask": torch.from_numpy(mask),
        }


class Latents:
    """The column "latent" of one member of fixed shape in float16.

    Args:
        items: the batch's items.
        name: the member.
        shape: its shape.
        buffers: where the memory comes from.
    """

    def __init__(self, items: Items, name: str, shape: tuple[int, ...], buffers: Buffers) -> None:
        self._name = name
        self._values = buffers.take((len(items.positions), *shape), np.float16)

    def take(self, row: int, sample: int, members: Members) -> None:
        """Copy the latent of one sample."""
        data = _member(members, self._name)
        out = self._values[row]
        if len(data) != out.nbytes:
            raise ValueError(f".{self._name} has {len(data)} bytes, expected {out.nbytes} for the shape {out.shape}")
        out[...] = np.frombuffer(data, dtype=np.float16).reshape(out.shape)

    def entries(self) -> Batch:
        """The latents."""
        return {"latent": torch.from_numpy(self._values)}


def has_caption(members: Members, name: str) -> bool:
    """Whether a sample has a certain one of several captions; one that cannot be read counts as had."""
    if not name.startswith(_JSON):
        return name in members
    try:
        entry = json.loads(members.get("json", b"null"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return True
    return isinstance(entry, dict) and entry.get(name.removeprefix(_JSON)) is not None


def caption_of(members: Members, name: str) -> str:
    """Caption in a member, or in an entry of the member ``json`` for ``json:NAME``.

    Raises:
        ValueError: there is none, or it is no text.
    """
    try:
        if not name.startswith(_JSON):
            return _member(members, name).decode().strip()
        entry = json.loads(_member(members, "json"))[name.removeprefix(_JSON)]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the caption in {name} cannot be read ({error})") from error
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"no {name.removeprefix(_JSON)} in .json") from error
    if not isinstance(entry, str):
        raise ValueError(f"{name} is {str(entry)[:40]}, expected a caption")
    return entry.strip()


def _member(members: Members, name: str) -> bytes:
    try:
        return members[name]
    except KeyError:
        raise ValueError(f"no .{name} among its members ({', '.join(members)})") from None
