"""``sample --image --mask``: fill in a part of a picture, once per seed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightningmodules.shared.codecs import PixelTokens
from lightningmodules.shared.conditioning import Condition


@dataclass(frozen=True)
class Gap:
    """A picture and what is missing of it.

    Attributes:
        image: uint8 (C, H, W), values as in the training data.
        missing: bool (1, H, W), True where to fill in.
        digest: eight digits that stand for both.
    """

    image: Tensor
    missing: Tensor
    digest: str

    def fill(self, module: Any, seeds: Sequence[int], condition: Any, settings: Mapping[str, Any]) -> Tensor:
        """One picture per seed, uint8 (n, C, H, W); what is known stays as it is."""
        rows, device = len(seeds), module.device
        image = self.image.to(device).expand(rows, -1, -1, -1)
        missing = self.missing.to(device).expand(rows, -1, -1, -1)
        if not hasattr(module, "inpaint"):  # pixels are tokens, and any of them can be given
            tokens = module.codec.encode({"image": image})
            given = tokens.masked_fill(missing.expand_as(image).flatten(1), -1)
            drawn = module.generate(seeds, replace(condition or Condition(), prompt=given), **settings)
            return torch.where(missing, drawn, image)
        x, accepted = module.inpaint({"image": image}, missing, seeds, condition, **settings)
        print(f"seeds {seeds[0]}-{seeds[-1]}: {float(accepted.mean()):.0%} of the proposals after the first accepted")
        return torch.where(missing, module.codec.decode(x), image)


def read(image: str, mask: str, module: Any) -> Gap:
    """The picture and its mask.

    Args:
        image: file of a picture of the size that the model draws, e.g. one that ``sample`` wrote.
        mask: file of a picture of the same size; bright where to fill in, dark where to keep.
        module: the room, which needs ``inpaint``, or pixels as tokens.

    Raises:
        ValueError: the model cannot fill in, or a file is not what is wanted.
    """
    if not hasattr(module, "inpaint") and not isinstance(module.codec, PixelTokens):
        raise ValueError(
            f"--image: {type(module).__name__} fills in no pictures here (STARFlow does, and CADD where pixels are"
            " tokens). Leave it out."
        )
    pixels = getattr(module.codec, "pixels", module.codec)
    kind = "L" if pixels.channels == 1 else "RGB"
    picture, shown = _open(image, kind, "--image"), _open(mask, "L", "--mask")
    size = (pixels.size, pixels.size)
    for name, file, found in (("--image", image, picture), ("--mask", mask, shown)):
        if found.shape[:2] != size:
            raise ValueError(
                f"{name} {file} has {found.shape[1]}x{found.shape[0]} pixels, the model draws {size[1]}x{size[0]}."
                " Crop or resize it."
            )
    if picture.max() > pixels.white:
        raise ValueError(
            f"--image {image} holds values up to {picture.max()}; white is {pixels.white} in this model's pictures."
            " Give one as sample writes them."
        )
    missing = torch.from_numpy(shown >= 128)[None]
    if not missing.any():
        raise ValueError(f"--mask {mask} is dark everywhere, so nothing is to be filled in. Paint that part white.")
    digest = hashlib.sha256(picture.tobytes() + missing.numpy().tobytes()).hexdigest()[:8]
    return Gap(torch.from_numpy(picture).reshape(*size, -1).permute(2, 0, 1).clone(), missing, digest)


def _open(file: str, kind: str, option: str) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    try:
        with Image.open(Path(file).expanduser()) as picture:
            return np.array(picture.convert(kind), dtype=np.uint8)
    except FileNotFoundError:
        raise ValueError(f"{option} {file}: no such file.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{option} {file} cannot be read as a picture ({error}).") from None
