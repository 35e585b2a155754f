"""Sampling: token by token and window by window, guided and not, with one cache and rows that ignore one another."""

import pytest
import torch
from torch import Tensor

from lightningmodules.starflow.network import StarFlowNet
from lightningmodules.starflow.sampler import Guidance, Windows, inpaint, invert
from lightningmodules.starflow.straightforward import Straightforward
from tests.unit.test_starflow_network import OPTIONS, network

TEXT = {"txt_size": 2, "txt_dim": 5, "head_dim": 20}


def noise(net: StarFlowNet, rows: int = 4) -> tuple[Tensor, Tensor | None, Tensor | None]:
    made = torch.Generator().manual_seed(1)
    z = torch.randn(rows, net.tokens, net.dims, generator=made)
    if not net.txt_dim:
        return z, None, None
    y, null = torch.randn(2, rows, net.txt_size, net.txt_dim, generator=made).unbind()
    return z, y, null


@pytest.mark.parametrize("name", OPTIONS)
def test_samples_are_the_straightforward_ones(name: str) -> None:
    net = network(**OPTIONS[name])
    z, y, null = noise(net)
    for omega, temperature in ((1.7, 1.0), (0.0, 0.8)):
        ours = invert(net, z, y, null, Guidance(1 + omega), temperature=temperature)
        plain = Straightforward(net).reverse(z, y, null, omega if net.txt_dim else 0.0, temperature=temperature)
        for mine, theirs in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["text-everywhere", "gqa-no-bias"])
def test_both_references_agree(name: str) -> None:
    net = network(**OPTIONS[name])
    z, y, null = noise(net)
    one, other = (Straightforward(net, batched).reverse(z, y, null, 1.5)[-1] for batched in (False, True))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["precision", "plain"])
@pytest.mark.parametrize("blocks", ["all", "deep"])
def test_guidance_acts_in_the_blocks_it_should(rule: str, blocks: str) -> None:
    net = network(**TEXT, cond_top_only=False)
    z, y, null = noise(net)
    ours = invert(net, z, y, null, Guidance(3.0, rule, blocks))
    plain = Straightforward(net).reverse(z, y, null, 2.0, rule=rule, deep_only=blocks == "deep")
    torch.testing.assert_close(ours[-1], plain[-1], atol=2e-5, rtol=1e-5)
    assert not torch.allclose(ours[-1], invert(net, z, y)[-1], atol=1e-3)


def test_weight_zero_is_the_unconditional_model() -> None:
    net = network(**TEXT)
    z, y, null = noise(net)
    towards = invert(net, z, y, null, Guidance(0.0, "plain"))[-1]
    torch.testing.assert_close(towards, invert(net, z, null)[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [TEXT, {"sos": False}, {"rope": False}, {"hf_style_rope": True}])
@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_windows_equal_the_sequence(options: dict[str, object], size: int) -> None:
    net = network(**options)
    z, y, null = noise(net)
    expected = invert(net, z, y, null, Guidance(2.0))[-1]
    exact = invert(net, z, y, null, Guidance(2.0), windows=Windows(size, 0.0, "all"))[-1]
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=0)
    loose = invert(net, z, y, null, Guidance(2.0), windows=Windows(size, 1e-3, "all"))[-1]
    assert (loose - expected).abs().max() < 2e-3 * (1 + expected.abs().max())


def test_windows_stop_early_and_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = network(layers_per_block=[1, 1, 2], spread=0.02), []
    from lightningmodules.starflow import sampler

    plain = sampler._Reader.window

    def count(self: object, i: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((len(self.layers), tokens.shape[1]))  # type: ignore[attr-defined]
        return plain(self, i, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(sampler._Reader, "window", count)
    invert(net, noise(net)[0], windows=Windows(16, 1e-3, "shallow"))
    assert {layers for layers, _ in seen} == {1}  # the deep block went token by token
    assert len(seen) < 2 * 8


@pytest.mark.parametrize("windows", [Windows(), Windows(5, 1e-3, "all")])
def test_samples_do_not_depend_on_their_batch(windows: Windows) -> None:
    net = network(**TEXT)
    z, y, null = noise(net)
    assert y is not None
    assert null is not None
    whole = invert(net, z, y, null, Guidance(1.5), windows=windows)[-1]
    parts = [invert(net, z[a:b], y[a:b], null[a:b], Guidance(1.5), windows=windows)[-1] for a, b in ((0, 1), (1, 4))]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("windows", [Windows(), Windows(5, 1e-3, "all")])
def test_a_broken_sample_leaves_the_others_alone(windows: Windows) -> None:
    net = network()
    z = noise(net)[0]
    clean = z.clone()
    z[2] = float("nan")
    ours, expected = (invert(net, part, windows=windows)[-1][[0, 1, 3]] for part in (z, clean))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_inputs_are_left_as_they_were_and_results_can_be_differentiated() -> None:
    net = network(num_blocks=1, seq_order="R2L")  # identity order, where in-place writes would show
    z = noise(net)[0]
    before = z.clone()
    x = invert(net, z)[-1]
    assert torch.equal(z, before)
    (x.requires_grad_() * 2).sum().backward()


def test_another_shape_of_picture() -> None:
    net = network()
    z = noise(net)[0]
    wide = net.unpatchify(invert(net, z, size=(2, 8))[-1], (2, 8))
    assert wide.shape == (4, 3, 2, 8)
    torch.testing.assert_close(net(wide).z, z, atol=2e-5, rtol=0)
    assert not torch.allclose(wide.flatten(), invert(net, z)[-1].flatten())
    with pytest.raises(ValueError, match="Noise for 16 tokens"):
        invert(net, z, size=(3, 4))


def test_sampling_in_bfloat16_is_close() -> None:
    net = network(**TEXT, use_qk_norm=True)
    z, y, null = noise(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = invert(net, z, y, null, Guidance(1.5))[-1]
    assert low.dtype == torch.float32
    assert 0 < (low - invert(net, z, y, null, Guidance(1.5))[-1]).abs().max() < 0.2


def test_compiled_blocks_sample_eagerly() -> None:
    net = network()
    z = noise(net)[0]
    expected = invert(net, z)[-1]
    for block in net.steps:
        block.compile(backend="eager")
    assert torch.equal(invert(net, z)[-1], expected)


def test_inpainting_keeps_what_is_known_and_prefers_what_fits() -> None:
    net = network(spread=0.15)
    z, _, _ = noise(net)
    known = net.unpatchify(invert(net, z)[-1])
    missing = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    missing[..., 1:3, 1:3] = True
    made = torch.Generator().manual_seed(3)
    noises = [torch.randn(z.shape, generator=made) for _ in range(8)]
    uniforms = [torch.rand(4, generator=made) for _ in range(8)]
    x, accepted = inpaint(net, known, missing, noises, uniforms)
    assert torch.equal(torch.where(missing, 0, x), torch.where(missing, 0, known))
    assert (torch.where(missing, x - known, 0).abs().amax((1, 2, 3)) > 1e-3).all()
    assert ((accepted >= 0) & (accepted <= 1)).all()
    everything = inpaint(net, known, torch.ones_like(missing), noises, uniforms)
    assert everything[1].tolist() == [1.0] * 4  # nothing is put back, so nothing speaks against a proposal
    torch.testing.assert_close(everything[0], net.unpatchify(invert(net, noises[-1])[-1]))
    nothing = inpaint(net, known, torch.zeros_like(missing), noises, uniforms)[0]
    assert torch.equal(nothing, known)


@pytest.mark.parametrize("wrong", [{"weight": -0.1}, {"rule": "other"}, {"blocks": "shallow"}])
def test_guidance_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"sampling\.guid"):
        Guidance(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"size": -1}, {"tolerance": -1.0}, {"blocks": "deep"}])
def test_windows_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"sampling\.jacobi_window"):
        Windows(**wrong)  # type: ignore[arg-type]
