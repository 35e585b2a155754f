"""TarFlow against numbers of the authors' code, and against files made here in the same layout."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightningmodules.shared import flow
from lightningmodules.tarflow import golden
from lightningmodules.tarflow.network import TarFlowNet
from lightningmodules.tarflow.straightforward import Straightforward
from lightningmodules.tarflow.weights import to_official

HERE = Path(__file__).parent
Reference = tuple[dict[str, Tensor], dict[str, str]]


def read(name: str) -> Reference:
    with safe_open(HERE / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def verdicts(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, bool]:
    return {name: error <= tolerance for name, error, tolerance in golden.check(tensors, metadata, Path("file"))}


@pytest.mark.parametrize("name", ["tarflow_uncond", "tarflow_class"])
def test_agrees_with_the_authors(name: str) -> None:
    tensors, metadata = read(name)
    results = verdicts(tensors, metadata)
    assert results.keys() == golden.references(tensors)
    assert all(results.values()), results


def test_a_wrong_weight_shows_everywhere() -> None:
    tensors, metadata = read("tarflow_class")
    tensors["state/blocks.1.attn_blocks.0.attention.qkv.weight"][40, 3] += 0.1
    results = verdicts(tensors, metadata)
    failed = {name for name, good in results.items() if not good}
    assert {"out/z", "out/logdet", "out/sample", "out/grad_norms", "out/bpd", "out/block_out/1"} <= failed
    assert results["out/block_out/0"]  # the block before is untouched


def test_a_wrong_reference_shows_alone() -> None:
    tensors, metadata = read("tarflow_uncond")
    tensors["out/sample_guided/g1.0_b_t0.5_const"][0, 0, 0, 0] += 0.01
    failed = {name for name, good in verdicts(tensors, metadata).items() if not good}
    assert failed == {"out/sample_guided/g1.0_b_t0.5_const"}


def test_unknown_quantities_are_left_to_the_caller_and_shapes_matter() -> None:
    tensors, metadata = read("tarflow_uncond")
    few = {name: value for name, value in tensors.items() if name.startswith(("state/", "in/"))}
    few["out/mystery"], few["out/z"] = torch.zeros(3), tensors["out/z"][:, :-1]
    assert list(golden.check(few, metadata, Path("file"))) == [("out/z", math.inf, pytest.approx(2.99e-5, rel=0.01))]
    assert golden.references(few) == {"out/mystery", "out/z"}


def test_missing_input_fails_its_quantities_and_no_others() -> None:
    tensors, metadata = read("tarflow_class")
    for name in ("in/y_drop", "in/dequant_u", "in/z"):
        del tensors[name]
    results = verdicts(tensors, metadata)
    failed = {name for name, agrees in results.items() if not agrees}
    assert {"out/z_drop", "out/logdet_drop", "out/bpd", "out/sample"} <= failed
    assert {"out/z", "out/z_null", "out/denoised_sample", "out/grad_norms"}.isdisjoint(failed)
    assert results.keys() == golden.references(tensors)


def test_label_beyond_the_classes_is_refused() -> None:
    tensors, metadata = read("tarflow_class")
    tensors["in/y"] = torch.full_like(tensors["in/y"], 5)
    with pytest.raises(ValueError, match="Label 5 came"):
        list(golden.check(tensors, metadata, Path("file")))


@pytest.mark.parametrize(("nvp", "classes", "channels"), [(False, 3, 1), (False, 0, 3), (True, 2, 3)])
def test_other_files_of_the_layout(nvp: bool, classes: int, channels: int) -> None:
    tensors, metadata = made(nvp=nvp, num_classes=classes, in_channels=channels)
    results = verdicts(tensors, metadata)
    assert results.keys() == golden.references(tensors)
    assert all(results.values()), results


def made(**options: object) -> Reference:
    """A reference file computed by the straightforward implementation: flat image 9x9, other sizes than the shipped."""
    config = {"in_channels": 1, "img_size": 9, "patch_size": 3, "channels": 24, "num_blocks": 3, "layers_per_block": 2}
    config |= {"head_dim": 8, "expansion": 2, "num_classes": 0, "nvp": True} | options
    torch.manual_seed(5)
    net = TarFlowNet(**config)
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    if not net.nvp:
        net.var.uniform_(0.3, 2.0)
    plain, batch, sigma = Straightforward(net), 3, 0.2
    x, z = torch.randn(batch, net.in_channels, 9, 9), torch.randn(batch, net.tokens, net.dims)
    pixels, u = torch.randint(256, x.shape, dtype=torch.uint8), torch.rand(x.shape)
    tensors = {f"state/{key}": value.clone() for key, value in to_official(net.state_dict()).items()}
    tensors |= {"in/x": x, "in/z": z, "in/x_uint8": pixels, "in/dequant_u": u}
    y = None
    if net.num_classes:
        y = torch.tensor([1, -1, 0])
        tensors |= {"in/y": y, "in/y_drop": torch.tensor([-1, -1, 0])}
        tensors["out/z_drop"], _, tensors["out/logdet_drop"] = plain.forward(x, tensors["in/y_drop"])
        tensors["out/z_null"], _, tensors["out/logdet_null"] = plain.forward(x)
    out, blocks, logdet = plain.forward(x, y)
    tensors |= {f"out/block_out/{k}": block for k, block in enumerate(blocks[:-1])}
    loss = 0.5 * out.square().mean() - logdet.mean()
    tensors |= {"out/z": out, "out/logdet": logdet, "out/loss": loss}
    names, parameters = zip(*reversed(list(net.named_parameters())), strict=True)
    tensors["out/grad_norms"] = torch.stack([g.norm() for g in torch.autograd.grad(loss, parameters)])
    images = plain.reverse(z, y)
    tensors |= {f"out/sample_seq/{k}": image for k, image in enumerate(images[:-1])} | {"out/sample": images[-1]}
    guided = {
        f"g{g}_{what}_t{t}": {"guidance": g, "guide_what": what, "attn_temp": t, "annealed_guidance": annealed}
        for g, what, t, annealed in [
            (0.7, "ab", 0.6, True),
            (0.3, "a", 1.0, False),
            (0.5, "b", 1.3, True),
            (0.0, "ab", 0.5, True),
        ]
    }
    for suffix, s in guided.items():
        settings = {"attn_temp": s["attn_temp"], "annealed": s["annealed_guidance"], "what": s["guide_what"]}
        tensors[f"out/sample_guided/{suffix}"] = plain.reverse(z, y, s["guidance"], **settings)[-1]
    for name, image in (("x", x), ("sample", images[-1])):
        noisy = image.clone().requires_grad_()
        latent, _, part = plain.forward(noisy, y)
        log_p = -(0.5 * latent.square().mean((1, 2)) - part) * image[0].numel()
        tensors[f"out/denoised_{name}"] = image + sigma**2 * torch.autograd.grad(log_p.sum(), noisy)[0]
    latent, _, part = plain.forward(2 * (pixels + u) / 256 - 1)
    nats = 0.5 * latent.square().mean((1, 2)) - part + 0.5 * math.log(2 * math.pi) + math.log(128)
    tensors["out/bpd"] = nats / math.log(2)
    tensors["out/var_after_update"] = 0.9 * net.var + 0.1 * out.square().mean(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    losses = []
    for _ in range(5):
        latent, _, part = plain.forward(x, y)
        step = flow.nll(latent, part).mean()
        optimizer.zero_grad()
        step.backward()
        optimizer.step()
        losses.append(step)
    tensors["out/train_losses"] = torch.stack(losses)
    metadata = {"method": "tarflow", "config": json.dumps({**config, "noise_std": sigma}), "guided": json.dumps(guided)}
    return {name: value.detach() for name, value in tensors.items()}, {**metadata, "param_order": json.dumps(names)}
