"""The STARFlow network: several shallow causal transformers next to the data and a deep one next to the noise.

Parameter names are those of apple/ml-starflow, so its checkpoints load without renaming.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightningmodules.starflow import process
from lightningmodules.starflow.transformer import RMSNorm, Rotation, Shape, TransformerLayer

T = TypeVar("T")


class FlowOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        z: latent, (B, N, D) float32, in row-major order.
        inputs: input of every block, first block first, (B, N, D) each; the first is the data.
        scales: -log sigma of every block, (B, N, D) each, in the order in which that block reads its tokens.
    """

    z: Tensor
    inputs: list[Tensor]
    scales: list[Tensor]


class FlowBlock(nn.Module):
    """One invertible step: a causal transformer predicts a scale and a shift of every token from those before it.

    Args:
        shape: what the transformer is made of.
        layers: transformer layers; 0 makes the identity.
        size: sequence length for learnt positions; not used with rotary ones.
        dims: values per token D.
        text_dim: features of a text token that go before the image; 0 for a block without text.
        text_axis: whether rotary positions set pairs aside for text.
        span: extent of rotary coordinates.
        sos: the sequence starts with a learnt token, so the first token is transformed as well.
        softplus: scales are softplus(r) instead of exp(r).
        soft_clip: bound of raw scales and shifts; 0 for none.
        flipped: read the sequence last token first.
    """

    def __init__(
        self,
        shape: Shape,
        layers: int,
        *,
        size: int,
        dims: int,
        text_dim: int,
        text_axis: bool,
        span: int,
        sos: bool,
        softplus: bool,
        soft_clip: float,
        flipped: bool,
    ) -> None:
        super().__init__()
        self.shape, self.dims, self.text_axis, self.span = shape, dims, text_axis, span
        self.softplus, self.soft_clip, self.flipped = softplus, soft_clip, flipped
        self.text_dim = text_dim if layers else 0
        self.sos_embed = nn.Parameter(torch.randn(1, 1, dims)) if sos and layers else None
        self.pos_embed: nn.Parameter | None = None
        if not layers:
            self.attn_blocks = nn.ModuleList()
            return
        self.proj_in = nn.Linear(dims, shape.channels)
        self.proj_out = nn.Linear(shape.channels, 2 * dims)
        nn.init.zeros_(self.proj_out.weight)  # its bias keeps the default, so the initial map is a constant affine one
        if not shape.rope:
            self.pos_embed = nn.Parameter(torch.randn(size, shape.channels) * 0.01)
        if self.text_dim:
            self.proj_txt = nn.Linear(text_dim, shape.channels) if shape.project_text else nn.Identity()
            if not shape.project_text and text_dim != shape.channels:
                raise ValueError(
                    f"module.net.txt_dim={text_dim} must be the deep block's {shape.channels} channels, since"
                    " module.net.deep.project_text is false. Set it true, or use features of that width."
                )
        self.attn_blocks = nn.ModuleList(TransformerLayer(shape) for _ in range(layers))
        self.final_norm = RMSNorm(shape.channels) if shape.use_final_norm else None

    @property
    def layers(self) -> list[TransformerLayer]:
        """The transformer layers."""
        return cast(list[TransformerLayer], list(self.attn_blocks))

    @property
    def ahead(self) -> int:
        """How many tokens lie between what a step reads and what it predicts: 0 after a start token, else 1."""
        return 0 if self.sos_embed is not None else 1

    def order(self, x: Tensor) -> Tensor:
        """Switch tokens, (..., N, D), between row-major order and this block's; its own inverse."""
        return x.flip(-2) if self.flipped else x

    def rotation(self, size: tuple[int, int], text: int, device: torch.device) -> Rotation | None:
        """Cosines and sines for ``text`` tokens and an image of ``size``; None for learnt positions."""
        if not self.shape.rope:
            return None
        pairs = self.shape.head_dim // 2
        if self.shape.rope_1d:
            angles = process.line_angles(text + size[0] * size[1], pairs, device)
        else:
            angles = process.rotary_angles(size, text, pairs, self.span, with_text=self.text_axis, device=device)
        return angles.cos(), angles.sin()

    def text(self, y: Tensor | None) -> Tensor | None:
        """Text tokens at the transformer's width, (B, L, channels); None where the block takes none.

        Raises:
            ValueError: the block needs text and there is none, or of another width.
        """
        if not self.text_dim:
            return None
        if y is None or y.shape[-1] != self.text_dim:
            came = "nothing" if y is None else f"features of width {y.shape[-1]}"
            raise ValueError(
                f"The network is conditioned on {self.text_dim} features per text token (module.net.txt_dim), but"
                f" {came} came. Ask for a class or a caption, or for the null condition."
            )
        return cast(Tensor, self.proj_txt(y.to(self.proj_in.weight.dtype)))

    def read(self, x: Tensor) -> Tensor:
        """What the transformer reads: tokens in this block's order, the start token first if there is one.

        Args:
            x: (B, N, D) float32, in this block's order; its last token predicts nothing.
        """
        if self.sos_embed is None:
            return x[:, :-1]
        return torch.cat([self.sos_embed.to(x.dtype).expand(len(x), -1, -1), x[:, :-1]], dim=1)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        size: tuple[int, int] = (0, 0),
        *,
        within: Callable[[], T] | None = None,
    ) -> tuple[Tensor, Tensor] | T:
        """Map data to latent in one parallel pass; the affine map is float32 under any autocast.

        Args:
            x: (B, N, D) float32, row-major order.
            y: text features, (B, L, txt_dim).
            size: height and width in tokens.
            within: call this instead and return its result. A sharded block holds its weights only inside ``forward``,
                so whoever wants to use its parts (the sampler) does it from in here.

        Returns:
            z, (B, N, D) in row-major order, and -log sigma, (B, N, D) in this block's order.
        """
        if within is not None:
            return within()
        if not self.layers:
            return x, torch.zeros_like(x)
        x = self.order(x)
        h = self.proj_in(self.read(x).to(self.proj_in.weight.dtype))
        if self.pos_embed is not None:
            h = h + self.order(self.pos_embed)[: h.shape[1]]
        text = self.text(y)
        before = 0 if text is None else text.shape[1]
        h = h if text is None else torch.cat([text, h], dim=1)
        rotation = self.rotation(size, before, x.device)
        if rotation is not None:
            rotation = rotation[0][: h.shape[1]], rotation[1][: h.shape[1]]
        for layer in self.layers:
            h = layer(h, rotation)
        h = h[:, before:]
        out = self.proj_out(h if self.final_norm is None else self.final_norm(h)).float()
        with torch.autocast(x.device.type, enabled=False):
            raw, mu = process.soft_clip(out, self.soft_clip).chunk(2, dim=-1)
            log_sigma = process.log_sigma_of(raw, softplus=self.softplus)
            moved = (x[:, self.ahead :] - mu) * torch.exp(-log_sigma)
            if self.ahead:  # the first token passes unchanged
                moved = torch.cat([x[:, :1], moved], dim=1)
                log_sigma = F.pad(log_sigma, (0, 0, 1, 0))
        return self.order(moved), -log_sigma


class StarFlowNet(nn.Module):
    """A stack of flow blocks over the tokens of a latent, the last of which may be deep and see a text or a class.

    Args:
        in_channels: channels C of the latent.
        img_size: height and width of the latent; other sizes and shapes work as well with rotary positions.
        patch_size: side of a patch p; N = (img_size / p)^2 tokens of D = C p^2 values.
        channels: width of the transformers.
        num_blocks: flow blocks T.
        layers_per_block: transformer layers of each block, the one next to the data first; one number for all.
        head_dim: features per attention head.
        num_heads: query heads; None for channels / head_dim.
        num_kv_heads: heads of keys and values; None for as many.
        expansion: width of the perceptrons in units of the width.
        rope: rotary positions; False for learnt ones.
        pt_seq_len: extent of rotary coordinates; None for img_size / p. Keep it when training on at another size.
        sos: start from a learnt token, so that the first token is transformed too.
        txt_size: text tokens; > 0 sets pairs of rotary features aside for text, also in blocks without text.
        txt_dim: features per text token, or classes + 1 for one-hot classes; 0 for an unconditional model.
        cond_top_only: only the last block sees the text.
        top_block_channels: width of the last block; None for ``channels``.
        deep: settings of ``Shape`` in which the last block differs.
        use_softplus: scales are softplus(r) instead of exp(r).
        soft_clip: bound of raw scales and shifts; 0 for none.
        seq_order: "L2R": even blocks read backwards; "R2L": odd ones do.
        use_final_norm: normalise the output of each transformer.
        norm_type: "layer_norm", "rms_norm" or "none".
        use_bias: biases inside the transformer layers.
        use_qk_norm: normalise queries and keys.
        use_post_norm: normalise each residual branch.
        use_swiglu: gated perceptrons.
        hf_style_rope: pair feature i with i + head_dim / 2.
        dropout: dropout probability of every residual branch.

    Source: arXiv 2506.06276; apple/ml-starflow, Model and MetaBlock. Defaults are those of the released 3.8B model,
    sizes apart.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: int,
        patch_size: int,
        channels: int,
        num_blocks: int,
        layers_per_block: Sequence[int] | int,
        head_dim: int = 64,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        expansion: float = 4.0,
        rope: bool = True,
        pt_seq_len: int | None = None,
        sos: bool = True,
        txt_size: int = 0,
        txt_dim: int = 0,
        cond_top_only: bool = True,
        top_block_channels: int | None = None,
        deep: Mapping[str, Any] | None = None,
        use_softplus: bool = True,
        soft_clip: float = 4.0,
        seq_order: Literal["L2R", "R2L"] = "L2R",
        use_final_norm: bool = True,
        norm_type: str = "layer_norm",
        use_bias: bool = True,
        use_qk_norm: bool = False,
        use_post_norm: bool = False,
        use_swiglu: bool = False,
        hf_style_rope: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers = _layers(layers_per_block, num_blocks)
        _check(in_channels, img_size, patch_size, soft_clip, seq_order, txt_size, txt_dim)
        shape = Shape(
            channels,
            head_dim,
            num_heads,
            num_kv_heads,
            expansion,
            norm_type,
            use_bias,
            use_qk_norm,
            use_post_norm,
            use_swiglu,
            use_final_norm,
            rope,
            hf_style_rope,
            dropout=dropout,
        )
        top = _deep_shape(shape, top_block_channels, deep or {})
        for each in (shape, top):
            each.check()
        self.in_channels, self.img_size, self.patch_size = in_channels, img_size, patch_size
        self.txt_size, self.txt_dim, self.cond_top_only = txt_size, txt_dim, cond_top_only
        self.side = img_size // patch_size
        self.tokens, self.dims = self.side**2, in_channels * patch_size**2
        last = num_blocks - 1
        self.blocks = nn.ModuleList(
            FlowBlock(
                top if k == last else shape,
                layers[k],
                size=self.tokens,
                dims=self.dims,
                text_dim=txt_dim if k == last or not cond_top_only else 0,
                text_axis=txt_size > 0,
                span=pt_seq_len or self.side,
                sos=sos,
                softplus=use_softplus,
                soft_clip=soft_clip,
                flipped=(k % 2 == 1) if seq_order == "R2L" else (k % 2 == 0),
            )
            for k in range(num_blocks)
        )
        for each in (shape, top):
            if each.rope and not each.rope_1d:
                process.spatial_pairs(each.head_dim // 2, with_text=txt_size > 0)

    @property
    def steps(self) -> list[FlowBlock]:
        """The flow blocks, the one next to the data first."""
        return cast(list[FlowBlock], list(self.blocks))

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Height and width of an image in tokens."""
        return image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size

    def patchify(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, D)."""
        return process.patchify(image, self.patch_size)

    def unpatchify(self, tokens: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Tokens (B, N, D) to images (B, C, H, W); ``size`` in tokens, None for the square of ``img_size``."""
        return process.unpatchify(tokens, self.patch_size, size or (self.side, self.side))

    def forward(self, x: Tensor, y: Tensor | None = None, *, within: Callable[[], T] | None = None) -> FlowOutput | T:
        """Map data to latents.

        Args:
            x: (B, C, H, W) float, noise already added.
            y: text features or one-hot classes, (B, L, txt_dim); not masked, padding is zero features.
            within: call this instead, see ``FlowBlock.forward``.
        """
        if within is not None:
            return within()
        z, size = self.patchify(x.float()), self.grid(x)
        inputs, scales = [], []
        for block in self.steps:
            inputs.append(z)
            z, scale = block(z, y, size)
            scales.append(scale)
        return FlowOutput(z, inputs, scales)

    @torch.no_grad()
    def overflow(self, x: Tensor, y: Tensor | None = None) -> str | None:
        """Where a forward pass first leaves the finite numbers, in words: block, token, sample; None if it does not."""
        z, size = self.patchify(x.float()), self.grid(x)
        for k, block in enumerate(self.steps):
            z, scale = block(z, y, size)
            bad = ~(block.order(z).isfinite() & scale.isfinite())
            if bad.any():
                row, token, _ = bad.nonzero()[0].tolist()
                low, high = torch.aminmax(torch.exp(-scale[row].nan_to_num()))
                return (
                    f"flow block {k} of {len(self.steps)} (0 is next to the data), token {token} of {z.shape[1]} in its"
                    f" order, sample {row} of the batch; sigma {float(low):.3g}..{float(high):.3g} in that block"
                )
        return None

    def flops(self) -> float:
        """Floating-point operations of a forward pass of one image: 2 per multiply-add, attention counted causally."""
        total = 0.0
        for block in self.steps:
            if not block.layers:
                continue
            text = self.txt_size if block.text_dim else 0
            n = self.tokens - block.ahead
            ends = (block.proj_in, block.proj_out)
            inner = sum(weight.numel() for weight in block.attn_blocks.parameters() if weight.dim() == 2)
            total += 2.0 * n * sum(end.weight.numel() for end in ends) + 2.0 * (n + text) * inner
            if isinstance(proj := getattr(block, "proj_txt", None), nn.Linear):
                total += 2.0 * text * proj.weight.numel()
            width = block.shape.heads * block.shape.head_dim
            total += 2.0 * len(block.layers) * (n + text) * (n + text + 1) * width
        return total


def _layers(layers_per_block: Sequence[int] | int, num_blocks: int) -> list[int]:
    given = [layers_per_block] if isinstance(layers_per_block, int) else [int(number) for number in layers_per_block]
    layers = given * num_blocks if len(given) == 1 else given
    if num_blocks < 1 or len(layers) != num_blocks or min(layers) < 0 or not layers[-1]:
        raise ValueError(
            f"module.net.layers_per_block={given} does not fit module.net.num_blocks={num_blocks}: expected one number"
            " of layers per block, or one for all, each >= 0 and the last > 0."
        )
    return layers


def _check(
    in_channels: int, img_size: int, patch_size: int, soft_clip: float, seq_order: str, txt_size: int, txt_dim: int
) -> None:
    if min(in_channels, img_size, patch_size) < 1 or img_size % patch_size or img_size == patch_size:
        raise ValueError(
            f"A latent of {in_channels} channels and {img_size} pixels a side cannot be cut into two or more patches of"
            f" {patch_size} pixels. Set module.net.patch_size to a proper divisor of module.net.img_size."
        )
    if seq_order not in ("L2R", "R2L"):
        raise ValueError(
            f"module.net.seq_order={seq_order!r}: expected L2R (deep block of an even stack forwards) or R2L."
        )
    if soft_clip < 0 or txt_size < 0 or txt_dim < 0:
        raise ValueError(
            f"module.net.soft_clip={soft_clip}, txt_size={txt_size}, txt_dim={txt_dim}: expected values >= 0; 0 is off."
        )
    if bool(txt_dim) and not txt_size:
        raise ValueError(
            f"module.net.txt_dim={txt_dim} needs module.net.txt_size > 0: 1 for classes, else the text tokens."
        )


def _deep_shape(shape: Shape, channels: int | None, deep: Mapping[str, Any]) -> Shape:
    known = {field.name for field in fields(Shape)}
    if unknown := sorted(set(deep) - known):
        raise ValueError(f"module.net.deep.{unknown[0]} is no setting of a block. Known: {', '.join(sorted(known))}.")
    top = shape
    if channels is not None and channels != shape.channels:
        top = replace(top, channels=channels)  # num_heads, where it is None, follows
    return replace(top, **deep)
