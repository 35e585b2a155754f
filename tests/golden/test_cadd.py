"""Masked diffusion against numbers of the authors' code, CADD against the exact oracle, and files of other options."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightningmodules.cadd import golden
from lightningmodules.cadd.replay_cadd import CaddReplay, Curve
from lightningmodules.cadd.replay_mdlm import MdlmReplay, schedule_of
from lightningmodules.shared import masking

HERE = Path(__file__).parent
Reference = tuple[dict[str, Tensor], dict[str, str]]


def read(name: str) -> Reference:
    with safe_open(HERE / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def verdicts(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, bool]:
    return {name: error <= tolerance for name, error, tolerance in golden.check(tensors, metadata, Path("file"))}


@pytest.mark.parametrize("name", ["mdlm_tiny", "mdlm_cosine", "mdlm_cosine2_steps", "cadd_toy"])
def test_every_quantity_agrees(name: str) -> None:
    tensors, metadata = read(name)
    results = verdicts(tensors, metadata)
    assert results.keys() == golden.references(tensors)
    assert all(results.values()), results


def test_a_subset_is_enough() -> None:
    tensors, metadata = read("mdlm_cosine2_steps")
    assert tensors.pop("loss.nlls").isnan().any()  # the first of the steps
    assert verdicts(tensors, metadata)["loss.loss"]


def test_a_wrong_weight_shows_everywhere_and_a_wrong_reference_alone() -> None:
    tensors, metadata = read("mdlm_tiny")
    tensors["state/blocks.0.attn_qkv.weight"][3, 2] += 0.1
    failed = {name for name, good in verdicts(tensors, metadata).items() if not good}
    assert {"fwd.logits_sigma", "loss.nlls", "step.p_x0"} <= failed
    assert not failed & {"sched.sigma", "loss.xt", "genppl.weight"}
    tensors, metadata = read("cadd_toy")
    tensors["rev.mean_soft"][0, 0, 0] += 1e-6
    assert {name for name, good in verdicts(tensors, metadata).items() if not good} == {"rev.mean_soft"}


def test_unknown_quantities_are_left_to_the_caller_and_missing_inputs_fail() -> None:
    tensors, metadata = read("cadd_toy")
    del tensors["step.eps"]
    tensors["mystery"] = torch.zeros(2)
    results = verdicts(tensors, metadata)
    assert golden.references(tensors) - results.keys() == {"mystery"}
    assert {name for name, good in results.items() if not good} == {"step.z_s_soft", "step.z_s_hard"}


@pytest.mark.parametrize(
    "options",
    [
        {"time_conditioning": "True", "noise": "cosine eps=1e-3"},
        {"noise": "cosinesqr", "T": "5"},
        {"noise": "linear", "time_conditioning": "True"},
    ],
)
def test_other_options_of_masked_diffusion(options: dict[str, str]) -> None:
    """The recipes follow the metadata: formulas written out once more, in float64."""
    tensors, metadata = read("mdlm_tiny")
    for name in [name for name in tensors if name.startswith("sched.importance")]:
        del tensors[name]
    metadata |= options
    replay = MdlmReplay(tensors, metadata, Path("file"))
    recipes = replay.recipes()
    u = (tensors["loss.u_t"].double() / 4 + torch.arange(4) / 4) % 1
    t = 0.999 * u + 1e-3
    steps = int(metadata["T"])
    if steps:
        t = torch.floor(t * steps) / steps + 1 / steps
    alpha = {
        "cosine": lambda t: 1e-3 + 0.999 * torch.cos(math.pi * t / 2),
        "cosinesqr": lambda t: 1e-3 + 0.999 * torch.cos(math.pi * t / 2) ** 2,
        "linear": lambda t: torch.exp(-10 * t),
    }[options["noise"].split()[0]]
    t.requires_grad_()
    kept = alpha(t)
    (slope,) = torch.autograd.grad(kept.sum(), t)
    kept, t = kept.detach(), t.detach()
    torch.testing.assert_close(recipes["loss.t"]().double(), t, atol=1e-6, rtol=0)
    torch.testing.assert_close(recipes["loss.sigma"]().double(), -kept.log(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(recipes["loss.dsigma"]().double(), -slope / kept, atol=1e-3, rtol=2e-4)
    tokens = recipes["loss.xt"]()
    assert torch.equal(tokens == 12, (tensors["loss.u_x"] < (1 - kept).unsqueeze(1)) | (tensors["x0"] == 12))
    sigma = recipes["loss.sigma"]() if metadata["time_conditioning"] == "True" else torch.zeros(4)
    logits = replay.net(tokens, sigma)[..., :12]
    nats = -logits.log_softmax(-1).gather(-1, tensors["x0"].unsqueeze(-1)).squeeze(-1) * (tokens == 12)
    weight = 1 / t.clamp(max=1 - 1e-4) if steps else -slope / (1 - kept)
    expected = nats.double() * weight.unsqueeze(1) * tensors["loss.attention_mask"]
    if steps:
        expected[t < 1.5 / steps] = torch.nan  # theirs, in the first step
    nlls = recipes["loss.nlls"]().double()
    torch.testing.assert_close(nlls, expected.detach(), atol=2e-4, rtol=2e-4, equal_nan=True)


def test_other_sizes_and_schedules_of_the_oracle() -> None:
    """With gamma = (1 - t)^2 the bound of one token approaches its entropy from above, and the means interpolate."""
    tensors, metadata = read("cadd_toy")
    metadata |= {"gamma_bar": "(1-t)^2", "T": "4"}
    tensors["batch.k"] = tensors["batch.k"].clamp(max=4)
    replay = CaddReplay(tensors, metadata, Path("file"))
    recipes = replay.recipes()
    torch.testing.assert_close(recipes["gamma_bar"](), (1 - torch.arange(5).double() / 4) ** 2)
    table = recipes["elbo1d.table_H_ce_cont"]()
    gap = table[..., 1] + table[..., 2] - table[..., 0]
    assert (gap >= 0).all()
    assert (table[..., 1] < table[..., 0]).all()  # the cross-entropy alone is no bound
    assert gap[0, -1] < 0.004 < gap[0, 1]
    assert (gap[1] > gap[0]).all()
    joint = recipes["post.joint"]()
    torch.testing.assert_close(joint.sum(1), torch.ones(len(joint), dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "curve"),
    [
        ("(1-t)(1+t)", lambda t: 1 - t * t),
        ("1 - t**4", lambda t: 1 - t**4),
        ("1 - 0.999 t", lambda t: 1 - 0.999 * t),
        ("cos(pi t/2)^2", lambda t: torch.cos(math.pi * t / 2) ** 2),
        ("cos^2(pi t/2)", lambda t: torch.cos(math.pi * t / 2) ** 2),
        ("np.cos(np.pi*t/2)**2", lambda t: torch.cos(math.pi * t / 2) ** 2),
        ("0.5(1+cos(pi t))", lambda t: (1 + torch.cos(math.pi * t)) / 2),
        ("pow(1-t, 2)", lambda t: (1 - t) ** 2),
        ("-t^2 + 1e0", lambda t: 1 - t * t),
    ],
)
def test_formulas_of_the_metadata(text: str, curve: Curve) -> None:
    tensors, metadata = read("cadd_toy")
    del tensors["gamma_bar"]
    metadata |= {"gamma_bar": text, "T": "4"}
    ours = CaddReplay(tensors, metadata, Path("file")).recipes()["gamma_bar"]()
    torch.testing.assert_close(ours, curve(torch.arange(5).double() / 4))


@pytest.mark.parametrize("text", ["", "1-", "(1-t", "1-t)", "f(t)", "cos t", "__import__('os')"])
def test_what_is_no_formula_is_refused_where_no_table_replaces_it(text: str) -> None:
    tensors, metadata = read("cadd_toy")
    metadata["gamma_bar"] = text
    CaddReplay(tensors, metadata, Path("file"))
    del tensors["gamma_bar"]
    with pytest.raises(ValueError, match="is no formula of t"):
        CaddReplay(tensors, metadata, Path("file"))


def test_signal_may_be_flat_where_it_is_clean() -> None:
    """With gamma = 1 - t^4 nearly all of the last step's noise is below any fixed share of it."""
    tensors, metadata = read("cadd_toy")
    metadata |= {"gamma_bar": "1-t^4", "T": "64"}
    recipes = CaddReplay(tensors, metadata, Path("file")).recipes()
    torch.testing.assert_close(recipes["coef.z0"]()[0], torch.ones((), dtype=torch.float64))
    left = 1 - (torch.arange(65).double() / 64) ** 4
    signal = recipes["coef.z0"]() + recipes["coef.zt"]() * left[1:].sqrt()
    torch.testing.assert_close(signal, left[:-1].sqrt())  # the mean of the latent of a known token


def test_unreadable_configurations_are_refused() -> None:
    tensors, metadata = read("mdlm_tiny")
    with pytest.raises(ValueError, match="no known schedule"):
        list(golden.check(tensors, {**metadata, "noise": "sawtooth"}, Path("file")))
    with pytest.raises(ValueError, match="holds no weights"):
        list(golden.check({"x0": tensors["x0"]}, metadata, Path("file")))
    assert isinstance(schedule_of("cosine^2", Path("file")), masking.CosineSquared)
    assert isinstance(schedule_of("cosine eps=1e-2", Path("file")), masking.Cosine)
