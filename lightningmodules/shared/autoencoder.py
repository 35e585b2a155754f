"""A convolutional autoencoder with a Gaussian latent, as latent generative models use: pictures to latents and back.

Parameter names are those of AutoencoderKL in Hugging Face diffusers, so its weights load without renaming.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightningmodules.shared.statedict import match

CONFIG = "config.json"
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "weights.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
)
PICKLED = (".bin", ".pth", ".pt")  # read as tensors and nothing else
TILE = 64  # latent pixels a side that are decoded at once, where tiling is on
OVERLAP = 16  # latent pixels over which neighbouring tiles are blended
TILED_FROM = 128  # latent pixels a side from which decoding is tiled: 1,024 pixels at a factor of 8
LOGVAR = (-30.0, 20.0)  # log-variances are kept within
# scale and shift of the latents by which families of models normalise them: (x - shift) * scale
FAMILIES: dict[str, tuple[float, float]] = {
    "sd": (0.18215, 0.0),
    "sdxl": (0.13025, 0.0),
    "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159),
}
SETTINGS = (  # of config.json that shape the network
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
    "scaling_factor",
    "shift_factor",
)
PARTS = {  # of apple/ml-starflow's decoder for noisy latents, to ours
    "encoder.0.": "encoder.",
    "encoder.1.": "quant_conv.",
    "decoder.0.": "post_quant_conv.",
    "decoder.1.": "decoder.",
}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ResnetBlock(nn.Module):
    """Two convolutions, each after a group normalisation and SiLU, beside a shortcut."""

    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inner, eps=1e-6)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outer, eps=1e-6)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, h, w) to (B, outer, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nn.Module):
    """One attention head over all positions, beside a shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h w, channels)
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).squeeze(1).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return cast(Tensor, self.resnets[1](x))


class Resample(nn.Module):
    """Halve by a strided convolution, or double by repetition and a convolution."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to half or twice the size."""
        if self.down:
            return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))  # a border on the right and below only
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """Residual blocks of one resolution, and the way to the next."""

    def __init__(self, inner: int, outer: int, blocks: int, groups: int, *, down: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(inner if index == 0 else outer, outer, groups) for index in range(blocks)
        )
        if down is not None:
            setattr(self, "downsamplers" if down else "upsamplers", nn.ModuleList([Resample(outer, down=down)]))
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, h, w) to (B, outer, h', w')."""
        for block in self.resnets:
            x = block(x)
        if self.down is None:
            return x
        return cast(Tensor, getattr(self, "downsamplers" if self.down else "upsamplers")[0](x))


class Encoder(nn.Module):
    """Pictures to means and log-variances."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], blocks: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(0, k - 1)], width, blocks, groups, down=True if k < last else None)
            for k, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / f, W / f)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x)))))


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], blocks: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        back = list(reversed(widths))
        last = len(back) - 1
        self.conv_in = nn.Conv2d(in_channels, back[0], 3, padding=1)
        self.mid_block = MidBlock(back[0], groups, attention)
        self.up_blocks = nn.ModuleList(
            Level(back[max(0, k - 1)], width, blocks + 1, groups, down=False if k < last else None)
            for k, width in enumerate(back)
        )
        self.conv_norm_out = nn.GroupNorm(groups, back[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(back[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, out_channels, f h, f w)."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(x))))


class AutoencoderKL(nn.Module):
    """Encoder to a diagonal Gaussian over latents, and decoder.

    Args:
        in_channels: of pictures; they span [-1, 1].
        out_channels: of reconstructions.
        latent_channels: of latents.
        block_out_channels: width of every resolution, the finest first; one fewer halvings than widths.
        layers_per_block: residual blocks per resolution; the decoder has one more.
        norm_num_groups: groups of the normalisations; must divide every width.
        use_quant_conv: a 1x1 convolution after the encoder.
        use_post_quant_conv: a 1x1 convolution before the decoder.
        mid_block_add_attention: attention at the coarsest resolution.
        scaling_factor: what a family of models multiplies latents by, kept with the weights; not applied here.
        shift_factor: what it subtracts before.

    Source: arXiv 2112.10752 (latent diffusion); names of diffusers. The defaults are Stable Diffusion's.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        scaling_factor: float = 0.18215,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        wrong = [width for width in widths if width < 1 or norm_num_groups < 1 or width % norm_num_groups]
        if not widths or wrong:
            raise ValueError(
                f"norm_num_groups={norm_num_groups} does not divide the widths {widths} (block_out_channels)."
                " Set it to a common divisor, e.g. 8."
            )
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self.factor = 2 ** (len(widths) - 1)
        shape = (widths, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shape)
        self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        given = locals()
        self.config: dict[str, Any] = {name: given[name] for name in SETTINGS} | {"block_out_channels": widths}

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution of the latents of pictures.

        Args:
            x: (B, in_channels, H, W) in [-1, 1], H and W multiples of ``factor``.

        Returns:
            Mean and log-variance, (B, latent_channels, H / factor, W / factor) each.

        Raises:
            ValueError: the size is no multiple of ``factor``.
        """
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(
                f"Pictures of {x.shape[-2]}x{x.shape[-1]} cannot be encoded: the sides must be multiples of"
                f" {self.factor}. Crop or resize them (data.size)."
            )
        moments = self.encoder(x)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def decode(self, z: Tensor, *, tiled: bool | None = None) -> Tensor:
        """Pictures of latents.

        Args:
            z: (B, latent_channels, h, w), neither scaled nor shifted.
            tiled: decode tile by tile, which bounds memory; None does so from ``TILED_FROM`` latent pixels a side.

        Returns:
            (B, out_channels, factor h, factor w), about [-1, 1], not clipped.
        """
        if tiled is None:
            tiled = max(z.shape[-2:]) >= TILED_FROM
        return self._decode_tiled(z) if tiled else self._decode(z)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from a draw of the latent; with mean and log-variance."""
        mean, logvar = self.encode(x)
        return self.decode(mean + torch.exp(0.5 * logvar) * noise), mean, logvar

    def _decode(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z)))

    def _decode_tiled(self, z: Tensor) -> Tensor:
        """Overlapping tiles, blended linearly where they meet."""
        height, width = z.shape[-2:]
        total = norm = torch.zeros(())
        for top in _starts(height):
            for left in _starts(width):
                tile = z[..., top : top + TILE, left : left + TILE]
                part = self._decode(tile)
                weight = torch.outer(
                    _ramp(tile.shape[-2], top > 0, top + TILE < height, self.factor, z.device),
                    _ramp(tile.shape[-1], left > 0, left + TILE < width, self.factor, z.device),
                )
                if not total.ndim:
                    total = part.new_zeros(*part.shape[:2], height * self.factor, width * self.factor)
                    norm = torch.zeros(height * self.factor, width * self.factor, device=z.device)
                rows = slice(top * self.factor, (top + tile.shape[-2]) * self.factor)
                columns = slice(left * self.factor, (left + tile.shape[-1]) * self.factor)
                total[..., rows, columns] += part * weight.to(part.dtype)
                norm[rows, columns] += weight
        return total / norm.to(total.dtype)

    def fingerprint(self, parts: tuple[str, ...] = ("encoder.", "quant_conv.")) -> str:
        """Sixteen hexadecimal digits that change with any weight of the encoder: they tell whose latents these are.

        Args:
            parts: how the names of the weights begin that count.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            if key.startswith(parts):
                digest.update(key.encode())
                digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _starts(length: int) -> list[int]:
    """Where tiles begin, so that they overlap and the last one ends at the border."""
    if length <= TILE:
        return [0]
    return [*range(0, length - TILE, TILE - OVERLAP), length - TILE]


def _ramp(length: int, left: bool, right: bool, factor: int, device: torch.device) -> Tensor:
    """Weights of a tile's rows: rising over the overlap where it has a neighbour, always > 0."""
    ramp = torch.ones(length * factor, device=device)
    over = OVERLAP * factor
    rise = (torch.arange(over, device=device) + 1.0) / (over + 1.0)
    if left:
        ramp[:over] = rise
    if right:
        ramp[-over:] = torch.minimum(ramp[-over:], rise.flip(0))
    return ramp


def translate(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring older names of diffusers, and convolutions that stand for linear layers, up to date.

    Args:
        official: state dict of an AutoencoderKL; keys may carry the prefix ``net.`` of this project's weights, or be
            those of apple/ml-starflow's decoder for noisy latents.

    Returns:
        State dict of ``AutoencoderKL``.
    """
    state = {}
    for key, value in official.items():
        key = key.removeprefix("net.")
        key = PARTS[key[:10]] + key[10:] if key[:10] in PARTS else key
        found = re.fullmatch(r"(.*attentions\.0\.)(query|key|value|proj_attn)(\.\w+)", key)
        if found:
            key = f"{found[1]}{OLD_NAMES[found[2]]}{found[3]}"
        if ".attentions.0.to_" in key and value.dim() == 4:
            value = value.flatten(1)
        state[key] = value
    return state


def load(folder: str | Path, make: Callable[[], AutoencoderKL] | None = None) -> AutoencoderKL:
    """Read an autoencoder from this machine; nothing is downloaded.

    Args:
        folder: holds ``config.json`` and a safetensors file, as diffusers saves them, or ``weights.safetensors`` of
            this project; or the path of such a file, or of a bare state dict (.bin, .pth).
        make: builds the network; None reads its shape from ``config.json``.

    Returns:
        In evaluation mode, without gradients, on the CPU in float32.

    Raises:
        ValueError: something is missing, damaged, or does not fit.
    """
    place = Path(folder).expanduser()
    file = place if place.is_file() else next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    if file is None:
        raise ValueError(
            f"{place} holds no autoencoder: expected one of {', '.join(WEIGHTS)} in it, with {CONFIG} beside it. Copy"
            " the folder 'vae' of a model in diffusers' format there, or train one: python -m platform fit vae_digits"
        )
    net = make() if make is not None else AutoencoderKL(**_read_config(file.parent / CONFIG))
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True) if file.suffix in PICKLED else load_file(file)
        state = translate(tensors)
    except pickle.UnpicklingError:
        raise ValueError(f"{file} holds something else than tensors, or is damaged; nothing was executed.") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError) as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file} cannot be read ({str(error).splitlines()[0]}; {size:,} bytes). Is the copy complete?"
        ) from error
    try:
        match(state, net.state_dict())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    net.load_state_dict(state)
    return net.float().eval().requires_grad_(False)


def save(net: AutoencoderKL, folder: str | Path) -> None:
    """Write ``config.json`` and weights as diffusers does."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    (place / CONFIG).write_text(json.dumps({"_class_name": "AutoencoderKL", **net.config}, indent=2) + "\n")
    save_file({key: value.contiguous().cpu() for key, value in net.state_dict().items()}, place / WEIGHTS[0])


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing, so the autoencoder's shape is not known. Copy it beside the weights.")
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    return {key: given[key] for key in SETTINGS if given.get(key) is not None}
