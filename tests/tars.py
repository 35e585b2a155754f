"""Small shards for tests of the data layer."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()


def picture(number: int, size: int = 8, channels: int = 1) -> np.ndarray:
    shape = (size, size) if channels == 1 else (size, size, channels)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def sample(number: int, label: int | None = None, **options: int) -> dict[str, bytes]:
    members = {"png": png(picture(number, **options))}
    return members if label is None else {**members, "cls": str(label).encode()}


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]], layout: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=layout) as archive:
        for key, members in samples.items():
            for extension, data in members.items():
                add(archive, f"{key}.{extension}", data)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_set(folder: Path, counts: Iterable[int], prefix: str = "train", classes: int = 10, **options: int) -> Path:
    """Shards <prefix>-000000.tar ... with the given numbers of samples; sample i has class i mod ``classes``."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        numbers = range(number, number + count)
        content = {f"{prefix}{i:05d}": sample(i, i % classes if classes else None, **options) for i in numbers}
        write_tar(folder / f"{prefix}-{shard:06d}.tar", content)
        number += count
    return folder
