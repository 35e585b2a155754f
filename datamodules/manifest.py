"""Whether the manifest beside packed shards tells what they hold: every sample, and every input that was refused."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.packjournal import MANIFEST

Found = tuple[str, str, str]  # file, key or nothing, what is wrong


def compare(folder: Path, card: Mapping[str, Any], keys: Mapping[str, NDArray[np.bytes_]], whole: bool) -> list[Found]:
    """Compare the manifest of a folder with its shards.

    Args:
        folder: where it lies.
        card: the card of index.json; its counts of inputs are compared, too.
        keys: keys of the samples found in each shard.
        whole: whether these are all shards of the folder.

    Returns:
        What differs; nothing for a folder that was not packed and has no manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return [(MANIFEST, "", "missing")] if "pack" in card else []
    counts: Counter[str] = Counter()
    found: list[Found] = []
    met: set[str] = set()
    try:
        for shard, lines in groupby(_lines(path, counts), key=lambda line: str(line[0])):
            listed = {key for _, key in lines}
            met.add(shard)
            held = {bytes(key).decode("utf-8", "surrogateescape") for key in keys.get(shard, ())}
            if shard in keys:
                found += [(shard, key, f"listed in {MANIFEST}, but not to be read") for key in sorted(listed - held)]
                found += [(shard, key, f"not listed in {MANIFEST}") for key in sorted(held - listed)]
            elif whole:
                found.append((MANIFEST, "", f"lists {len(listed)} samples of {shard}, which is no shard of the set"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        number = counts["lines"] + 1
        return [*found, (MANIFEST, "", f"line {number} cannot be read ({type(error).__name__}: {error})")]
    found += [(shard, "", f"none of its samples is listed in {MANIFEST}") for shard in keys if shard not in met]
    return [*found, *_totals(counts, card.get("inputs"))]


def _lines(path: Path, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Shard and key of every written input; all lines and the refused ones are counted in passing."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            if "refused" in line:
                counts[f"refused: {line['refused']}"] += 1
            else:
                counts["written"] += 1
                yield line["shard"], line["key"]
            counts["lines"] += 1


def _totals(counts: Counter[str], inputs: Any) -> Iterator[Found]:
    if not isinstance(inputs, dict):
        return
    told = {f"refused: {reason}": count for reason, count in inputs.get("refused", {}).items()}
    told["written"] = inputs.get("written", 0)
    for name in sorted({*told, *counts} - {"lines"}):
        if counts[name] != told.get(name, 0):
            yield MANIFEST, "", f"{counts[name]} inputs {name}, index.json says {told.get(name, 0)}"
