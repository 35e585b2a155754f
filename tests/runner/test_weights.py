"""The authors' files in and out again, and weights of a run as a folder to use."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightningmodules.tarflow.network import TarFlowNet
from lightningmodules.tarflow.weights import infer, match, to_official, translate
from platform import config, verbs, weights
from platform.runs import load_module

SIZES = {"in_channels": 1, "img_size": 8, "patch_size": 2, "channels": 64, "num_blocks": 4, "layers_per_block": 1}


def official(**options: object) -> dict[str, Tensor]:
    """A file of the quickstart's network as the authors' code would write it."""
    torch.manual_seed(4)
    net = TarFlowNet(**{**SIZES, "num_classes": 10, **options})
    for parameter in net.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return to_official(net.state_dict())


def run(*words: object) -> int:
    return weights.run(verbs.parse("weights", [str(word) for word in words]))


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    file = tmp_path / "digits_model_2_64_4_1_0.10.pth"
    torch.save(official(), file)
    return file


def test_there_and_back(pth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("import", pth, "--as", "quickstart", "--out", tmp_path / "in") == 0
    assert "0 missing, 0 unexpected" in capsys.readouterr().out
    module, cfg = load_module(tmp_path / "in")
    assert cfg.experiment == "quickstart"
    assert module.sample([1, 2]).isfinite().all()
    facts = json.loads((tmp_path / "in/provenance.json").read_text())[0]
    assert facts["imported"] == str(pth)
    assert len(facts["sha256"]) == 64
    assert run("export", tmp_path / "in", "--out", tmp_path / "out.pth") == 0
    before, after = official(), torch.load(tmp_path / "out.pth", weights_only=True)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert run("export", tmp_path / "in", "--out", tmp_path / "again") == 0
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("in", "again"))
    assert first.keys() == second.keys() == {f"net.{key}" for key in translate(before)}
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (
        config.difference(config.load(tmp_path / "in/config.yaml"), config.load(tmp_path / "again/config.yaml")) == []
    )


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in official().items()}, tmp_path / "m.safetensors")
    assert run("import", tmp_path / "m.safetensors", "--as", "quickstart", "--out", tmp_path / "in") == 0


def test_files_that_do_not_fit(pth: Path, tmp_path: Path) -> None:
    def refused(message: str, file: Path = pth, experiment: str = "quickstart") -> None:
        with pytest.raises(ValueError, match=message):
            run("import", file, "--as", experiment, "--out", tmp_path / "in")
        assert not (tmp_path / "in").exists()

    wide = tmp_path / "wide.pth"
    torch.save(official(channels=128), wide)
    refused("the file has module.net.channels=128, here 64.*Type --as", wide)
    refused(r"is not a model of tarflow_mnist.*module\.net\.img_size=8, here 28", pth, "tarflow_mnist")
    broken = official()
    broken["extra"] = broken.pop("blocks.1.proj_in.bias")
    torch.save(broken, wide)
    refused(r"1 missing \(blocks\.1\.proj_in\.bias\); 1 unexpected \(extra\); 0 of another shape", wide)
    broken = official()
    broken["blocks.2.proj_out.bias"] = torch.zeros(7)
    torch.save(broken, wide)
    refused(r"blocks\.2\.proj_out\.bias: \(7,\) in the file, \(8,\) in the network", wide)
    torch.save({"optimizer": {}, "lr_schedule": {}}, wide)
    refused("not a bare state dict of named tensors.*take the model file", wide)
    wide.write_bytes(pth.read_bytes()[:1000])
    refused("cannot be read as tensors", wide)
    refused("no such file", tmp_path / "nowhere.pth")


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="nothing in it was executed"):
        weights.read_official(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_an_occupied_folder_is_left_alone(pth: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/mine").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        run("import", pth, "--as", "quickstart", "--out", tmp_path / "in")
    assert [item.name for item in (tmp_path / "in").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nvp": False, "num_classes": 0},
        {"in_channels": 3, "img_size": 12, "patch_size": 3, "layers_per_block": 2, "expansion": 2},
    ],
)
def test_shapes_tell_the_network(options: dict[str, object]) -> None:
    said = {**SIZES, "num_classes": 10, "nvp": True, "head_dim": 64, "expansion": 4, **options}
    assert infer(official(**options)) == said
    net = TarFlowNet(**infer(official(**options)))
    match(translate(official(**options)), net.state_dict())


def test_foreign_files_are_recognised() -> None:
    with pytest.raises(ValueError, match="no state dict of TarFlow"):
        infer({"unet.weight": torch.zeros(1)})
    odd = official()
    odd["blocks.0.attn_mask"] = torch.ones(16, 16)
    with pytest.raises(ValueError, match="not the causal mask"):
        translate(odd)


def test_import_keeps_the_whole_configuration(pth: Path, tmp_path: Path) -> None:
    run("import", pth, "--as", "quickstart", "--out", tmp_path / "in")
    saved = OmegaConf.load(tmp_path / "in/config.yaml")
    assert saved == config.compose("quickstart", [])
