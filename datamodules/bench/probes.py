"""What can only be measured in a process of its own: the first batch after a cold start, and memory.

Run as ``python -m datamodules.bench.probes first|memory '{settings}'``; prints one line of JSON.
"""

import gc
import json
import os
import sys
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

from datamodules.images import Images
from datamodules.text import Text
from datamodules.tokenizers import Bytes

_PAGE = os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> int:
    """Run one probe.

    Args:
        argv: name of the probe, and its settings for :class:`datamodules.images.Images` as JSON; for
            :class:`datamodules.text.Text` if there is a "mode".

    Returns:
        0.
    """
    settings = json.loads(argv[1])
    print(json.dumps({"first": first_batch, "memory": memory}[argv[0]](settings)))
    return 0


def first_batch(settings: dict[str, Any]) -> dict[str, float]:
    """Seconds from the constructor of the data module to its first batch, everything being imported already."""
    begin = time.perf_counter()
    data = Text(tokenizer=Bytes(), **settings) if "mode" in settings else Images(**settings)
    data.setup("fit")
    opened = time.perf_counter()
    batches = iter(data.train_dataloader())
    next(batches)
    seconds = time.perf_counter() - begin
    data.teardown("fit")
    return {"seconds": seconds, "setup": opened - begin}


def memory(settings: dict[str, Any]) -> dict[str, float]:
    """Memory of reading: growth of the process, and bytes per sample that are kept for the open window.

    ``settings`` also hold "batches", how many to draw; the shards must fit in one window.
    """
    batches = int(settings.pop("batches"))
    data = Images(**settings)
    gc.collect()
    begin = resident()
    data.setup("fit")
    peak = 0
    for _ in islice(data.train_dataloader(), batches):
        peak = max(peak, resident())
    data.teardown("fit")
    tracemalloc.start()
    again = Images(**{**settings, "workers": 0, "batch_size": 4})
    before = tracemalloc.get_traced_memory()[0]
    again.setup("fit")
    for _ in islice(again.train_dataloader(), 2 * len(again.source_of("train").names)):
        pass
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] - before
    held = int(again.source_of("train").counts.sum())
    again.teardown("fit")
    batch = data.batch_size * data.channels * data.size**2
    return {"growth": peak - begin, "buffers": data.buffers * batch, "per_sample": kept / held, "window": held}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
