"""What the loader is measured against: bare loops over the same bytes, and the usual ways to read the same images."""

import importlib
import io
import multiprocessing
import tarfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.memory import empty

BATCH = 64
_READ = 1 << 20
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Transform = Callable[[Any], Tensor]


def torchvision() -> Any:
    """The torchvision module, or None where it is not installed or does not fit the installed torch."""
    try:
        importlib.import_module("torchvision.transforms")
        importlib.import_module("torchvision.datasets")
        return importlib.import_module("torchvision")
    except Exception:  # a torchvision built for another torch fails in many ways
        return None


def usual(size: int) -> Transform:
    """The usual image transforms: resize, centre crop, random mirror, to a float tensor, normalise.

    torchvision's own where it can be imported, else the same steps with Pillow and torch.

    Args:
        size: height and width of the result.

    Returns:
        A function from a Pillow image to a float32 tensor (3, size, size).
    """
    vision = torchvision()
    if vision is None:
        return _Plain(size)
    steps = vision.transforms
    composed: Transform = steps.Compose(
        [
            steps.Resize(size, interpolation=steps.InterpolationMode.BICUBIC),
            steps.CenterCrop(size),
            steps.RandomHorizontalFlip(),
            steps.ToTensor(),
            steps.Normalize(_MEAN, _STD),
        ]
    )
    return composed


class _Plain:
    """The same steps as torchvision's on Pillow images."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.mean, self.std = torch.tensor(_MEAN)[:, None, None], torch.tensor(_STD)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        short = min(image.size)
        if short != self.size:
            width, height = (self.size * side // short for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (round((side - self.size) / 2) for side in image.size)
        if (left, top) != (0, 0):
            image = image.crop((left, top, left + self.size, top + self.size))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(self.mean).div_(self.std)


class Fast:
    """The same decoder as ours, one image at a time, mirrored at random: uint8 (size, size, 3).

    Args:
        size: height and width of the result; the images are square.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, data: bytes) -> Tensor:
        """Decode one JPEG."""
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        pixels = pixels if pixels.shape[0] == self.size else _shrink(pixels, self.size)
        return pixels.flip(1) if torch.rand(1) < 0.5 else pixels


def _shrink(pixels: Tensor, size: int) -> Tensor:
    planes = pixels[None].permute(0, 3, 1, 2)  # in this order torch sees that the channels come last
    return functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


# Limits


def read_files(paths: list[Path]) -> int:
    """Read whole files into one buffer and return the number of bytes."""
    buffer = bytearray(_READ)
    total = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def decode(blobs: list[bytes], source: int, size: int) -> int:
    """Decode every image into the same buffer, and shrink it where ``size`` is smaller than ``source``."""
    pixels = empty((source, source, 3))  # where the decoder is fastest, rather than where malloc happens to put it
    tensor = torch.from_numpy(pixels)
    for blob in blobs:
        simplejpeg.decode_jpeg(blob, colorspace="RGB", buffer=pixels)
        if size != source:
            _shrink(tensor, size)
    return len(blobs)


class AtOnce:
    """The same work in several processes at the same time, as each needs a core; they wait between the turns.

    Args:
        work: what each of them does; returns the number of items.
        count: number of processes.
    """

    def __init__(self, work: Callable[[], int], count: int) -> None:
        context = multiprocessing.get_context("fork")  # the others would copy the images
        self._ends = []
        for _ in range(count):
            mine, other = context.Pipe()
            context.Process(target=_serve, args=(other, work), daemon=True).start()
            self._ends.append(mine)

    def __call__(self) -> int:
        """Let all of them work once; returns the number of items of all."""
        for end in self._ends:
            end.send(None)
        return sum(end.recv() for end in self._ends)


def _serve(end: "Connection[int, None]", work: Callable[[], int]) -> None:
    while True:
        end.recv()
        end.send(work())


def blobs(paths: list[Path], extension: str) -> list[bytes]:
    """All members with one extension, through Python's own tar reader."""
    found = []
    for path in paths:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(f".{extension}"):
                    file = archive.extractfile(member)
                    assert file is not None
                    found.append(file.read())
    return found


# Other loaders


def webdataset_usual(paths: list[Path], size: int) -> Any:
    """A webdataset with Pillow and the usual transforms, batched, as its documentation writes it."""
    return (
        webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(usual(size), _same)
        .batched(BATCH)
    )


def webdataset_fast(paths: list[Path], size: int) -> Any:
    """A webdataset with our decoder."""
    return (
        webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(Fast(size), int)
        .batched(BATCH)
    )


def webdataset_raw(paths: list[Path]) -> Any:
    """A webdataset without any decoding."""
    return webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)


def folder_usual(folder: Path, size: int, count: int) -> "DataLoader[Any]":
    """``count`` images of an ImageFolder with Pillow and the usual transforms in a DataLoader."""
    vision = torchvision()
    data: Any = vision.datasets.ImageFolder(str(folder), usual(size)) if vision else _Folder(folder, usual(size), False)
    return DataLoader(Subset(data, range(0, len(data), len(data) // count)), BATCH, shuffle=True)


def folder_fast(folder: Path, size: int, workers: int) -> "DataLoader[Any]":
    """A whole ImageFolder with our decoder in a DataLoader with so many processes."""
    data = _Folder(folder, Fast(size), True)
    return DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def in_processes(batches: Any, workers: int) -> "DataLoader[Any]":
    """The same batches from worker processes."""
    return DataLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def samples(batches: Any) -> int:
    """Draw every batch and return the number of samples in them."""
    return sum(len(batch[0]) for batch in batches)


def members(stream: Any) -> int:
    """Draw every sample and return their number."""
    return sum(1 for _ in stream)


class _Folder(Dataset[Any]):
    """A folder with one sub-folder per class."""

    def __init__(self, folder: Path, transform: Transform, raw: bool) -> None:
        self.files = list(_walk(folder))
        self.transform = transform
        self.raw = raw

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        data = path.read_bytes()
        return self.transform(data if self.raw else Image.open(io.BytesIO(data)).convert("RGB")), label


def _walk(folder: Path) -> Iterator[tuple[Path, int]]:
    for label, inner in enumerate(sorted(folder.iterdir())):
        for path in sorted(inner.iterdir()):
            yield path, label


def _same(value: Any) -> Any:
    return value
