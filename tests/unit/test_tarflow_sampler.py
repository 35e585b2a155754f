"""Sampling: guidance in all its forms, one cache, one batch, and independence of the samples in it."""

import pytest
import torch
from torch import Tensor

from lightningmodules.shared.attention import CausalAttention, KVCache, compute_dtype
from lightningmodules.tarflow.network import TarFlowNet
from lightningmodules.tarflow.sampler import Guidance, invert
from lightningmodules.tarflow.straightforward import Straightforward


def network(**options: object) -> TarFlowNet:
    torch.manual_seed(3)
    sizes = {"in_channels": 1, "img_size": 8, "patch_size": 2, "channels": 32, "num_blocks": 3, "layers_per_block": 2}
    net = TarFlowNet(**{**sizes, "head_dim": 16, **options})
    for parameter in net.parameters():
        parameter.data.add_(0.04 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture
def z() -> Tensor:
    return torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(1))


Y = torch.tensor([0, 2, -1, 1])


@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize("what", ["a", "b", "ab"])
@pytest.mark.parametrize(("classes", "temperature"), [(3, 1.0), (3, 0.7), (0, 0.5)])
def test_guidance_is_the_straightforward_one(
    z: Tensor, classes: int, temperature: float, what: str, annealed: bool
) -> None:
    net = network(num_classes=classes)
    y = Y if classes else None
    ours = invert(net, z, y, Guidance(2.3, temperature, annealed, what))
    plain = Straightforward(net).reverse(z, y, 1.3, attn_temp=temperature, annealed=annealed, what=what)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(net.unpatchify(mine), theirs, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(ours[-1], invert(net, z, y)[-1], atol=1e-3)


def test_guidance_without_classes_and_temperature_does_nothing(z: Tensor) -> None:
    net = network()
    assert torch.equal(invert(net, z, None, Guidance(3.0))[-1], invert(net, z)[-1])


def test_weight_zero_is_the_unconditional_model(z: Tensor) -> None:
    net = network(num_classes=3)
    towards = invert(net, z, Y, Guidance(0.0, annealed=False))[-1]
    torch.testing.assert_close(towards, invert(net, z)[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pairwise", [False, True])
def test_both_references_agree(z: Tensor, pairwise: bool) -> None:
    net = network(nvp=False)
    net.var.uniform_(0.5, 2.0)
    plain = Straightforward(net, pairwise).reverse(z)
    torch.testing.assert_close(net.unpatchify(invert(net, z)[-1]), plain[-1], atol=1e-5, rtol=0)


def test_samples_do_not_depend_on_their_batch(z: Tensor) -> None:
    net, guide = network(num_classes=3), Guidance(1.5)
    whole = invert(net, z, Y, guide)[-1]
    parts = torch.cat([invert(net, z[a:b], Y[a:b], guide)[-1] for a, b in ((0, 1), (1, 4))])
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_a_broken_sample_leaves_the_others_alone(z: Tensor) -> None:
    net, clean = network(), z.clone()
    z[2] = float("nan")
    torch.testing.assert_close(invert(net, z)[-1][[0, 1, 3]], invert(net, clean)[-1][[0, 1, 3]], atol=1e-6, rtol=0)


def test_inputs_are_left_as_they_were(z: Tensor) -> None:
    net, before = network(num_blocks=1), z.clone()  # one block: identity order, where in-place writes would show
    invert(net, z)
    assert torch.equal(z, before)


def test_sampling_in_bfloat16_is_close(z: Tensor) -> None:
    net = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = invert(net, z)[-1]
    assert low.dtype == torch.float32
    error = (low - invert(net, z)[-1]).abs().max()
    assert 0 < error < 0.2


def test_cached_attention_is_the_parallel_one() -> None:
    torch.manual_seed(0)
    attention, x = CausalAttention(32, 16), torch.randn(3, 7, 32)
    cache = KVCache(2, 3, 2, 16, 7, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        qkv = attention.qkv(attention.norm(x))
        cache.attend(1, 0, torch.full((3, 96), 9.0))  # leftovers of an earlier sequence must not matter
        steps = torch.stack([attention.proj(cache.attend(1, i, qkv[:, i])) for i in range(7)], dim=1)
    torch.testing.assert_close(steps, attention(x), atol=1e-6, rtol=0)


def test_compute_dtype_follows_autocast() -> None:
    weight = torch.zeros(1)
    assert compute_dtype(weight) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(weight) == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"what": "ac"}, {"weight": float("inf")}])
def test_guidance_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"sampling\.guidance="):
        Guidance(**wrong)  # type: ignore[arg-type]


def test_compiled_blocks_sample_eagerly(z: Tensor) -> None:
    net = network(layers_per_block=1)
    expected = invert(net, z)[-1]
    for block in net.steps:
        block.compile(backend="eager")
    assert torch.equal(invert(net, z)[-1], expected)
