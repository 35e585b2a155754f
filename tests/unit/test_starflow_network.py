"""The flow as mathematics, with every option its checkpoints come in: invertible, causal, with its log-determinant."""

import math

import pytest
import torch
from torch import Tensor

from lightningmodules.shared import flow
from lightningmodules.starflow import process
from lightningmodules.starflow.network import StarFlowNet
from lightningmodules.starflow.sampler import invert
from lightningmodules.starflow.straightforward import Straightforward

SIZES = {"in_channels": 3, "img_size": 4, "patch_size": 1, "channels": 40, "num_blocks": 3, "layers_per_block": 1}
OPTIONS: dict[str, dict[str, object]] = {
    "released": {},
    "shift": {"sos": False},
    "exp": {"use_softplus": False, "soft_clip": 0.0},
    "rms": {"norm_type": "rms_norm", "use_final_norm": False},
    "no-norm": {"norm_type": "none"},
    "qk-post-swiglu": {"use_qk_norm": True, "use_post_norm": True, "use_swiglu": True},
    "gqa-no-bias": {"num_heads": 4, "num_kv_heads": 2, "use_bias": False},
    "half-split": {"hf_style_rope": True, "use_qk_norm": True},
    "learnt-places": {"rope": False},
    "learnt-places-shift": {"rope": False, "sos": False},
    "text-everywhere": {"txt_size": 4, "txt_dim": 5, "cond_top_only": False, "head_dim": 20},
    "text-on-top": {"txt_size": 4, "txt_dim": 5, "top_block_channels": 60, "head_dim": 20},
    "R2L-identity": {"seq_order": "R2L", "layers_per_block": [1, 0, 2]},
    "span": {"pt_seq_len": 7},
    "patches": {"img_size": 8, "patch_size": 2},
    "language-model": {
        "txt_size": 4,
        "txt_dim": 48,
        "head_dim": 20,
        "deep": {"channels": 48, "head_dim": 12, "num_kv_heads": 2, "rope_1d": True, "project_text": False},
    },
}


def network(spread: float = 0.06, seed: int = 0, **options: object) -> StarFlowNet:
    """A small network away from its initial weights, at which it would be a constant map."""
    torch.manual_seed(seed)
    net = StarFlowNet(**{**SIZES, "head_dim": 8, **options})
    for parameter in net.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))
    return net.eval()


def inputs(net: StarFlowNet, rows: int = 3) -> tuple[Tensor, Tensor | None]:
    made = torch.Generator().manual_seed(1)
    y = torch.randn(rows, net.txt_size, net.txt_dim, generator=made) if net.txt_dim else None
    return torch.randn(rows, net.in_channels, net.img_size, net.img_size, generator=made), y


@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_the_straightforward_implementation(name: str) -> None:
    net = network(**OPTIONS[name])
    x, y = inputs(net)
    z, blocks, scales = Straightforward(net).forward(x, y)
    ours = net(x, y)
    torch.testing.assert_close(ours.z, z, atol=2e-5, rtol=0)
    for mine, plain in zip([*ours.inputs[1:], ours.z], blocks, strict=True):
        torch.testing.assert_close(mine, plain, atol=2e-5, rtol=0)
    for mine, plain in zip(ours.scales, scales, strict=True):
        torch.testing.assert_close(-mine, plain, atol=1e-5, rtol=0)
    names, parameters = zip(*net.named_parameters(), strict=True)
    mine = torch.autograd.grad(flow.nll(ours.z, process.log_det(ours.scales)).mean(), parameters)
    total = torch.stack([scale.mean() for scale in scales]).sum()
    plain = torch.autograd.grad(0.5 * z.square().mean() + total, parameters)
    for key, a, b in zip(names, mine, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_undoes_reverse(name: str) -> None:
    net = network(**OPTIONS[name])
    noise, y = net.patchify(inputs(net)[0]), inputs(net)[1]
    image = net.unpatchify(invert(net, noise, y)[-1])
    torch.testing.assert_close(net(image, y).z, noise, atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"sos": False, "use_softplus": False}, {"rope": False, "use_qk_norm": True}])
def test_logdet_is_that_of_the_jacobian(options: dict[str, object]) -> None:
    net = network(in_channels=1, img_size=2, channels=16, num_blocks=2, spread=0.2, **options)
    x = torch.randn(1, 1, 2, 2)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v).z.flatten(), x).reshape(4, 4)
    expected = torch.linalg.slogdet(jacobian.double()).logabsdet / 4
    torch.testing.assert_close(process.log_det(net(x).scales)[0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sos", [True, False])
def test_a_token_depends_on_itself_and_those_before_in_the_order_of_the_block(sos: bool) -> None:
    net, x, size = network(sos=sos), torch.randn(1, 16, 3), (4, 4)
    for block in net.steps:
        before = block.order(block(x, None, size)[0])
        moved = block.order(x).clone()
        moved[:, 7] += 1.0
        after = block.order(block(block.order(moved), None, size)[0])
        changed = (after - before).abs().amax(dim=(0, 2)) > 0
        assert changed.tolist() == [False] * 7 + [True] * 9
        first_moves = not torch.equal(block.order(block(x, None, size)[0])[:, 0], block.order(x)[:, 0])
        assert first_moves is sos


@pytest.mark.parametrize(
    ("order", "blocks", "flipped"),
    [
        ("L2R", 6, [True, False, True, False, True, False]),
        ("R2L", 4, [False, True, False, True]),
        ("L2R", 3, [True, False, True]),
    ],
)
def test_blocks_alternate_their_order(order: str, blocks: int, flipped: list[bool]) -> None:
    net = network(seq_order=order, num_blocks=blocks)
    assert [block.flipped for block in net.steps] == flipped


def test_only_the_deep_block_hears_the_text() -> None:
    net = network(txt_size=2, txt_dim=3, head_dim=20)
    assert [block.text_dim for block in net.steps] == [0, 0, 3]
    x, y = inputs(net)
    a, b = net(x, y), net(x, y + 1)
    assert torch.equal(a.inputs[2], b.inputs[2])
    assert not torch.allclose(a.z, b.z, atol=1e-3)
    with pytest.raises(ValueError, match=r"conditioned on 3 features .* but nothing came"):
        net(x)


def test_positions_of_a_wide_picture_share_the_range_of_a_square_one() -> None:
    square = process.rotary_angles((4, 4), 0, 10, 8, with_text=True)
    wide = process.rotary_angles((2, 8), 3, 10, 8, with_text=True)
    assert square.shape == (16, 10)
    assert wide.shape == (19, 10)
    assert square[5].tolist()[:2] == [2.0, 2.0]  # row 1, column 1: 8 / 4 apart
    assert wide[3 + 8 + 3].tolist()[:2] == [2.0, 6.0]  # row 1, column 3
    assert wide[2, :2].tolist() == [0.0, 0.0]  # text tokens stand at the origin
    assert wide[2, 2] == pytest.approx(2 * 8 / 3)
    assert wide[3:, 2:].abs().max() == 0
    frequencies = process.rotary_angles((4, 4), 0, 12, 4, with_text=False)[5]
    assert frequencies[:6].tolist() == pytest.approx([10000 ** (-j / 6) for j in range(6)])


def test_scales_are_positive_one_at_zero_and_bounded_by_the_clip() -> None:
    zero = torch.zeros(1)
    for softplus in (True, False):
        assert process.sigma_of(zero, softplus=softplus) == pytest.approx(1.0, abs=1e-6)
        raw = torch.linspace(-30, 30, 61)
        log = process.log_sigma_of(raw, softplus=softplus)
        torch.testing.assert_close(log, process.sigma_of(raw.double(), softplus=softplus).log().float())
    assert process.log_sigma_of(torch.tensor(-500.0), softplus=True).isfinite()
    low, high = (process.sigma_of(process.soft_clip(torch.tensor(v), 4.0), softplus=True) for v in (-1e9, 1e9))
    assert float(low) == pytest.approx(0.031, abs=5e-4)
    assert float(high) == pytest.approx(4.55, abs=5e-3)


def test_guidance_is_a_product_of_gaussians() -> None:
    mu, sigma, other, spread, omega = torch.tensor(0.3), torch.tensor(0.8), torch.tensor(-0.4), torch.tensor(1.1), 2.0
    mean, scale = process.guide(mu, sigma, other, spread, omega)
    grid = torch.linspace(-6, 6, 24001, dtype=torch.float64)

    def log_p(centre: Tensor, width: Tensor) -> Tensor:
        return -0.5 * ((grid - centre) / width) ** 2

    product = torch.exp((1 + omega) * log_p(mu, sigma) - omega * log_p(other, spread))
    product /= product.sum()
    centre = (product * grid).sum()
    assert float(mean) == pytest.approx(float(centre), abs=1e-5)
    assert float(scale) == pytest.approx(float((product * (grid - centre) ** 2).sum().sqrt()), abs=1e-4)
    wider = process.guide(mu, torch.tensor(2.0), other, spread, omega)  # the ratio is clipped: plain guidance of means
    assert float(wider[1]) == 2.0
    assert float(wider[0]) == pytest.approx(0.3 + omega * 0.7)
    for rule in ("precision", "plain"):
        off = process.guide(mu, sigma, other, spread, 0.0, rule=rule)
        assert [float(value) for value in off] == pytest.approx([0.3, 0.8])
        alone = process.guide(mu, sigma, other, spread, -1.0, rule=rule)
        assert [float(value) for value in alone] == pytest.approx([-0.4, 1.1])


def test_patches_are_channel_last_and_row_major() -> None:
    image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    tokens = process.patchify(image, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[0, 4], image[0, :, 2:4, 2:4].permute(1, 2, 0).flatten())
    assert torch.equal(process.unpatchify(tokens, 2, (2, 3)), image)


def test_bfloat16_keeps_the_data_path_fine() -> None:
    net, (x, _) = network(), inputs(network())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x)
    assert low.z.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in (*low.inputs, *low.scales))
    assert (low.inputs[1] != low.inputs[1].bfloat16().float()).any()
    assert 0 < (low.z - net(x).z).abs().max() < 0.1


def test_starts_as_a_constant_affine_map() -> None:
    torch.manual_seed(0)
    net = StarFlowNet(**SIZES, head_dim=8)
    a, b = net(inputs(net)[0]), net(inputs(net)[0] + 1)
    assert all(torch.equal(mine, other) for mine, other in zip(a.scales, b.scales, strict=True))
    assert 0 < float(a.scales[0].detach().abs().max()) < 1


def test_flops_grow_with_layers_and_text() -> None:
    net = network(num_blocks=1)
    width, tokens = 40, 16
    matrices = 3 * width + 6 * width + 12 * width**2
    assert net.flops() == 2 * tokens * matrices + 2 * tokens * (tokens + 1) * width
    assert network(num_blocks=1, txt_size=4, txt_dim=5, head_dim=20).flops() > net.flops()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 42}, "channels=42 is not a multiple of head_dim=8.*40"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide the 4 query heads"),
        ({"head_dim": 10}, r"head_dim=10: .* 5 are left\. Set 4, 8, 12"),
        ({"txt_size": 2, "txt_dim": 3}, "head_dim=8: .* -4 are left after 8 for the text"),
        ({"txt_dim": 3}, r"txt_dim=3 needs module\.net\.txt_size"),
        ({"layers_per_block": [1, 1]}, r"layers_per_block=\[1, 1\] does not fit module\.net\.num_blocks=3"),
        ({"norm_type": "batch"}, "norm_type='batch': expected one of layer_norm"),
        ({"seq_order": "up"}, "seq_order='up': expected L2R"),
        ({"patch_size": 3}, "cannot be cut"),
        ({"deep": {"widht": 3}}, r"module\.net\.deep\.widht is no setting"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_bits_of_a_standard_normal() -> None:
    zero = flow.nll(torch.zeros(1, 2, 3), torch.zeros(1))
    assert float(flow.log_prob_per_dim(zero, 2)) == pytest.approx(-0.5 * math.log(2 * math.pi))
