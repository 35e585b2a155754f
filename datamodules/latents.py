"""Latents of an image autoencoder from tar shards, with classes or text features, copied straight into batches."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.bad import BadSamples
from datamodules.base import ShardData
from datamodules.images import Images
from datamodules.loader import Buffers
from datamodules.members import Labels, keys_of, sizes_of
from datamodules.order import Ints, Lookup, sample_bits
from datamodules.source import BadSample, Source, first_dots, place

Batch = dict[str, Any]

LATENT, FLIPPED = "lat", "lat.flip"

_KINDS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_BYTES = 2  # of either kind


@dataclass(frozen=True)
class Features:
    """Text features of a sample: up to ``length`` rows of ``width`` numbers.

    Attributes:
        member: which member holds them, raw, row after row.
        length: L, rows in a batch; further ones are left out.
        width: D, numbers per row.
        kind: torch.float16 or torch.bfloat16.
    """

    member: str
    length: int
    width: int
    kind: torch.dtype


def latent_card(
    *, shape: Sequence[int], encoder: str, scale: float, flip: bool = False, dtype: str = "float16"
) -> dict[str, dict[str, Any]]:
    """Card of a set of latents, for index.json: without it nobody could tell what the numbers mean.

    Args:
        shape: (2C, h, w): means, then log-variances.
        encoder: hash of the weights of the autoencoder that made them.
        scale: factor to be applied to a latent drawn from mean and log-variance, so that it has about unit variance.
        flip: whether every sample also has ``lat.flip``, the latent of the mirrored image.
        dtype: number format, "float16".
    """
    entry = {"dtype": dtype, "shape": list(shape), "encoder": encoder, "scale": scale, "flip": flip}
    return {LATENT: entry}


def features_card(member: str, width: int, encoder: str, dtype: str = "float16") -> dict[str, dict[str, Any]]:
    """Card of a set of text features, for index.json.

    Args:
        member: "emb" or "emb.NAME".
        width: D, numbers per row.
        encoder: hash of the weights of the text encoder that made them.
        dtype: "float16" or "bfloat16".
    """
    return {member: {"dtype": dtype, "shape": [None, width], "encoder": encoder}}


class Latents(ShardData):
    """Train and validation latents as batches of mean and log-variance.

    A batch is a dict: "latent" float16 (B, 2C, h, w), mean and log-variance without any scaling; "label" int64 (B,)
    if there are classes; "text_features" float16 or bfloat16 (B, L, D), zero behind the last row, and "text_mask" bool
    (B, L), True where there is one, if there are features; "key" list of B strings.

    Args:
        root: folder that relative names start from.
        train: shards, as a name with wildcards or braces, a URL, a folder, or a list of them; or a mixture
            {name: {path, weight or repeat}}.
        val: held-out samples, given alike but not as a mixture; None for none.
        source: called with ``root`` before anything is read, to make the shards if they are not there.
        encoder: hash of the autoencoder's weights that the latents must come from; None takes any.
        num_classes: number of classes; 0 for data without labels.
        label_offset: added to every stored class, e.g. -1 for classes stored as 1..1000.
        features: which member holds text features, e.g. "emb" or "emb.t5"; None for none.
        feature_length: L, rows of text features in a batch.
        flip: take the latent of the mirrored image for half of the training samples, drawn from (seed, epoch, sample).
        batch_size: G, samples per update over all ranks and micro-batches.
        micro_batch: samples per rank and forward pass; None for batch_size / ranks.
        val_batch_size: validation samples per batch over all ranks; None for as many as a training pass takes.
        workers: reader threads per rank; 0, the default, copies in the training thread, which is fastest here.
        window: shards whose samples are mixed with one another.
        seed: seed of the order and of the flips.
        allow_missing: accept that some of the named shards are absent.
        max_bad_fraction: accepted share of unreadable samples, 0..1; each is logged with shard and key.
        columns: folders below ``root`` with shards of the same names and keys, whose members join the samples.
        cache_gib: size of the local cache for shards that come from elsewhere, in GiB.
        pictures: what the latents were made of, for metrics that compare with pictures; None where there are none.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
        val: str | Sequence[str] | None = None,
        source: Callable[[Path], object] | None = None,
        encoder: str | None = None,
        num_classes: int = 0,
        label_offset: int = 0,
        features: str | None = None,
        feature_length: int = 128,
        flip: bool = False,
        batch_size: int,
        micro_batch: int | None = None,
        val_batch_size: int | None = None,
        workers: int = 0,
        window: int = 16,
        seed: int = 0,
        allow_missing: bool = False,
        max_bad_fraction: float = 0.0,
        columns: Sequence[str] = (),
        cache_gib: float = 64.0,
        pictures: Images | None = None,
    ) -> None:
        super().__init__(
            root=root,
            train=train,
            val=val,
            source=source,
            batch_size=batch_size,
            micro_batch=micro_batch,
            val_batch_size=val_batch_size,
            workers=workers,
            window=window,
            seed=seed,
            allow_missing=allow_missing,
            max_bad_fraction=max_bad_fraction,
            columns=columns,
            cache_gib=cache_gib,
        )
        self.encoder = encoder
        self.pictures = pictures
        self.num_classes = num_classes
        self.label_offset = label_offset
        self.features = features
        self.feature_length = feature_length
        self.flip = flip
        self.check_limits(
            {
                "num_classes": (num_classes >= 0, "0 (no labels) or more", "10"),
                "feature_length": (feature_length >= 1, "at least 1", "128"),
            }
        )
        self._card: dict[str, Any] = {}
        self._features: Features | None = None

    @property
    def card(self) -> dict[str, Any]:
        """What index.json says about the latents: "shape", "encoder", "scale", "flip" and "dtype"."""
        self.source_of("train")
        return dict(self._card)

    @property
    def reference_images(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """As of ``Images``, of ``pictures``; None without them."""
        return None if self.pictures is None else self.pictures.reference_images

    def facts(self) -> dict[str, Any]:
        """What the latents are."""
        card = self.card
        shown = {"shape": "x".join(str(side) for side in card["shape"]), "classes": self.num_classes}
        shown |= {name: card[name] for name in ("encoder", "scale")}
        return {**shown, **({"features": self.features} if self.features else {})}

    def reader(self, split: str, lookup: Lookup, training: bool) -> "LatentReader":
        """A reader of the split's latents, mirrored at random only in training."""
        source = self.source_of(split)
        return LatentReader(
            source,
            lookup,
            self.bad_of(split),
            shape=tuple(self._card["shape"]),
            num_classes=self.num_classes,
            label_offset=self.label_offset,
            features=self._features,
            flip_seed=self.seed if self.flip and training else None,
            buffers=self.buffers,
        )

    def check_source(self, source: Source, setting: str) -> None:
        """Refuse a source without the members asked for, or whose card does not fit them, the encoder, or the rest."""
        members = source.extensions()
        wanted = {
            LATENT: f"Set {setting} to shards of latents",
            FLIPPED: "Set data.flip=false, or encode the mirrored images, too",
            "cls": "Set data.num_classes=0, or use shards with classes",
            self.features or "": "Set data.columns to the folder of the features, or data.features=null",
        }
        needed = [LATENT, FLIPPED * self.flip, "cls" * bool(self.num_classes), self.features or ""]
        for member in filter(None, needed):
            if member not in members:
                listed = ", ".join(f".{name}" for name in members)
                first = source.names[0]
                raise ValueError(
                    f"{setting}: the samples of {first} have {listed}, but no .{member}. {wanted[member]}."
                    + first_dots(members, [member])
                )
        card = _checked_card(source.described(LATENT), setting)
        if self.encoder is not None and card["encoder"] != self.encoder:
            raise ValueError(
                f"{setting}: the latents come from the encoder {card['encoder']}, but data.encoder={self.encoder}. "
                "Encode the images with that autoencoder, or set data.encoder to the one that the module decodes with."
            )
        if self._card and card != self._card:
            raise ValueError(
                f"{setting}: its latents are {card}, those of the other shards {self._card}. Use one kind."
            )
        self._card = card
        if self.features:
            self._check_features(source.described(self.features), setting)
        self._check_classes(source, setting)

    def _check_features(self, card: dict[str, Any], setting: str) -> None:
        kind, shape = _KINDS.get(str(card.get("dtype"))), list(card.get("shape") or [])
        if kind is None or len(shape) != 2 or not isinstance(shape[1], int):
            raise ValueError(
                f"{setting}: the card in index.json says {card or 'nothing'} about .{self.features}; expected dtype "
                "float16 or bfloat16 and shape [null, D]. Make the features again (datamodules.latents.features_card)."
            )
        found = Features(str(self.features), self.feature_length, shape[1], kind)
        if self._features not in (None, found):
            raise ValueError(f"{setting}: its features are {found}, those of the other shards {self._features}.")
        self._features = found

    def _check_classes(self, source: Source, setting: str) -> None:
        """Refuse classes out of range before anything is built, where they are known beforehand."""
        if not self.num_classes or source.classes is None or self.max_bad_fraction:
            return
        stored = sum(source.classes, Counter[int]())
        low, high = min(stored) + self.label_offset, max(stored) + self.label_offset
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"{setting}: labels run from {low} to {high}, but data.num_classes={self.num_classes} allows "
                f"0..{self.num_classes - 1} (data.label_offset={self.label_offset}). "
                "Correct data.label_offset or data.num_classes."
            )


class LatentReader:
    """Turns positions into a batch: order -> bytes -> tensors over recycled memory. Safe to call from several threads.

    Args:
        source: the samples.
        order: which sample stands at a position.
        bad: account of unreadable samples.
        shape: (2C, h, w).
        num_classes: labels must lie in 0..num_classes-1; 0 leaves labels out of the batch.
        label_offset: added to every stored class.
        features: text features to add; None for none.
        flip_seed: seed of the choice between a latent and that of the mirrored image; None for no flip.
        buffers: how many batches are kept for reuse.
    """

    def __init__(
        self,
        source: Source,
        order: Lookup,
        bad: BadSamples,
        *,
        shape: tuple[int, ...],
        num_classes: int = 0,
        label_offset: int = 0,
        features: Features | None = None,
        flip_seed: int | None = None,
        buffers: int = 8,
    ) -> None:
        self.source = source
        self.order = order
        self.shape = shape
        self.size = _BYTES * int(np.prod(shape))
        self.features = features
        self.flip_seed = flip_seed
        self._labels = Labels(source, num_classes, label_offset) if num_classes else None
        self._bad = bad
        self._buffers = Buffers(buffers)

    def __call__(self, positions: Ints) -> Batch:
        """Read one batch.

        Args:
            positions: int64 (B,).

        Returns:
            The batch, see :class:`Latents`. Where a sample cannot be read and ``data.max_bad_fraction`` allows it, the
            next readable one in the order stands in its place, whatever the number of ranks or workers.

        Raises:
            ValueError: more samples are unreadable, or have a label out of range, than allowed.
        """
        epochs, samples = self.order(positions)
        while True:
            try:
                return self._read(epochs, samples)
            except BadSample as error:
                row = error.row
                self._bad.add(int(samples[row]), error)
                read = partial(self._one, epochs[row : row + 1])
                samples[row], _ = self._bad.replacement(int(positions[row]), self.order, read)

    def _one(self, epoch: Ints, sample: int) -> Batch:
        return self._read(epoch, np.array([sample]))

    def _read(self, epochs: Ints, samples: Ints) -> Batch:
        """Batch of some samples.

        Raises:
            BadSample: one of them cannot be read; ``row`` says which.
        """
        batch: Batch = {"latent": self._latents(epochs, samples)}
        if self._labels is not None:
            batch["label"] = torch.from_numpy(self._labels(samples))
        if self.features is not None:
            batch["text_features"], batch["text_mask"] = self._text(samples, self.features)
        batch["key"] = keys_of(self.source, samples)
        return batch

    def _latents(self, epochs: Ints, samples: Ints) -> Tensor:
        """Float16 (B, 2C, h, w)."""
        values = self._buffers.take((len(samples), *self.shape), np.float16)
        raw = values.view(np.uint8).reshape(len(samples), -1)
        if self.flip_seed is None:
            self.source.gather(samples, LATENT, raw)
            return torch.from_numpy(values)
        mirrored = (sample_bits(self.flip_seed, epochs, samples) & np.uint64(1)).astype(bool)
        for member, here in ((LATENT, np.flatnonzero(~mirrored)), (FLIPPED, np.flatnonzero(mirrored))):
            try:
                self._copy_to_rows(samples[here], member, raw, here)
            except BadSample as error:
                error.row = int(here[error.row])
                raise
        return torch.from_numpy(values)

    def _copy_to_rows(self, samples: Ints, member: str, raw: np.ndarray, rows: Ints) -> None:
        sizes = sizes_of(self.source, samples, member)
        wrong = np.flatnonzero((sizes != self.size) & (sizes > 0))  # what is missing is refused with its reason below
        if len(wrong):
            where = place(self.source, int(samples[wrong[0]]))
            told = f".{member} has {sizes[wrong[0]]} bytes, expected {self.size}"
            raise BadSample(f"{where}: {told}", row=int(wrong[0]))
        whole = np.full(len(rows), self.size, dtype=np.int64)
        self.source.pieces(samples, member, np.zeros_like(whole), whole, raw, rows * self.size)

    def _text(self, samples: Ints, features: Features) -> tuple[Tensor, Tensor]:
        """Text features (B, L, D), zero where there are none, and a mask bool (B, L) of the rows there are."""
        step = features.width * _BYTES
        sizes = sizes_of(self.source, samples, features.member)
        odd = np.flatnonzero(sizes % step)
        if len(odd):
            where = place(self.source, int(samples[odd[0]]))
            told = f".{features.member} has {sizes[odd[0]]} bytes, no whole number of rows of {step}"
            raise BadSample(f"{where}: {told}", row=int(odd[0]))
        rows = np.minimum(sizes // step, features.length)
        values = self._buffers.take((len(samples), features.length, features.width), np.int16)
        places = np.arange(len(samples), dtype=np.int64) * (features.length * step)
        self.source.pieces(
            samples, features.member, np.zeros_like(rows), rows * step, values.view(np.uint8).reshape(-1), places
        )
        mask = np.arange(features.length) < rows[:, None]
        values[~mask] = 0
        return torch.from_numpy(values).view(features.kind), torch.from_numpy(mask)


def _checked_card(card: dict[str, Any], setting: str) -> dict[str, Any]:
    """The card of latents, with all that it needs.

    Raises:
        ValueError: something is missing or not possible.
    """
    shape = list(card.get("shape") or [])
    fine = len(shape) == 3 and all(isinstance(side, int) and side > 0 for side in shape)
    if not fine or shape[0] % 2 or card.get("dtype") != "float16" or not _tells(card):
        raise ValueError(
            f"{setting}: the card in index.json says {card or 'nothing'} about .{LATENT}; expected dtype float16, "
            "shape [2C, h, w], encoder and scale. Encode the images again, with datamodules.latents.latent_card."
        )
    return {"flip": False, **card}


def _tells(card: dict[str, Any]) -> bool:
    return "encoder" in card and isinstance(card.get("scale"), int | float)
