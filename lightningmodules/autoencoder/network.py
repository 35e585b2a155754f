"""Networks beside the autoencoder: a critic of patches, and fixed networks that compare pictures by their features."""

import json
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightningmodules.shared import pretrained

VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # widths; 0 halves the picture
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of photographs that span [-1, 1], as LPIPS has them
SIDE = 224  # pixels a side that networks of ImageNet were trained on


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
        features: file (.safetensors, .pth) of a VGG-16, keys ``features.<i>.weight`` and ``.bias`` as in torchvision.
        heads: file of LPIPS' linear layers, keys ``lin<k>.model.1.weight``, as the package lpips has them.

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
        """Distance of pictures (B, 1 or 3, H, W) in [-1, 1], averaged, a scalar."""
        x, y = _standardised(x), _standardised(y)
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


class ConvNext(nn.Module):
    """Mean square distance of what a ConvNeXt says about two pictures, from a folder on this machine.

    Compared are the answers of its classifier, or its pooled features where the folder holds no classifier.

    Args:
        folder: as ``save_pretrained`` of transformers leaves it, config.json and the weights.

    Raises:
        ValueError: there is no ConvNeXt in it.

    Source: arXiv 2201.03545; apple/ml-starflow, PerceptualLoss (answers of ConvNeXt-S about pictures of 224 pixels).
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        import transformers

        place = Path(folder).expanduser()
        try:
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            classifies = str(config["architectures"][0]).endswith("ForImageClassification")
            if config["model_type"] not in ("convnext", "convnextv2"):
                raise ValueError(f"config.json says model_type={config['model_type']!r}")
            kind = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
            self.net = pretrained.load(kind, place)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{folder} holds no ConvNeXt ({str(error).splitlines()[0] if str(error) else type(error).__name__})."
                " Expected config.json and model.safetensors as transformers saves them, e.g. of"
                " facebook/convnext-small-224. Without them leave lightningmodules.autoencoder.network.ConvNext out."
            ) from None
        self.answers = "logits" if classifies else "pooler_output"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of pictures (B, 1 or 3, H, W) in [-1, 1], averaged, a scalar."""
        x, y = (
            getattr(self.net(_standardised(F.interpolate(part, SIDE, mode="bilinear", antialias=True))), self.answers)
            for part in (x, y)
        )
        return F.mse_loss(x, y)


class Together(nn.Module):
    """Several comparisons of pictures, added up.

    Args:
        judges: build them.
        weights: of each, >= 0.
    """

    def __init__(self, judges: Sequence[Callable[[], nn.Module]], weights: Sequence[float]) -> None:
        super().__init__()
        if len(judges) != len(weights) or not judges or min(weights) < 0:
            raise ValueError(
                f"module.perceptual.judges holds {len(judges)}, module.perceptual.weights={list(weights)}: expected one"
                " weight >= 0 for each, e.g. [1.0, 0.1]."
            )
        self.judges, self.weights = nn.ModuleList(make() for make in judges), list(weights)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Weighted sum of the distances, a scalar."""
        distances = [weight * judge(x, y) for judge, weight in zip(self.judges, self.weights, strict=True)]
        return torch.stack(distances).sum()


def _standardised(x: Tensor) -> Tensor:
    """Pictures as networks of ImageNet expect them, (B, 3, H, W)."""
    mean, spread = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, SPREAD))
    return (x - mean) / spread


def _read(file: str) -> dict[str, Tensor]:
    place = Path(file).expanduser()
    if not place.is_file():
        raise ValueError(
            f"{file}: no such file. LPIPS needs its networks on this machine; without them use"
            " lightningmodules.autoencoder.network.RandomFeatures, or module.perceptual=null."
        )
    try:
        if place.suffix == ".safetensors":
            return load_file(place)
        return dict(torch.load(place, map_location="cpu", weights_only=True))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as named tensors ({type(error).__name__}). Copy it again.") from None


def _distance(x: Tensor, y: Tensor, *, summed: bool = True) -> Tensor:
    """Squared difference of features normalised over channels; summed over channels, (B, 1, h, w), or not."""
    a, b = (part / (part.square().sum(dim=1, keepdim=True) + 1e-10).sqrt() for part in (x, y))
    square = (a - b).square()
    return square.sum(dim=1, keepdim=True) if summed else square
