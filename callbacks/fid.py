"""Distance between generated and training pictures while training, with the settings that produced each number."""

import hashlib
import importlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.features.extractor import Extractor, Features
from callbacks.features.frechet import Moments, Stats
from callbacks.features.neighbours import precision_recall
from callbacks.records import scalars, warn_once
from callbacks.sampling import guidance_of, plain, shares
from callbacks.validations import AtValidations
from lightningmodules.base import GenerativeModule

NEIGHBOURS = 3
MOST_NEIGHBOURS = 10_000  # points per set for precision and recall; the convention of the papers
EXACT_ABOVE = 2.0  # samples per feature dimension below which the covariance is poorly known

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Reference:
    stats: Stats
    digest: str
    hidden: Tensor | None


class FrechetDistance(AtValidations):
    """Frechet distance and its companions at every n-th validation.

    Logs ``metrics/<name>`` (for example ``metrics/fd_digits``) and, when the extractor offers them,
    ``metrics/recall_*``, ``metrics/precision_*`` (nearest neighbours, k = 3) and ``metrics/agreement_*`` (share of
    samples that the extractor's classifier gives the class they were asked for). Weights other than the first kind
    carry a suffix, ``metrics/fd_digits_raw``; so does guidance, when several values are compared. Rows in
    ``metrics.jsonl`` hold digests of extractor and reference, n, weights, guidance, sampler settings and seeds.

    Sample i has seed ``first_seed + i`` and class ``i % classes``; the seeds are dealt out to the ranks and the
    moments summed in float64, so the number does not depend on how many ranks there are.

    Args:
        extractor: class by dotted path, or an object.
        settings: keywords of the room's ``sample``; the experiment's ``sampling`` block.
        n: samples; numbers of different n are never comparable (the bias falls as 1 / n).
        every: validations between measurements; the last validation always measures.
        weights: kinds to measure; ``ema`` is the first average.
        guidances: values to compare with the same seeds, or None for the one in ``settings``.
        reference_n: most training pictures to compare with, spread evenly over the set.
        first_seed: seed of the first sample.
        chunk: samples per call of the network.

    Raises:
        ValueError: at start, when the extractor cannot be found.
    """

    def __init__(
        self,
        extractor: str | Extractor,
        settings: Mapping[str, Any] | None = None,
        *,
        n: int = 1800,
        every: int = 1,
        weights: Sequence[str] = ("ema", "raw"),
        guidances: Sequence[float] | None = None,
        reference_n: int = 10_000,
        first_seed: int = 0,
        chunk: int = 256,
    ) -> None:
        super().__init__()
        if n < 2:
            raise ValueError(f"callbacks.fid.n={n}: a distance needs at least 2 samples. Type callbacks.fid.n=1800.")
        self.extractor = _load(extractor) if isinstance(extractor, str) else extractor
        self.settings: dict[str, Any] = plain(settings or {})
        self.n, self.every, self.weights = n, every, tuple(weights)
        self.guidances = None if guidances is None else tuple(guidances)
        self.reference_n, self.first_seed, self.chunk = reference_n, first_seed, chunk
        self._reference: _Reference | None = None

    @property
    def state_key(self) -> str:
        """One name per metric, so that a run can have several."""
        return f"{type(self).__name__}/{self.extractor.name}/n={self.n}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before anything is trained."""
        assert isinstance(pl_module, GenerativeModule)
        for kind in self.weights:
            pl_module.resolve_weights(kind)
        if self.n < trainer.world_size:
            raise ValueError(f"callbacks.fid.n={self.n} is less than the {trainer.world_size} ranks. Raise n.")
        pl_module.check_settings(self.settings)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the reference before the first update: what is missing should not be found out after a day."""
        self._prepare(trainer, pl_module)

    def at_validation(self, trainer: L.Trainer, module: GenerativeModule) -> bool:
        """Measure, for every kind of weights and every guidance."""
        if not self.due(trainer, module, self.every):
            return True
        reference = self._prepare(trainer, module)
        rows: list[tuple[dict[str, float], dict[str, Any]]] = []
        for kind in dict.fromkeys(module.resolve_weights(kind) for kind in self.weights):
            for guidance in self.guidances or (guidance_of(self.settings),):
                row = self._measure(trainer, module, reference, kind, guidance)
                if row is None:
                    return False
                rows.append(row)
        for values, protocol in rows:
            scalars(trainer, values, **protocol)
        return True

    # ---- one measurement ------------------------------------------------------------------------------------------

    def _measure(
        self, trainer: L.Trainer, module: GenerativeModule, reference: _Reference, kind: str, guidance: float
    ) -> tuple[dict[str, float], dict[str, Any]] | None:
        settings = {**self.settings, "guidance": guidance}
        start = time.perf_counter()
        with module.use_weights(kind), torch.no_grad():
            collected = self._collect(trainer, module, settings)
        if collected is None:
            return None
        moments, hidden, agreement, broken, evaluations = collected
        sampled = time.perf_counter()
        stats = moments.finalize()
        short = self.extractor.name.removeprefix("fd_")
        values = {self.extractor.name: self.extractor.distance(reference.stats, stats)}
        if evaluations is not None:
            values["evaluations"] = evaluations  # network calls per sample, of methods that count them
        if agreement is not None:
            values[f"agreement_{short}"] = agreement
        if hidden is not None and reference.hidden is not None:
            values[f"precision_{short}"], values[f"recall_{short}"] = precision_recall(
                reference.hidden, hidden, NEIGHBOURS
            )
        if broken:
            warn_once(
                "broken samples", f"{broken} of {self.n} samples of {kind} weights are not finite; shown as black."
            )
        suffix = "" if kind == module.resolve_weights(self.weights[0]) else "_raw" if kind == "raw" else f"_{kind}"
        suffix += f"_g{guidance:g}" if self.guidances is not None else ""
        values = {f"metrics/{name}{suffix}": value for name, value in values.items()}
        if not suffix:
            values[f"speed/{self.extractor.name}_sampling_sec"] = sampled - start
            values[f"speed/{self.extractor.name}_distance_sec"] = time.perf_counter() - sampled
        return values, self._protocol(reference, kind, settings, module.num_classes, broken)

    def _collect(
        self, trainer: L.Trainer, module: GenerativeModule, settings: Mapping[str, Any]
    ) -> tuple[Moments, Tensor | None, float | None, int, float | None] | None:
        moments, kept, agreed, broken, calls = Moments(), [], 0, 0, 0
        predicts = False
        for numbers, count in shares(self.n, trainer.global_rank, trainer.world_size, self.chunk):
            if module.stop_requested():
                return None
            labels = [number % max(1, module.num_classes) for number in numbers]
            x = module.sample([self.first_seed + number for number in numbers], module.condition(labels), **settings)
            counted = getattr(module, "evaluations", None)
            calls += 0 if counted is None else int(counted[:count].sum())
            broken += int((~x[:count].flatten(1).isfinite().all(1)).sum())
            seen = _look(self.extractor, module.codec.decode(x.nan_to_num(nan=-1.0)))
            moments.update(seen.values[:count]) if count else None
            if seen.hidden is not None:
                kept.append(seen.hidden[:count].float())
            if seen.predicted is not None and module.num_classes:
                predicts = True
                agreed += int((seen.predicted[:count].cpu() == torch.tensor(labels[:count])).sum())
        moments = _over_ranks(trainer, moments, module.device)
        agreed, broken, calls = _sum(trainer, [agreed, broken, calls], module.device)
        hidden = _gather(trainer, torch.cat(kept), self.n, module.device)[:MOST_NEIGHBOURS] if kept else None
        return moments, hidden, agreed / self.n if predicts else None, broken, calls / self.n if calls else None

    def _protocol(
        self, reference: _Reference, kind: str, settings: Mapping[str, Any], classes: int, broken: int
    ) -> dict[str, Any]:
        short = f"{self.extractor.digest[:12]}/ref={reference.digest[:12]}"
        return {
            "protocol": f"{self.extractor.name}/{short}/n={self.n}",
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.digest,
            "reference_sha256": reference.digest,
            "reference_n": reference.stats.n,
            "n": self.n,
            "neighbours": NEIGHBOURS,
            "weights": kind,
            "guidance": settings["guidance"],
            "sampler": dict(settings),
            "labels": "balanced" if classes else "none",
            "seeds": f"{self.first_seed}-{self.first_seed + self.n - 1}",
            "nonfinite_samples": broken,
        }

    # ---- the reference --------------------------------------------------------------------------------------------

    def _prepare(self, trainer: L.Trainer, module: L.LightningModule) -> _Reference:
        if self._reference is not None:
            return self._reference
        device = module.device if module.device.type != "mps" else torch.device("cpu")
        self.extractor = self.extractor.to(device)
        stats = self.extractor.reference()
        moments, kept = Moments(), []
        with torch.no_grad():
            pictures = _training_pictures(trainer, self.reference_n, needed=stats is None)
            for images in pictures.split(1024) if len(pictures) else ():
                seen = _look(self.extractor, images.to(device))
                moments.update(seen.values)
                if seen.hidden is not None:
                    kept.append(seen.hidden.float())
        stats = stats or moments.finalize()
        width = stats.mean.shape[0]
        if self.n < EXACT_ABOVE * width or stats.n < EXACT_ABOVE * width:
            few = min(self.n, stats.n)
            warn_once(
                "few samples", f"{self.extractor.name} has {width} features and {few} samples: it is mostly bias."
            )
        digest = hashlib.sha256(stats.mean.numpy().tobytes() + stats.cov.numpy().tobytes()).hexdigest()
        hidden = torch.cat(kept)[:MOST_NEIGHBOURS].float().cpu() if kept else None
        self._reference = _Reference(stats, digest, hidden)
        log.info("%s: reference %s of %d pictures, %d samples", self.extractor.name, digest[:12], stats.n, self.n)
        return self._reference


def _load(path: str) -> Extractor:
    module, _, name = path.rpartition(".")
    try:
        found: Extractor = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"callbacks.fid.extractor={path!r} cannot be loaded ({error}). Give a class by dotted path, for example"
            f" callbacks.features.fd_lite.FdLite."
        ) from error
    return found


def _look(extractor: Extractor, images: Tensor) -> Features:
    """Features in full precision, whatever precision training runs in."""
    with (
        torch.autocast(images.device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        return extractor(images)


def _training_pictures(trainer: L.Trainer, most: int, needed: bool) -> Tensor:
    """Training pictures (N, C, H, W) uint8, at most ``most``, spread evenly; none when there are none to be had."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    source = getattr(datamodule, "reference_images", None)
    if source is None and needed:
        kind = type(datamodule).__name__
        raise ValueError(
            f"callbacks.fid compares with training pictures, but data={kind} has no reference_images. Set data to one"
            f" that has, for example datamodules.images.Images, or data.pictures of latents, or callbacks.fid=null."
        )
    images: Tensor = source("train", most)[0] if source is not None else torch.empty(0, 1, 1, 1, dtype=torch.uint8)
    return images


def _over_ranks(trainer: L.Trainer, moments: Moments, device: torch.device) -> Moments:
    if trainer.world_size == 1:
        return moments
    packed = trainer.strategy.reduce(moments.pack().to(device), reduce_op="sum")
    return Moments.unpack(packed, len(moments.total))


def _sum(trainer: L.Trainer, counts: Sequence[int], device: torch.device) -> list[int]:
    if trainer.world_size == 1:
        return list(counts)
    total = trainer.strategy.reduce(torch.tensor(counts, dtype=torch.float64, device=device), reduce_op="sum")
    return [round(count) for count in total.tolist()]


def _gather(trainer: L.Trainer, rows: Tensor, total: int, device: torch.device) -> Tensor:
    """Rows of all ranks in the order of their numbers: rank r holds numbers r, r + world, ..."""
    if trainer.world_size == 1:
        return rows.cpu()
    longest = -(-total // trainer.world_size)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])]).to(device)
    gathered = trainer.strategy.all_gather(padded)  # (world, longest, D)
    return gathered.transpose(0, 1).reshape(-1, rows.shape[1])[:total].cpu()
