"""The room: one switch between masked diffusion and CADD, its loss, bound, samples, weights and refusals."""

import functools
import math
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightningmodules.cadd import process, weights
from lightningmodules.cadd.module import Cadd
from lightningmodules.cadd.network import CaddNet
from lightningmodules.cadd.sampler import guided
from lightningmodules.cadd.straightforward import Straightforward
from lightningmodules.shared.codecs import HOLE, PixelTokens, Tokens
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.masking import Cosine, LogLinear
from lightningmodules.shared.noise import SampleNoise

V, L, ROWS = 6, 8, 4


class Letters:
    size = V

    def decode(self, tokens: Any) -> str:
        return "".join("abcdef"[token] for token in tokens)


def room(seed: int = 0, net: dict[str, Any] | None = None, shake: float = 0.2, **options: Any) -> Cadd:
    arguments = {"hidden": 16, "blocks": 2, "heads": 2, "cond_dim": 8, "length": L, "dropout": 0.0} | (net or {})
    module = Cadd(
        net=functools.partial(CaddNet, **arguments),
        codec=Tokens(Letters(), L),
        optimizer=torch.optim.AdamW,
        **options,
    )
    module.run_seed = seed
    module.configure_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.net.named_parameters():
            if not name.startswith(("latent_gate", "time_map")):
                parameter += shake * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def batch(rows: int = ROWS) -> dict[str, Any]:
    tokens = torch.randint(V, (rows, L), generator=torch.Generator().manual_seed(9))
    return {"tokens": tokens, "valid": torch.ones(rows, L, dtype=torch.bool), "key": [f"k{i}" for i in range(rows)]}


def value(module: Cadd, data: dict[str, Any], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return module.loss(data)["loss"]


def test_ranks_share_the_times_of_an_update_evenly() -> None:
    """Each has small and large ones, since a row costs what is masked in it; together they are one in every part."""
    module, found = room(), []
    for rank in range(2):
        module._trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, global_rank=rank)  # type: ignore[assignment]
        module.micro_batches = 1
        found.append(((1.0 - module._times(4)) * 8).floor().long())
    assert torch.cat(found).sort().values.tolist() == list(range(8))
    assert found[0].diff().tolist() == found[1].diff().tolist() == [2, 2, 2]


# ---- the switch ----


def test_off_is_masked_diffusion_written_down_plainly() -> None:
    module, data = room(latent="off"), batch()
    torch.manual_seed(3)
    u = (torch.rand(ROWS, dtype=torch.float64) / ROWS + torch.arange(ROWS) / ROWS) % 1
    t = 1 - (1 - 1e-3) * u
    masked = torch.rand(ROWS, L) < t.float().unsqueeze(1)
    logits = module.net(data["tokens"].masked_fill(masked, V))[..., :V]
    nats = -logits.log_softmax(-1).gather(-1, data["tokens"].unsqueeze(-1)).squeeze(-1)
    expected = (nats * masked / t.float().unsqueeze(1)).sum() / (ROWS * L)
    torch.testing.assert_close(value(module, data, 3), expected)


def test_an_independent_implementation_agrees() -> None:
    module, data = room(latent="off"), batch()
    plain = Straightforward(module.net, V)
    tokens = data["tokens"].masked_fill(torch.rand(ROWS, L) < 0.5, V)
    sigma = torch.tensor([0.0, 0.3, 1.0, 5.0])
    torch.testing.assert_close(plain.logits(tokens, sigma), module.net(tokens, sigma), atol=1e-5, rtol=1e-4)
    drawn, evaluations = plain.sample(2, L, 12)
    assert drawn.max() < V
    assert 2 <= evaluations <= 13


def test_a_closed_gate_is_the_masked_model_bit_for_bit() -> None:
    """A pretrained masked model continues as CADD exactly where it was, whatever the latent."""
    off, gated = room(latent="off"), room(latent="on", latent_gate=0.0)
    data = batch()
    assert set(gated.net.state_dict()) - set(off.net.state_dict()) == set(weights.NEW)
    assert torch.equal(value(off, data, 5), value(gated, data, 5))
    settings: dict[str, Any] = {"steps": 5, "cache": False}
    model_tokens = off.sample([1, 2], **settings)
    # The latent's draws shift the noise of later steps, so compare the first frame that tokens are drawn in.
    first = [module.trajectory([1, 2], **settings)[0] for module in (off, gated)]
    assert torch.equal(*first)
    assert model_tokens.shape == (2, L)
    with torch.no_grad():
        gated.net.latent_gate.fill_(1.0)
    assert not torch.equal(value(off, data, 5), value(gated, data, 5))


def test_the_open_gate_is_plain_addition() -> None:
    data = batch()
    plain = room(latent="on", time_conditioning=False)
    gated = room(latent="on", time_conditioning=False, latent_gate=1.0)
    torch.testing.assert_close(value(plain, data), value(gated, data))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": "uniform", "mse_coef": 0.1},
        {"latent": "selfcond"},
        {"latent_path": "flow", "latent_norm": "none", "alpha": Cosine()},
        {"latent": "off", "discrete_steps": 4, "alpha": LogLinear(1e-3)},
        {"latent_gate": 0.5, "latent_detach": True},
    ],
)
def test_every_variant_trains_all_it_has(options: dict[str, Any]) -> None:
    module = room(**options).train()
    terms = module.loss(batch(16))
    terms["loss"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.net.parameters())


def test_no_gradient_through_a_detached_latent() -> None:
    grads = []
    for detach in (False, True):
        module = room(latent_detach=detach)
        value(module, batch()).backward()
        grads.append(module.net.vocab_embed.embedding.grad)
    assert not torch.allclose(*grads)


def test_padding_and_given_tokens_are_neither_masked_nor_scored() -> None:
    module, data = room(), batch()
    data["valid"][:, 6:] = False
    data["given"] = torch.zeros(ROWS, L, dtype=torch.bool)
    data["given"][:, 0] = True
    before = value(module, data)
    changed = {**data, "tokens": data["tokens"].clone()}
    changed["tokens"][:, 6:] = (changed["tokens"][:, 6:] + 1) % V
    assert torch.equal(before, value(module, changed))
    changed["tokens"][:, 0] = (changed["tokens"][:, 0] + 1) % V
    assert not torch.equal(before, value(module, changed))  # given tokens are seen
    changed["tokens"][1, 3] = module.codec.mask_id  # as a tokenizer with a mask of its own may write
    assert module._eligible(changed, changed["tokens"])[1].tolist() == [False, True, True, False, True, True] + [
        False
    ] * (L - 6)


# ---- bound ----


def test_bound_is_right_for_a_model_that_knows_nothing_and_one_that_knows_all() -> None:
    nothing = room(shake=0.0, latent="off")
    torch.testing.assert_close(
        nothing.log_likelihood(batch(), seeds=range(ROWS)), torch.full((ROWS,), -L * math.log(V)).double()
    )
    data = {"tokens": torch.full((ROWS, L), 2)}
    all_ = room(shake=0.0, latent="on")
    with torch.no_grad():
        all_.net.output_layer.linear.bias[2] = 40.0
    torch.testing.assert_close(
        all_.log_likelihood(data, seeds=range(ROWS)), torch.zeros(ROWS).double(), atol=1e-6, rtol=0
    )


def test_bound_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = room().bound(batch(), seeds=range(ROWS))
    monkeypatch.setattr("lightningmodules.cadd.module.LOGITS", 5 * (V + 1))
    parts = room().bound(batch(), seeds=range(ROWS))
    torch.testing.assert_close(parts.cross_entropy, whole.cross_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.continuous, whole.continuous, rtol=1e-5, atol=1e-5)
    assert parts.continuous.sum() > 0


def test_bound_of_a_sampler_with_steps() -> None:
    """A network that ignores its input: what each step adds is known, the last one of a latent nothing."""
    module, data, steps = room(shake=0.0, latent="on"), batch(256), 4
    one = module.bound(data, seeds=range(256), draws=1, steps=1)
    torch.testing.assert_close(one.cross_entropy, torch.full((1, 256), L * math.log(V)).double())
    assert (one.continuous == 0).all()
    assert (one.t == 1).all()
    found = module.bound(data, seeds=range(256), draws=steps, steps=steps)  # every step once
    assert found.t.tolist() == [[(k + 1) / steps] * 256 for k in range(steps)]
    assert (found.continuous[0] == 0).all()
    assert found.cross_entropy.mean() == pytest.approx(L * math.log(V), rel=0.03)
    with torch.no_grad():
        table = module.latent_rows()
        error = (table[data["tokens"]] - table.mean(dim=0)).square().sum().item() / 256
    left = 1 - torch.arange(steps + 1).double() / steps  # of the signal, and of the tokens
    weight = process.squared_error_weight(left[1:], left[:-1])
    expected = error * float(((1 - left[:-1]) * weight).sum())
    assert found.continuous.mean(dim=1).sum().item() / steps == pytest.approx(expected, rel=0.03)
    assert module.log_likelihood(data, seeds=range(256), steps=64).mean() < 0


def test_bound_of_a_latent_counts_both_parts() -> None:
    """A network that ignores its input on uniform tokens: the cross-entropy is exact, the latent costs extra."""
    module = room(shake=0.0, latent="on")
    found = module.bound(batch(64), seeds=range(64), draws=8)
    torch.testing.assert_close(found.cross_entropy, torch.full((8, 64), L * math.log(V)).double())
    assert (found.continuous > 0).all()
    assert ((found.t > 0) & (found.t < 1)).all()
    assert found.tokens.tolist() == [L] * 64
    assert found.t.mean() == pytest.approx(0.5, abs=0.05)


# ---- samples ----

SETTINGS: list[dict[str, Any]] = [
    {},
    {"order": "entropy", "block": 4, "temperature": 0.7, "top_k": 3},
    {"order": "wino", "draft": 0.2, "verify": 0.4, "block": 4},
    {"order": "wino", "draft": 0.1, "verify": 0.3, "draft_by": "likeliest"},
    {"remask": "rescale", "remask_strength": 0.5},
    {"guidance": 2.0, "estimator": "soft", "latents": 2},
    {"estimator": "sampled", "eta": 0.3, "latent_top_k": 2, "latent_temperature": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("latent", ["on", "off", "selfcond"])
def test_samples_depend_on_their_seed_alone_and_keep_what_is_given(latent: Any, settings: dict[str, Any]) -> None:
    module = room(latent=latent, net={"num_classes": 3})
    given = torch.full((3, 6), -1)
    given[0, 2], given[1, :5], given[:, 3] = 4, 1, 5
    condition = Condition(label=torch.tensor([0, 2, -1]), prompt=given)
    together = module.sample([5, 6, 7], condition, steps=4, **settings)
    evaluations = module.evaluations
    assert together.shape == (3, L)
    assert together.min() >= 0
    assert together.max() < V
    assert torch.equal(together[:, :6][given >= 0], given[given >= 0])
    alone = module.sample([6], condition[1:2], steps=4, **settings)
    assert torch.equal(alone, together[1:2])
    assert module.evaluations[0] == evaluations[1]
    frames = module.trajectory([5, 6, 7], condition, steps=4, **settings)
    assert torch.equal(frames[-1], together)
    assert (frames[0] == V).any()


@pytest.mark.parametrize(
    ("options", "settings", "again"), [({"latent_path": "flow"}, {}, False), ({}, {"eta": 0.0}, False), ({}, {}, True)]
)
def test_noise_is_drawn_where_it_is_used(options: dict[str, Any], settings: dict[str, Any], again: bool) -> None:
    class Counted(SampleNoise):
        calls = 0

        def normal_at(self, where: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            self.calls += 1
            return super().normal_at(where, *shape, dtype=dtype)

    noise = Counted([0, 1])
    room(**options).sample([0, 1], steps=4, noise=noise, **settings)
    assert (noise.calls > 1) == again


@pytest.mark.parametrize("latent", ["on", "selfcond"])
def test_latents_stay_in_float32_under_bfloat16(latent: Any) -> None:
    module = room(latent=latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = module.sample([0, 1], steps=4, estimator="soft")
        soft = process.estimate(torch.zeros(2, V).log_softmax(dim=1), module.latent_rows(), "soft")
    assert tokens.max() < V
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft[0], module.latent_rows().mean(dim=0))


def test_one_step_and_the_number_of_evaluations() -> None:
    for latent in ("on", "off"):
        module = room(latent=latent)
        assert module.sample([0, 1], steps=1).max() < V
        assert module.evaluations.tolist() == [1, 1]
        module.sample([0], steps=64, cache=False)
        lone = int(module.evaluations)
        module.sample([0], steps=64)
        assert int(module.evaluations) == lone if latent == "on" else int(module.evaluations) <= L


def test_guidance_needs_two_evaluations_and_reaches_the_tokens() -> None:
    module = room(latent="off", net={"num_classes": 3}, shake=0.5)
    condition = Condition(label=torch.zeros(32, dtype=torch.int64))
    plain = module.sample(range(32), condition, steps=3)
    assert int(module.evaluations[0]) <= 3
    strong = module.sample(range(32), condition, steps=3, guidance=4.0)
    assert int(module.evaluations.max()) == 6
    assert not torch.equal(plain, strong)
    inside = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    inside[:, 2] = -torch.inf  # the mask, where it is one of the vocabulary
    led = guided(inside.log_softmax(dim=1), inside.roll(1, dims=0).log_softmax(dim=1), 2.0)
    torch.testing.assert_close(led.exp().sum(dim=1), torch.ones(2))
    assert led[:, 2].eq(-torch.inf).all()
    null = module.sample(range(32), module.null_condition(32), steps=3, guidance=4.0)
    assert torch.equal(null, module.sample(range(32), steps=3))


def test_text_and_pictures_of_tokens() -> None:
    codec = Tokens(Letters(), 4)
    assert codec.decode(torch.tensor([[0, 1, V, 5], [V, V, 2, V]])) == ["ab" + HOLE + "f", HOLE * 2 + "c" + HOLE]
    digits = PixelTokens(2, 1, 17, 240)
    image = torch.tensor([[[[0, 15], [120, 240]]]], dtype=torch.uint8)
    assert digits.encode({"image": image}).tolist() == [[0, 1, 8, 16]]
    assert torch.equal(digits.decode(digits.encode({"image": image})), image)
    assert digits.decode(torch.full((1, 4), 17)).unique().tolist() == [120]


# ---- weights ----


def test_official_checkpoints_start_a_run(tmp_path: Path) -> None:
    """Lightning checkpoint with a configuration object and averages as a list; wrapper; bare; exported."""
    off = room(latent="off", seed=4)
    state = off.net.state_dict()
    averages = [parameter.detach() + 1 for parameter in off.net.parameters()]
    lightning = {
        "state_dict": OrderedDict((f"backbone.{key}", tensor) for key, tensor in state.items()),
        "ema": {"decay": 0.9999, "num_updates": 3, "shadow_params": averages},
        "hyper_parameters": {"config": Path("stands for an object")},
    }
    torch.save(lightning, tmp_path / "best.ckpt")
    torch.save(state, tmp_path / "bare.pth")
    save_file({f"net.{key}": tensor for key, tensor in state.items()}, tmp_path / "weights.safetensors")
    for name, offset in (("best.ckpt", 1.0), ("bare.pth", 0.0), ("", 0.0)):
        module = room(latent="on", latent_gate=0.0, shake=0.0, start=str(tmp_path / name))
        torch.testing.assert_close(module.net.blocks[0].mlp[0].weight, state["blocks.0.mlp.0.weight"] + offset)
        assert not module.net.latent_gate.any()
    assert weights.infer(weights.to_official(state)) == {
        **{"hidden": 16, "blocks": 2, "heads": 2, "cond_dim": 8, "expansion": 4, "num_classes": 0},
        "learned_positions": False,
    }
    placed = room(latent="off", shake=0.0, start=str(tmp_path / "bare.pth"), net={"learned_positions": True})
    assert torch.equal(value(placed, batch(), 5), value(off, batch(), 5))
    assert weights.infer(placed.net.state_dict())["learned_positions"] is True
    weights.match(weights.translate(weights.to_official(state)), state)
    with pytest.raises(ValueError, match="no state dict of a masked-diffusion network"):
        weights.translate({"conv.weight": torch.zeros(1)})


def test_wrong_starts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        room(start=str(tmp_path / "nothing.ckpt"))
    (tmp_path / "broken.ckpt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        room(start=str(tmp_path / "broken.ckpt"))
    other = CaddNet(V + 4, 16, 2, 2, 8)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"know 10 tokens, mask included; the tokenizer of this run makes 7"):
        room(start=str(tmp_path / "other.pth"))


def test_a_checkpoint_executes_nothing(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "trap.ckpt").write_bytes(pickle.dumps({"state_dict": {}, "trap": Trap()}))
    with pytest.raises(ValueError, match=r"module\.start"):
        room(start=str(tmp_path / "trap.ckpt"))
    assert not (tmp_path / "sprung").exists()


# ---- mistakes ----


def test_mistakes_get_one_clear_message() -> None:
    module = room()
    with pytest.raises(ValueError, match=r"The prompt has 9 tokens, the model writes 8"):
        module.sample([0], Condition(prompt=torch.zeros(1, 9, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"holds the token 6; the tokenizer has 6"):
        module.sample([0], Condition(prompt=torch.tensor([[0, V]])))
    with pytest.raises(ValueError, match="nothing to draw"):
        module.sample([0], Condition(prompt=torch.zeros(1, L, dtype=torch.int64)))
    with pytest.raises(ValueError, match="1 seeds but 2 prompts"):
        module.sample([0], Condition(prompt=torch.zeros(2, 1, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"holds the token 7; the tokenizer has 6"):
        module.loss({"tokens": torch.full((1, L), 7)})
    empty = batch()
    empty["valid"][2] = False
    with pytest.raises(ValueError, match="The row k2 has no token that could be masked"):
        module.loss(empty)
    with pytest.raises(ValueError, match=r"rows of \(5,\) tokens"):
        module.loss({"tokens": torch.zeros(1, 5, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"module.net.length"):
        room(net={"length": 4})
    with pytest.raises(ValueError, match=r"module.net.latent_gate=0.0 would change nothing. Set module.latent_gate"):
        room(net={"latent_gate": 0.0})
    with pytest.raises(ValueError, match=r"module\.latent='maybe'"):
        room(latent="maybe")
    with pytest.raises(ValueError, match="needs labels"):
        room(net={"num_classes": 2}).loss(batch())
    labels = torch.zeros(ROWS, dtype=torch.int64).index_fill_(0, torch.tensor([1]), -2)
    with pytest.raises(ValueError, match="Label -2 came; the model has 2 classes"):
        room(net={"num_classes": 2}).loss({**batch(), "label": labels})
    with pytest.raises(ValueError, match=r"remask=cap masks nothing again with sampling.remask_strength=0"):
        module.sample([0], remask="cap")
    with pytest.raises(ValueError, match=r"sampling.remask=cap: order=wino masks again by its own rule"):
        module.sample([0], order="wino", remask="cap", remask_strength=0.1)
    with pytest.raises(ValueError, match="estimator='firm'"):
        module.sample([0], estimator="firm")
    with pytest.raises(ValueError, match=r"sampling.latent_top_k=-1: expected a number of tokens >= 0"):
        module.sample([0], latent_top_k=-1)
    with pytest.raises(ValueError, match=r"sampling.guidance=2: there is neither a class nor a prompt"):
        module.sample([0], guidance=2.0)
    apart = {"document": torch.zeros(ROWS, L, dtype=torch.int64), "position": torch.arange(L).expand(ROWS, L)}
    with pytest.raises(
        ValueError, match=r"learned_positions\) is learnt for places in a row.*Type data.documents=false"
    ):
        room(net={"learned_positions": True}).loss(batch() | apart)


def test_rows_of_lost_documents_count_for_nothing_where_losses_are_accepted() -> None:
    """A damaged document may fill whole rows; the run goes on with the others, and with none it stands still."""
    module, lost = room(latent="off"), batch()
    lost["valid"][2] = False
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(max_bad_fraction=0.1))  # type: ignore[assignment]
    assert value(module, lost) > 0
    bound = module.bound(lost, seeds=range(ROWS)).log_likelihood()
    assert bound[2] == 0
    assert (bound[[0, 1, 3]] < 0).all()
    lost["valid"][:] = False
    assert value(module, lost) == 0
