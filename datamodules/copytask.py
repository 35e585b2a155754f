"""A coordination task with a known answer: rows of random tokens whose second half repeats the first, as tar shards.

The best masked-diffusion model is known in closed form: with T steps a pair of twins is right unless both are drawn in
one step, so a row of n pairs is valid with probability (1 - (1 - 1/V) / T)^n.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datamodules import catalogue
from datamodules.tokenizers import Characters
from datamodules.writer import DatasetWriter

NAME = "copy-task"
ALPHABET = "abcdefgh"
HALF = 8  # tokens that are repeated
ROWS = 1024  # per document
TRAIN, VAL = 64, 4  # documents
SEED = 16
LICENCE = "Random numbers, made by this program."


def write(root: Path | str) -> None:
    """Write the shards to ``root`` unless they are there; less than a second and 3 MB.

    A document is 1,024 rows of 16 tokens one after the other, stored as ``<number>.tok`` (uint16): read it with
    ``mode: concat``, ``add_eos: false`` and ``length: 16`` and every row of a batch is one row of the task.

    Args:
        root: folder of the shards. A folder that already holds this data set is left as it is.

    Raises:
        ValueError: the folder holds something else or cannot be written.
    """
    root = Path(root)
    index = catalogue.read(root)
    if index is not None and index.dataset == NAME:
        return
    tokenizer = Characters(ALPHABET, eos=False)
    card = {
        "tok": {"dtype": "uint16"},
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.size},
    }
    random = np.random.RandomState(SEED)  # its stream never changes
    sources = {"alphabet": ALPHABET, "half": str(HALF), "seed": str(SEED)}
    with DatasetWriter(root, dataset=NAME, licence=LICENCE, sources=sources, card=card) as writer:
        writer.write("train", _documents(random, TRAIN), per_shard=TRAIN // 8)
        writer.write("val", _documents(random, VAL), per_shard=VAL)


def _documents(random: np.random.RandomState, count: int) -> Iterator[dict[str, bytes | str]]:
    for number in range(count):
        half = random.randint(len(ALPHABET), size=(ROWS, HALF))
        yield {"__key__": f"{number:06d}", "tok": np.concatenate([half, half], axis=1).astype("<u2").tobytes()}
