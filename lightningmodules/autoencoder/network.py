"""Networks beside the autoencoder: a critic of patches, and fixed networks that compare pictures by their features."""

from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # widths; 0 halves the picture
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS: of pictures that span [-1, 1]


class PatchCritic(nn.Module):
    """Judges patches of a picture, without an activation at the end.

    Args:
        channels: of the picture.
        width: of the first convolution; doubled at every halving, up to eight times.
        levels: halvings.

    Source: arXiv 1611.07004 (PatchGAN).
    Differs: group instead of batch normalisation, so that a picture is judged alone.
    """

    def __init__(self, channels: int = 3, width: int = 64, levels: int = 3) -> None:
        super().__init__()
        if width % 8 or levels < 1:
            raise ValueError(f"module.critic.width={width} must be a multiple of 8 and levels={levels} >= 1.")
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        inner = width
        for level in range(1, levels + 1):
            outer = width * min(2**level, 8)
            stride = 2 if level < levels else 1
            layers += [nn.Conv2d(inner, outer, 4, stride, 1, bias=False), nn.GroupNorm(8, outer), nn.LeakyReLU(0.2)]
            inner = outer
        self.main = nn.Sequential(*layers, nn.Conv2d(inner, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) in [-1, 1] to (B, 1, h, w) answers."""
        return cast(Tensor, self.main(x))


class RandomFeatures(nn.Module):
    """Compares pictures by the features of a small convolutional network with fixed random weights.

    No substitute for LPIPS: it knows nothing of what people see, but needs no files and rewards sharp edges, which a
    mean square alone does not.

    Args:
        channels: of the pictures.
        width: of the first layer.
        seed: of the weights.
    """

    def __init__(self, channels: int = 3, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [channels, width, 2 * width, 4 * width]
            self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in pairwise(widths))
            for layer in self.layers:
                nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean square distance of normalised features of all layers, a scalar."""
        total = x.new_zeros(())
        for layer in self.layers:
            x, y = F.relu(layer(x)), F.relu(layer(y))
            total = total + _distance(x, y).mean()
            x, y = F.avg_pool2d(x, 2, ceil_mode=True), F.avg_pool2d(y, 2, ceil_mode=True)
        return total / len(self.layers)


class Lpips(nn.Module):
    """Learned perceptual distance over VGG-16, from files on this machine.

    Args:
        features: safetensors file of a VGG-16, keys ``features.<i>.weight`` and ``.bias`` as in torchvision.
        heads: safetensors file of LPIPS' linear layers, keys ``lin<k>.model.1.weight``.

    Raises:
        ValueError: a file is missing or holds other keys.

    Source: arXiv 1801.03924.
    """

    def __init__(self, features: str, heads: str) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        inner = 3
        for width in VGG:
            parts += [nn.MaxPool2d(2)] if not width else [nn.Conv2d(inner, width, 3, padding=1), nn.ReLU()]
            inner = width or inner
        self.features = nn.Sequential(*parts)
        self._fill(self.features, features, "features.")
        stages = [4, 9, 16, 23, 30]  # after relu1_2, 2_2, 3_3, 4_3, 5_3
        self.stages = list(zip([0, *stages], stages, strict=False))
        given = _read(heads)
        try:
            self.heads = [given[f"lin{k}.model.1.weight"] for k in range(len(self.stages))]
        except KeyError as error:
            raise ValueError(f"{heads} holds no {error}; expected the linear layers of LPIPS.") from None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of pictures (B, 3, H, W) in [-1, 1], averaged, a scalar."""
        mean, spread = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, SPREAD))
        x, y = (x - mean) / spread, (y - mean) / spread
        total = x.new_zeros(())
        for (begin, end), head in zip(self.stages, self.heads, strict=True):
            x, y = self.features[begin:end](x), self.features[begin:end](y)
            total = total + F.conv2d(_distance(x, y, summed=False), head.to(x)).mean()
        return total

    @staticmethod
    def _fill(net: nn.Module, file: str, prefix: str) -> None:
        given = {key.removeprefix(prefix): value for key, value in _read(file).items() if key.startswith(prefix)}
        try:
            net.load_state_dict(given)
        except RuntimeError as error:
            raise ValueError(f"{file} is no VGG-16 of torchvision: {str(error).splitlines()[-1].strip()}") from None


def _read(file: str) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise ValueError(
            f"{file}: no such file. LPIPS needs its networks as safetensors on this machine; without them use"
            " lightningmodules.autoencoder.network.RandomFeatures, or module.perceptual=null."
        )
    return load_file(file)


def _distance(x: Tensor, y: Tensor, *, summed: bool = True) -> Tensor:
    """Squared difference of features normalised over channels; summed over channels, (B, 1, h, w), or not."""
    a, b = (part / (part.square().sum(dim=1, keepdim=True) + 1e-10).sqrt() for part in (x, y))
    square = (a - b).square()
    return square.sum(dim=1, keepdim=True) if summed else square
