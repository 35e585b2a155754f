"""The flow as mathematics: invertible, causal, with the log-determinant of its Jacobian."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightningmodules.shared import flow
from lightningmodules.tarflow import process
from lightningmodules.tarflow.network import TarFlowNet
from lightningmodules.tarflow.sampler import invert
from lightningmodules.tarflow.straightforward import Straightforward


def network(*, spread: float = 0.04, seed: int = 0, **options: object) -> TarFlowNet:
    """A small network away from its initial weights, at which it would be a constant map."""
    torch.manual_seed(seed)
    sizes = {"in_channels": 1, "img_size": 8, "patch_size": 2, "channels": 32, "num_blocks": 3, "layers_per_block": 1}
    net = TarFlowNet(**{**sizes, "head_dim": 16, **options})
    for parameter in net.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))
    return net.eval()


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("classes", [0, 4])
def test_forward_undoes_reverse(nvp: bool, classes: int) -> None:
    net, z = network(nvp=nvp, num_classes=classes), torch.randn(5, 16, 4)
    y = torch.tensor([0, 3, -1, 1, 2]) if classes else None
    image = net.unpatchify(invert(net, z, y)[-1])
    torch.testing.assert_close(net(image, y).z, z, atol=2e-5, rtol=0)


@pytest.mark.parametrize("nvp", [True, False])
def test_logdet_is_that_of_the_jacobian(nvp: bool) -> None:
    net = network(nvp=nvp, img_size=2, patch_size=1, channels=16, head_dim=8, num_blocks=2)
    x = torch.randn(1, 1, 2, 2)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v).z.flatten(), x).reshape(4, 4)
    expected = torch.linalg.slogdet(jacobian.double()).logabsdet / 4
    torch.testing.assert_close(net(x).logdet[0].double(), expected, atol=1e-6, rtol=0)
    assert nvp or net(x).logdet.abs().max() == 0


def test_a_token_depends_on_itself_and_those_before_in_the_order_of_the_block() -> None:
    net, x = network(), torch.randn(1, 16, 4)
    for block in net.steps:
        before = block.order(block(x)[0])
        moved = block.order(x).clone()
        moved[:, 7] += 1.0
        after = block.order(block(block.order(moved))[0])
        changed = (after - before).abs().amax(dim=(0, 2)) > 0
        assert changed.tolist() == [False] * 7 + [True] * 9
        assert torch.equal(block.order(block(x)[0])[:, 0], block.order(x)[:, 0])  # the first passes unchanged


def test_blocks_alternate_their_order() -> None:
    assert [block.flipped for block in network(num_blocks=4).steps] == [False, True, False, True]


def test_a_dropped_label_is_no_label() -> None:
    net, x = network(num_classes=3), torch.randn(4, 1, 8, 8)
    dropped, none = net(x, torch.full((4,), -1)), net(x)
    assert torch.equal(dropped.z, none.z)
    assert torch.equal(dropped.logdet, none.logdet)
    mixed = net(x, torch.tensor([-1, 2, -1, 0]))
    torch.testing.assert_close(mixed.z[::2], none.z[::2], atol=1e-6, rtol=0)
    assert not torch.allclose(mixed.z[1::2], none.z[1::2], atol=1e-3)


@pytest.mark.parametrize("label", [-2, 3])
def test_labels_that_name_no_class_are_refused(label: int) -> None:
    with pytest.raises(ValueError, match=rf"Label {label} came.*0\.\.2"):
        network(num_classes=3).check_labels(torch.tensor([0, label]))


def test_agrees_with_the_straightforward_implementation() -> None:
    net, x = network(in_channels=3, img_size=6, num_classes=2), torch.randn(3, 3, 6, 6)
    y = torch.tensor([1, -1, 0])
    z, blocks, logdet = Straightforward(net).forward(x, y)
    ours = net(x, y)
    torch.testing.assert_close(ours.z, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.logdet, logdet, atol=1e-6, rtol=0)
    for mine, plain in zip(ours.blocks, blocks, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=0)


def test_every_parameter_learns() -> None:
    net, x = network(num_classes=3), torch.randn(4, 1, 8, 8)
    out = net(x, torch.tensor([0, 1, 2, -1]))
    flow.nll(out.z, out.logdet).mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_bfloat16_keeps_the_determinant_fine() -> None:
    net, x = network(img_size=16, spread=0.05), torch.randn(6, 1, 16, 16)
    for block in net.steps:
        block.proj_out.bias.data[:4] += 1.0  # log-scales near 1, so that |logdet| is near 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x)
    full = net(x)
    assert low.logdet.dtype == low.z.dtype == torch.float32
    assert (low.logdet != low.logdet.to(torch.bfloat16).float()).any()
    # 256 log-scales with rounding errors of up to 2^-9 each average out; a bfloat16 sum is known to 2^-7 only
    assert full.logdet.abs().min() > 2.5
    assert (low.logdet - full.logdet).abs().max() < 2.0**-10


def test_starts_as_a_constant_affine_map() -> None:
    torch.manual_seed(0)
    net = TarFlowNet(1, 8, 2, 32, 2, 1, head_dim=16, num_classes=3)
    a, b = net(torch.randn(2, 1, 8, 8)), net(torch.randn(2, 1, 8, 8))
    assert a.logdet.std() == 0
    assert torch.equal(a.logdet, b.logdet)
    assert a.logdet[0] != 0  # the bias of the last layer keeps its default
    assert 0.005 < net.steps[0].pos_embed.std() < 0.02


def test_patches_are_channel_first_and_row_major() -> None:
    image = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    tokens = process.patchify(image, 2)
    assert torch.equal(tokens, F.unfold(image, 2, stride=2).transpose(1, 2))
    assert torch.equal(process.unpatchify(tokens, 2, 3), image)


def test_bits_per_dimension() -> None:
    assert flow.bits_per_dim(torch.tensor(-3.698), 256) == pytest.approx(2.99, abs=0.002)
    uniform = torch.tensor(0.5 * 0.0 - 0.5 * math.log(2 * math.pi) + math.log(2.0))  # density 1/2 on [-1, 1]
    assert flow.bits_per_dim(uniform, 17) == pytest.approx(math.log2(17), abs=1e-5)


def test_tweedie_is_exact_for_a_gaussian() -> None:
    var, sigma, noisy = 0.7, 0.5, torch.randn(3, 1, 2, 2, dtype=torch.float64)
    grad = noisy / (var + sigma**2) / 4  # of 0.5 x^2 / (var + sigma^2), per dimension
    torch.testing.assert_close(flow.tweedie(noisy, grad, sigma), noisy * var / (var + sigma**2))


def test_variance_moves_towards_the_second_moment() -> None:
    var = torch.ones(2, 3)
    for _ in range(200):
        var = process.updated_variance(var, torch.full((2, 3), 4.0))
    torch.testing.assert_close(var, torch.full((2, 3), 4.0))
    assert process.updated_variance(torch.ones(1), torch.zeros(1)) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("annealed", "what", "expected"),
    [(False, "ab", [[2.0] * 4] * 4), (True, "b", [[0, 0, 0.5, 0.5], [0, 0, 1, 1], [0, 0, 1.5, 1.5], [0, 0, 2, 2]])],
)
def test_guidance_table(annealed: bool, what: str, expected: list[list[float]]) -> None:
    table: Tensor = process.guidance_strengths(3.0, what, annealed=annealed, tokens=5, dims=2, nvp=True)
    assert table.tolist() == expected
    assert process.guidance_strengths(3.0, "ab", annealed=False, tokens=5, dims=2, nvp=False).shape == (4, 2)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8 pixels cannot be cut"):
        TarFlowNet(1, 8, 3, 32, 1, 1)
    with pytest.raises(ValueError, match=r"channels=40 is not a multiple of head_dim=16 .*32"):
        TarFlowNet(1, 8, 2, 40, 1, 1, head_dim=16)
