"""Inverting the flow: from prior noise to tokens, the deep block first, token by token or window by window."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightningmodules.shared import flow
from lightningmodules.shared.attention import KVCache, compute_dtype, window_mask
from lightningmodules.shared.stepping import Layer, Norm, cast, layer_norm, linear, transform
from lightningmodules.starflow import process
from lightningmodules.starflow.network import FlowBlock, StarFlowNet
from lightningmodules.starflow.transformer import RMSNorm, TransformerLayer


@dataclass(frozen=True)
class Guidance:
    """How predictions are pushed away from unconditional ones, in blocks that see the text.

    Attributes:
        weight: w of the house, >= 0; 1 is off, 0 leads to the unconditional mean. The authors' omega is w - 1.
        rule: "precision" or "plain", see ``process.guide``.
        blocks: "all" blocks that see the text, or only the "deep" one.

    Raises:
        ValueError: a value out of range.
    """

    weight: float = 1.0
    rule: str = "precision"
    blocks: str = "all"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"sampling.guidance={self.weight}: expected a finite number >= 0; 1 is off.")
        if self.rule not in ("precision", "plain") or self.blocks not in ("all", "deep"):
            raise ValueError(
                f"sampling.guidance_rule={self.rule!r} must be precision or plain and sampling.guide_blocks="
                f"{self.blocks!r} all or deep."
            )


@dataclass(frozen=True)
class Windows:
    """Parallel sampling: all tokens of a window are computed together until they no longer change.

    After k passes the first k tokens of a window are exact, so there are at most as many passes as tokens. What is
    accepted is read once more into the cache, so an error never exceeds what the tolerance left.

    Attributes:
        size: tokens of a window; 0 samples token by token.
        tolerance: largest change of any value in the last pass, in units of 1 + the largest value of the window; each
            sample stops on its own.
        blocks: "shallow" blocks only, or "all".

    Raises:
        ValueError: a value out of range.
    """

    size: int = 0
    tolerance: float = 1e-4
    blocks: str = "shallow"

    def __post_init__(self) -> None:
        if self.size < 0 or not self.tolerance >= 0 or self.blocks not in ("shallow", "all"):
            raise ValueError(
                f"sampling.jacobi_window={self.size} must be >= 0 (0 is off), sampling.jacobi_tolerance="
                f"{self.tolerance} >= 0 and sampling.jacobi_blocks={self.blocks!r} shallow or all."
            )


SEQUENTIAL = Windows()


class Plan(NamedTuple):
    """How samples are drawn.

    Attributes:
        guide: guidance.
        windows: token by token, or window by window.
        temperature: attention logits are divided by it.
        denoise: factor on the denoising step.
        aspect: width:height.
    """

    guide: Guidance
    windows: Windows
    temperature: float
    denoise: float
    aspect: str


def plan(
    guidance: float,
    guidance_rule: str,
    guide_blocks: str,
    attention_temperature: float,
    denoise: float,
    jacobi_window: int,
    jacobi_tolerance: float,
    jacobi_blocks: str,
    aspect: str,
) -> Plan:
    """The arguments of ``StarFlow.sample``, which explains them, checked.

    Raises:
        ValueError: a value out of range.
    """
    if denoise < 0 or not attention_temperature > 0:
        raise ValueError(
            f"sampling.denoise={denoise} must be >= 0 (1 is Tweedie's formula, 0 is off) and"
            f" sampling.attention_temperature={attention_temperature} > 0 (1 is off)."
        )
    guide = Guidance(guidance, guidance_rule, guide_blocks)
    windows = Windows(jacobi_window, jacobi_tolerance, jacobi_blocks)
    return Plan(guide, windows, attention_temperature, denoise, aspect)


@dataclass(frozen=True)
class _Request:
    """What all blocks of one inversion share."""

    size: tuple[int, int]
    y: Tensor | None
    null: Tensor | None
    guide: Guidance | None
    temperature: float
    windows: Windows
    caches: dict[tuple[int, int, int, int, int], KVCache]  # of blocks that are alike, which run one after the other


@torch.no_grad()
def invert(
    net: StarFlowNet,
    noise: Tensor,
    y: Tensor | None = None,
    null: Tensor | None = None,
    guide: Guidance | None = None,
    *,
    size: tuple[int, int] | None = None,
    temperature: float = 1.0,
    windows: Windows = SEQUENTIAL,
) -> list[Tensor]:
    """Map prior noise to tokens, the inverse of ``StarFlowNet.forward`` on patches.

    In guided blocks the unconditional prediction runs as a second half of the batch and reads the same guided tokens;
    the other blocks run once. Transformers compute in the dtype of the weights, or autocast's; tokens, affine maps,
    angles and residual streams are float32. Dropout is not applied.

    Args:
        net: the network.
        noise: standard normal, (B, N, D) float32.
        y: text features or one-hot classes, (B, L, txt_dim); None for an unconditional network.
        null: the same for "nothing", needed for guidance.
        guide: None for no guidance.
        size: height and width in tokens; None for the square of ``img_size``.
        temperature: attention logits are divided by it, in every block, > 0.
        windows: token by token, or window by window.

    Returns:
        The tokens after every inverted block, (B, N, D) each; the deep block comes first, the image last.

    Source: apple/ml-starflow, MetaBlock.reverse and jacobi; arXiv 2506.06276.
    Differs: keys are rotated once, when they are cached; windows refresh the cache after acceptance and need no
    process group.
    """
    if guide is not None and (guide.weight == 1.0 or null is None):
        guide = None
    request = _Request(size or (net.side, net.side), y, null, guide, temperature, windows, {})
    if request.size[0] * request.size[1] != noise.shape[1]:
        raise ValueError(f"Noise for {noise.shape[1]} tokens came, but {request.size} are to be made.")

    def run() -> list[Tensor]:
        x = noise.float()
        images: list[Tensor] = []
        for block in reversed(net.steps):
            deep = block is net.steps[-1]
            x = block(x, within=partial(_invert_block, block, x, request, deep))
            images.append(x)
        return images

    with flow.eager():
        images: list[Tensor] = net(noise, within=run)
    return images


def _invert_block(block: FlowBlock, z: Tensor, request: _Request, deep: bool) -> Tensor:
    """Invert one block, from inside its ``forward``: (B, N, D) to (B, N, D), both in row-major order."""
    if not block.layers:
        return z
    dtype = compute_dtype(block.proj_in.weight)
    with torch.autocast(z.device.type, enabled=False), torch.inference_mode():  # a tenth faster than no_grad
        z = block.order(z)
        guide, windows = request.guide, request.windows
        guided = guide is not None and block.text_dim > 0 and (deep or guide.blocks == "all")
        reader = _Reader(block, len(z), dtype, request, guide if guided else None)
        if windows.size and (not deep or windows.blocks == "all"):
            x = _by_windows(reader, z, windows)
        else:
            x = _by_tokens(reader, z)
    return block.order(x.clone())  # an ordinary tensor again, that may be changed in place and differentiated


def _by_tokens(reader: "_Reader", z: Tensor) -> Tensor:
    ahead, tokens = reader.ahead, list(z.unbind(1))  # (B, D) each, replaced one after the other
    for i in range(len(tokens) - ahead):
        target = i + ahead
        mu, sigma = reader.step(i, tokens[target - 1] if target else reader.start)
        tokens[target] = torch.addcmul(mu, tokens[target], sigma)
    return torch.stack(tokens, dim=1)


def _by_windows(reader: "_Reader", z: Tensor, windows: Windows) -> Tensor:
    """Fixed-point iteration inside windows; the noise is the first guess.

    Source: apple/ml-starflow, MetaBlock.jacobi.
    """
    ahead, last = reader.ahead, z.shape[1]
    before = reader.start.unsqueeze(1)  # stands in for the token before the first
    x = torch.cat([before.expand(len(z), -1, -1), z], dim=1)  # x[:, k + 1] is token k
    for begin in range(0, last - ahead, windows.size):
        count = min(windows.size, last - ahead - begin)
        first = begin + ahead  # the first token of the window
        moving = torch.ones(len(z), dtype=torch.bool, device=z.device)
        for _ in range(count):
            mu, sigma = reader.window(begin, x[:, first : first + count])
            new = torch.addcmul(mu, z[:, first : first + count], sigma)
            old = x[:, first + 1 : first + 1 + count]
            still = ~((new - old).abs().amax((1, 2)) <= windows.tolerance * (1 + new.abs().amax((1, 2))))
            x[:, first + 1 : first + 1 + count] = torch.where(moving.view(-1, 1, 1), new, old)
            moving = moving & still
            if not bool(moving.any()):
                reader.refresh(begin, x[:, first : first + count])
                break
    return x[:, 1:]


class _Reader:
    """The transformer of one block, reading tokens into its cache and predicting what comes next.

    Args:
        block: the block; the text goes into the cache at once.
        rows: samples.
        dtype: of matrix products, keys and values.
        request: what is asked for.
        guide: guidance in this block, or None.
    """

    def __init__(
        self, block: FlowBlock, rows: int, dtype: torch.dtype, request: _Request, guide: Guidance | None
    ) -> None:
        weight, self.block, self.guide = block.proj_in.weight, block, guide
        self.ahead = block.ahead
        start = torch.zeros(1, block.dims, device=weight.device) if block.sos_embed is None else block.sos_embed[0]
        self.start = start.float().expand(rows, -1)
        shape = block.shape
        self.layers = [_take(layer, dtype) for layer in block.layers]
        self.query_norms = [_head_norms(layer) for layer in block.layers]
        self.turning = (shape.heads + shape.kv_heads) * shape.head_dim  # queries and keys stand side by side
        self.scale = shape.head_dim**-0.5 / request.temperature
        self.enter, self.leave = cast(block.proj_in, torch.float32), cast(block.proj_out, torch.float32)
        self.final_norm = _bound(block.final_norm) if block.final_norm is not None else None
        places = block.pos_embed
        self.places = None if places is None else block.order(places).float()
        doubled = rows * (2 if guide else 1)
        text = request.y
        if guide is not None and request.null is not None and text is not None:
            text = torch.cat([text, request.null])
        text = block.text(text)
        self.before = 0 if text is None else text.shape[1]
        rotation = block.rotation(request.size, self.before, weight.device)
        self.turn = None if rotation is None else torch.complex(*rotation)  # (tokens, head_dim / 2)
        length = self.before + request.size[0] * request.size[1] - self.ahead
        key = (len(self.layers), doubled, shape.kv_heads, shape.head_dim, length)
        if key not in request.caches:
            request.caches[key] = KVCache(*key, dtype=dtype, device=weight.device)
        self.cache = request.caches[key]
        self.masks: dict[tuple[int, int], Tensor | None] = {}
        if text is not None:
            h = text.float().flatten(0, 1).clone()  # it is overwritten, and may be what the caller gave
            transform(self.layers, h, partial(self._attend_window, 0, self.before))

    def step(self, i: int, token: Tensor) -> tuple[Tensor, Tensor]:
        """Read one token, (rows, D), as the ``i``-th of the image; mean and scale of the next, (rows, D) each."""
        h = linear(token, self.enter)
        if self.places is not None:
            h = h + self.places[i]
        if self.guide is not None:
            h = torch.cat((h, h))
        return self._predict(transform(self.layers, h, partial(self._attend, self.before + i)))

    def window(self, i: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read ``tokens``, (rows, n, D), from the ``i``-th on; means and scales of those after, (rows, n, D) each."""
        mu, sigma = self._predict(self.refresh(i, tokens))
        return mu.view(tokens.shape), sigma.view(tokens.shape)

    def refresh(self, i: int, tokens: Tensor) -> Tensor:
        """Read ``tokens`` into the cache; hidden states, (rows n, channels)."""
        count = tokens.shape[1]
        h = linear(tokens.flatten(0, 1), self.enter)
        if self.places is not None:
            h = (h.unflatten(0, (-1, count)) + self.places[i : i + count]).flatten(0, 1)
        if self.guide is not None:
            h = torch.cat((h, h))
        return transform(self.layers, h, partial(self._attend_window, self.before + i, count))

    def _predict(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h if self.final_norm is None else self.final_norm(h)
        raw, mu = process.soft_clip(linear(h, self.leave), self.block.soft_clip).chunk(2, dim=-1)
        sigma = process.sigma_of(raw, softplus=self.block.softplus)
        if self.guide is None:
            return mu, sigma
        (mu, mu_null), (sigma, sigma_null) = mu.chunk(2), sigma.chunk(2)
        return process.guide(mu, sigma, mu_null, sigma_null, self.guide.weight - 1.0, rule=self.guide.rule)

    def _attend(self, position: int, layer: int, qkv: Tensor) -> Tensor:
        self._turn(layer, qkv, None if self.turn is None else self.turn[position])
        return self.cache.attend(layer, position, qkv, self.scale)

    def _attend_window(self, position: int, count: int, layer: int, qkv: Tensor) -> Tensor:
        angles = None if self.turn is None else self.turn[position : position + count].unsqueeze(1)
        qkv = qkv.unflatten(0, (-1, count))
        self._turn(layer, qkv, angles)
        where = position, count
        if where not in self.masks:
            self.masks = {where: window_mask(*where, qkv.device)}
        return self.cache.attend_window(layer, position, qkv, self.scale, self.masks[where]).flatten(0, 1)

    def _turn(self, layer: int, qkv: Tensor, angles: Tensor | None) -> None:
        """Normalise and rotate queries and keys in place, (..., width); their features are paired 2 i with 2 i + 1."""
        norms, shape = self.query_norms[layer], self.block.shape
        if norms is None and angles is None:
            return
        both = qkv.narrow(-1, 0, self.turning).unflatten(-1, (-1, shape.head_dim))  # (..., heads, head_dim)
        wide = both.float()
        if norms is not None:
            parts = wide.split([shape.heads, shape.kv_heads], dim=-2)
            wide = torch.cat([norm(part) for norm, part in zip(norms, parts, strict=True)], dim=-2)
        if angles is not None:
            torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(angles)
        if wide.data_ptr() != both.data_ptr():
            both.copy_(wide)


def _take(layer: TransformerLayer, dtype: torch.dtype) -> Layer:
    attention, mlp = layer.attention, layer.mlp
    bias, weight = cast(attention.qkv, dtype)
    if attention.half_split:
        rows = _interleaved(attention.heads, attention.kv_heads, attention.head_dim, weight.device)
        bias, weight = None if bias is None else bias[rows], weight[:, rows]
    return Layer(
        norm_attention=_bound(attention.norm),
        qkv=(bias, weight),
        proj=cast(attention.proj, dtype),
        norm_mlp=_bound(mlp.norm),
        up=cast(mlp.up, dtype),
        down=cast(mlp.down, dtype),
        gate=None if mlp.gate_proj is None else cast(mlp.gate_proj, dtype),
        post_attention=None if attention.post_norm is None else _bound(attention.post_norm),
        post_mlp=None if mlp.post_norm is None else _bound(mlp.post_norm),
    )


def _interleaved(heads: int, kv_heads: int, head_dim: int, device: torch.device) -> Tensor:
    """Rows of qkv in the order that pairs 2 i with 2 i + 1 what was paired i with i + head_dim / 2.

    Products of queries and keys do not notice when both are reordered alike.
    """
    rows = torch.arange((heads + 2 * kv_heads) * head_dim, device=device).view(-1, head_dim)
    turned = rows[: heads + kv_heads].unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    return torch.cat([turned.flatten(), rows[heads + kv_heads :].flatten()])


def _head_norms(layer: TransformerLayer) -> tuple[Norm, Norm] | None:
    attention = layer.attention
    if attention.query_norm is None or attention.key_norm is None:
        return None
    return _bound(attention.query_norm, attention.half_split), _bound(attention.key_norm, attention.half_split)


def _bound(norm: nn.Module, interleaved: bool = False) -> Norm:
    """A normalisation with its parameters bound."""
    if isinstance(norm, nn.LayerNorm):
        return layer_norm(norm)
    if isinstance(norm, RMSNorm):
        weight = 1.0 + norm.weight.float()
        if interleaved:
            weight = weight.unflatten(0, (2, -1)).t().flatten()
        shape = list(weight.shape)
        return lambda x: torch.rms_norm(x, shape, weight, 1e-6)
    return lambda x: x


@torch.no_grad()
def inpaint(
    net: StarFlowNet,
    known: Tensor,
    missing: Tensor,
    noises: Iterable[Tensor],
    uniforms: Sequence[Tensor],
    y: Tensor | None = None,
    *,
    windows: Windows = SEQUENTIAL,
) -> tuple[Tensor, Tensor]:
    """Fill in a region by Metropolis-Hastings: fresh noise there, invert, put the known values back, accept or not.

    A proposal redraws the latent of the tokens that hold a missing value and keeps the others. It is weighed by how
    much putting the known values back costs, p(merged) / p(proposed); the first is always accepted. As the proposal's
    density is taken to be p(proposed), the chain is exact only where known values survive the inversion.

    Args:
        net: the network.
        known: latents, (B, C, H, W) float32; values in the missing region do not matter.
        missing: (B, 1, H, W) bool, True where to fill in.
        noises: standard normal draws, (B, N, D) per iteration.
        uniforms: draws in [0, 1), (B,) per iteration.
        y: text features or one-hot classes.
        windows: see ``invert``.

    Returns:
        (B, C, H, W) with the known values untouched, and the share of accepted proposals after the first, (B,).

    Source: arXiv 2506.06276, appendix D.1 (20 iterations, proposals of unit standard deviation in the mask only).
    Differs: the weight; the appendix does not say how the proposal's density enters.
    """
    size, numel = net.grid(known), known[0].numel()
    region = net.patchify(missing.expand_as(known).float()).amax(dim=-1, keepdim=True) > 0  # (B, N, 1)
    x = torch.where(missing, torch.zeros_like(known), known)
    weight = torch.full((len(x),), -math.inf, device=x.device)
    accepted = torch.zeros(len(x), device=x.device)
    for noise, uniform in zip(noises, uniforms, strict=True):
        z = torch.where(region, noise, net(x, y).z)
        proposed = net.unpatchify(invert(net, z, y, size=size, windows=windows)[-1], size)
        merged = torch.where(missing, proposed, known)
        after = numel * (_nll(net, proposed, y) - _nll(net, merged, y))
        first = weight.isinf()
        better = ((uniform.clamp(min=1e-30).log() < after - weight) | first) & after.isfinite()
        accepted += (better & ~first).float()
        x = torch.where(better.view(-1, 1, 1, 1), merged, x)
        weight = torch.where(better, after, weight)
    return x, accepted / max(1, len(uniforms) - 1)


def _nll(net: StarFlowNet, x: Tensor, y: Tensor | None) -> Tensor:
    out = net(x, y)
    return flow.nll(out.z, process.log_det(out.scales))
