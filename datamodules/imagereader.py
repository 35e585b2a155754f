"""From positions to batches of images: read, decode, label, flip, and account for what cannot be read."""

from functools import partial
from typing import Any

import numpy as np
import torch

from datamodules.bad import BadSamples
from datamodules.loader import Buffers
from datamodules.order import Ints, Lookup, sample_bits
from datamodules.shards import BadSample, Source
from datamodules.transforms import IMAGE_EXTENSIONS, Pixels, decode_into

Batch = dict[str, Any]


class ImageReader:
    """Turns positions into a batch: order -> bytes -> pixels, labels and keys. Safe to call from several threads.

    Args:
        source: the samples.
        order: which sample stands at a position.
        bad: account of unreadable samples.
        size: height and width of the batch's images in pixels.
        channels: 1 (grey) or 3 (RGB).
        num_classes: labels must lie in 0..num_classes-1; 0 leaves labels out of the batch.
        label_offset: added to every stored class.
        flip_seed: seed of the random horizontal flip; None for no flip.
        buffers: how many image buffers are kept for reuse.
    """

    def __init__(
        self,
        source: Source,
        order: Lookup,
        bad: BadSamples,
        *,
        size: int,
        channels: int,
        num_classes: int,
        label_offset: int = 0,
        flip_seed: int | None = None,
        buffers: int = 8,
    ) -> None:
        self.source = source
        self.order = order
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.label_offset = label_offset
        self.flip_seed = flip_seed
        self._buffers = Buffers(buffers)
        self._bad = bad

    def __call__(self, positions: Ints) -> Batch:
        """Read one batch.

        Args:
            positions: int64 (B,).

        Returns:
            "image": uint8 (B, C, H, W), a channels-last view; "label": int64 (B,) if there are classes; "key": B
            strings. Where a sample cannot be read and ``data.max_bad_fraction`` allows it, the next readable one in the
            order stands in its place, whatever the number of ranks or workers.

        Raises:
            ValueError: more samples are unreadable, or have a label out of range, than allowed.
        """
        epochs, samples = self.order(positions)
        pixels = self._buffers.take((len(positions), self.size, self.size, self.channels))
        labels = np.zeros(len(positions), dtype=np.int64)
        for row, position in enumerate(positions):
            try:
                labels[row] = self._read(int(samples[row]), pixels[row])
            except BadSample as error:
                self._bad.add(int(samples[row]), error)
                read = partial(self._read, out=pixels[row])
                samples[row], labels[row] = self._bad.replacement(int(position), self.order, read)
        if self.flip_seed is not None:
            mirrored = (sample_bits(self.flip_seed, epochs, samples) & np.uint64(1)).astype(bool)
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        batch: Batch = {"image": torch.from_numpy(pixels).permute(0, 3, 1, 2)}
        if self.num_classes:
            batch["label"] = torch.from_numpy(labels)
        batch["key"] = [self.source.key(int(sample)) for sample in samples]
        return batch

    def _read(self, sample: int, out: Pixels) -> int:
        """Decode one sample into ``out`` and return its label (0 without classes)."""
        members = self.source.read(sample)
        data = next((members[kind] for kind in IMAGE_EXTENSIONS if kind in members), None)
        if data is None:
            raise BadSample(f"{self._place(sample)}: no image among its members ({', '.join(members)})")
        try:
            decode_into(data, out)
        except ValueError as error:
            raise BadSample(f"{self._place(sample)}: {error}") from error
        return self._label(sample, members) if self.num_classes else 0

    def _label(self, sample: int, members: dict[str, bytes]) -> int:
        text = members.get("cls")
        if text is None:
            raise BadSample(f"{self._place(sample)}: no class (.cls) among its members ({', '.join(members)})")
        try:
            label = int(text) + self.label_offset
        except ValueError as error:
            raise BadSample(f"{self._place(sample)}: the class is {text[:20]!r}, expected a whole number") from error
        if not 0 <= label < self.num_classes:
            raise BadSample(
                f"Label {label} in shard {self._place(sample)}, but data.num_classes={self.num_classes} allows "
                f"0..{self.num_classes - 1} (stored class {label - self.label_offset}, "
                f"data.label_offset={self.label_offset})",
                advice="Correct data.label_offset or data.num_classes.",
            )
        return label

    def _place(self, sample: int) -> str:
        return f"{self.source.shard(sample)}, sample {self.source.key(sample)}"
