"""Images from tar shards or class folders, with or without classes, in an order any number of ranks can continue."""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from datamodules import shards
from datamodules.folders import ImageFolder
from datamodules.imagereader import Batch, ImageReader
from datamodules.loader import Loader, SizedLoader
from datamodules.order import InOrder, Ints, Lookup, Order, held_out_batches, micro_batches
from datamodules.shards import ShardSet
from datamodules.transforms import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)

ImageSource = ShardSet | ImageFolder

_REFERENCE_BATCH = 256


class Images(L.LightningDataModule):
    """Train and validation images as batches of uint8.

    A batch is a dict: "image" uint8 (B, C, H, W); "label" int64 (B,) if there are classes; "key" list of B strings.
    Training never ends by itself. Update s trains on the positions [s*G, (s+1)*G) of one endless sequence that depends
    on seed, window and shard list only, so ranks, workers and micro-batches may change from one start to the next.

    Args:
        root: folder that relative names start from.
        train: shards, as a name with wildcards or braces or a list of them, or a folder of images with one sub-folder
            per class.
        val: held-out samples, given alike; None for none.
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
        seed: seed of the order and of the flips.
        label_offset: added to every stored class, e.g. -1 for classes stored as 1..1000.
        allow_missing: accept that some of the named shards are absent.
        max_bad_fraction: accepted share of unreadable samples, 0..1; each is logged with shard and key.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train: str | Sequence[str],
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
        seed: int = 0,
        label_offset: int = 0,
        allow_missing: bool = False,
        max_bad_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.train = train
        self.val = val
        self.source = source
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.val_batch_size = val_batch_size
        self.workers = workers
        self.window = window
        self.flip = flip
        self.seed = seed
        self.label_offset = label_offset
        self.allow_missing = allow_missing
        self.max_bad_fraction = max_bad_fraction
        self._check_settings()
        self._sources: dict[str, ImageSource] = {}
        self._readers: dict[str, ImageReader] = {}
        self._loaders: weakref.WeakSet[Loader[Ints, Batch]] = weakref.WeakSet()
        self._order: Order | None = None
        self._restored: tuple[int, str] | None = None

    # Set-up

    def prepare_data(self) -> None:
        """Make the shards if there is a ``source`` for them; quick when they are there."""
        if self.source is not None:
            self.source(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Find the shards and check what can be known without decoding. Repeated calls do nothing.

        Raises:
            ValueError: shards are missing, damaged or empty, or labels do not fit ``num_classes``.
        """
        self._source("train")
        if self.val:
            self._source("val")

    def teardown(self, stage: str | None = None) -> None:
        """End all reader threads and close all files."""
        for loader in list(self._loaders):
            loader.close()
        self._loaders.clear()
        for source in self._sources.values():
            source.close()

    def describe(self) -> dict[str, Any]:
        """Facts for the start screen and the provenance record."""
        train = self._source("train")
        val = self._source("val") if self.val else None
        return {
            "root": str(self.root),
            "shards": len(train.names),
            "samples": int(train.counts.sum()),
            "val_shards": len(val.names) if val else 0,
            "val_samples": int(val.counts.sum()) if val else 0,
            "classes": self.num_classes,
            "fingerprint": train.fingerprint,
        }

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
        total = int(self._source(split).counts.sum())
        count = min(total, limit or total)
        chosen = np.arange(count, dtype=np.int64) * total // count
        plans = np.array_split(chosen, -(-count // _REFERENCE_BATCH))
        images = torch.empty((count, self.channels, self.size, self.size), dtype=torch.uint8)
        labels = torch.zeros(count, dtype=torch.int64)
        begin = 0
        for batch in SizedLoader(plans, self._reader(split, InOrder(total), flip=False), self.workers):
            end = begin + len(batch["key"])
            images[begin:end] = batch["image"]
            labels[begin:end] = batch.get("label", 0)
            begin = end
        return images, labels

    # Position

    @property
    def samples(self) -> int:
        """Samples trained on so far over all ranks: the position at which training continues."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        seen = getattr(module, "samples_seen", None)
        if seen is not None:
            return int(seen)
        return self._restored[0] if self._restored else 0

    @property
    def next_key(self) -> str:
        """Key of the sample at the current position."""
        return self._key_at(self.samples)

    @property
    def bad_samples(self) -> int:
        """Different samples that this process found unreadable so far."""
        return sum(reader.bad_samples for reader in self._readers.values())

    def state_dict(self) -> dict[str, Any]:
        """Position and everything that gives it its meaning; equal on all ranks."""
        return {"samples": self.samples, "next_key": self.next_key, **self._meaning()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            ValueError: seed, window or shard list differ from those the position was counted with.
        """
        now = self._meaning()
        changed = [name for name in now if state.get(name) != now[name]]
        if changed:
            raise ValueError(
                "the data order is not the one this run was trained with: "
                + ", ".join(f"{_SETTING[name]} was {state.get(name)}, is {now[name]}" for name in changed)
                + ". Restore the former setting or files, or start another run with tag=NAME."
            )
        samples, key = int(state["samples"]), str(state["next_key"])
        if self._key_at(samples) != key:
            raise ValueError(
                f"sample {samples} of the data order is {self._key_at(samples)}, but the checkpoint says {key}: "
                "the content of the shards has changed. Restore them, or start another run with tag=NAME."
            )
        self._restored = (samples, key)

    # Batches

    @property
    def accumulation(self) -> int:
        """Micro-batches per update and rank, for the trainer's number of ranks."""
        return self.accumulation_for(self._rank_and_world()[1])

    def accumulation_for(self, world_size: int) -> int:
        """Micro-batches per update and rank: batch_size / (ranks * micro_batch).

        Raises:
            ValueError: batch_size does not divide; the message names the nearest values that do.
        """
        unit = world_size * (self.micro_batch or 1)
        if self.batch_size % unit == 0:
            return self.batch_size // unit if self.micro_batch else 1
        lower = self.batch_size // unit * unit
        sizes = f"{lower} or {lower + unit}" if lower else f"{unit}"
        over = f"over {world_size} ranks" + (f" in micro-batches of {self.micro_batch}" if self.micro_batch else "")
        other = ""
        if self.micro_batch and self.batch_size % world_size == 0:
            share = self.batch_size // world_size
            fitting = [n for n in range(1, share + 1) if share % n == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - (self.micro_batch or 1)))[:2])
            other = f", or data.micro_batch to {' or '.join(str(n) for n in near)}"
        raise ValueError(
            f"data.batch_size={self.batch_size} does not divide {over} "
            f"({self.batch_size} / {unit} = {self.batch_size / unit:g}). Set data.batch_size to {sizes}{other}."
        )

    def train_dataloader(self) -> Loader[Ints, Batch]:
        """Endless micro-batches of this rank; an iterator starts at the position that holds when it is made."""
        self.accumulation_for(self._rank_and_world()[1])
        reader = self._reader("train", self._training_order(), flip=self.flip)
        return self._track(Loader(self._plans, reader, self.workers))

    def val_dataloader(self) -> Loader[Ints, Batch] | list[Any]:
        """Every validation sample once, in shard order; all ranks get equally many batches, none of them empty."""
        if not self.val:
            return []
        rank, world_size = self._rank_and_world()
        total = int(self._source("val").counts.sum())
        size = self.val_batch_size or self.batch_size // self.accumulation_for(world_size)
        plans = held_out_batches(total, size, rank, world_size)
        return self._track(SizedLoader(plans, self._reader("val", InOrder(total), flip=False), self.workers))

    def _plans(self) -> Iterator[Ints]:
        rank, world_size = self._rank_and_world()
        start = self.samples
        if self._restored is not None:
            # A loader that quietly starts elsewhere would repeat or lose samples without any sign of it.
            saved, key = self._restored
            assert start >= saved, f"restored at sample {saved}, but training would continue at {start}"
            assert start > saved or self._key_at(start) == key, (start, key)
        micro_batch = self.batch_size // (world_size * self.accumulation_for(world_size))
        return micro_batches(start, self.batch_size, micro_batch, rank, world_size)

    def _track(self, loader: Loader[Ints, Batch]) -> Loader[Ints, Batch]:
        self._loaders.add(loader)
        return loader

    def _reader(self, split: str, order: Lookup, flip: bool) -> ImageReader:
        reader = ImageReader(
            self._source(split),
            order,
            size=self.size,
            channels=self.channels,
            num_classes=self.num_classes,
            label_offset=self.label_offset,
            flip_seed=self.seed if flip else None,
            max_bad_fraction=self.max_bad_fraction,
            buffers=3 * self.workers + 2,
        )
        self._readers[split] = reader
        return reader

    # Details

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _training_order(self) -> Order:
        if self._order is None:
            self._order = Order(self._source("train").counts, self.seed, self.window)
        return self._order

    def _key_at(self, position: int) -> str:
        _, samples = self._training_order()(np.array([position]))
        return self._source("train").key(int(samples[0]))

    def _meaning(self) -> dict[str, Any]:
        return {"seed": self.seed, "window": self.window, "fingerprint": self._source("train").fingerprint}

    def _source(self, split: str) -> ImageSource:
        """Samples of a split, "train" or "val"; found and checked on first use."""
        if split in self._sources:
            return self._sources[split]
        setting = f"data.{split}"
        patterns = {"train": self.train, "val": self.val}[split]
        if not patterns:
            raise ValueError(f"{setting} is not set, but its samples are needed. Set {setting} to shards or a folder.")
        paths = shards.find(patterns, self.root, setting, self.allow_missing)
        source: ImageSource
        if len(paths) == 1 and paths[0].is_dir():
            source = ImageFolder(paths[0], setting)
        else:
            source = ShardSet(paths, setting, self.max_bad_fraction, open_shards=max(64, 2 * self.window))
        self._check_members(source, setting)
        self._check_classes(source)
        self._sources[split] = source
        return source

    def _check_members(self, source: ImageSource, setting: str) -> None:
        members = source.extensions()
        listed = ", ".join(f".{name}" for name in members)
        if not set(IMAGE_EXTENSIONS) & set(members):
            raise ValueError(
                f"{setting}: the samples of {source.names[0]} have {listed}, but no image "
                f"({', '.join(f'.{name}' for name in IMAGE_EXTENSIONS)}). Set {setting} to image shards."
            )
        if self.num_classes and "cls" not in members:
            raise ValueError(
                f"{setting}: the samples of {source.names[0]} have {listed}, but no class (.cls), and "
                f"data.num_classes={self.num_classes} wants one. Set data.num_classes=0, or use shards with classes."
            )

    def _check_classes(self, source: ImageSource) -> None:
        """Refuse labels out of range before anything is built, where the classes are known beforehand."""
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

    def _check_settings(self) -> None:
        limits: dict[str, tuple[bool, str, str]] = {
            "size": (self.size >= 1, "at least 1 pixel", "64"),
            "channels": (self.channels in (1, 3), "1 (grey) or 3 (RGB)", "3"),
            "num_classes": (self.num_classes >= 0, "0 (no labels) or more", "10"),
            "batch_size": (self.batch_size >= 1, "at least 1", "64"),
            "micro_batch": (self.micro_batch is None or self.micro_batch >= 1, "null or at least 1", "null"),
            "val_batch_size": (self.val_batch_size is None or self.val_batch_size >= 1, "null or at least 1", "null"),
            "workers": (self.workers >= 0, "0 (no threads) or more", "2"),
            "window": (self.window >= 1, "at least 1 shard", "16"),
            "max_bad_fraction": (0 <= self.max_bad_fraction <= 1, "a share between 0 and 1", "0.001"),
        }
        for name, (fine, expected, example) in limits.items():
            if not fine:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected {expected}. E.g. data.{name}={example}")


_SETTING = {"seed": "data.seed", "window": "data.window", "fingerprint": "the fingerprint of data.train"}
