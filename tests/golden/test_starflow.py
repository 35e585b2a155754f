"""STARFlow against numbers of the authors' code, and against files made here in the same layout."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightningmodules.starflow import golden
from lightningmodules.starflow.network import StarFlowNet
from lightningmodules.starflow.straightforward import Straightforward
from lightningmodules.starflow.weights import to_official

HERE = Path(__file__).parent
Reference = tuple[dict[str, Tensor], dict[str, str]]


def read() -> Reference:
    with safe_open(HERE / "starflow_class.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def verdicts(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, bool]:
    return {name: error <= tolerance for name, error, tolerance in golden.check(tensors, metadata, Path("file"))}


def test_agrees_with_the_authors() -> None:
    tensors, metadata = read()
    results = verdicts(tensors, metadata)
    assert results.keys() == golden.references(tensors)
    assert all(results.values()), results


def test_a_wrong_weight_shows_everywhere_behind_it() -> None:
    tensors, metadata = read()
    tensors["state/blocks.1.attn_blocks.0.attention.qkv.weight"][40, 3] += 0.1
    failed = {name for name, good in verdicts(tensors, metadata).items() if not good}
    assert {"out/z", "out/logdet/1", "out/sample", "out/grad_norms", "out/block_out/2", "out/denoised_x"} <= failed
    assert {"out/block_out/0", "out/logdet/0", "out/sample_seq/0"}.isdisjoint(failed)


def test_a_wrong_reference_shows_alone() -> None:
    tensors, metadata = read()
    tensors["out/sample_guided/w3.0"][0, 0, 0, 0] += 0.01
    failed = {name for name, good in verdicts(tensors, metadata).items() if not good}
    assert failed == {"out/sample_guided/w3.0"}


def test_unknown_quantities_are_left_to_the_caller_and_shapes_matter() -> None:
    tensors, metadata = read()
    few = {name: value for name, value in tensors.items() if name.startswith(("state/", "in/"))}
    few["out/mystery"], few["out/z"] = torch.zeros(3), tensors["out/z"][:, :-1]
    assert [row[:2] for row in golden.check(few, metadata, Path("file"))] == [("out/z", math.inf)]


def test_missing_input_fails_its_quantities_and_no_others() -> None:
    tensors, metadata = read()
    for name in ("in/y_null", "in/z"):
        del tensors[name]
    results = verdicts(tensors, metadata)
    failed = {name for name, agrees in results.items() if not agrees}
    assert {"out/z_null", "out/sample", "out/sample_guided/w1.0"} <= failed
    assert {"out/z", "out/grad_norms", "out/denoised_x"}.isdisjoint(failed)


def test_weights_of_another_model_are_refused() -> None:
    tensors, metadata = read()
    del tensors["state/blocks.0.sos_embed"]
    with pytest.raises(ValueError, match=r"1 missing \(blocks\.0\.sos_embed\)"):
        verdicts(tensors, metadata)
    with pytest.raises(ValueError, match="lacks in_channels"):
        verdicts(tensors, {**metadata, "config": "{}"})


MODELS: dict[str, dict[str, object]] = {
    "defaults of the authors": {"rope": 1, "head_dim": 20},
    "unconditional": {"rope": True, "sos": True, "head_dim": 8, "use_softplus": 1, "soft_clip": 2.0},
    "text, GQA": {
        "rope": True,
        "sos": True,
        "head_dim": 20,
        "num_heads": 4,
        "num_kv_heads": 2,
        "txt_size": 3,
        "txt_dim": 5,
        "norm_type": "rms_norm",
        "use_bias": False,
        "use_swiglu": True,
        "use_qk_norm": True,
        "use_post_norm": True,
        "use_final_norm": True,
        "use_checkpoint": 1,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_files_of_other_models_pass_too(name: str) -> None:
    tensors, metadata = made(MODELS[name])
    results = verdicts(tensors, metadata)
    assert results.keys() == golden.references(tensors)
    assert all(results.values()), results


def made(options: dict[str, object]) -> Reference:
    """A reference file computed by the straightforward implementation."""
    sizes = {"in_channels": 2, "img_size": 4, "patch_size": 1, "channels": 40, "num_blocks": 2, "layers_per_block": [1]}
    model, sigma = {**sizes, **options}, 0.2
    torch.manual_seed(5)
    net = StarFlowNet(**golden.arguments(model))
    for parameter in net.parameters():
        parameter.data.add_(0.04 * torch.randn_like(parameter))
    plain, x, z = Straightforward(net), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    constants = (4, net.txt_size, int(options["head_dim"]))  # type: ignore[call-overload]
    tensors = {f"state/{key}": value for key, value in to_official(net.state_dict(), constants=constants).items()}
    tensors |= {"in/x": x, "in/z": z}
    y = null = None
    if net.txt_dim:
        y, null = torch.randn(2, 3, net.txt_size, net.txt_dim).unbind()
        tensors |= {"in/y_cond": y, "in/y_null": null, "out/z_null": net.unpatchify(plain.forward(x, null)[0])}

    def loss_of(image: Tensor, penalty: float = 0.0) -> Tensor:
        out, blocks, scales = plain.forward(image, y)
        loss = 0.5 * out.square().mean() + torch.stack([scale.mean() for scale in scales]).sum()
        return loss + penalty * sum(part.square().mean() for part in [plain.tokens(image), *blocks[:-1]])

    out, blocks, scales = plain.forward(x, y)
    tensors |= {"out/z": net.unpatchify(out), "out/loss": loss_of(x), "out/loss_z": 0.5 * out.square().mean()}
    tensors |= {f"out/block_out/{k}": block.unflatten(1, (4, 4)) for k, block in enumerate(blocks)}
    tensors |= {f"out/logdet/{k}": -scale for k, scale in enumerate(scales)}
    names, parameters = zip(*reversed(list(net.named_parameters())), strict=True)
    tensors["out/grad_norms"] = torch.stack([g.norm() for g in torch.autograd.grad(loss_of(x), parameters)])
    path = [net.unpatchify(tokens) for tokens in plain.reverse(net.patchify(z), y)]
    tensors |= {"out/sample": path[-1], "out/sample_seq/0": path[0], "out/sample_jacobi": path[-1]}
    warm = plain.reverse(net.patchify(z), y, temperature=0.7)
    tensors["out/sample_attn_temp0.7"] = net.unpatchify(warm[-1])
    if net.txt_dim:
        guided = plain.reverse(net.patchify(z), y, null, 2.0)
        tensors["out/sample_guided/w2.0"] = net.unpatchify(guided[-1])
    noisy = x.clone().requires_grad_()
    score = -torch.autograd.grad(loss_of(noisy), noisy)[0] * x.numel()
    tensors["out/denoised_x"] = x + sigma**2 * score
    kept = {name: value.clone() for name, value in tensors.items()}
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4), []
    for _ in range(5):
        losses.append(loss_of(x, 1e-4))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    kept["out/train_losses"] = torch.stack(losses)
    metadata = {"method": "starflow", "config": json.dumps({"model": model, "noise_std": sigma})}
    return {name: value.detach() for name, value in kept.items()}, {**metadata, "param_order": json.dumps(names)}
