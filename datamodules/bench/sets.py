"""Data sets that the measurement makes once: images as shards and as folders, many small shards, latents, tokens."""

import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from datamodules.latents import latent_card
from datamodules.tarindex import cache_folder
from datamodules.tokenizers import Bytes
from datamodules.writer import DatasetWriter

CLASSES = 10
SHARDS = 16  # of a data set, one window
NOISE = 4.0  # standard deviation in grey levels: without it the photographs compress better than most do
QUALITY = 90
LONGEST = 2048  # tokens of a document
LICENCE = "Crops of the photographs china.jpg and flower.jpg that scikit-learn distributes (CC BY)."
_SEED = 0
_DIFFERENT = 64  # of the latents and small images; the rest repeat them

Members = dict[str, bytes]


def images(count: int, size: int) -> tuple[Path, Path]:
    """JPEG images as shards and, with the same bytes, as class folders; made on first use.

    Crops, mirrored or not, of scikit-learn's two photographs with a random brightness and noise; quality 90.

    Args:
        count: number of images.
        size: height and width, at most 427.

    Returns:
        The folder of the shards train-000000.tar ..., and the folder with one sub-folder per class.
    """
    folder = _made(f"images-{size}-{count}", _photographs(count, size), -(-count // SHARDS))
    classes = folder.with_name(f"classes-{size}-{count}")
    if not classes.exists():
        _unpack(folder, classes)
    return folder, classes


def small_shards(shards: int, per_shard: int) -> Path:
    """Shards of small JPEG images (32 pixels), for what a start and a window cost; made on first use."""
    pictures = [members for _, members in _photographs(_DIFFERENT, 32)]
    samples = ((f"{i:09d}", pictures[i % _DIFFERENT]) for i in range(shards * per_shard))
    return _made(f"small-{shards}x{per_shard}", samples, per_shard)


def latents(count: int, shape: tuple[int, int, int]) -> Path:
    """Latents, float16 mean and log-variance together of ``shape``, with a class each; made on first use."""
    block = np.random.default_rng(_SEED).standard_normal((_DIFFERENT, *shape)).astype(np.float16)
    samples = (
        (f"{i:09d}", {"lat": block[i % _DIFFERENT].tobytes(), "cls": b"%d" % (i % CLASSES)}) for i in range(count)
    )
    card = latent_card(shape=shape, encoder="none", scale=1.0)
    return _made(f"latents-{'x'.join(map(str, shape))}-{count}", samples, -(-count // SHARDS), card)


def tokens(documents: int) -> Path:
    """Documents of 16 to 2048 uint16 tokens of the byte tokenizer, all lengths alike; made on first use."""
    return _tokens(f"tokens-{documents}", documents, LONGEST, -(-documents // SHARDS))


def small_documents(shards: int, per_shard: int) -> Path:
    """Shards of documents of 16 to 256 tokens, for what a start costs; made on first use."""
    return _tokens(f"small-tokens-{shards}x{per_shard}", shards * per_shard, 256, per_shard)


def files(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    return sorted(folder.glob("*.tar"))


def _tokens(name: str, documents: int, longest: int, per_shard: int) -> Path:
    draw = np.random.default_rng(_SEED)
    block = draw.integers(0, 250, longest, dtype=np.uint16)
    lengths = draw.integers(16, longest + 1, documents)
    samples = ((f"{i:09d}", {"tok": block[:length].tobytes()}) for i, length in enumerate(lengths))
    card = {"tok": {"dtype": "uint16"}, "tokenizer": {"fingerprint": Bytes().fingerprint}}
    return _made(name, samples, per_shard, card)


def _made(
    name: str, samples: Iterable[tuple[str, Members]], per_shard: int, card: Mapping[str, Any] | None = None
) -> Path:
    folder = cache_folder() / "bench" / name
    if not folder.exists():
        with DatasetWriter(folder, dataset=f"bench {name}", licence=LICENCE, sources={}, card=card) as writer:
            writer.write("train", ({"__key__": key, **members} for key, members in samples), per_shard)
    return folder


def _photographs(count: int, size: int) -> Iterator[tuple[str, Members]]:
    from sklearn.datasets import load_sample_image

    scenes = [np.asarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    draw = np.random.default_rng(_SEED)
    for number in range(count):
        scene = scenes[int(draw.integers(len(scenes)))]
        top, left = (int(draw.integers(0, side - size + 1)) for side in scene.shape[:2])
        crop = scene[top : top + size, left : left + size]
        if draw.random() < 0.5:
            crop = crop[:, ::-1]
        noise = NOISE * draw.standard_normal(crop.shape, dtype=np.float32)
        pixels: NDArray[np.float32] = crop * draw.uniform(0.7, 1.3) + noise
        picture = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))
        data = simplejpeg.encode_jpeg(picture, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
        yield f"{number:09d}", {"jpg": data, "cls": b"%d" % int(draw.integers(CLASSES))}


def _unpack(shards: Path, folder: Path) -> None:
    """Images as files in class folders, under a passing name until they are all there."""
    passing = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(passing, ignore_errors=True)
    for path in files(shards):
        with tarfile.open(path) as archive:
            content = {member.name: archive.extractfile(member) for member in archive}
            for name, file in content.items():
                key, _, extension = name.rpartition(".")
                label = content[f"{key}.cls"]
                assert file is not None
                assert label is not None
                if extension == "jpg":
                    place = passing / label.read().decode()
                    place.mkdir(parents=True, exist_ok=True)
                    (place / name).write_bytes(file.read())
    passing.rename(folder)
