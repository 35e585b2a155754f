"""The quickstart's data: 1,797 scanned 8x8 digits that ship with scikit-learn, as tar shards."""

import io
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules import catalogue
from datamodules.order import Order
from datamodules.writer import DatasetWriter

NAME = "digits8"
LICENCE = (
    "Copy of the test set of the UCI data set 'Optical Recognition of Handwritten Digits' (E. Alpaydin, C. Kaynak), "
    "as distributed with scikit-learn (BSD-3-Clause)."
)
TRAIN_SHARDS = 8
VAL_SHARDS = 2
STEP = 15  # grey value of one of the 16 levels above black, so that 16 becomes 240


def held_out(labels: np.ndarray) -> np.ndarray:
    """Mask of the test split: every 4th sample of each class, in the order of the data set.

    Args:
        labels: classes, (n,).

    Returns:
        bool (n,), True for the test split (445 of the 1,797 digits).
    """
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[3::4]] = True
    return mask


def write(root: Path | str) -> None:
    """Write the shards to ``root`` unless they are there; about a second and 3 MB.

    Members are ``<number>.png`` (grey, value x 15) and ``<number>.cls``. The samples of each split are shuffled once,
    so that no shard is sorted by class. Keys are positions in scikit-learn's array.

    Args:
        root: folder of the shards. A folder that already holds this data set is left as it is.

    Raises:
        ValueError: scikit-learn is missing, or the folder holds something else or cannot be written.
    """
    root = Path(root)
    index = catalogue.read(root)
    if index is not None and index.dataset == NAME:
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the data set digits8 comes with scikit-learn, which is not installed. Type: pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) * STEP).astype(np.uint8)
    test = held_out(labels)
    sources = {name: version(name) for name in ("scikit-learn", "pillow")}
    with DatasetWriter(root, dataset=NAME, licence=LICENCE, sources=sources) as writer:
        for split, shards, chosen in (("train", TRAIN_SHARDS, ~test), ("val", VAL_SHARDS, test)):
            numbers = np.flatnonzero(chosen)
            _, shuffle = Order([len(numbers)], seed=0)(np.arange(len(numbers)))
            samples = _samples(images, labels, numbers[shuffle])
            writer.write(split, samples, per_shard=-(-len(numbers) // shards))


def _samples(images: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> Iterator[dict[str, bytes | str]]:
    for number in numbers:
        with io.BytesIO() as file:
            Image.fromarray(images[number]).save(file, format="PNG")
            yield {"__key__": f"{number:06d}", "png": file.getvalue(), "cls": str(labels[number]).encode()}
