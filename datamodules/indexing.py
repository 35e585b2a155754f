"""Index files for shards that others have written: one beside each shard, and two for all of them."""

from collections import Counter
from pathlib import Path
from typing import Any

from datamodules import catalogue, overview, stamp, survey, tarindex
from datamodules.catalogue import Catalogue, ShardEntry
from datamodules.overview import Overview
from datamodules.tarindex import TarIndex
from datamodules.transforms import IMAGE_EXTENSIONS
from datamodules.writer import write_text


def write_indices(
    path: Path, *, name: str | None, licence: str, workers: int | None, progress: survey.Progress
) -> tuple[int, bool]:
    """Write what is missing beside foreign shards: an index file per shard, the overview, and index.json.

    Args:
        path: folder of the shards.
        name: name of the data set for index.json; None for the folder's.
        licence: licence for index.json.
        workers: threads; None for the number of cores.
        progress: told (what, done, total, detail).

    Returns:
        Number of index files written, and whether index.json was.

    Raises:
        ValueError: a shard is damaged, or disagrees with the index.json that is there; nothing is written then.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder. Type the folder of the shards; index.json describes all of it.")
    paths = survey.find(path)
    known = survey.entries(paths)
    made = list(survey.in_parallel(lambda one: _index_shard(one, known[one]), paths, workers, progress, "indexing"))
    found = catalogue.read(path)
    stale = [one for one in paths if found is not None and known[one] is None]
    if stale:
        raise ValueError(
            f"{path / catalogue.FILE_NAME} does not list {len(stale)} of {len(paths)} shards, first: {stale[0].name}. "
            f"Move them away, or delete {catalogue.FILE_NAME} and type the command again."
        )
    written = 0
    card = stamp.together(paths) if found is None else {}
    try:
        for one, (index, measured, _) in zip(paths, made, strict=True):
            if measured is not None:
                tarindex.write_sidecar(one, index, measured=measured)
                written += 1
        shards = {one.name: entry for one, (_, _, entry) in zip(paths, made, strict=True)}
        beside = Overview(path / overview.FILE_NAME)
        if written or not all(
            overview.agrees(beside, one.name, entry.sha256, index)
            for one, (index, _, entry) in zip(paths, made, strict=True)
        ):
            overview.describe(path, shards)
        if found is None:
            whole = Catalogue(name or path.resolve().name, licence, {}, shards, card)
            write_text(path / catalogue.FILE_NAME, whole.to_json())
    except OSError as error:
        raise ValueError(
            f"cannot write to {path}: {error.strerror or error}. Type a folder you may write to."
        ) from error
    return written, found is None


def _index_shard(path: Path, entry: ShardEntry | None) -> tuple[TarIndex, dict[str, Any] | None, ShardEntry]:
    """Index of a shard, its measured columns if its index file is missing, and its entry of index.json."""
    if not path.is_file():
        raise ValueError(f"{path} is listed in {catalogue.FILE_NAME}, but it is missing. Copy it again.")
    index = tarindex.scan(path)
    if index.problem or not len(index):
        raise ValueError(f"{path.name}: {index.problem or 'it holds no sample'}. Check all of them with data check.")
    if entry is not None and (entry.bytes != index.size or entry.samples != len(index)):
        raise ValueError(
            f"{path.name} has {len(index)} samples in {index.size} bytes, but {catalogue.FILE_NAME} says "
            f"{entry.samples} in {entry.bytes}. If it was replaced on purpose, delete {catalogue.FILE_NAME}."
        )
    measured: dict[str, Any] | None = None
    if not survey.agrees(path, index):
        images = any(name in IMAGE_EXTENSIONS for name in index.extensions)
        measured = {"shape": survey.header_shapes(path, index)} if images else {}
    if entry is None:
        counts = Counter(survey.labels(path, index).tolist())
        del counts[survey.NO_LABEL]
        classes = {str(label): counts[label] for label in sorted(counts)}
        entry = ShardEntry(len(index), index.size, catalogue.sha256(path), classes)
    return index, measured, entry
