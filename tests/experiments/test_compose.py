"""Every experiment composes, in full and as a miniature, and its networks have the size that its file states."""

import importlib
import re
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from platform import config, signatures
from platform.assemble import blueprint
from platform.estimate import estimate
from platform.origins import EXPERIMENTS, experiments, groups, read

NAMES = experiments()
MILLIONS = re.compile(r"#.*?([\d.]+) ?M parameters")


def composed(name: str, tiny: bool = False, *overrides: str) -> DictConfig:
    return config.compose(name, overrides, tiny=tiny)


def test_there_is_something_to_test() -> None:
    assert "quickstart" in NAMES
    assert set(groups()) == {"data", "hardware"}


@pytest.mark.parametrize("tiny", [False, True], ids=["full", "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_composes_completely(name: str, tiny: bool) -> None:
    cfg = composed(name, tiny)
    text = OmegaConf.to_yaml(cfg)
    assert "???" not in text
    assert "${" not in text
    parts = {part: OmegaConf.to_container(cfg[part]) for part in ("module", "data", "callbacks")}
    for key, node in signatures.targets(parts).items():
        signature = signatures.of(node["_target_"])
        plain = {argument for argument, found in signature.arguments.items() if found.plain}
        assert not signature.filled or plain <= set(node), key


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("cadd_", "mdlm_", "causal_"))])
def test_what_is_published_can_be_measured(name: str) -> None:
    """``evaluate`` measures with the callbacks of the recipe: texts by ``quality``, pictures by ``fid``."""
    cfg = composed(name, False)
    assert ("fid" if cfg.module.codec._target_.endswith("PixelTokens") else "quality") in cfg.callbacks
    blueprint(cfg).check_settings(config.check_sampling(cfg))


@pytest.mark.parametrize("name", NAMES)
def test_states_what_it_is(name: str) -> None:
    content = read(EXPERIMENTS / f"{name}.yaml").content
    assert content["about"]
    assert len(content["about"]) <= 100
    assert content["source"]
    assert [next(iter(item)) for item in content["defaults"] if isinstance(item, dict)] == ["data", "hardware"]
    assert content["defaults"][0] == "base"
    assert content["defaults"][-1] == "_self_"


@pytest.mark.parametrize("name", NAMES)
def test_miniature_is_small(name: str) -> None:
    cfg = composed(name, tiny=True)
    assert cfg.trainer.max_steps <= 20
    assert cfg.trainer.accelerator == "cpu"
    assert cfg.trainer.devices * cfg.trainer.num_nodes == 1
    assert estimate(cfg).trainable < 1_000_000


@pytest.mark.parametrize(
    ("name", "setting"), [("starflow_digits", "start"), ("cadd_digits", "start"), ("vae_digits", "weights")]
)
def test_plans_need_no_weights_to_start_from(name: str, setting: str) -> None:
    cfg = composed(name, True, f"module.{setting}=removed")
    assert blueprint(cfg).averaged()
    assert estimate(cfg).trainable


@pytest.mark.parametrize("name", NAMES)
def test_builds_with_the_stated_number_of_parameters(name: str) -> None:
    stated = MILLIONS.search((EXPERIMENTS / f"{name}.yaml").read_text())
    assert stated, "the file's comments say how large the network is: '# ... 3.23 M parameters'"
    digits = len(stated.group(1).partition(".")[2])
    assert f"{estimate(composed(name)).trainable / 1e6:.{digits}f}" == stated.group(1)


@pytest.mark.parametrize("choice", groups()["hardware"])
def test_every_hardware_goes_with_the_quickstart(choice: str) -> None:
    cfg = composed("quickstart", False, f"hardware={choice}")
    assert cfg.trainer.accelerator in ("cpu", "gpu")
    assert config.run_name(cfg, "quickstart") == "quickstart"


@pytest.mark.parametrize("choice", groups()["data"])
def test_every_data_file_composes(choice: str) -> None:
    using = [name for name in NAMES if f"data: {choice}\n" in (EXPERIMENTS / f"{name}.yaml").read_text()]
    # offered, but no experiment's own
    fitting = {"unicode_names": "causal_pydoc", "digits8_latents": "starflow_digits_latent"}
    cfg = composed((using or [fitting.get(choice, "quickstart")])[0], False, f"data={choice}")
    module, _, name = cfg.data._target_.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_files_are_plain_text(file: Path) -> None:
    text = file.read_text(encoding="ascii")
    assert text.endswith("\n")
    assert "\t" not in text
