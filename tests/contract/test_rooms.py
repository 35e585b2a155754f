"""Every experiment's miniature keeps the contract of ``lightningmodules/base.py``."""

import math
import types
from typing import Any

import hydra
import pytest
import torch

from lightningmodules.base import GenerativeModule
from lightningmodules.shared.codecs import Pixels
from lightningmodules.shared.conditioning import Condition
from platform import config
from platform.origins import experiments

EXPERIMENTS = experiments()
Miniature = tuple[GenerativeModule, dict[str, Any], Any]


@pytest.fixture(scope="module", params=EXPERIMENTS)
def miniature(request: pytest.FixtureRequest) -> Miniature:
    """A built room with no weight at its special initial value, one training batch, and the configuration."""
    cfg = config.compose(request.param, [], tiny=True)
    data = hydra.utils.instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    data.teardown()
    room = hydra.utils.instantiate(cfg.module, _convert_="all")
    room.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in room._followed:
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return room, batch, cfg


def condition_of(room: GenerativeModule, batch: dict[str, Any], rows: int) -> Condition | None:
    return Condition(label=batch["label"][:rows]) if room.num_classes else None


def test_loss_is_finite_and_reaches_every_parameter(miniature: Miniature) -> None:
    room, batch, _ = miniature
    room.train()
    assert room.needs <= set(batch)
    room.zero_grad(set_to_none=True)
    room.trainer = types.SimpleNamespace(accumulate_grad_batches=1, world_size=1)  # type: ignore[assignment]
    terms = room.loss(batch)
    assert all(math.isfinite(value.item()) for value in terms.values())
    terms["loss"].backward()
    for name, parameter in room.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    room.eval()


def test_sample_is_a_function_of_its_seed(miniature: Miniature) -> None:
    room, batch, cfg = miniature
    settings = config.check_sampling(cfg)
    condition = condition_of(room, batch, 4)
    together = room.sample([7, 8, 9, 10], condition, **settings)
    assert together.shape == (4, *room.codec.shape)
    assert together.isfinite().all()
    assert torch.equal(together, room.sample([7, 8, 9, 10], condition, **settings))
    parts = [
        room.sample(seeds, None if condition is None else condition[rows], **settings)
        for seeds, rows in (([7], slice(0, 1)), ([8, 9, 10], slice(1, 4)))
    ]
    torch.testing.assert_close(torch.cat(parts), together, atol=1e-4, rtol=1e-4)  # kernels differ by batch size
    assert not torch.equal(room.sample([11], None if condition is None else condition[:1], **settings), together[:1])


def test_generated_data_is_made_of_the_codec_s_levels(miniature: Miniature) -> None:
    room, batch, _ = miniature
    images = room.generate([0, 1], condition_of(room, batch, 2))
    if isinstance(images, list):
        assert len(images) == 2
        assert all(isinstance(text, str) for text in images)
        return
    assert images.dtype == torch.uint8
    if not hasattr(room.codec, "levels"):  # an autoencoder's pictures have no exact way back
        return
    assert images.max() <= room.codec.white
    assert torch.equal(room.codec.decode(room.codec.encode({"image": images})), images)


def test_nothing_is_a_condition(miniature: Miniature) -> None:
    room, _, _ = miniature
    images = room.sample([0, 1], room.null_condition(2))
    assert images.shape[0] == 2


def test_likelihood_depends_on_the_row_alone(miniature: Miniature) -> None:
    room, batch, _ = miniature
    if not hasattr(room, "log_likelihood"):
        pytest.skip("the method has no likelihood")
    rows = len(batch["key"])
    whole = room.log_likelihood(batch, seeds=list(range(rows)))
    last = {name: value[-1:] for name, value in batch.items()}
    assert whole.shape == (rows,)
    torch.testing.assert_close(room.log_likelihood(last, seeds=[rows - 1]), whole[-1:], atol=1e-2, rtol=1e-4)
    if room.likelihood == "bound" or hasattr(room.codec, "dequantize"):  # otherwise nothing is drawn
        assert not torch.equal(room.log_likelihood(batch, seeds=[99] * rows), whole)


def test_path_ends_at_the_sample(miniature: Miniature) -> None:
    room, batch, cfg = miniature
    if not hasattr(room, "trajectory"):
        pytest.skip("the method shows no path")
    settings, condition = config.check_sampling(cfg), condition_of(room, batch, 2)
    frames = room.trajectory([3, 4], condition, **settings)
    assert len(frames) > 2
    last = frames[-1].clamp(-1, 1) if isinstance(room.codec, Pixels) else frames[-1]
    torch.testing.assert_close(last, room.sample([3, 4], condition, **settings))


def test_only_followed_weights_are_averaged_and_exported(miniature: Miniature) -> None:
    room, _, _ = miniature
    names = {name for name, _ in room._followed}
    exported = set(room.weights("raw"))
    assert names <= exported
    for shadows in room.shadows.values():
        assert {name.replace("/", ".") for name in dict(shadows.named_parameters())} == names
    assert room.flops_per_sample() >= 0  # 0: unknown
