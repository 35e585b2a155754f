"""The learning-rate curve; and the optimiser for matrices: its updates, which parameters get them, how it continues."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightningmodules.shared.optim import Muon, orthogonal, warmup_cosine
from tests.toy import Toy


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(9, 12), "inner": nn.Linear(12, 20), "output": nn.Linear(20, 9)})


def train(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, updates: int) -> Tensor:
    tokens = torch.arange(9)
    for _ in range(updates):
        found = model["output"](model["inner"](model["embed"](tokens)).relu())
        value = nn.functional.cross_entropy(found, tokens.flip(0))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return value.detach()


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    u, s, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    found = orthogonal(u @ torch.diag_embed(s) @ v)
    in_its_basis = u.mT @ found @ v.mT
    values = in_its_basis.diagonal(dim1=1, dim2=2)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    torch.testing.assert_close(in_its_basis, torch.diag_embed(values), atol=1e-5, rtol=0)


def test_matrices_move_as_with_the_optimiser_of_torch() -> None:
    """Which rounds to bfloat16, hence the tolerance; one setting changed by a tenth is beyond it."""
    torch.manual_seed(2)
    start, gradients = torch.randn(20, 12), torch.randn(8, 20, 12)
    moved = []
    for name in ("ours", "theirs"):
        matrix = nn.Parameter(start.clone())
        shared = {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.9}
        ours = name == "ours"
        optimizer = (
            Muon([matrix], **shared) if ours else torch.optim.Muon([matrix], **shared, adjust_lr_fn="match_rms_adamw")
        )
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        moved.append(matrix.detach() - start)
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 0.02


def test_tables_last_layers_and_vectors_are_left_to_adamw() -> None:
    ours, theirs = network(), network()
    train(ours, Muon(ours.named_parameters(), lr=0.0, adam_lr=0.01), 4)
    rest = [p for name, p in theirs.named_parameters() if name != "inner.weight"]
    train(theirs, torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0, fused=True), 4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_it_continues_bit_for_bit() -> None:
    whole, parts = network(), network()
    train(whole, Muon(whole.named_parameters(), lr=0.01), 6)
    first = Muon(parts.named_parameters(), lr=0.01)
    train(parts, first, 3)
    second = Muon(parts.named_parameters(), lr=0.5)
    second.load_state_dict(first.state_dict())
    train(parts, second, 3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", ["lr=-1.0", "adam_lr=-1.0", "momentum=1.0", "ns_steps=0"])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(ValueError, match=setting):
        Muon([torch.zeros(2, 2)], **{name: type(0.0 if "." in value else 0)(value)})  # type: ignore[arg-type]


def test_a_room_tells_it_the_names() -> None:
    room = Toy()
    room._optimizer, room._schedule = partial(Muon, others=["outer"]), None
    room.configure_model()
    matrices = room.configure_optimizers().param_groups[0]["params"]
    assert [id(matrix) for matrix in matrices] == [id(room.net.inner.weight)]


def test_curve_starts_peaks_ends_and_stays() -> None:
    factors = [warmup_cosine(step, 100, warmup_steps=10, start=0.1, end=0.2) for step in (0, 5, 10, 55, 100, 500)]
    expected = [0.1, 0.55, 1.0, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)), 0.2, 0.2]
    assert factors == pytest.approx(expected)
