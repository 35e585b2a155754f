"""What ``prepare`` computes of a sample: latents of its image, or features of its caption."""

import base64
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightningmodules.shared import autoencoder, text_encoders
from lightningmodules.shared.autoencoder import AutoencoderKL
from platform import runs

MEASURE = "measure"  # instead of a scale
NULL = "empty_caption"  # entry of the card: features of the caption "", by member, base64 of the raw numbers
DEFAULT_LENGTH = 128
EMBEDDINGS = "embeddings:"  # before the folder of a language model whose embeddings of tokens are wanted
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SMALLEST = (4, 2)  # width and length of random features


class Pictures:
    """Images to latents: mean and log-variance as the autoencoder gives them, neither scaled nor shifted.

    Args:
        net: the autoencoder.
        name: where it comes from.
        white: stored value of white, 1..255; it becomes 1 in the autoencoder, and 0 becomes -1.
        size: height and width of the images in pixels.
        resize: bring images of another size to it (shorter side, then the centre), instead of refusing them.
        flip: also encode the mirrored images.
        scale: factor by which models multiply the latents, or "measure": 1 / standard deviation of them all.
        shift: what they subtract before.
        device: where the autoencoder runs.

    Raises:
        ValueError: the size does not suit the autoencoder.
    """

    def __init__(
        self,
        net: AutoencoderKL,
        name: str,
        *,
        white: int,
        size: tuple[int, int],
        resize: bool,
        flip: bool,
        scale: float | str,
        shift: float,
        device: torch.device,
    ) -> None:
        self._check_size(net, size, resize)
        self._tools, self._cards = (import_module(f"datamodules.{part}") for part in ("transforms", "latents"))
        self.net, self.name, self.device = net.to(device), name, device
        self.white, self.size, self.resize, self.flip, self.scale, self.shift = white, size, resize, flip, scale, shift
        self.shape = [2 * net.latent_channels, size[0] // net.factor, size[1] // net.factor]
        self._encoder = net.fingerprint()
        self.stamp = self._entry(scale)
        self.settings = {
            "action": "latents",
            "encoder": self._encoder,
            "pixels": list(size),
            "white": white,
            "flip": flip,
            "dtype": "float16",
            "scale": scale,
            "shift": shift,
        }

    def read(self, members: Mapping[str, bytes]) -> tuple[Any, bytes | None]:
        """Pixels, uint8 (h, w, C), and the class as it is stored.

        Raises:
            ValueError: the image cannot be read or has another size, or the class is no number.
        """
        label = members.get("cls")
        if label is not None and not re.fullmatch(rb"\s*-?\d+\s*", label):
            raise ValueError(f"the class is {label[:20]!r}, expected a whole number")
        data = self._tools.picture_of(members)
        if not self.resize and (found := self._tools.shape_of(data)) != self.size:
            height, width = self.size
            raise ValueError(
                f"its image has {found[1]}x{found[0]} pixels (width x height), the first one {width}x{height}; with"
                " --size all are brought to one size"
            )
        pixels = np.empty((*self.size, self.net.in_channels), np.uint8)
        self._tools.decode_into(data, pixels)
        return pixels, label

    def encode(self, items: Sequence[tuple[Any, bytes | None]]) -> tuple[list[dict[str, bytes]], Any]:
        """Members ``lat``, ``lat.flip`` and ``cls``; count, sum, sum of squares and summed variance of the latents.

        Raises:
            ValueError: the autoencoder makes numbers that are not finite in float16.
        """
        images = torch.from_numpy(np.stack([pixels for pixels, _ in items])).to(self.device).permute(0, 3, 1, 2)
        moments = self._moments(images)
        mean, logvar = moments.double().chunk(2, dim=1)
        parts = [torch.tensor(mean.numel(), dtype=torch.float64), mean.sum(), mean.square().sum(), logvar.exp().sum()]
        sums = torch.stack([part.cpu() for part in parts]).numpy()
        stored = {"lat": _raw(moments, torch.float16, "")}
        if self.flip:
            stored["lat.flip"] = _raw(self._moments(images.flip(-1)), torch.float16, "")
        members = [{name: rows[row].tobytes() for name, rows in stored.items()} for row in range(len(items))]
        for row, (_, label) in zip(members, items, strict=True):
            row.update({} if label is None else {"cls": label})
        return members, sums

    def spread(self, sums: Any) -> tuple[float, float]:
        """Mean and standard deviation of draws of all latents."""
        count, total, squares, variance = sums
        mean = total / count
        return float(mean), float(np.sqrt((squares + variance) / count - mean**2))

    def card(self, sums: Any) -> dict[str, Any]:
        """What readers of the latents must know, and how the numbers are spread before scale and shift."""
        mean, std = self.spread(sums)
        scale = float(f"{1 / std:.5g}") if self.scale == MEASURE else self.scale
        return {**self._entry(scale), "spread": {"mean": mean, "std": std}}

    def _entry(self, scale: float | str) -> dict[str, Any]:
        card = self._cards.latent_card(shape=self.shape, encoder=self._encoder, scale=scale, flip=self.flip)
        return {"lat": {**card["lat"], "shift": self.shift}}

    @torch.no_grad()
    def _moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance, (B, 2C, h, w), of images uint8 (B, C, H, W)."""
        x = images.to(torch.float32).contiguous() * (2.0 / self.white) - 1.0
        return torch.cat(self.net.encode(x), dim=1)

    @staticmethod
    def _check_size(net: AutoencoderKL, size: tuple[int, int], resize: bool) -> None:
        factor = net.factor
        if not any(side % factor for side in size):
            return
        lower = max(factor, min(size) // factor * factor)
        came = f"--size {size[0]}" if resize else f"The first image has {size[1]}x{size[0]} pixels (width x height)"
        raise ValueError(
            f"{came}, but this autoencoder makes one latent pixel of {factor}x{factor}, so both sides must be multiples"
            f" of {factor}. Type --size {lower} or --size {lower + factor}."
        )


class Captions:
    """Captions to text features: a row of numbers per token, without the padding.

    Args:
        encoder: see ``text_encoders``.
        name: where it comes from.
        caption: member with the caption, or ``json:NAME``.
        member: member to store, "emb" or "emb.NAME".
        kind: "float16" or "bfloat16".
        device: where the encoder runs.
    """

    def __init__(self, encoder: Any, name: str, *, caption: str, member: str, kind: str, device: torch.device) -> None:
        self.encoder, self.name, self.caption, self.member, self.kind, self.device = (
            encoder, name, caption, member, kind, device,
        )  # fmt: skip
        self._caption_of: Callable[..., str] = import_module("datamodules.image_text").caption_of
        self.settings = {
            "action": "text-features",
            "encoder": encoder.fingerprint,
            "caption": caption,
            "member": member,
            "length": encoder.length,
            "width": encoder.width,
            "dtype": kind,
        }
        make = import_module("datamodules.latents").features_card
        more = {"length": encoder.length, "caption": caption, "name": name}
        self.stamp = {member: {**make(member, encoder.width, encoder.fingerprint, kind)[member], **more}}

    def read(self, members: Mapping[str, bytes]) -> str:
        """The caption.

        Raises:
            ValueError: there is none, or it is no text.
        """
        return self._caption_of(members, self.caption)

    def encode(self, items: Sequence[str]) -> tuple[list[dict[str, bytes]], Any]:
        """The features of some captions; count of captions and of rows.

        Raises:
            ValueError: there are numbers that are not finite in the type they are to be stored in.
        """
        features, mask = self.encoder.encode(items, self.device)
        other = "" if self.kind == "bfloat16" else ". Larger numbers fit into --dtype bfloat16 (and a new folder)"
        rows = _raw(features, TYPES[self.kind], other)
        real = mask.cpu().numpy()
        members = [{self.member: row[kept].tobytes()} for row, kept in zip(rows, real, strict=True)]
        return members, np.array([len(items), real.sum()], dtype=np.float64)

    def card(self, sums: Any) -> dict[str, Any]:
        """What readers of the features must know, with the features of the empty caption, which stands for none."""
        null = base64.b64encode(self.encode([""])[0][0][self.member]).decode()
        return {**self.stamp, NULL: {self.member: null}, "rows": {"mean": float(sums[1] / sums[0])}}


def open_autoencoder(path: str, weights: str | None, white: int | None) -> tuple[AutoencoderKL, int, float | str]:
    """An autoencoder from a folder in diffusers' format, or from a run or weights folder of this project.

    Args:
        path: the folder.
        weights: which weights of a run; None for its averages.
        white: stored value of white; None for what the run was trained on, and 255 without a run.

    Returns:
        The network, the stored value of white, and the scale of the latents: for a run it has yet to be measured.

    Raises:
        ValueError: there is none, or the options do not fit it.
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == runs.WEIGHTS else folder
    if (folder / runs.CONFIG).is_file():
        module, _ = runs.load_module(folder, weights or "ema")
        net = next((part for part in module.modules() if isinstance(part, AutoencoderKL)), None)
        if net is None:
            raise ValueError(
                f"--encoder {path} is a run of {type(module).__name__}, which is no autoencoder. Type a run of one"
                " (python -m platform fit vae_digits), or a folder in diffusers' format."
            )
        trained = int(getattr(module.codec, "white", 255))
        if white not in (None, trained):
            raise ValueError(f"--white {white}: the run {path} was trained with white at {trained}. Leave it out.")
        return net.float().eval().requires_grad_(False), trained, MEASURE
    if weights is not None:
        raise ValueError(f"--weights {weights} belongs to a run, but --encoder {path} is none. Leave it out.")
    if not (folder / autoencoder.CONFIG).is_file() and (folder / "vae" / autoencoder.CONFIG).is_file():
        raise ValueError(f"--encoder {path} is a whole pipeline. Type its autoencoder: --encoder {folder / 'vae'}")
    net = autoencoder.load(folder)
    return net, white or 255, net.scaling_factor


def open_text_encoder(text: str, length: int | None) -> text_encoders.TextEncoder:
    """A text encoder from a folder, its embeddings alone for ``embeddings:FOLDER``, or ``random:WIDTHxLENGTH``.

    Raises:
        ValueError: there is none, or the length does not suit it.
    """
    if not text.startswith("random"):
        states = "embeddings" if text.startswith(EMBEDDINGS) else "last"
        text = text.removeprefix(EMBEDDINGS)
        limit = _longest(Path(text).expanduser() / "config.json")
        if length is not None and limit is not None and length > limit:
            raise ValueError(f"--length {length}: {text} reads {limit} tokens at most. Type --length {limit}.")
        return text_encoders.Pretrained(text, length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH), states=states)
    match = re.fullmatch(r"random:(\d{1,5})x(\d{1,5})", text)
    if match is None or int(match[1]) < _SMALLEST[0] or int(match[2]) < _SMALLEST[1]:
        raise ValueError(
            f"--encoder {text}: expected random:WIDTHxLENGTH, numbers per token (>= {_SMALLEST[0]}) and tokens per"
            f" caption (>= {_SMALLEST[1]}). Type for example --encoder random:64x32."
        )
    if length not in (None, int(match[2])):
        raise ValueError(f"--length {length} and --encoder {text} name two lengths. Leave --length out.")
    return text_encoders.RandomBytes(int(match[1]), int(match[2]))


def device_of(text: str) -> torch.device:
    """The device to compute on; "auto" takes the graphics processor that belongs to this process, if there is one.

    Raises:
        ValueError: there is no such device.
    """
    here = int(os.environ.get("LOCAL_RANK") or 0)
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"--device {text}: expected cpu, cuda, cuda:NUMBER or mps. Leave it out to have it chosen.")
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[match[1]]
    number = int(match[2]) if match[2] else here % max(1, found)
    if number >= found:
        raise ValueError(f"--device {text}: this machine has {found} of that kind. Leave it out to have it chosen.")
    return torch.device(match[1], number) if match[1] == "cuda" else torch.device(match[1])


def _longest(config: Path) -> int | None:
    """Tokens that an encoder reads at most, by its config.json; None where there is no limit, or no such file."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        limit = found.get("text_config", found).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None  # the encoder tells what is wrong with its folder
    return limit if isinstance(limit, int) else None


def _raw(values: Tensor, kind: torch.dtype, advice: str) -> Any:
    """Numbers in the type they are stored in, as an array of 2-byte integers of the same shape.

    Raises:
        ValueError: some are not finite.
    """
    stored = values.to(kind)
    if not stored.isfinite().all():
        largest = float(values.abs().max())
        told = str(kind).removeprefix("torch.")
        raise ValueError(f"the encoder makes numbers up to {largest:g}, which are not finite in {told}{advice}")
    return stored.view(torch.int16).cpu().contiguous().numpy()
