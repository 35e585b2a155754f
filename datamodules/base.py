"""What every data module over shards has in common: position, continuation, ranks, mixtures, threads and health."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from datamodules import shards
from datamodules.bad import BadSamples
from datamodules.loader import Loader, SizedLoader
from datamodules.mixture import Concatenated, Mixed, shares_of
from datamodules.order import InOrder, Ints, Order, held_out_batches, micro_batches
from datamodules.shards import Source

Batch = dict[str, Any]
Reader = Callable[[Ints], Batch]
Patterns = str | Sequence[str]
Mixture = Mapping[str, Mapping[str, Any]]

GIB = 2**30
_ANNOUNCED = 4096  # samples of a window that are looked up to learn its shards
_PART = ("path", "weight", "repeat")


class ShardData(L.LightningDataModule):
    """Endless training batches and finite validation batches from shards, exact after any interruption.

    An item is what stands at one position of the training sequence: a sample, or a row of tokens. Update s trains on
    the positions [s*G, (s+1)*G) of one endless sequence that depends on settings, seed and shard list only, so ranks,
    workers and micro-batches may change from one start to the next. The whole state is one integer. Memory holds at
    most 3 * workers + 2 batches of each kind, two shuffle windows of sample numbers, and the indices of two windows.

    A concrete module passes its keyword arguments on and fills in:

    * ``reader(split, lookup, training)`` (required): turns positions into a batch. It looks positions up in
      ``lookup``, reads from ``self.source_of(split)`` and reports what it cannot use to ``self.bad_of(split)``.
    * ``check_source(source, setting)``: refuse, with ``ValueError``, a set that lacks members the module needs.
    * ``sequence(source, number)``: the endless training sequence of one source, the ``number``-th of a mixture; by
      default samples in shuffled order.
    * ``mixed(sequences, parts)``: several of them as one; by default item by item, in the proportions of ``parts``.
    * ``arrange(lookup)``: the last word on the whole training sequence, e.g. one aspect ratio per update.
    * ``held_out(source)``: the finite sequence of a source whose items are visited once for validation.
    * ``upcoming(positions)``: numbers of the samples trained on at about these positions, for fetching their shards.
    * ``key_at(position)``: name of the item at a training position, by default the key of its sample.
    * ``facts()``: more entries for ``describe``.
    * ``check_limits({"length": (self.length >= 1, "at least 1 token", "1024")})``: called in the constructor, refuses
      settings out of their range.

    Args:
        root: folder that relative names start from.
        train: shards, as a name with wildcards or braces, a URL, a folder, or a list of them; or a mixture
            {name: {path, weight or repeat}}: weights are shares of the items, repeat says how often each sample of
            the source comes in an epoch of the mixture.
        val: held-out samples, given as one source; None for none.
        source: called with ``root`` before anything is read, to make the shards if they are not there.
        batch_size: G, items per update over all ranks and micro-batches.
        micro_batch: items per rank and forward pass; None for batch_size / ranks.
        val_batch_size: validation items per batch over all ranks; None for as many as a training pass takes.
        workers: reader threads per rank; 0 reads in the training thread.
        window: shards whose samples are mixed with one another.
        seed: seed of the order and of everything drawn per sample.
        allow_missing: accept that some of the named shards are absent.
        max_bad_fraction: accepted share of unusable samples, 0..1; each is logged with shard and key.
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
        val: str | Sequence[str] | None,
        source: Callable[[Path], object] | None,
        batch_size: int,
        micro_batch: int | None,
        val_batch_size: int | None,
        workers: int,
        window: int,
        seed: int,
        allow_missing: bool,
        max_bad_fraction: float,
        columns: Sequence[str],
        cache_gib: float,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.train = train
        self.val = val
        self.source = source
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.val_batch_size = val_batch_size
        self.workers = workers
        self.window = window
        self.seed = seed
        self.allow_missing = allow_missing
        self.max_bad_fraction = max_bad_fraction
        self.columns = tuple(columns)
        self.cache_gib = cache_gib
        self.check_limits(
            {
                "batch_size": (batch_size >= 1, "at least 1", "64"),
                "micro_batch": (micro_batch is None or micro_batch >= 1, "null or at least 1", "null"),
                "val_batch_size": (val_batch_size is None or val_batch_size >= 1, "null or at least 1", "null"),
                "workers": (workers >= 0, "0 (no threads) or more", "2"),
                "window": (window >= 1, "at least 1 shard", "16"),
                "max_bad_fraction": (0 <= max_bad_fraction <= 1, "a share between 0 and 1", "0.001"),
                "cache_gib": (cache_gib > 0, "more than 0 GiB", "64"),
            }
        )
        self._sources: dict[str, Source] = {}
        self._parts: dict[str, Source] = {}
        self._bad: dict[str, BadSamples] = {}
        self._loaders: weakref.WeakSet[Loader[Ints, Batch]] = weakref.WeakSet()
        self._sequences: list[Any] = []
        self._mixture: Any = None
        self._training: Any = None
        self._restored: tuple[int, str] | None = None
        self._feeding: tuple[Loader[Ints, Batch], Reader] | None = None

    # What a concrete module fills in

    def reader(self, split: str, lookup: Any, training: bool) -> Reader:
        """A function from positions to a batch, safe to call from several threads.

        Args:
            split: "train" or "val".
            lookup: the training sequence, a held-out one, or the plain order of the split's samples.
            training: whether random changes such as flips apply.
        """
        raise TypeError(f"{type(self).__name__} has no reader")

    def check_source(self, source: Source, setting: str) -> None:
        """Refuse a source that cannot serve this module; every source passes by here once.

        Raises:
            ValueError: it lacks members, or holds values out of range.
        """

    def sequence(self, source: Source, number: int) -> Any:
        """The endless training sequence of one source.

        Args:
            source: the samples.
            number: which source of a mixture it is, so that each is shuffled in its own way; 0 without a mixture.
        """
        return Order(source.counts, self.seed, self.window, source=number)

    def mixed(self, sequences: list[Any], parts: Mixture) -> Any:
        """The endless training sequences of several sources as one.

        Args:
            sequences: one per source.
            parts: settings of the sources in the same order, with ``weight`` or ``repeat``.
        """
        return Mixed(sequences, shares_of(parts, [sequence.length() for sequence in sequences]))

    def arrange(self, lookup: Any) -> Any:
        """The training sequence as it is read, from that of the source or of the mixture."""
        return lookup

    def held_out(self, source: Source) -> Any:
        """The items of a source, each once, in the order of the shard list."""
        return InOrder(int(source.counts.sum()))

    def upcoming(self, positions: Ints) -> Ints:
        """Samples that are trained on at about these positions, so that their shards can be fetched beforehand."""
        samples: Ints = self._mixture(positions)[1]
        return samples

    def key_at(self, position: int) -> str:
        """Name of the item at a training position."""
        _, samples = self.training_sequence()(np.array([position], dtype=np.int64))
        return self.source_of("train").key(int(samples[0]))

    def facts(self) -> dict[str, Any]:
        """More entries for :meth:`describe`."""
        return {}

    # Set-up

    def prepare_data(self) -> None:
        """Make the shards if there is a ``source`` for them; quick when they are there."""
        if self.source is not None:
            self.source(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Find the shards and check what can be known without decoding. Repeated calls do nothing.

        Raises:
            ValueError: shards are missing, damaged or empty, or do not serve this module.
        """
        self.source_of("train")
        if self.val:
            self.source_of("val")

    def teardown(self, stage: str | None = None) -> None:
        """End all reader threads and close all files."""
        sources: list[Any] = list(self._sources.values())
        for opened in [*sources, *self._loaders, *sources]:  # at first to abort downloads that threads wait for
            opened.close()
        self._loaders.clear()

    def describe(self) -> dict[str, Any]:
        """Facts for the start screen and the provenance record."""
        train = self.source_of("train")
        val = self.source_of("val") if self.val else None
        return {
            "root": str(self.root),
            "shards": len(train.names),
            "samples": int(train.counts.sum()),
            "val_shards": len(val.names) if val else 0,
            "val_samples": int(val.counts.sum()) if val else 0,
            **({"columns": ", ".join(self.columns)} if self.columns else {}),
            **({"mixture": ", ".join(self._parts)} if self._parts else {}),
            **self.facts(),
            "fingerprint": train.fingerprint,
        }

    # Position

    @property
    def samples(self) -> int:
        """Items trained on so far over all ranks: the position at which training continues."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        seen = getattr(module, "samples_seen", None)
        if seen is not None:
            return int(seen)
        return self._restored[0] if self._restored else 0

    @property
    def next_key(self) -> str:
        """Key of the item at the current position."""
        return self._key(self.samples)

    @property
    def bad_samples(self) -> int:
        """Different samples that were lost before the start, or that this process could not use so far."""
        return sum(len(self.bad_of(split)) for split in self._sources)

    def health(self) -> dict[str, float]:
        """Numbers for the logs: where in the epoch training stands, per source of a mixture too, and what was lost.

        Returns:
            "data/epoch": epochs trained on, with their fraction; "data/bad_samples"; "data/cache_hits" and
            "data/cache_misses" for shards from elsewhere; for a mixture "data/epoch_NAME" and "data/share_NAME", the
            epochs of each source and its realised share of the items so far.
        """
        position = self.samples
        found = {
            "data/epoch": position / self.training_sequence().length(),
            "data/bad_samples": float(self.bad_samples),
        }
        for source in self._sources.values():
            for name, value in (source.health() if hasattr(source, "health") else {}).items():
                found[f"data/{name}"] = found.get(f"data/{name}", 0.0) + value
        if self._parts:
            drawn = self._mixture.schedule.counts(position)
            for name, sequence, items in zip(self._parts, self._sequences, drawn, strict=True):
                found[f"data/epoch_{name}"] = items / sequence.length()
                found[f"data/share_{name}"] = items / max(1, position)
        return found

    def spent(self) -> dict[str, float]:
        """Seconds that the reader threads together have spent on training batches, to find out what is slow.

        Returns:
            "busy": in all; "reading": of these on getting bytes, where the reader tells them from work on the bytes.
        """
        if self._feeding is None:
            return {}
        loader, reader = self._feeding
        reading = getattr(reader, "reading", None)
        return {"busy": loader.busy, **({} if reading is None else {"reading": reading})}

    def state_dict(self) -> dict[str, Any]:
        """Position and everything that gives it its meaning; equal on all ranks."""
        return {"samples": self.samples, "next_key": self.next_key, **self._meaning()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            ValueError: the settings or the shards differ from those the position was counted with.
        """
        now = self._meaning()
        changed = [name for name in now | state if name not in _PLACE and state.get(name) != now.get(name)]
        if changed:
            raise ValueError(
                "the data order is not the one this run was trained with: "
                + ", ".join(f"{_setting(name)} was {state.get(name)}, is {now.get(name)}" for name in changed)
                + ". Restore the former setting or files, or start another run with tag=NAME."
            )
        samples, key = int(state["samples"]), str(state["next_key"])
        if not self._named(samples, key):
            raise ValueError(
                f"sample {samples} of the data order is {self._key(samples)}, but the checkpoint says {key}: "
                "the content of the shards has changed. Restore them, or start another run with tag=NAME."
            )
        self._restored = (samples, key)

    # Batches

    @property
    def accumulation(self) -> int:
        """Micro-batches per update and rank, for the trainer's number of ranks."""
        return self.accumulation_for(self.rank_and_world()[1])

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
        self.accumulation_for(self.rank_and_world()[1])
        reader = self.reader("train", self.training_sequence(), training=True)
        loader = Loader(self._plans, reader, self.workers)
        self._feeding = (loader, reader)
        return self._track(loader)

    def val_dataloader(self) -> Loader[Ints, Batch] | list[Any]:
        """Every validation item once, in order; all ranks get equally many batches, none of them empty."""
        if not self.val:
            return []
        rank, world_size = self.rank_and_world()
        items = self.held_out(self.source_of("val"))
        size = self.val_batch_size or self.batch_size // self.accumulation_for(world_size)
        plans = held_out_batches(items.length(), size, rank, world_size)
        return self._track(SizedLoader(plans, self.reader("val", items, training=False), self.workers))

    # For readers

    def source_of(self, split: str) -> Source:
        """Samples of a split, "train" or "val"; found and checked on first use.

        Raises:
            ValueError: the split is not set, or its samples cannot be used.
        """
        if split in self._sources:
            return self._sources[split]
        setting = f"data.{split}"
        patterns = {"train": self.train, "val": self.val}[split]
        if not patterns:
            raise ValueError(f"{setting} is not set, but its samples are needed. Set {setting} to shards or a folder.")
        if isinstance(patterns, Mapping):
            self._parts = {
                name: self._open(_path(part, f"{setting}.{name}"), f"{setting}.{name}.path")
                for name, part in patterns.items()
            }
            self._sources[split] = Concatenated(self._parts)
        else:
            self._sources[split] = self._open(patterns, setting)
        return self._sources[split]

    def bad_of(self, split: str) -> BadSamples:
        """The account of bad samples of a split."""
        if split not in self._bad:
            source = self.source_of(split)
            self._bad[split] = BadSamples(int(source.counts.sum()), self.max_bad_fraction, source.lost)
        return self._bad[split]

    def training_sequence(self) -> Any:
        """The one endless sequence that all ranks train on."""
        if self._training is None:
            source = self.source_of("train")
            parts = list(self._parts.values()) or [source]
            self._sequences = [self.sequence(part, number) for number, part in enumerate(parts)]
            mixed = self.mixed(self._sequences, self.train) if isinstance(self.train, Mapping) else None
            self._mixture = mixed or self._sequences[0]
            self._training = self.arrange(self._mixture)
        return self._training

    @property
    def buffers(self) -> int:
        """How many batches may be in memory at once: those being read, those waiting, and those in use."""
        return 3 * self.workers + 2

    def rank_and_world(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def check_limits(self, limits: Mapping[str, tuple[bool, str, str]]) -> None:
        """Refuse settings out of their range.

        Args:
            limits: name of the setting to whether it is fine, what is expected, and an example.

        Raises:
            ValueError: one of them is not fine.
        """
        for name, (fine, expected, example) in limits.items():
            if not fine:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected {expected}. E.g. data.{name}={example}")

    # Details

    def _open(self, patterns: Patterns, setting: str) -> Source:
        source = shards.open_source(
            patterns,
            self.root,
            setting,
            allow_missing=self.allow_missing,
            max_bad_fraction=self.max_bad_fraction,
            window=self.window,
            cache_bytes=int(self.cache_gib * GIB),
            columns=self.columns,
        )
        self.check_source(source, setting)
        return source

    def _plans(self) -> Iterator[Ints]:
        rank, world_size = self.rank_and_world()
        start = self.samples
        if self._restored is not None:
            # A loader that quietly starts elsewhere would repeat or lose samples without any sign of it.
            saved, key = self._restored
            assert start >= saved, f"restored at sample {saved}, but training would continue at {start}"
            assert start > saved or self._named(start, key), (start, key)
        micro_batch = self.batch_size // (world_size * self.accumulation_for(world_size))
        plans = micro_batches(start, self.batch_size, micro_batch, rank, world_size)
        source = self.source_of("train")
        return self._announced(plans, source) if source.health() else plans  # only shards from elsewhere count hits

    def _announced(self, plans: Iterator[Ints], source: Source) -> Iterator[Ints]:
        """Tell the source a shuffle window ahead which samples come, so that their shards are fetched meanwhile."""
        ahead = max(1, int(source.counts.mean() * self.window))
        step = -(-ahead // _ANNOUNCED)
        told = -1
        for plan in plans:
            begin = int(plan[0])
            if told < begin:
                # The first time from the present window on, then the following one, whose shards are then known.
                told = max(told, begin - 1) + ahead
                source.expect(self.upcoming(np.arange(begin, told + ahead, step, dtype=np.int64)))
            yield plan

    def _track(self, loader: Loader[Ints, Batch]) -> Loader[Ints, Batch]:
        self._loaders.add(loader)
        return loader

    def _key(self, position: int) -> str:
        """Key of an item, or "#" and its position while the shard that knows it is out of reach."""
        try:
            return self.key_at(position)
        except (OSError, shards.BadSample):
            return f"#{position}"

    def _named(self, position: int, key: str) -> bool:
        """Whether a key is that of the item at a position, as far as either is known."""
        now = self._key(position)
        return now == key or "#" in (now[:1], key[:1])

    def _meaning(self) -> dict[str, Any]:
        return {**self.training_sequence().meaning(), "fingerprint": self.source_of("train").fingerprint}


_PLACE = ("samples", "next_key")


def _setting(name: str) -> str:
    return "the fingerprint of data.train" if name == "fingerprint" else f"data.{name}"


def _path(part: Any, setting: str) -> Patterns:
    """Check one source of a mixture and return where it is."""
    if not isinstance(part, Mapping) or "path" not in part or set(part) - set(_PART):
        raise ValueError(
            f"{setting}={part}: a source of a mixture has a path and a weight or a repeat. "
            f"E.g. {setting}={{path: 'train-*.tar', weight: 0.5}}"
        )
    path: Patterns = part["path"]
    return path
