"""Images from tar shards or class folders, with or without classes, in an order any number of ranks can continue."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.base import ShardData
from datamodules.buckets import BucketOrder, Buckets
from datamodules.imagereader import Columns, Items, Labels, Pictures, SampleReader
from datamodules.loader import Buffers, SizedLoader
from datamodules.order import InOrder, Ints, Lookup
from datamodules.source import Source, first_dots
from datamodules.transforms import IMAGE_EXTENSIONS, picture_of, shape_of

_REFERENCE_BATCH = 256


class Images(ShardData):
    """Train and validation images as batches of uint8.

    A batch is a dict: "image" uint8 (B, C, H, W); "label" int64 (B,) if there are classes; "key" list of B strings;
    "bucket" the batch's ratio, e.g. "16:9", with ``buckets``.
    Training never ends by itself. Update s trains on the positions [s*G, (s+1)*G) of one endless sequence that depends
    on seed, window and shard list only, so ranks, workers and micro-batches may change from one start to the next.

    Args:
        root: folder that relative names start from.
        train: shards, as a name with wildcards or braces, a URL, a list of them, or a folder of images with one
            sub-folder per class; or a mixture {name: {path, weight or repeat}} of such.
        val: held-out samples, given alike but not as a mixture; None for none.
        source: called with ``root`` before anything is read, to make the shards if they are not there.
        size: height and width in pixels; other sizes are resized (shorter side, bicubic) and centre-cropped.
        channels: 1 (grey) or 3 (RGB).
        num_classes: number of classes; 0 for data without labels.
        batch_size: G, samples per update over all ranks and micro-batches.
        micro_batch: samples per rank and forward pass; None for batch_size / ranks.
        val_batch_size: validation samples per batch over all ranks; None for as many as a training pass takes.
        workers: reader threads per rank; 0 reads in the training thread.
        window: shards whose samples are mixed with one another.
        flip: mirror half of the training images, drawn from (seed, epoch, sample).
        buckets: shapes for training images of several aspect ratios. Every update has images of one shape, resized to
            cover it and centre-cropped; None for squares. Validation always has squares.
        seed: seed of the order and of the flips.
        label_offset: added to every stored class, e.g. -1 for classes stored as 1..1000.
        allow_missing: accept that some of the named shards are absent.
        max_bad_fraction: accepted share of unreadable samples, 0..1; each is logged with shard and key.
        columns: folders below ``root`` with shards of the same names and keys, whose members join the samples.
        cache_gib: size of the local cache for shards that come from elsewhere, in GiB.

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
        size: int,
        channels: int = 3,
        num_classes: int = 0,
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
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.flip = flip
        self.buckets = buckets
        self.label_offset = label_offset
        self.check_limits(
            {
                "size": (size >= 1, "at least 1 pixel", "64"),
                "channels": (channels in (1, 3), "1 (grey) or 3 (RGB)", "3"),
                "num_classes": (num_classes >= 0, "0 (no labels) or more", "10"),
            }
        )

    def facts(self) -> dict[str, Any]:
        """Number of classes."""
        return {"classes": self.num_classes}

    def reference_images(self, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Images of a split as metrics compare with them: decoded, cropped, never flipped.

        Args:
            split: "train" or "val".
            limit: at most this many, spread evenly over the split; None for all.

        Returns:
            uint8 (N, C, H, W), and int64 labels (N,), all 0 without classes.

        Raises:
            ValueError: the split is not set.
        """
        total = int(self.source_of(split).counts.sum())
        count = min(total, limit or total)
        chosen = np.arange(count, dtype=np.int64) * total // count
        plans = np.array_split(chosen, -(-count // _REFERENCE_BATCH))
        images = torch.empty((count, self.channels, self.size, self.size), dtype=torch.uint8)
        labels = torch.zeros(count, dtype=torch.int64)
        begin = 0
        reader = SampleReader(self.source_of(split), InOrder(total), self.bad_of(split), self.reference_columns(split))
        for batch in SizedLoader(plans, reader, self.workers):
            end = begin + len(batch["key"])
            images[begin:end] = batch["image"]
            labels[begin:end] = batch.get("label", 0)
            begin = end
        return images, labels

    def reference_columns(self, split: str) -> list[Columns]:
        """What fills the batches of ``reference_images``."""
        return self.filled(split, training=False)

    def reader(self, split: str, lookup: Lookup, training: bool) -> SampleReader:
        """A reader of the split's samples, which draws at random only in training."""
        return SampleReader(self.source_of(split), lookup, self.bad_of(split), self.filled(split, training))

    def filled(self, split: str, training: bool) -> list[Columns]:
        """What fills the entries of a batch."""
        return [self.pictures(training), *([self.labels(split)] if self.num_classes else [])]

    def pictures(self, training: bool) -> Columns:
        """Fills "image", in training with the shape of the batch's bucket."""
        buffers = Buffers(self.buffers)
        flip_seed = self.seed if self.flip and training else None

        def column(items: Items) -> Pictures:
            shape, ratio = self.shape_for(items)
            return Pictures(items, shape, self.channels, buffers, flip_seed, ratio if self.buckets else None)

        return column

    def shape_for(self, items: Items) -> tuple[tuple[int, int], str]:
        """Height and width of a batch's images, and the name of their ratio."""
        if self.buckets is None or items.bucket is None:
            return (self.size, self.size), "1:1"
        return self.buckets.shapes[items.bucket], self.buckets.names[items.bucket]

    def labels(self, split: str) -> Columns:
        """Fills "label"."""
        source = self.source_of(split)
        return lambda items: Labels(items, source, self.num_classes, self.label_offset)

    def arrange(self, lookup: Any) -> Any:
        """Updates of one aspect ratio each, if there are buckets."""
        if self.buckets is None:
            return lookup
        source = self.source_of("train")

        def shapes(shard: int) -> Ints:
            return source.measured(shard, "shape", lambda members: shape_of(picture_of(members)), 2)

        return BucketOrder(lookup, self.buckets, shapes, self.batch_size)

    def check_source(self, source: Source, setting: str) -> None:
        """Refuse a source without images, or whose labels do not fit ``num_classes``."""
        self.check_images(source, setting)
        self.check_classes(source, setting)

    def check_images(self, source: Source, setting: str) -> None:
        """Refuse a source without images."""
        members = source.extensions()
        listed = ", ".join(f".{name}" for name in members)
        if not set(IMAGE_EXTENSIONS) & set(members):
            raise ValueError(
                f"{setting}: the samples of {source.names[0]} have {listed}, but no image "
                f"({', '.join(f'.{name}' for name in IMAGE_EXTENSIONS)}). Set {setting} to image shards."
                + first_dots(members, IMAGE_EXTENSIONS)
            )

    def check_classes(self, source: Source, setting: str) -> None:
        """Refuse labels that are absent, or out of range where the classes are known beforehand."""
        members = source.extensions()
        listed = ", ".join(f".{name}" for name in members)
        if self.num_classes and "cls" not in members:
            raise ValueError(
                f"{setting}: the samples of {source.names[0]} have {listed}, but no class (.cls), and "
                f"data.num_classes={self.num_classes} wants one. Set data.num_classes=0, or use shards with classes."
                + first_dots(members, ["cls"])
            )
        if not self.num_classes or source.classes is None:
            return
        stored = sorted(sum(source.classes, Counter[int]()))
        allowed = range(-self.label_offset, self.num_classes - self.label_offset)
        wrong = [label for label in stored if label not in allowed]
        if not wrong or self.max_bad_fraction > 0:
            return
        place = next(name for name, seen in zip(source.names, source.classes, strict=True) if wrong[-1] in seen)
        low, high = stored[0], stored[-1]
        advice = f"data.label_offset={-low}" if high - low < self.num_classes else f"data.num_classes={high + 1}"
        raise ValueError(
            f"Label {wrong[-1] + self.label_offset} in shard {place}, but data.num_classes={self.num_classes} allows "
            f"0..{self.num_classes - 1}. Labels seen in the index: {low}..{high}, data.label_offset="
            f"{self.label_offset}. Set {advice}."
        )
