"""The copy task, trained: the latent coordinates tokens that are revealed in one step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from platform import cli
from platform.runs import load_module

EVALUATIONS, ROWS = 8, 1000
CLOSED_FORM = (1 - (1 - 1 / 8) / EVALUATIONS) ** 8  # of masked diffusion with the exact denoiser


def valid(tokens: Tensor) -> float:
    return float((tokens[:, :8] == tokens[:, 8:]).all(dim=1).double().mean())


def entropy(tokens: Tensor) -> float:
    shares = torch.bincount(tokens.flatten(), minlength=8).double() / tokens.numel()
    return float(-(shares * shares.log()).sum())


def drawn(name: str, folder: Path) -> tuple[Any, Tensor]:
    assert cli.main(["fit", name, f"runs={folder}", "callbacks.samples=null", "trainer.val_every=0"]) == 0
    room, _ = load_module(str(folder / name), "ema")
    tokens = room.sample(range(ROWS), steps=EVALUATIONS, cache=False)
    assert room.evaluations.max() <= EVALUATIONS
    return room, tokens


@pytest.mark.slow
def test_a_latent_makes_more_rows_valid_at_equal_evaluations(tmp_path: Path) -> None:
    _, plain = drawn("mdlm_copy", tmp_path)
    room, joint = drawn("cadd_copy", tmp_path)
    assert valid(plain) == pytest.approx(CLOSED_FORM, abs=0.04)
    assert valid(joint) >= max(0.52, valid(plain) + 0.12)
    assert min(entropy(plain), entropy(joint)) >= 2.06
    half = torch.randint(8, (512, 8), generator=torch.Generator().manual_seed(1))
    found = room.bound({"tokens": torch.cat([half, half], dim=1)}, seeds=range(512))
    truth = 8 * torch.log(torch.tensor(8.0)).item()
    assert float((found.cross_entropy + found.continuous).mean()) >= truth
    assert float(found.cross_entropy.mean()) < truth  # which is why it is never reported as a likelihood
