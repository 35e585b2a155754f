"""Data sets that the loader's measurement makes once: JPEG shards and folders, many small shards, latents, tokens."""

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from datamodules import catalogue
from datamodules.catalogue import Catalogue, ShardEntry
from datamodules.tarindex import cache_folder

CLASSES = 10
NOISE = 4.0  # standard deviation in grey levels: without it the photographs compress better than most do
QUALITY = 90
LICENCE = "Crops of the photographs china.jpg and flower.jpg that scikit-learn distributes (CC BY)."
_SEED = 0

Members = dict[str, bytes]


def images(count: int, size: int, shards: int = 16) -> tuple[Path, Path]:
    """JPEG images as shards and, with the same bytes, as class folders; made on first use.

    Crops, mirrored or not, of scikit-learn's two photographs with a random brightness and noise; quality 90.

    Args:
        count: number of images.
        size: height and width, at most 427.
        shards: number of tar files.

    Returns:
        The folder of the shards train-000000.tar ..., and the folder with one sub-folder per class.
    """
    shard_folder = _folder(f"images-{size}-{count}")
    if not shard_folder.exists():
        write_shards(shard_folder, "train", _photographs(count, size), -(-count // shards), "benchmark images")
    class_folder = _folder(f"classes-{size}-{count}")
    if not class_folder.exists():
        _whole(class_folder, lambda folder: _unpack(shard_folder, folder))
    return shard_folder, class_folder


def small_shards(shards: int = 1000, per_shard: int = 64) -> Path:
    """Many shards of small JPEG images (32 pixels), for what a start costs; made on first use."""
    folder = _folder(f"shards-{shards}x{per_shard}")
    if not folder.exists():
        pictures = [members for _, members in _photographs(4 * per_shard, 32)]
        samples = ((f"{i:09d}", pictures[i % len(pictures)]) for i in range(shards * per_shard))
        write_shards(folder, "train", samples, per_shard, "benchmark of a start")
    return folder


def latents(count: int, shape: tuple[int, int, int], shards: int = 8) -> Path:
    """Latents, float16 mean and log-variance together of ``shape``, with a class each; made on first use."""
    folder = _folder(f"latents-{'x'.join(map(str, shape))}-{count}")
    if not folder.exists():
        draw = np.random.default_rng(_SEED)
        block = draw.standard_normal((64, *shape)).astype(np.float16)
        samples = ((f"{i:09d}", {"lat": (block[i % 64]).tobytes(), "cls": b"%d" % (i % CLASSES)}) for i in range(count))
        card = {"lat": {"dtype": "float16", "shape": list(shape)}}
        write_shards(folder, "train", samples, -(-count // shards), "benchmark latents", card)
    return folder


def tokens(documents: int, length: int, shards: int = 8) -> Path:
    """Documents of exactly ``length`` uint16 tokens below 256; made on first use."""
    folder = _folder(f"tokens-{length}-{documents}")
    if not folder.exists():
        draw = np.random.default_rng(_SEED)
        block = draw.integers(0, 250, (64, length), dtype=np.uint16)
        samples = ((f"{i:09d}", {"tok": block[i % 64].tobytes()}) for i in range(documents))
        card = {"tok": {"dtype": "uint16"}}
        write_shards(folder, "train", samples, -(-documents // shards), "benchmark tokens", card)
    return folder


def write_shards(
    folder: Path,
    split: str,
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    per_shard: int,
    dataset: str,
    card: Mapping[str, object] | None = None,
) -> None:
    """Write plain ustar shards with their index.json, in one step as far as others can see."""
    _whole(folder, lambda made: _write_shards(made, split, iter(samples), per_shard, dataset, card))


def files(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    return sorted(folder.glob("*.tar"))


def _write_shards(
    folder: Path,
    split: str,
    samples: Iterator[tuple[str, Mapping[str, bytes]]],
    per_shard: int,
    dataset: str,
    card: Mapping[str, object] | None,
) -> None:
    entries: dict[str, ShardEntry] = {}
    while True:
        path = folder / f"{split}-{len(entries):06d}.tar"
        classes: dict[str, int] = {}
        written = 0
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for _, (key, members) in zip(range(per_shard), samples, strict=False):
                for extension, data in members.items():
                    header = tarfile.TarInfo(f"{key}.{extension}")
                    header.size = len(data)
                    archive.addfile(header, io.BytesIO(data))
                if "cls" in members:
                    label = members["cls"].decode()
                    classes[label] = classes.get(label, 0) + 1
                written += 1
        if not written:
            path.unlink()
            break
        content = path.read_bytes()
        entries[path.name] = ShardEntry(written, len(content), hashlib.sha256(content).hexdigest(), classes)
    settings = {"card": dict(card)} if card and "card" in Catalogue.__dataclass_fields__ else {}
    index = Catalogue(dataset, LICENCE, {}, entries, **settings)
    (folder / catalogue.FILE_NAME).write_text(index.to_json())


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
    for path in files(shards):
        with tarfile.open(path) as archive:
            content = {member.name: archive.extractfile(member) for member in archive}
            for name, file in content.items():
                assert file is not None
                key, _, extension = name.rpartition(".")
                if extension == "jpg":
                    label = content[f"{key}.cls"]
                    assert label is not None
                    place = folder / label.read().decode()
                    place.mkdir(exist_ok=True)
                    (place / name).write_bytes(file.read())


def _folder(name: str) -> Path:
    return cache_folder() / "bench" / name


def _whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill a folder under a passing name, then rename it; what an interrupted attempt left is cleared away."""
    passing = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(passing, ignore_errors=True)
    passing.mkdir(parents=True)
    make(passing)
    passing.rename(folder)
