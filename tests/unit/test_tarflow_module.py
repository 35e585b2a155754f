"""The room: losses, likelihoods, classification, denoising, and what happens to samples that go wrong."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightningmodules.shared import flow
from lightningmodules.shared.codecs import Pixels
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import ReplayNoise, fold_seed
from lightningmodules.tarflow.module import TarFlow
from lightningmodules.tarflow.network import FlowOutput, TarFlowNet


def room(classes: int = 3, nvp: bool = True, **options: object) -> TarFlow:
    net = partial(TarFlowNet, 1, 8, 2, 32, 2, 1, head_dim=16, num_classes=classes, nvp=nvp)
    made = TarFlow(
        net=net, codec=Pixels(8, 1, levels=17, white=240), optimizer=partial(torch.optim.AdamW, lr=3e-3), **options
    )
    made.configure_model()
    torch.manual_seed(1)
    for parameter in made.net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def batch(count: int = 6) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(2)
    return {
        "image": (torch.randint(17, (count, 1, 8, 8), generator=made) * 15).to(torch.uint8),
        "label": torch.arange(count) % 3,
    }


def test_loss_terms() -> None:
    tarflow, data = room(), batch()
    torch.manual_seed(7)
    terms = tarflow.loss(data)
    assert set(terms) == {"loss", "logdet", "z2_block0", "z2_block1"}
    torch.manual_seed(7)
    noisy = tarflow.codec.encode(data) + 0.05 * torch.randn(6, 1, 8, 8)
    out = tarflow.net(noisy, data["label"])
    torch.testing.assert_close(terms["loss"], 0.5 * out.z.square().mean() - out.logdet.mean())
    torch.testing.assert_close(terms["loss"], 0.5 * terms["z2_block1"] - terms["logdet"])


def test_labels_drop_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tarflow, data, seen = room(label_drop=0.5), batch(600), []

    def spy(x: Tensor, y: Tensor) -> FlowOutput:
        seen.append(y)
        return FlowOutput(torch.zeros(600, 16, 4), [], torch.zeros(600))

    monkeypatch.setattr(tarflow.net, "forward", spy)
    for training in (True, False):
        tarflow.train(training).loss(data)
    assert float((seen[0] == -1).float().mean()) == pytest.approx(0.5, abs=0.08)
    assert torch.equal(seen[1], data["label"])


def test_bits_per_dimension_match_the_formula() -> None:
    tarflow, data = room(noise_type="uniform"), batch()
    bits = tarflow.bits_per_dim(data, seeds=range(6), conditional=False)
    again = torch.cat(
        [
            tarflow.bits_per_dim({k: v[i : i + 1] for k, v in data.items()}, seeds=[i], conditional=False)
            for i in range(6)
        ]
    )
    torch.testing.assert_close(bits, again, atol=1e-5, rtol=0)  # a function of image and seed alone
    nats = tarflow.log_likelihood(data, seeds=range(6), conditional=False)
    torch.testing.assert_close(bits, -nats / (64 * math.log(2)))
    assert not torch.allclose(bits, tarflow.bits_per_dim(data, seeds=range(6)), atol=1e-3)


def test_likelihoods_add_up_to_one() -> None:
    """The density of pictures of four pixels integrates to one, by importance sampling."""
    net = partial(TarFlowNet, 1, 2, 1, 16, 2, 1, head_dim=8)
    tarflow = TarFlow(net=net, codec=Pixels(2, 1, levels=2, white=1), optimizer=partial(torch.optim.AdamW))
    tarflow.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the initial maps, which are constants
        for parameter in tarflow.net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    points = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)) * 3.0  # importance sampling
    x = points.view(-1, 1, 2, 2)
    with torch.no_grad():
        out = tarflow.net(x)
        log_p = 4 * flow.log_prob_per_dim(flow.nll(out.z, out.logdet), 2)
    log_q = -0.5 * (points / 3).square().sum(1) - 2 * math.log(2 * math.pi) - 4 * math.log(3.0)
    assert (log_p - log_q).exp().mean() == pytest.approx(1.0, abs=0.03)


def test_prior_variance_is_part_of_the_likelihood_where_it_is_learnt() -> None:
    tarflow, data = room(nvp=False), batch()
    before = tarflow.log_likelihood(data, seeds=range(6))
    tarflow.net.var.fill_(4.0)
    after = tarflow.log_likelihood(data, seeds=range(6))
    assert not torch.allclose(before, after)


def test_variance_follows_training_updates() -> None:
    tarflow, data = room(nvp=False).train(), batch()
    optimizer = torch.optim.SGD(tarflow.net.parameters(), lr=0.0)
    tarflow._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda value, reduce_op: value))  # type: ignore[assignment]
    moments = []
    for _ in range(2):  # two micro-batches of one update
        tarflow.loss(data)
        moments.append(tarflow._moments[-1])
    tarflow.optimizer_step(0, 0, optimizer, None)
    torch.testing.assert_close(tarflow.net.var, 0.9 + 0.1 * (moments[0] + moments[1]) / 2)
    assert not tarflow._moments
    tarflow.eval().loss(data)
    assert not tarflow._moments  # validation leaves the prior alone


@pytest.mark.parametrize("options", [{}, {"nvp": False}, {"classes": 0, "noise_type": "uniform"}])
def test_what_goes_through_the_flow_comes_back(options: dict[str, object]) -> None:
    tarflow = room(**options)  # type: ignore[arg-type]
    tarflow.net.var.mul_(1.5 if "nvp" in options else 1.0)
    state = torch.get_rng_state()
    x, again = tarflow.reconstruct(batch())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, tarflow.reconstruct(batch())[0])
    assert x.shape == (6, 1, 8, 8)
    torch.testing.assert_close(x, again, atol=2e-5, rtol=0)


def test_a_sample_is_a_function_of_its_seed_and_label() -> None:
    tarflow, labels = room(), Condition(label=torch.tensor([0, 1, 2, -1]))
    whole = tarflow.sample([5, 6, 7, 8], labels, guidance=1.5)
    assert whole.shape == (4, 1, 8, 8)
    assert whole.abs().max() <= 1
    alone = tarflow.sample([7], labels[2:3], guidance=1.5)
    torch.testing.assert_close(whole[2:3], alone, atol=1e-5, rtol=0)
    assert torch.equal(tarflow.sample([8], None), tarflow.sample([8], tarflow.null_condition(1)))


def test_one_bad_sample_is_drawn_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tarflow, seeds = room(), [10, 11, 12]
    labels = Condition(label=torch.tensor([0, 1, 2]))
    clean = tarflow.sample(seeds, labels)
    prior = TarFlow._prior

    def broken(self: TarFlow, noise: object) -> Tensor:
        z = prior(self, noise)  # type: ignore[arg-type]
        if noise.seeds == seeds:  # type: ignore[attr-defined]
            z[1, 3, 0] = float("inf")
        return z

    monkeypatch.setattr(TarFlow, "_prior", broken)
    with pytest.warns(UserWarning, match="1 of 3 samples were not finite; drawn again"):
        mended = tarflow.sample(seeds, labels)
    torch.testing.assert_close(mended[[0, 2]], clean[[0, 2]], atol=0, rtol=0)
    torch.testing.assert_close(mended[1:2], tarflow.sample([fold_seed(11, 1)], labels[1:2]), atol=1e-5, rtol=0)
    assert tarflow.redrawn == 1


def test_hopeless_samples_become_grey_and_replayed_noise_is_left_alone() -> None:
    tarflow = room()
    tarflow.net.steps[0].proj_out.bias.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="not finite") as warned:
        assert tarflow.sample([1, 2]).abs().max() == 0
    assert "2 of 2 samples stay not finite" in str(warned[-1].message)
    assert tarflow.redrawn == 6
    assert tarflow.sample([1], noise=ReplayNoise([torch.zeros(1, 16, 4)])).isnan().any()


def test_denoising_follows_the_score_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tarflow, x, y = room(noise_std=0.2), torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, -1, 0])
    step, size = torch.zeros(5, 1, 8, 8), 1e-3
    step[:, 0, 4, 5] = size

    def log_p(v: Tensor) -> Tensor:
        with torch.no_grad():
            out = tarflow.net(v.double().float(), y)
        return -64 * flow.nll(out.z, out.logdet).double()

    slope = (log_p(x + step) - log_p(x - step)) / (2 * size)
    whole = tarflow._denoised(x, y, 0.9)
    torch.testing.assert_close((whole - x)[:, 0, 4, 5].double(), 0.9 * 0.04 * slope, atol=2e-3, rtol=0)
    monkeypatch.setattr(TarFlow, "_gradient_rows", lambda self: 2)
    torch.testing.assert_close(tarflow._denoised(x, y, 0.9), whole, atol=1e-5, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(tarflow._denoised(x.clone(), y.clone(), 0.9), whole, atol=1e-5, rtol=0)


def test_trajectory_ends_at_the_sample() -> None:
    tarflow = room()
    path = tarflow.trajectory([3, 4], Condition(label=torch.tensor([0, 1])))
    assert len(path) == 4  # noise, two blocks, denoised
    torch.testing.assert_close(path[-1].clamp(-1, 1), tarflow.sample([3, 4], Condition(label=torch.tensor([0, 1]))))
    assert len(tarflow.trajectory([3, 4], denoise=0.0)) == 3


def test_classification_finds_the_class_that_made_the_picture() -> None:
    torch.manual_seed(0)
    tarflow = room(noise_std=0.1, label_drop=0.0).train()
    levels = torch.tensor([2, 8, 14])
    optimizer = torch.optim.AdamW(tarflow.net.parameters(), lr=3e-3)

    def draw(count: int) -> dict[str, Tensor]:
        label = torch.randint(3, (count,))
        level = (levels[label].view(-1, 1, 1, 1) + torch.randint(-2, 3, (count, 1, 8, 8))).clamp(0, 16)
        return {"image": (level * 15).to(torch.uint8), "label": label}

    for _ in range(60):
        optimizer.zero_grad()
        tarflow.loss(draw(32))["loss"].backward()
        optimizer.step()
    tarflow.eval()
    held_out = draw(90)
    found = tarflow.classify(held_out, draws=2)
    assert (found == held_out["label"]).float().mean() > 0.95
    assert torch.equal(found, tarflow.classify(held_out, draws=2))  # the noise is seeded


def test_flops_count_the_matrix_products() -> None:
    tarflow = room()
    tokens, width = 15, 32
    per_block = 4 * width + width * 8 + 12 * width**2  # in, out, attention and perceptron
    assert tarflow.flops_per_sample() == 3 * 2 * (2 * tokens * per_block + 2 * tokens * (tokens + 1) * width)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"module\.noise_type='gauss'"):
        room(noise_type="gauss")
    with pytest.raises(ValueError, match=r"reads images of shape \(1, 8, 8\).*\(3, 8, 8\)"):
        TarFlow(net=partial(TarFlowNet, 1, 8, 2, 64, 1, 1), codec=Pixels(8), optimizer=torch.optim.AdamW).build()
    tarflow = room()
    with pytest.raises(ValueError, match="needs labels"):
        tarflow.loss({"image": batch()["image"]})
    with pytest.raises(ValueError, match="Label 3 came"):
        tarflow.sample([1], Condition(label=torch.tensor([3])))
    with pytest.raises(ValueError, match="2 seeds but 1 labels"):
        tarflow.sample([1, 2], Condition(label=torch.tensor([0])))
    with pytest.raises(ValueError, match=r"sampling\.denoise=-1"):
        tarflow.sample([1], denoise=-1.0)
    with pytest.warns(UserWarning, match="nothing to act on"):
        tarflow.sample([1], guidance=2.0)
    with pytest.raises(ValueError, match="Only a network that knows classes"):
        room(classes=0).classify(batch())
