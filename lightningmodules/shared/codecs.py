"""Between data space (uint8 pictures, text) and model space (the tensor a network sees). Never trained, never saved."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightningmodules.shared.autoencoder import FAMILIES, LOGVAR, AutoencoderKL, load

Batch = Mapping[str, Any]


class Codec(Protocol):
    """Model space <-> data space."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example in model space."""
        ...

    def encode(self, batch: Batch) -> Tensor:
        """A batch in model space, (B, *shape)."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Model space back to data space."""
        ...


class Pixels:
    """Pixels as they are: uint8 in a file, [-1, 1] in the model.

    A picture has ``levels`` grey values per channel, stored as ``value * white / (levels - 1)``. Photographs have 256
    levels up to 255; the 8x8 digits have 17 levels stored in steps of 15 up to 240.

    Args:
        size: height and width in pixels.
        channels: 1 or 3.
        levels: number of distinct values, >= 2.
        white: stored value of the highest level, 1..255, a multiple of ``levels - 1``.

    Raises:
        ValueError: ``white`` is not a multiple of ``levels - 1``.
    """

    def __init__(self, size: int, channels: int = 3, levels: int = 256, white: int = 255) -> None:
        if not 2 <= levels <= white + 1 <= 256 or white % (levels - 1):
            raise ValueError(
                f"codec.levels={levels} and codec.white={white} do not fit: the stored white (1..255) must be a"
                f" multiple of levels - 1. Photographs: levels=256 white=255. Digits: levels=17 white=240."
            )
        self.size, self.channels, self.levels, self.white = size, channels, levels, white

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, size)."""
        return (self.channels, self.size, self.size)

    def _pixels(self, batch: Batch) -> Tensor:
        pixels = batch["image"]
        if tuple(pixels.shape[1:]) != self.shape:
            raise ValueError(
                f"The batch holds pictures of shape {tuple(pixels.shape[1:])}, module.codec expects {self.shape}."
                f" Set data.size / data.channels, or module.codec.size / module.codec.channels, so that they agree."
            )
        return pixels.to(torch.float32)

    def encode(self, batch: Batch) -> Tensor:
        """Pictures in model space.

        Args:
            batch: ``batch["image"]`` is (B, channels, size, size) uint8, 0..white.

        Returns:
            (B, channels, size, size) float32, 0 -> -1 and white -> 1.
        """
        return self._pixels(batch) * (2.0 / self.white) - 1.0

    def decode(self, x: Tensor) -> Tensor:
        """Nearest level of every pixel.

        Args:
            x: (B, channels, size, size) float, clipped to [-1, 1].

        Returns:
            (B, channels, size, size) uint8, 0..white in steps of ``white / (levels - 1)``.
        """
        level = ((x.float() + 1.0) * (0.5 * (self.levels - 1))).round().clamp(0, self.levels - 1)
        return (level * (self.white // (self.levels - 1))).to(torch.uint8)

    def dequantize(self, batch: Batch, uniform: Tensor) -> Tensor:
        """Spread every level over its bin, so that a density on the result bounds the probability of the picture.

        Args:
            batch: as in :meth:`encode`.
            uniform: (B, channels, size, size) draws in [0, 1).

        Returns:
            (B, channels, size, size) float32 in [-1, 1): ``2 * (level + uniform) / levels - 1``; one bin is 2 / levels.

        Source: arXiv 2412.06329 (TarFlow) likelihood experiments; uniform dequantisation of arXiv 1511.01844.
        """
        level = self._pixels(batch) * ((self.levels - 1) / self.white)
        return (level.round() + uniform) * (2.0 / self.levels) - 1.0


class Tokenizer(Protocol):
    """What a codec of text needs of a tokenizer."""

    @property
    def size(self) -> int:
        """Number of tokens."""
        ...

    def decode(self, tokens: Any) -> str:
        """Text of tokens."""
        ...


HOLE = "\u2591"  # stands for a token that is not drawn yet


class Tokens:
    """Rows of tokens as they are; the mask of a diffusion model is one more token unless the vocabulary has one.

    Args:
        tokenizer: turns tokens into text; its ``size`` is the vocabulary.
        length: tokens per row, >= 1.
        vocabulary: that size, so that it is known without reading the tokenizer; null takes it from there.
        mask: number of the vocabulary's own mask token; null for none.

    Raises:
        ValueError: the length is no length, or the mask is no token.
    """

    def __init__(
        self, tokenizer: Tokenizer, length: int, *, vocabulary: int | None = None, mask: int | None = None
    ) -> None:
        if length < 1:
            raise ValueError(f"codec.length={length}: expected at least one token per row. Set data.length, e.g. 128.")
        self.tokenizer, self.length = tokenizer, length
        self.vocabulary: int = tokenizer.size if vocabulary is None else vocabulary
        self.mask_id: int = self.vocabulary if mask is None else mask
        if not 0 <= self.mask_id <= self.vocabulary:
            raise ValueError(
                f"module.codec.mask={mask}: expected a token of the vocabulary, 0 to {self.vocabulary - 1}, or null for"
                " one more."
            )
        self._checked = vocabulary is None

    def check(self) -> None:
        """Insist that the tokenizer has the stated size, once.

        Raises:
            ValueError: it has another.
        """
        if not self._checked and self.tokenizer.size != self.vocabulary:
            raise ValueError(
                f"module.codec.vocabulary={self.vocabulary}, but data.tokenizer has {self.tokenizer.size} tokens. Set"
                " the one or the other; weights fit only the tokenizer they were trained with."
            )
        self._checked = True

    @property
    def shape(self) -> tuple[int]:
        """(length,)."""
        return (self.length,)

    def encode(self, batch: Batch) -> Tensor:
        """Tokens, (B, length) int64.

        Args:
            batch: ``batch["tokens"]`` is (B, length) of any integer dtype, each below the tokenizer's size.

        Raises:
            ValueError: the rows have another length, or hold a token the tokenizer does not have (checked on the CPU).
        """
        self.check()
        tokens: Tensor = batch["tokens"]
        if tuple(tokens.shape[1:]) != self.shape:
            raise ValueError(
                f"The batch holds rows of {tuple(tokens.shape[1:])} tokens, module.codec expects {self.shape}."
                " Set data.length and module.codec.length so that they agree."
            )
        if tokens.device.type == "cpu" and tokens.numel():  # elsewhere reading values would make the device wait
            check_tokens(tokens, self.vocabulary)
        return tokens.to(torch.int64)

    def decode(self, x: Tensor) -> Any:
        """Text of rows (B, length), list of B strings; tokens beyond the vocabulary are shown as one light block."""
        self.check()
        return [self._text(row) for row in x.tolist()]

    def _text(self, row: list[int]) -> str:
        text, run = "", list[int]()
        for token in [*row, self.mask_id]:
            if token < self.vocabulary and token != self.mask_id:
                run.append(token)
                continue
            text += self.tokenizer.decode(run) if run else ""
            text += HOLE
            run = []
        return text[: -len(HOLE)]


class PixelTokens:
    """Pictures as sequences of grey levels: one token per pixel and channel, channel by channel, row by row.

    Args:
        size: height and width in pixels.
        channels: 1 or 3.
        levels: number of tokens, >= 2; 256 for photographs, 17 for the 8x8 digits.
        white: stored value of the highest level, a multiple of ``levels - 1``.
    """

    def __init__(self, size: int, channels: int = 3, levels: int = 256, white: int = 255) -> None:
        self._pixels = Pixels(size, channels, levels, white)
        self.size, self.channels, self.levels, self.white = size, channels, levels, white
        self.vocabulary = self.mask_id = levels

    @property
    def shape(self) -> tuple[int]:
        """(channels size size,)."""
        return (self.channels * self.size * self.size,)

    def encode(self, batch: Batch) -> Tensor:
        """Levels of pictures: ``batch["image"]`` (B, channels, size, size) uint8 to (B, channels size size) int64."""
        x = self._pixels.encode(batch)
        return ((x + 1.0) * (0.5 * (self.levels - 1))).round().long().flatten(1)

    def decode(self, x: Tensor) -> Tensor:
        """Pictures of tokens, uint8 (B, channels, size, size); a token that is not drawn yet is shown grey."""
        level = torch.where(x < self.levels, x, (self.levels - 1) // 2).clamp(min=0)
        images = (level * (self.white // (self.levels - 1))).to(torch.uint8)
        return images.view(len(x), self.channels, self.size, self.size)


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Insist that all tokens lie in 0 .. vocabulary - 1.

    Raises:
        ValueError: one does not.
    """
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"The batch holds the token {low if low < 0 else high}; the tokenizer has {vocabulary} (0 to"
            f" {vocabulary - 1}). Set data.tokenizer to the one the tokens were made with."
        )


class Latents:
    """Latents of an autoencoder, normalised: (x - shift) * scale; pictures are what it decodes them to.

    The autoencoder is loaded when it is first needed, so training on stored latents does without it until pictures
    are to be drawn. It is never trained, averaged or saved.

    Args:
        size: height and width of a latent.
        channels: channels of a latent.
        scale: factor that brings latents near unit variance, > 0; None takes the family's.
        shift: subtracted before; None takes the family's.
        autoencoder: builds the network; None reads its shape from ``config.json`` beside the weights.
        weights: folder or file on this machine, see ``autoencoder.load``; None leaves it as ``autoencoder`` built it,
            from seed 0, which is of use in tests only.
        pixels: between the pictures' uint8 and [-1, 1]; None for photographs with 256 levels.
        rows: pictures encoded or decoded at a time, which bounds memory.
        any_shape: take latents of other heights and widths as well (batches of one aspect ratio each).
        family: "sd", "sdxl", "sd3" or "flux", whose scale and shift hold where none are given.
        decoder: folder or file of an autoencoder with the same encoder, whose decoder draws the pictures, e.g. one that
            was fine-tuned on noisy latents; None for the autoencoder's own.
    """

    def __init__(
        self,
        size: int,
        channels: int = 4,
        scale: float | None = None,
        shift: float | None = None,
        autoencoder: Callable[[], AutoencoderKL] | None = None,
        weights: str | None = None,
        pixels: Pixels | None = None,
        rows: int = 16,
        any_shape: bool = False,
        family: Literal["sd", "sdxl", "sd3", "flux"] = "sd",
        decoder: str | None = None,
    ) -> None:
        if family not in FAMILIES:
            raise ValueError(f"module.codec.family={family!r}: expected one of {', '.join(FAMILIES)}.")
        usual = FAMILIES[family]
        scale, shift = usual[0] if scale is None else scale, usual[1] if shift is None else shift
        if size < 1 or channels < 1 or rows < 1 or not scale > 0:
            raise ValueError(
                f"module.codec.size={size}, channels={channels}, rows={rows} and scale={scale}: expected values > 0."
                " Stable Diffusion at 256 pixels: size=32 channels=4 scale=0.18215."
            )
        self.size, self.channels, self.scale, self.shift, self.rows = size, channels, scale, shift, rows
        self._make, self.weights, self._pixels, self.any_shape = autoencoder, weights, pixels, any_shape
        self.decoder, self._stored_by = decoder, ""
        self._net: AutoencoderKL | None = None
        self._device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, size)."""
        return (self.channels, self.size, self.size)

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The network, loaded on first use.

        Raises:
            ValueError: there are no weights, or their latents are of another shape.
        """
        if self._net is None:
            net = self._build()
            if net.latent_channels != self.channels:
                raise ValueError(
                    f"The autoencoder makes latents of {net.latent_channels} channels, module.codec.channels is"
                    f" {self.channels}. Set it, and module.net.in_channels, to {net.latent_channels}."
                )
            self._compare(net)
            self._net = net
            if self.decoder is not None:
                self.use_decoder(self.decoder)
        return self._net

    def _compare(self, net: AutoencoderKL) -> None:
        if self._stored_by and net.fingerprint() != self._stored_by:
            raise ValueError(
                f"The stored latents come from the encoder {self._stored_by}, module.codec.weights={self.weights}"
                f" is {net.fingerprint()}. Set module.codec.weights to the autoencoder that made them, or make them"
                " anew: python -m platform prepare latents"
            )

    def use_decoder(self, folder: str) -> str:
        """Draw pictures with another decoder from now on.

        Args:
            folder: of an autoencoder with the same encoder, see ``autoencoder.load``.

        Returns:
            Sixteen hexadecimal digits that change with any weight of the decoder.

        Raises:
            ValueError: there is none, or its encoder is another one.
        """
        net = self.autoencoder
        other = load(folder, lambda: AutoencoderKL(**net.config))
        if other.fingerprint() != net.fingerprint():
            raise ValueError(
                f"The decoder {folder} belongs to the encoder {other.fingerprint()}, the latents to"
                f" {net.fingerprint()}. Take a decoder that was fine-tuned with this encoder (vae_sd_decoder)."
            )
        other.to(self._device)
        net.decoder, net.post_quant_conv = other.decoder, other.post_quant_conv
        return net.fingerprint(("decoder.", "post_quant_conv."))

    def check(self, card: Mapping[str, Any]) -> None:
        """Insist that stored latents are those that this codec normalises and decodes.

        Args:
            card: what ``prepare latents`` wrote about them: "shape", "encoder", "scale" and "shift".

        Raises:
            ValueError: they are not. The encoder is compared where its weights are on this machine, else as soon as
                they are needed.
        """
        channels, *size = card["shape"]
        if channels != 2 * self.channels or not (self.any_shape or size == [self.size, self.size]):
            raise ValueError(
                f"The stored latents have {channels // 2} channels and {'x'.join(map(str, size))} pixels, module.codec"
                f" has channels={self.channels} and size={self.size}. Type module.codec.channels={channels // 2}"
                f" module.codec.size={size[0]}, and module.net.in_channels and img_size alike."
            )
        own = {"scale": self.scale, "shift": self.shift}
        stored = {name: float(card[name]) for name in own if card.get(name) is not None}
        if any(abs(value - own[name]) > 1e-4 * abs(value) + 1e-7 for name, value in stored.items()):
            raise ValueError(
                f"The stored latents are to be used with {_listed(stored, ' and ')}, as their card says; module.codec"
                f" has {_listed(own, ' and ')}. Type {_listed(stored, ' ', 'module.codec.')}, or take other latents."
            )
        self._stored_by = str(card["encoder"])
        here = self.weights is None or Path(self.weights).expanduser().exists()
        if self._net is not None:  # as it is: it may draw with another decoder, and lie on another device
            self._compare(self._net)
        elif here and (self.weights or self._make):
            self.autoencoder  # noqa: B018 - compares

    def _build(self) -> AutoencoderKL:
        if self.weights is not None:
            return load(self.weights, self._make)
        if self._make is None:
            raise ValueError(
                "Between latents and pictures stands an autoencoder, and none is set. Type"
                " module.codec.weights=FOLDER with one in diffusers' format (config.json and safetensors)."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._make().eval().requires_grad_(False)

    @property
    def pixels(self) -> Pixels:
        """Between uint8 pictures and [-1, 1]."""
        if self._pixels is None:
            self._pixels = Pixels(self.size * self.autoencoder.factor, self.autoencoder.in_channels)
        return self._pixels

    @property
    def white(self) -> int:
        """Stored value of white in the pictures that ``decode`` returns."""
        return 255 if self._pixels is None else self._pixels.white

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of pictures, neither scaled nor shifted.

        Args:
            images: (B, channels, H, W) uint8.

        Returns:
            (B, channels, h, w) float32 each.
        """
        x = images.float() * (2.0 / self.white) - 1.0
        net = self._on(x.device)
        parts = [net.encode(chunk) for chunk in x.split(self.rows)]
        return torch.cat([mean for mean, _ in parts]), torch.cat([logvar for _, logvar in parts])

    def distribution(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a batch's latents, neither scaled nor shifted.

        Args:
            batch: "latent", (B, 2 channels, size, size): mean and log-variance; without it "image", which is encoded.

        Returns:
            (B, channels, size, size) float32 each.

        Raises:
            ValueError: neither is there, or the latents are of another shape.
        """
        if "latent" in batch:
            mean, logvar = batch["latent"].float().chunk(2, dim=1)
        elif "image" in batch:
            mean, logvar = self.moments(batch["image"])
        else:
            raise ValueError(
                f"module.codec needs latents or pictures; the data gives {sorted(batch)}. Point data at shards of"
                " latents (python -m platform prepare latents) or of pictures."
            )
        if tuple(mean.shape[1:]) != self.shape and not (self.any_shape and mean.shape[1] == self.channels):
            raise ValueError(
                f"The data holds latents of shape {tuple(mean.shape[1:])}, module.codec expects {self.shape}. Set"
                " module.codec.size and channels, or data.size for pictures, so that they agree."
            )
        return mean, logvar.clamp(*LOGVAR)

    def encode(self, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """A draw of the latents.

        Args:
            batch: see ``distribution``.
            noise: standard normal, (B, channels, size, size); None takes the means.

        Returns:
            (B, channels, size, size) float32, shifted and scaled.
        """
        mean, logvar = self.distribution(batch)
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return (mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures of latents.

        Args:
            x: (B, channels, h, w) float, shifted and scaled.

        Returns:
            (B, channels, H, W) uint8.
        """
        z = x.float() / self.scale + self.shift
        net = self._on(z.device)
        return torch.cat([self.pixels.decode(net.decode(chunk)) for chunk in z.split(self.rows)])

    def _on(self, device: torch.device) -> AutoencoderKL:
        if self._device != device:
            self.autoencoder.to(device)
            self._device = device
        return self.autoencoder


def _listed(numbers: Mapping[str, float], between: str, prefix: str = "") -> str:
    return between.join(f"{prefix}{name}={value:g}" for name, value in numbers.items())
