"""The TarFlow network: causal transformer blocks that each map a sequence of patches one-to-one to another.

Parameter names are those of apple/ml-tarflow, so its checkpoints load without renaming.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from lightningmodules.shared.attention import CausalAttention, LayerNorm
from lightningmodules.tarflow.process import patchify, to_latent, unpatchify

DROPPED = -1  # the label of a row whose class is unknown
T = TypeVar("T")


class FlowOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        z: latent, (B, N, D) float32.
        blocks: output of every block, first block first, (B, N, D) each in row-major patch order; the last is ``z``.
        logdet: log |det dz/dx| / (N D) per image, (B,) float32.
    """

    z: Tensor
    blocks: list[Tensor]
    logdet: Tensor


class Mlp(nn.Module):
    """Pre-normalised two-layer perceptron, the second half of a transformer layer."""

    def __init__(self, channels: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, channels * expansion), nn.GELU(), nn.Linear(channels * expansion, channels)
        )
        self.dropout = nn.Dropout(dropout)

    @property
    def up(self) -> nn.Linear:
        """The layer that widens."""
        return cast(nn.Linear, self.main[0])

    @property
    def down(self) -> nn.Linear:
        """The layer that narrows again."""
        return cast(nn.Linear, self.main[2])

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual branch, shape of ``x`` (..., channels)."""
        return self.dropout(self.main(self.norm(x)))


class TransformerLayer(nn.Module):
    """Attention and perceptron, each added to the residual stream."""

    def __init__(self, channels: int, head_dim: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.attention = CausalAttention(channels, head_dim, dropout)
        self.mlp = Mlp(channels, expansion, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a whole sequence, (rows, tokens, channels)."""
        x = x + self.attention(x)
        return x + self.mlp(x)


class FlowBlock(nn.Module):
    """One invertible step: a causal transformer predicts a log-scale and a shift of every token from those before it.

    Args:
        tokens: sequence length N.
        dims: values per token D.
        channels: width.
        layers: transformer layers.
        head_dim: features per attention head.
        expansion: width of the perceptron in units of ``channels``.
        num_classes: classes with an embedding; 0 for none.
        nvp: predict log-scales as well; False leaves volumes unchanged.
        dropout: dropout probability of every residual branch.
        flipped: read the sequence last token first.
    """

    def __init__(
        self,
        tokens: int,
        dims: int,
        channels: int,
        layers: int,
        *,
        head_dim: int,
        expansion: int,
        num_classes: int,
        nvp: bool,
        dropout: float,
        flipped: bool,
    ) -> None:
        super().__init__()
        self.nvp, self.flipped = nvp, flipped
        self.proj_in = nn.Linear(dims, channels)
        self.pos_embed = nn.Parameter(torch.randn(tokens, channels) * 0.01)
        self.class_embed = nn.Parameter(torch.randn(num_classes, 1, channels) * 0.01) if num_classes else None
        self.attn_blocks = nn.ModuleList(
            TransformerLayer(channels, head_dim, expansion, dropout) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, 2 * dims if nvp else dims)
        nn.init.zeros_(self.proj_out.weight)  # its bias keeps the default, so the initial map is a constant affine one

    @property
    def layers(self) -> list[TransformerLayer]:
        """The transformer layers."""
        return cast(list[TransformerLayer], list(self.attn_blocks))

    def order(self, x: Tensor) -> Tensor:
        """Switch tokens, (..., N, D), between row-major order and this block's; its own inverse."""
        return x.flip(-2) if self.flipped else x

    def class_rows(self, y: Tensor | None) -> Tensor | None:
        """Look up what a class adds to every token of a row.

        Args:
            y: labels, (B,) int64, -1 for a row without a class; None means no row has one.

        Returns:
            (B, 1, channels), or (1, 1, channels) for ``y`` None: the class's embedding, or the mean over classes where
            there is none. None if the network knows no classes.
        """
        if self.class_embed is None:
            return None
        mean = self.class_embed.mean(dim=0, keepdim=True)  # (1, 1, channels)
        if y is None:
            return mean
        return torch.where((y == DROPPED).view(-1, 1, 1), mean, self.class_embed[y.clamp(min=0)])

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, within: Callable[[], T] | None = None
    ) -> tuple[Tensor, Tensor] | T:
        """Map data to latent in one parallel pass.

        The affine map and its determinant are float32 under any autocast; a bfloat16 log-determinant of -2.7 would be
        known to 0.016 only.

        Args:
            x: (B, N, D) float32, row-major patch order.
            y: labels, see ``class_rows``.
            within: call this instead and return its result. A sharded block holds its weights only inside ``forward``,
                so whoever wants to use its parts (the sampler) does it from in here.

        Returns:
            z, (B, N, D) in row-major order, and log |det dz/dx| / (N D), (B,).
        """
        if within is not None:
            return within()
        x = self.order(x)
        h = self.proj_in(x[:, :-1].to(self.proj_in.weight.dtype))  # the last token predicts nothing
        h = h + self.order(self.pos_embed)[:-1]
        class_rows = self.class_rows(y)
        if class_rows is not None:
            h = h + class_rows
        for layer in self.layers:
            h = layer(h)
        out = self.proj_out(h).float()  # (B, N - 1, 2 D): what token i says about token i + 1
        with torch.autocast(x.device.type, enabled=False):
            alpha, mu = out.chunk(2, dim=-1) if self.nvp else (None, out)
            z = torch.cat([x[:, :1], to_latent(x[:, 1:], alpha, mu)], dim=1)  # the first token passes unchanged
            dims = x.shape[1] * x.shape[2]
            logdet = x.new_zeros(len(x)) if alpha is None else -alpha.sum(dim=(1, 2)) / dims
        return self.order(z), logdet


class TarFlowNet(nn.Module):
    """A stack of flow blocks that read the patches of an image alternately forwards and backwards.

    Args:
        in_channels: image channels C.
        img_size: height and width in pixels.
        patch_size: side of a patch p in pixels; N = (img_size / p)^2 tokens of D = C p^2 values.
        channels: width of the transformers.
        num_blocks: flow blocks.
        layers_per_block: transformer layers per flow block.
        head_dim: features per attention head.
        expansion: width of the perceptrons in units of ``channels``.
        num_classes: classes; 0 for an unconditional model.
        nvp: predict log-scales as well as shifts. False preserves volume, and the prior's variance is learnt instead.
        dropout: dropout probability of every residual branch (the paper uses none).

    Source: arXiv 2412.06329; apple/ml-tarflow, Model and MetaBlock.
    """

    var: Tensor

    def __init__(
        self,
        in_channels: int,
        img_size: int,
        patch_size: int,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        head_dim: int = 64,
        expansion: int = 4,
        num_classes: int = 0,
        nvp: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "channels": channels, "num_blocks": num_blocks, "head_dim": head_dim}
        sizes |= {"layers_per_block": layers_per_block, "expansion": expansion, "in_channels": in_channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"module.net.{name}={size}: expected a whole number >= 1.")
        if num_classes < 0:
            raise ValueError(f"module.net.num_classes={num_classes}: expected >= 0; 0 is a model without classes.")
        if not 0 <= dropout < 1:
            raise ValueError(f"module.net.dropout={dropout}: expected 0 <= dropout < 1. The paper uses 0.")
        if img_size % patch_size or img_size == patch_size:
            raise ValueError(
                f"An image of {img_size} pixels cannot be cut into two or more patches of {patch_size} pixels a side. "
                f"Set module.net.patch_size to a proper divisor of data.size."
            )
        self.in_channels, self.img_size, self.patch_size = in_channels, img_size, patch_size
        self.num_classes, self.nvp = num_classes, nvp
        self.tokens, self.dims = (img_size // patch_size) ** 2, in_channels * patch_size**2
        self.blocks = nn.ModuleList(
            FlowBlock(
                self.tokens,
                self.dims,
                channels,
                layers_per_block,
                head_dim=head_dim,
                expansion=expansion,
                num_classes=num_classes,
                nvp=nvp,
                dropout=dropout,
                flipped=k % 2 == 1,
            )
            for k in range(num_blocks)
        )
        self.register_buffer("var", torch.ones(self.tokens, self.dims))  # of the prior; moves only if not nvp

    @property
    def steps(self) -> list[FlowBlock]:
        """The flow blocks, the one next to the data first."""
        return cast(list[FlowBlock], list(self.blocks))

    def patchify(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, D)."""
        return patchify(image, self.patch_size)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) to images (B, C, H, W)."""
        return unpatchify(tokens, self.patch_size, self.in_channels)

    def forward(self, x: Tensor, y: Tensor | None = None, *, within: Callable[[], T] | None = None) -> FlowOutput | T:
        """Map images to latents.

        Args:
            x: (B, C, H, W) float, in [-1, 1] plus noise.
            y: labels, (B,) int64; -1 or None means no class (the mean of the class embeddings is used).
            within: call this instead, see ``FlowBlock.forward``.
        """
        if within is not None:
            return within()
        z = self.patchify(x.float())
        blocks, logdet = [], z.new_zeros(len(z))
        for block in self.steps:
            z, part = block(z, y)
            blocks.append(z)
            logdet = logdet + part
        return FlowOutput(z, blocks, logdet)

    def check_labels(self, y: Tensor) -> None:
        """Refuse labels that name no class; reads the values, so call it where they are on the CPU.

        Args:
            y: labels, (B,) int64.

        Raises:
            ValueError: a label is below -1 or not below ``num_classes``.
        """
        wrong = (y < DROPPED) | (y >= self.num_classes)
        if bool(wrong.any()):
            known = f"-1 (no class) or 0..{self.num_classes - 1}" if self.num_classes else "-1 (no class) only"
            raise ValueError(
                f"Label {int(y[wrong][0])} came, but this network knows {known} (module.net.num_classes="
                f"{self.num_classes}). Ask for one of these, or set data.num_classes and train anew."
            )

    def flops(self) -> float:
        """Floating-point operations of a forward pass of one image: 2 per multiply-add, attention counted causally."""
        n = self.tokens - 1
        total = 0.0
        for block in self.steps:
            matrices = sum(weight.numel() for weight in block.parameters() if weight.dim() == 2)
            total += 2.0 * n * (matrices - block.pos_embed.numel())
            width, layers = block.pos_embed.shape[1], len(block.layers)
            total += 2.0 * layers * n * (n + 1) * width  # half of the 4 n^2 width of full attention
        return total
