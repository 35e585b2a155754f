"""The room: losses, conditions, likelihoods, denoising, and what happens to samples that go wrong."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lightningmodules.shared import flow
from lightningmodules.shared.autoencoder import AutoencoderKL
from lightningmodules.shared.codecs import Latents, Pixels
from lightningmodules.shared.conditioning import Condition
from lightningmodules.shared.noise import ReplayNoise, SampleNoise, fold_seed
from lightningmodules.shared.text_encoders import RandomBytes
from lightningmodules.starflow import process
from lightningmodules.starflow.module import StarFlow
from lightningmodules.starflow.network import StarFlowNet

NAMES = ("one", "two", "three")


def room(kind: str = "label", codec: Pixels | Latents | None = None, **options: object) -> StarFlow:
    told = {"label": {"txt_size": 1, "txt_dim": 4}, "text": {"txt_size": 6, "txt_dim": 16}, "none": {}}[kind]
    codec = codec or Pixels(4, 2, levels=17, white=240)
    net = partial(StarFlowNet, codec.channels, 4, 1, 40, 2, [1, 2], head_dim=20, **told)
    if kind == "text":
        options = {"text_encoder": partial(RandomBytes, 16, 6, layers=1), "class_names": NAMES, **options}
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    made = StarFlow(net=net, codec=codec, optimizer=optimizer, condition=kind, **options)  # type: ignore[arg-type]
    made.configure_model()
    torch.manual_seed(1)
    for parameter in made.net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def latents(**options: object) -> Latents:
    make = partial(AutoencoderKL, 1, 1, 3, (8, 8), 1, 4)
    return Latents(4, 3, scale=0.5, shift=0.1, autoencoder=make, pixels=Pixels(8, 1, 17, 240), **options)


def batch(count: int = 6) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(2)
    return {
        "image": (torch.randint(17, (count, 2, 4, 4), generator=made) * 15).to(torch.uint8),
        "label": torch.arange(count) % 3,
    }


def test_loss_terms() -> None:
    starflow, data = room(latent_norm=0.01), batch()
    torch.manual_seed(7)
    terms = starflow.loss(data)
    ranges = {f"sigma_{end}_block{k}" for end in ("min", "max") for k in (0, 1)}
    assert set(terms) == {"loss", "nll", "logdet", "z2"} | ranges
    torch.manual_seed(7)
    noisy = starflow.codec.encode(data) + 0.3 * torch.randn(6, 2, 4, 4)
    out = starflow.net(noisy, torch.eye(4)[data["label"]].unsqueeze(1))
    nll = 0.5 * out.z.square().mean() - process.log_det(out.scales).mean()
    torch.testing.assert_close(terms["nll"], nll)
    squares = starflow.net.patchify(noisy).square().mean() + out.inputs[1].square().mean()
    torch.testing.assert_close(terms["loss"], nll + 0.01 * squares)
    sigma = torch.exp(-out.scales[1])
    torch.testing.assert_close(terms["sigma_max_block1"], sigma.max())
    torch.testing.assert_close(terms["sigma_min_block1"], sigma.min())


@pytest.mark.parametrize("kind", ["label", "text"])
def test_conditions_drop_in_training_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    starflow, data, seen = room(kind, label_drop=0.5), batch(400), []
    plain = starflow.net.forward
    monkeypatch.setattr(starflow.net, "forward", lambda x, y: (seen.append(y), plain(x, y))[1])
    for training in (True, False):
        starflow.train(training).loss(data)
    assert starflow.told is not None
    null = starflow.told.null(400, torch.device("cpu"))
    dropped = (seen[0] == null).flatten(1).all(dim=1)
    assert float(dropped.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert torch.equal(seen[0][~dropped], seen[1][~dropped])
    assert not (seen[1] == null).flatten(1).all(dim=1).any()


def test_class_names_stand_for_classes_and_the_empty_caption_for_nothing() -> None:
    starflow = room("text")
    assert starflow.num_classes == 3
    by_class = starflow.sample([5, 6], starflow.condition([2, -1]), guidance=2.0)
    features, mask = RandomBytes(16, 6, layers=1).encode(["three", ""])
    by_text = starflow.sample([5, 6], Condition(text=features, text_mask=mask), guidance=2.0)
    torch.testing.assert_close(by_class, by_text)
    torch.testing.assert_close(starflow.sample([6]), starflow.sample([6], starflow.null_condition(1)))
    stored = starflow.loss({"image": batch()["image"][:2], "text_features": features.half(), "text_mask": mask})
    assert stored["loss"].isfinite()


def test_features_of_the_data_need_no_encoder() -> None:
    starflow = room("text", text_encoder=None, class_names=())
    features = torch.randn(6, 4, 16)  # shorter than txt_size: padded
    assert starflow.loss({**batch(), "text_features": features})["loss"].isfinite()
    assert starflow.sample([1], Condition(text=features[:1])).isfinite().all()
    with pytest.raises(ValueError, match="needs text_features, or captions"):
        starflow.loss(batch())
    with pytest.raises(ValueError, match=r"width 15 came, module\.net\.txt_dim is 16"):
        starflow.loss({**batch(), "text_features": features[..., :15]})


def test_latents_are_drawn_shifted_and_scaled() -> None:
    codec, noise = latents(), torch.randn(2, 3, 4, 4)
    stored = torch.randn(2, 6, 4, 4).half()
    mean, logvar = stored.float().chunk(2, dim=1)
    drawn = codec.encode({"latent": stored}, noise)
    torch.testing.assert_close(drawn, (mean + torch.exp(0.5 * logvar) * noise - 0.1) * 0.5)
    torch.testing.assert_close(codec.encode({"latent": stored}), (mean - 0.1) * 0.5)
    pictures = torch.randint(0, 17, (2, 1, 8, 8)).mul(15).to(torch.uint8)
    torch.testing.assert_close(codec.encode({"image": pictures}), (codec.moments(pictures)[0] - 0.1) * 0.5)
    again = codec.decode(codec.encode({"image": pictures}))
    assert again.shape == pictures.shape
    assert again.dtype == torch.uint8
    assert codec.white == 240
    with pytest.raises(ValueError, match=r"latents of shape \(3, 2, 2\), module\.codec expects \(3, 4, 4\)"):
        codec.encode({"latent": torch.zeros(1, 6, 2, 2)})
    with pytest.raises(ValueError, match=r"needs latents or pictures; the data gives \['label'\]"):
        codec.encode({"label": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"Type module\.codec\.weights=FOLDER"):
        Latents(4).decode(torch.zeros(1, 4, 4, 4))


def test_the_room_works_in_latent_space() -> None:
    starflow = room("label", latents())
    data = {"latent": torch.randn(4, 6, 4, 4).half(), "label": torch.tensor([0, 1, 2, 0])}
    assert starflow.loss(data)["loss"].isfinite()
    pictures = starflow.generate([1, 2], starflow.condition([0, 1]))
    assert pictures.shape == (2, 1, 8, 8)
    noise = SampleNoise([3, 4, 5, 6])
    x = starflow.codec.encode(data, noise.normal(3, 4, 4)) + 0.3 * noise.normal(3, 4, 4)  # type: ignore[call-arg]
    out = starflow.net(x, torch.eye(4)[data["label"]].unsqueeze(1))
    log_p = process.log_det(out.scales) - 0.5 * out.z.square().mean((1, 2)) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(starflow.log_likelihood(data, seeds=[3, 4, 5, 6]), 48 * log_p)
    assert starflow.likelihood_space == "noisy latents"
    assert starflow.classify(data).shape == (4,)
    state = torch.get_rng_state()
    x, again = starflow.reconstruct(data)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, starflow.reconstruct(data)[0])
    torch.testing.assert_close(x, again, atol=2e-5, rtol=0)


def test_likelihood_of_pixels_is_that_of_the_jacobian() -> None:
    starflow, data = room(noise_type="uniform"), batch(2)
    nats = starflow.log_likelihood(data, seeds=[0, 1])
    x = starflow.codec.dequantize(data, SampleNoise([0, 1]).uniform(2, 4, 4))  # type: ignore[union-attr]
    y = torch.eye(4)[data["label"]].unsqueeze(1)
    jacobian = torch.autograd.functional.jacobian(lambda v: starflow.net(v, y[:1]).z.flatten(), x[:1])
    logdet = torch.linalg.slogdet(jacobian.reshape(32, 32).double()).logabsdet
    z = starflow.net(x[:1], y[:1]).z.double()
    expected = -0.5 * z.square().sum() - 16 * math.log(2 * math.pi) + logdet - 32 * math.log(17 / 2)
    torch.testing.assert_close(nats[0].double(), expected, atol=1e-3, rtol=0)
    unknown = starflow.log_likelihood(data, seeds=[0, 1], conditional=False)
    assert not torch.allclose(nats, unknown)


def test_samples_depend_on_seed_and_condition_alone() -> None:
    starflow = room()
    labels = starflow.condition([0, 1, 2])
    assert labels is not None
    whole = starflow.sample([5, 6, 7], labels, guidance=1.5, jacobi_window=5)
    alone = starflow.sample([7], labels[2:3], guidance=1.5, jacobi_window=5)
    torch.testing.assert_close(whole[2:3], alone, atol=1e-5, rtol=0)
    sequential = starflow.sample([5, 6, 7], labels, guidance=1.5)
    torch.testing.assert_close(whole, sequential, atol=5e-4, rtol=0)
    assert torch.equal(starflow.sample([8]), starflow.sample([8], starflow.null_condition(1)))
    path = starflow.trajectory([5, 6, 7], labels, guidance=1.5)
    assert len(path) == 4
    torch.testing.assert_close(path[-1].clamp(-1, 1), sequential)


def test_one_bad_sample_is_drawn_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    starflow, seeds = room(), [10, 11, 12]
    clean = starflow.sample(seeds, starflow.condition([0, 1, 2]))
    prior = StarFlow._prior

    def broken(self: StarFlow, noise: SampleNoise, size: tuple[int, int]) -> Tensor:
        z = prior(self, noise, size)
        if getattr(noise, "seeds", None) == seeds:
            z[1, 3, 0] = float("inf")
        return z

    monkeypatch.setattr(StarFlow, "_prior", broken)
    with pytest.warns(UserWarning, match="1 of 3 samples were not finite; drawn again"):
        mended = starflow.sample(seeds, starflow.condition([0, 1, 2]))
    torch.testing.assert_close(mended[[0, 2]], clean[[0, 2]], atol=1e-5, rtol=0)
    again = starflow.sample([fold_seed(11, 1)], starflow.condition([1]))
    torch.testing.assert_close(mended[1:2], again, atol=1e-5, rtol=0)
    assert starflow.redrawn == 1
    assert not starflow.sample([1], noise=ReplayNoise([torch.full((1, 16, 2), float("inf"))])).isfinite().all()


def test_denoising_follows_the_score() -> None:
    starflow, x = room(noise_std=0.2), torch.randn(3, 2, 4, 4)
    y = torch.eye(4)[:3].unsqueeze(1)
    step, size = torch.zeros(3, 2, 4, 4), 1e-3
    step[:, 1, 2, 3] = size

    def log_p(v: Tensor) -> Tensor:
        with torch.no_grad():
            out = starflow.net(v, y)
            return -32 * flow.nll(out.z, process.log_det(out.scales)).double()

    slope = (log_p(x + step) - log_p(x - step)) / (2 * size)
    moved = starflow._denoised(x, y, 0.9) - x
    torch.testing.assert_close(moved[:, 1, 2, 3].double(), 0.9 * 0.04 * slope, atol=2e-3, rtol=0)


def test_an_overflow_is_explained_by_block_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    starflow, data = room(), batch()
    assert starflow.explain(data) is None
    block = starflow.net.steps[1]
    plain = block.forward

    def overflow(*given: object) -> tuple[Tensor, Tensor]:
        z, scale = plain(*given)  # type: ignore[arg-type, misc]
        scale[2, 5:] = float("inf")
        return z, scale

    monkeypatch.setattr(block, "forward", overflow)
    told = starflow.explain(data)
    assert told is not None
    assert told.startswith("flow block 1 of 2")
    assert "sample 2 of the batch" in told
    assert "token 5 of 16" in told


def test_inpainting_leaves_the_rest_alone() -> None:
    starflow, data = room(), batch(2)
    missing = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    missing[..., 2:, :] = True
    x, accepted = starflow.inpaint(data, missing, [1, 2], starflow.condition([0, 1]), iterations=4)
    clean = starflow.codec.encode(data)
    assert torch.equal(x[:, :, :2], clean[:, :, :2])
    assert not torch.allclose(x[:, :, 2:], clean[:, :, 2:])
    assert accepted.shape == (2,)
    with pytest.raises(ValueError, match="The mask is torch"):
        starflow.inpaint(data, missing.float(), [1, 2])
    with pytest.raises(ValueError, match="The mask is torch"):
        starflow.inpaint(data, missing[..., :3], [1, 2])
    with pytest.raises(ValueError, match=r"^iterations=0: expected at least 1"):
        starflow.inpaint(data, missing, [1, 2], iterations=0)
    latent = room("label", latents())
    picture = {"image": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}
    wide = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    wide[..., 3, 5] = True  # one pixel makes its latent one missing
    x, _ = latent.inpaint(picture, wide, [1], iterations=2, jacobi_window=4)
    changed = (x != latent.codec.encode(picture)).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[1, 2]]


def test_pictures_of_another_shape() -> None:
    starflow = room("text", null_caption="{ratio}")
    assert starflow.told is not None
    here = torch.device("cpu")
    assert not torch.equal(starflow.told.null(1, here, "4:1"), starflow.told.null(1, here, "2:1"))
    wide = starflow.sample([1, 2], starflow.condition([0, 1]), guidance=1.5, aspect="4:1")
    assert wide.shape == (2, 2, 2, 8)
    codec = latents(any_shape=True)
    bucket = {"image": torch.zeros(2, 1, 4, 16, dtype=torch.uint8), "label": torch.tensor([0, 1])}
    assert room("label", codec).train().loss(bucket)["loss"].isfinite()
    x, again = room("label", codec).reconstruct(bucket)
    assert x.shape == (2, 3, 2, 8)
    torch.testing.assert_close(x, again, atol=2e-5, rtol=0)
    said = starflow.caption(["three"], aspect="4:1").text
    assert said is not None
    torch.testing.assert_close(said, RandomBytes(16, 6, layers=1).encode(["three4:1"])[0])
    assert process.aspect_size("16:9", 32, 1) == (24, 43)
    assert process.aspect_size("2:3", 512, 8) == (624, 416)
    assert process.nearest_ratio(24, 43) == "16:9"
    with pytest.raises(ValueError, match="expected width:height"):
        starflow.sample([1], aspect="wide")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"module\.noise_type='gauss'"):
        room(noise_type="gauss")
    with pytest.raises(ValueError, match=r"module\.label_drop=2"):
        room(label_drop=2.0)
    with pytest.raises(ValueError, match="uniform spreads pixel values"):
        room("none", latents(), noise_type="uniform")
    with pytest.raises(ValueError, match=r"module\.condition=label and module\.net\.txt_dim=0"):
        StarFlow(
            net=partial(StarFlowNet, 2, 4, 1, 40, 2, 1, head_dim=20),
            codec=Pixels(4, 2, 17, 240),
            optimizer=torch.optim.AdamW,
            condition="label",
        ).build()
    with pytest.raises(ValueError, match=r"The network reads \(2, 4, 4\)"):
        StarFlow(
            net=partial(StarFlowNet, 2, 4, 1, 40, 2, 1, head_dim=20), codec=Pixels(8), optimizer=torch.optim.AdamW
        ).build()
    starflow = room()
    with pytest.raises(ValueError, match="needs labels"):
        starflow.loss({"image": batch()["image"]})
    with pytest.raises(ValueError, match="Label 3 came"):
        starflow.sample([1], starflow.condition([3]))
    with pytest.raises(ValueError, match="2 seeds but 1 conditions"):
        starflow.sample([1, 2], starflow.condition([0]))
    with pytest.raises(ValueError, match=r"sampling\.denoise=-1"):
        starflow.sample([1], denoise=-1.0)
    with pytest.warns(UserWarning, match="nothing to act on"):
        room("none").sample([1], guidance=2.0)
    with pytest.raises(ValueError, match="Only a model that knows classes"):
        room("none").classify(batch())
    with pytest.raises(ValueError, match="makes 7 tokens"):
        room("text", text_encoder=partial(RandomBytes, 16, 7)).sample([1])
