"""The authors' checkpoints, as one file and as the folder that sharded training writes."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from lightningmodules.shared.dcp import read_folder, write_folder
from lightningmodules.starflow.weights import infer, match, to_official, translate
from tests.unit.test_starflow_network import OPTIONS, inputs, network


@pytest.mark.parametrize("name", ["released", "gqa-no-bias", "learnt-places", "text-everywhere", "R2L-identity"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    net = network(**OPTIONS[name])
    constants = (4, net.txt_size, net.steps[0].shape.head_dim)
    official = to_official(net.state_dict(), constants=constants)
    assert {"var", "blocks.0.attn_mask"} <= official.keys()
    assert official["blocks.0.attn_mask"].shape == (16 + net.txt_size,) * 2
    file, folder = tmp_path / "model.pth", tmp_path / "sharded"
    torch.save(official, file)
    write_folder(official, folder)
    for read in (torch.load(file, weights_only=True), read_folder(folder)):
        state = translate(read)
        match(state, net.state_dict())
        other = network(seed=9, **OPTIONS[name])
        other.load_state_dict(state)
        x, y = inputs(net)
        assert torch.equal(other(x, y).z, net(x, y).z)


def test_sizes_are_read_from_a_file() -> None:
    net = network(**OPTIONS["text-everywhere"])
    found = infer(to_official(net.state_dict()))
    expected = {"channels": 40, "num_blocks": 3, "sos": True, "rope": True, "txt_dim": 5, "use_bias": True}
    assert expected.items() <= found.items()
    assert infer(network(**OPTIONS["learnt-places-shift"]).state_dict())["rope"] is False
    with pytest.raises(ValueError, match="no state dict of STARFlow"):
        infer({"blocks.0.pos_embed": torch.zeros(1)})


def test_a_folder_that_is_no_checkpoint_is_refused_and_nothing_in_it_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder of torch\.distributed\.checkpoint"):
        read_folder(tmp_path)

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="has no place in a checkpoint"):
        read_folder(tmp_path)
    assert not (tmp_path / "ran").exists()
