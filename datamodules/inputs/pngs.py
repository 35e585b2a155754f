"""Pixels of a numerical archive as a PNG file."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """PNG file of uint8 pixels, (H, W) grey or (H, W, 3) RGB, 0..255."""
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()
