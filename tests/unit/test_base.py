"""What every room inherits: averages, swaps, noise, codecs, curves."""

import pytest
import torch

from lightningmodules.shared.codecs import Pixels
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import ReplayNoise, SampleNoise, fold_seed
from tests.toy import Toy


def test_average_follows_by_the_decay_and_stays_float32() -> None:
    room = Toy(ema_decays=(0.5,))
    room.configure_model()
    room.updates = 1000
    start = room.net.inner.weight.detach().clone()
    with torch.no_grad():
        room.net.inner.weight += 1.0
    room.update_ema()
    room.update_ema()
    shadow = room.shadows["ema0/5"]["net/inner/weight"]
    torch.testing.assert_close(shadow, start + 0.75)
    assert shadow.dtype == torch.float32


def test_swap_is_exact_nested_and_in_place() -> None:
    room = Toy()
    room.configure_model()
    weight = room.net.inner.weight
    raw, place = weight.detach().clone(), weight.data_ptr()
    room.shadows["ema0/9"]["net/inner/weight"].data.fill_(9.0)
    room.shadows["ema0/99"]["net/inner/weight"].data.fill_(99.0)
    with room.use_weights("ema"):
        assert room.active_weights == "ema0.9"
        assert (weight == 9.0).all()
        with room.use_weights("raw"):
            assert torch.equal(weight, raw)
        with room.use_weights("ema0.99"):
            assert (weight == 99.0).all()
        assert (weight == 9.0).all()
    assert torch.equal(weight, raw)
    assert weight.data_ptr() == place
    assert (room.weights("ema0.99")["net.inner.weight"] == 99.0).all()


def test_swap_back_after_an_error() -> None:
    room = Toy()
    room.configure_model()
    raw = room.net.inner.weight.detach().clone()
    with pytest.raises(RuntimeError, match="boom"), room.use_weights("ema0.99"):
        raise RuntimeError("boom")
    assert room.active_weights == "raw"
    assert torch.equal(room.net.inner.weight, raw)


def test_unknown_weights_are_named() -> None:
    room = Toy()
    with pytest.raises(ValueError, match=r"this run has ema, raw, ema0\.9, ema0\.99"):
        room.resolve_weights("ema0.5")


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, second, other = Toy(), Toy(), Toy()
    other.run_seed = 1
    for room in (first, second, other):
        torch.randn(3)
        room.configure_model()
    assert torch.equal(first.net.inner.weight, second.net.inner.weight)
    assert not torch.equal(first.net.inner.weight, other.net.inner.weight)


def test_noise_belongs_to_the_seed_not_to_the_batch() -> None:
    together = SampleNoise([3, 5, 8])
    alone = SampleNoise([5])
    assert torch.equal(together.normal(4)[1:2], alone.normal(4))
    assert torch.equal(together.uniform(2, 2)[1:2], alone.uniform(2, 2))
    assert fold_seed(1, 2) != fold_seed(2, 1)
    assert 0 <= fold_seed(-1) < 2**63


def test_replay_refuses_other_shapes_and_running_dry() -> None:
    replay = ReplayNoise([torch.ones(2, 3)])
    with pytest.raises(ValueError, match="next recorded draw"):
        replay.normal(4)
    with pytest.raises(ValueError, match="every recorded one"):
        replay.normal(3)


@pytest.mark.parametrize(("levels", "white"), [(256, 255), (17, 240), (2, 255)])
def test_codec_is_lossless_and_dequantisation_stays_in_its_bin(levels: int, white: int) -> None:
    codec = Pixels(8, 1, levels=levels, white=white)
    values = torch.arange(64).reshape(1, 1, 8, 8) % levels
    batch = {"image": (values * (white // (levels - 1))).to(torch.uint8)}
    x = codec.encode(batch)
    assert x.min() == -1.0
    assert torch.equal(codec.decode(x), batch["image"])
    for u in (0.001, 0.999):
        spread = codec.dequantize(batch, torch.full_like(x, u))
        assert torch.equal(((spread + 1) * levels / 2).floor().long(), values)


def test_codec_refuses_levels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="levels=17"):
        Pixels(8, 1, levels=17, white=255)


def test_condition_slices_and_joins() -> None:
    condition = Condition(label=torch.arange(4))
    assert len(condition) == 4
    joined = Condition.cat([condition[:1], condition[3:]])
    assert joined.label is not None
    assert joined.label.tolist() == [0, 3]
