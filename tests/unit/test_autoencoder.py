"""The autoencoder: diffusers' names and sizes, files, tiles; and the losses that train it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightningmodules.autoencoder import process
from lightningmodules.autoencoder.module import Autoencoder
from lightningmodules.autoencoder.network import VGG, ConvNext, Lpips, PatchCritic, RandomFeatures, Together
from lightningmodules.shared.autoencoder import FAMILIES, AutoencoderKL, load, save, translate
from lightningmodules.shared.codecs import Latents, Pixels

SMALL = partial(AutoencoderKL, 1, 1, 2, (8, 16), 1, 4)


def room(**options: object) -> Autoencoder:
    options = {
        "net": SMALL,
        "codec": Pixels(8, 1, 17, 240),
        "optimizer": partial(torch.optim.AdamW, lr=2e-3),
        **options,
    }
    made = Autoencoder(**options)  # type: ignore[arg-type]
    made.configure_model()
    return made


def batch(count: int = 4) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(2)
    return {"image": (torch.randint(17, (count, 1, 8, 8), generator=made) * 15).to(torch.uint8)}


def test_stable_diffusion_s_has_its_parameters_and_names() -> None:
    with torch.device("meta"):
        net = AutoencoderKL()
    assert sum(parameter.numel() for parameter in net.parameters()) == 83_653_863
    keys = net.state_dict().keys()
    assert len(keys) == 248
    assert {
        "encoder.down_blocks.0.resnets.1.conv2.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        "encoder.down_blocks.2.downsamplers.0.conv.weight",
        "encoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.up_blocks.3.resnets.2.norm1.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.bias",
        "decoder.mid_block.attentions.0.group_norm.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
    } <= keys
    assert net.factor == 8
    assert FAMILIES["sd"] == (net.scaling_factor, net.shift_factor)


def test_a_folder_of_diffusers_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SMALL()
    save(net, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "act_fn": "silu", "sample_size": 8}))
    x = torch.randn(2, 1, 8, 8)
    again = load(tmp_path)
    assert torch.equal(again.encode(x)[0], net.encode(x)[0])
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert again.fingerprint() == net.fingerprint()
    net.encoder.conv_in.bias.data[0] += 1
    assert again.fingerprint() != net.fingerprint()
    assert torch.equal(Latents(4, 2, weights=str(tmp_path)).autoencoder.encode(x)[0], again.encode(x)[0])


def test_older_names_and_our_own_weights_are_read(tmp_path: Path) -> None:
    net = SMALL()
    old = {}
    for key, value in net.state_dict().items():
        for name, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{name}.", f"attentions.0.{before}.")
        old[f"net.{key}"] = value[..., None, None] if "query.weight" in key else value.clone()
    assert "net.decoder.mid_block.attentions.0.proj_attn.bias" in old
    assert translate(old).keys() == net.state_dict().keys()
    save_file(old, tmp_path / "weights.safetensors")
    z = torch.randn(1, 2, 4, 4)
    assert torch.equal(load(tmp_path, SMALL).decode(z), net.decode(z))
    assert torch.equal(load(tmp_path / "weights.safetensors", SMALL).decode(z), net.decode(z))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no autoencoder: expected one of diffusion_pytorch_model"):
        load(tmp_path)
    save(SMALL(), tmp_path)
    with pytest.raises(ValueError, match="of another shape"):
        load(tmp_path, partial(AutoencoderKL, 1, 1, 2, (8, 8), 1, 4))
    with pytest.raises(ValueError, match=r"makes latents of 2 channels, module\.codec\.channels is 4"):
        Latents(4, 4, weights=str(tmp_path)).autoencoder.encode(torch.zeros(1))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path)
    with pytest.raises(ValueError, match="norm_num_groups=3 does not divide"):
        AutoencoderKL(norm_num_groups=3)
    with pytest.raises(ValueError, match="Pictures of 7x8 cannot be encoded"):
        SMALL().encode(torch.zeros(1, 1, 7, 8))


def test_tiles_join_without_seams() -> None:
    torch.manual_seed(0)
    net = partial(AutoencoderKL, 1, 1, 2, (8, 8), 1, 4, mid_block_add_attention=False)()
    for part in net.modules():  # what looks at the whole picture differs between tiles; convolutions must not
        if isinstance(part, nn.GroupNorm):
            part.forward = lambda x: x  # type: ignore[method-assign]
    z = torch.randn(1, 2, 150, 80)
    with torch.no_grad():
        whole, tiled = net.decode(z, tiled=False), net.decode(z, tiled=True)
        assert tiled.shape == (1, 1, 300, 160)
        error = (whole - tiled).abs() / whole.abs().max()
        # a tile's border sees padding instead of its neighbour; the blend gives it little weight
        assert error.mean() < 0.01
        assert torch.equal(net.decode(z[..., :60, :60], tiled=True), net.decode(z[..., :60, :60], tiled=False))
        big = torch.zeros(1, 2, 128, 4)
        assert torch.equal(net.decode(big), net.decode(big, tiled=True))


def test_divergence_and_critics_losses() -> None:
    mean, logvar = torch.tensor([[0.5]]), torch.tensor([[0.3]])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, torch.exp(0.5 * logvar)), normal(0.0, 1.0))
    torch.testing.assert_close(process.kl(mean, logvar), expected.squeeze())
    assert process.kl(torch.zeros(1), torch.zeros(1)) == 0
    assert process.discriminator_loss(torch.tensor([2.0]), torch.tensor([-3.0])) == 0
    assert process.discriminator_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert process.psnr(torch.tensor(4.0)) == 0
    calm = process.lecam(torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor(-2.0), torch.tensor(2.0))
    assert calm == 0
    wild = process.lecam(torch.tensor([3.0]), torch.tensor([-3.0]), torch.tensor(1.0), torch.tensor(-1.0))
    assert wild == 16 + 16


def test_each_term_trains_its_own_network() -> None:
    torch.manual_seed(0)
    vae = room(critic=partial(PatchCritic, 1, 8, 1), critic_weight=1.0, perceptual=partial(RandomFeatures, 1, 4))
    terms = vae.train().loss(batch())
    assert set(terms) == {"loss", "mse", "psnr", "kl", "scale", "perceptual", "gan", "critic", "lecam"}
    critic = list(vae.critic.parameters())  # type: ignore[union-attr]
    torch.manual_seed(1)
    joint = torch.autograd.grad(vae.loss(batch())["loss"], critic)
    torch.manual_seed(1)
    terms = vae.loss(batch())
    own = torch.autograd.grad(terms["critic"] + vae.lecam_weight * terms["lecam"], critic)
    for a, b in zip(joint, own, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-2)  # the running means moved a little in between
    assert torch.autograd.grad(vae.loss(batch())["gan"], vae.net.decoder.conv_out.weight)[0].abs().sum() > 0
    assert all(parameter.requires_grad for parameter in critic)
    assert vae.answers.abs().sum() > 0
    assert not any("judge" in name for name, _ in vae.named_parameters())
    assert set(vae.averaged()) == {"net"}


def test_only_the_decoder_learns_from_noisy_latents(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(SMALL(), tmp_path)
    vae = room(trained="decoder", weights=str(tmp_path), latent_noise=0.3).train()
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(vae.net.state_dict()["quant_conv.weight"], saved["quant_conv.weight"])
    trained = {name.split(".")[1] for name, parameter in vae.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}
    vae.loss(batch())["loss"].backward()
    assert vae.net.encoder.conv_in.weight.grad is None
    assert vae.net.decoder.conv_in.weight.grad is not None
    again = vae.reconstruct(batch())[1]  # of noisy latents, always the same ones
    assert torch.equal(again, vae.reconstruct(batch())[1])
    vae.latent_noise = 0.0
    assert not torch.allclose(again, vae.reconstruct(batch())[1])


def test_it_learns_to_give_pictures_back() -> None:
    torch.manual_seed(0)
    vae, data = room(kl_weight=1e-4).train(), batch(8)
    data["image"] = data["image"][:, :, :1, :1].expand(-1, -1, 8, 8).contiguous()  # plain greys
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        terms = vae.loss(data)
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["mse"].detach()))
    assert losses[-1] < 0.1 * losses[0]
    x, again = vae.eval().reconstruct(data)
    assert float((x - again).square().mean()) < 0.1
    torch.testing.assert_close(vae.sample([3]), vae.sample([2, 3])[1:], atol=1e-5, rtol=0)


def test_lpips_reads_the_usual_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state, inner, place = {}, 3, 0
    for width in VGG:
        if width:
            state[f"features.{place}.weight"] = torch.randn(width, inner, 3, 3) * (2 / (9 * inner)) ** 0.5
            state[f"features.{place}.bias"] = torch.zeros(width)
            inner = width
        place += 2 if width else 1
    assert f"features.{28}.weight" in state  # the last of torchvision's VGG-16
    save_file(state, tmp_path / "vgg.safetensors")
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) / width for k, width in enumerate(widths)}
    save_file(heads, tmp_path / "heads.safetensors")
    judge = Lpips(str(tmp_path / "vgg.safetensors"), str(tmp_path / "heads.safetensors"))
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert judge(x, x) == 0
    assert judge(x, x.flip(-1)) > judge(x, x + 0.01 * torch.randn_like(x)) > 0
    with pytest.raises(ValueError, match="LPIPS needs its networks"):
        Lpips(str(tmp_path / "none"), str(tmp_path / "heads.safetensors"))
    with pytest.raises(ValueError, match="is no VGG-16"):
        Lpips(str(tmp_path / "heads.safetensors"), str(tmp_path / "heads.safetensors"))


def test_convnext_compares_answers_or_features(tmp_path: Path) -> None:
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[4, 4, 4, 8], depths=[1, 1, 1, 1], num_labels=5)
    torch.manual_seed(0)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).requires_grad_()
    for model in (transformers.ConvNextForImageClassification(config), transformers.ConvNextModel(config)):
        model.eval().save_pretrained(tmp_path / "net")
        judge = ConvNext(str(tmp_path / "net")).eval()
        assert judge(x, x) == 0
        distance = judge(x, y)
        assert torch.autograd.grad(distance, y)[0].abs().sum() > 0
        shown = [  # bilinear to 224 pixels, normalised as ImageNet's
            nn.functional.interpolate((part / 2 + 0.5), 224, mode="bilinear", antialias=True) for part in (x, y)
        ]
        mean, spread = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        said = [model((part - mean) / spread) for part in shown]
        answers = [one.logits if "logits" in one else one.pooler_output for one in said]
        torch.testing.assert_close(distance, nn.functional.mse_loss(*answers))
    both = Together([partial(ConvNext, str(tmp_path / "net")), partial(RandomFeatures, 3)], [0.1, 2.0])
    torch.testing.assert_close(both(x, y), 0.1 * distance + 2 * RandomFeatures(3)(x, y))
    with pytest.raises(ValueError, match="expected one weight >= 0 for each"):
        Together([RandomFeatures], [1.0, 0.1])
    with pytest.raises(ValueError, match="holds no ConvNeXt"):
        ConvNext(str(tmp_path))
    state = load_file(tmp_path / "net" / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, tmp_path / "net" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack layernorm\.weight"):
        ConvNext(str(tmp_path / "net"))


def test_a_decoder_takes_another_one_s_place(tmp_path: Path) -> None:
    """Also from the layout in which the authors would save theirs."""
    net = SMALL()
    save(net, tmp_path / "vae")
    tuned = SMALL()
    tuned.load_state_dict(net.state_dict())
    tuned.state_dict()["decoder.conv_out.bias"].add_(1)
    theirs = {
        "encoder.": "encoder.0.",
        "quant_conv": "encoder.1",
        "post_quant_conv": "decoder.0",
        "decoder.": "decoder.1.",
    }
    state = {
        next(new + key.removeprefix(old) for old, new in theirs.items() if key.startswith(old)): value
        for key, value in tuned.state_dict().items()
    }
    torch.save(state, tmp_path / "tuned.pth")
    codec = Latents(4, 2, weights=str(tmp_path / "vae"), decoder=str(tmp_path / "tuned.pth"))
    z = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(codec.autoencoder.decode(z), net.decode(z) + 1)
    net.state_dict()["encoder.conv_in.bias"].add_(1)
    save(net, tmp_path / "other")
    with pytest.raises(ValueError, match="Take a decoder that was fine-tuned with this encoder"):
        codec.use_decoder(str(tmp_path / "other"))
    (tmp_path / "trap.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="holds something else than tensors"):
        codec.use_decoder(str(tmp_path / "trap.pth"))


@pytest.mark.slow
def test_two_ranks_train_one_critic(tmp_path: Path) -> None:
    """Autoencoder and critic are sharded alike, so no rank goes its own way."""
    words = ["trainer.devices=2", "trainer.max_steps=4", "module.critic_weight=0.1", f"runs={tmp_path}"]
    command = [sys.executable, "-m", "platform", "fit", "vae_digits", "--tiny", *words]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "complete at step 4" in done.stdout + done.stderr


def test_stored_latents_must_be_the_codec_s(tmp_path: Path) -> None:
    net = SMALL()
    save(net, tmp_path)
    card = {"shape": [4, 4, 4], "encoder": net.fingerprint(), "scale": 0.3611, "shift": 0.1159}
    codec = Latents(4, 2, weights=str(tmp_path), family="flux")
    assert (codec.scale, codec.shift) == FAMILIES["flux"]
    codec.check(card)
    codec.check({**card, "shift": None})
    with pytest.raises(ValueError, match=r"Type module\.codec\.scale=0\.3611 module\.codec\.shift=0\.1159"):
        Latents(4, 2, weights=str(tmp_path)).check(card)
    with pytest.raises(ValueError, match=r"Type module\.codec\.channels=2 module\.codec\.size=4"):
        Latents(8, 2, weights=str(tmp_path), family="flux").check(card)
    with pytest.raises(ValueError, match="come from the encoder another"):
        Latents(4, 2, weights=str(tmp_path), family="flux").check({**card, "encoder": "another"})
    tuned = SMALL()
    tuned.load_state_dict(net.state_dict() | {"decoder.conv_out.bias": net.decoder.conv_out.bias + 1})
    save(tuned, tmp_path / "tuned")
    with_decoder = Latents(4, 2, weights=str(tmp_path), family="flux")
    digits = with_decoder.use_decoder(str(tmp_path / "tuned"))
    assert digits != with_decoder.use_decoder(str(tmp_path))  # it says which decoder it is, not which encoder
    assert digits == with_decoder.use_decoder(str(tmp_path / "tuned"))
    with_decoder.check(card)  # and the check leaves the decoder in its place
    z = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(with_decoder.autoencoder.decode(z), net.decode(z) + 1)
    with pytest.raises(ValueError, match="come from the encoder another"):
        with_decoder.check({**card, "encoder": "another"})
    late = Latents(4, 2, weights=str(tmp_path / "later"), family="flux")
    late.check({**card, "encoder": "another"})  # compared as soon as the weights are there
    save(net, tmp_path / "later")
    with pytest.raises(ValueError, match="come from the encoder another"):
        late.decode(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"module\.codec\.family='sd9': expected one of sd, sdxl, sd3, flux"):
        Latents(4, 2, family="sd9")  # type: ignore[arg-type]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"module\.trained='encoder'"):
        room(trained="encoder")
    with pytest.raises(ValueError, match=r"module\.kl_weight=-1"):
        room(kl_weight=-1.0)
    with pytest.raises(ValueError, match="reads 1 channels and halves to 1/2; the codec"):
        room(codec=Pixels(7, 1, 17, 240))
    with pytest.raises(ValueError, match=r"module\.critic\.width=9"):
        room(critic=partial(PatchCritic, 1, 9, 1))
