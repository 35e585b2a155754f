"""Composing, filling, overriding, saving and comparing configurations, on a toy experiments folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError

from platform import config, signatures
from platform.settings import FROM_COMMAND, SECTIONS, SETTINGS, is_volatile
from platform.suggest import closest, closest_key
from platform.typecheck import REFUSED, Minimum, coerce, describe, example
from tests.unit import config_rooms as rooms

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compose:
    """``compose(*overrides, tiny=False, **files)`` on the toy folder."""
    monkeypatch.setattr(signatures, "FILLED", (*signatures.FILLED, "tests."))

    def run(*overrides: str, tiny: bool = False, **files: str) -> DictConfig:
        return config.compose("toy", overrides, tiny=tiny, folder=rooms.write(tmp_path, **files))

    return run


# ---- filling ---------------------------------------------------------------------------------------------------------


def test_defaults_of_signatures_are_written_out(compose: Compose) -> None:
    cfg = compose()
    room = OmegaConf.to_container(cfg.module)
    assert {name: room[name] for name in ("noise_std", "noise_type", "layers", "betas", "decays", "vp")} == {
        "noise_std": 0.1,  # the file's, not the signature's
        "noise_type": "gaussian",
        "layers": 4,
        "betas": [0.9, 0.95],
        "decays": [],
        "vp": False,
    }
    assert "transform" not in room  # a function is no yaml


def test_partial_targets_are_filled_without_what_the_caller_gives(compose: Compose) -> None:
    module = compose().module
    assert module.net == {
        "_target_": "tests.unit.config_rooms.Net",
        "_partial_": True,
        "channels": 1,
        "width": 8,
        "dropout": 0.0,
    }
    assert module.optimizer.eps == 1e-8
    assert "params" not in module.optimizer
    assert module.schedule.end == 0.0
    assert not {"step", "total_steps"} & set(module.schedule)


def test_interpolation_sees_filled_defaults_and_overrides(compose: Compose) -> None:
    assert compose().module.net.channels == 1
    assert compose("data.channels=3").module.net.channels == 3
    assert compose("seed=7").data.seed == 7
    assert compose("sampling.guidance=3").callbacks.meter.settings == {"guidance": 3.0}


def test_targets_outside_our_packages_are_left_alone(compose: Compose) -> None:
    module = compose("module.transform={_target_: math.fabs, _partial_: true}").module
    assert module.transform == {"_target_": "math.fabs", "_partial_": True}


def test_experiment_knows_itself(compose: Compose) -> None:
    cfg = compose()
    assert (cfg.experiment, cfg.tiny_run) == ("toy", False)
    assert "tiny" not in cfg
    assert config.run_name(cfg, "toy") == "toy"
    small = compose("tag=5", tiny=True)
    assert small.tiny_run is True
    assert config.run_name(small, "toy") == "toy-5-tiny"


def test_unknown_keys_cannot_be_read(compose: Compose) -> None:
    with pytest.raises(ConfigAttributeError):
        compose().trainer.max_stepps  # noqa: B018


def test_composing_twice_gives_the_same(compose: Compose) -> None:
    assert OmegaConf.to_yaml(compose()) == OmegaConf.to_yaml(compose())


# ---- tiny ------------------------------------------------------------------------------------------------------------


def test_tiny_merges_and_replaces_whole_targets(compose: Compose) -> None:
    cfg = compose(tiny=True)
    assert cfg.trainer.max_steps == 2
    assert cfg.module.noise_std == 0.2
    # the old data had root and workers, which the new class does not take
    assert cfg.data == {"_target_": "tests.unit.config_rooms.OtherData", "side": 16, "channels": 3, "size": 16}
    assert cfg.module.net.channels == 3


def test_command_line_wins_over_tiny(compose: Compose) -> None:
    assert compose("trainer.max_steps=9", tiny=True).trainer.max_steps == 9


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("module.vp=true", "module.vp", True),
        ("trainer.max_steps=5e3", "trainer.max_steps", 5000),
        ("trainer.max_steps=5000.0", "trainer.max_steps", 5000),
        ("module.layers=1_000", "module.layers", 1000),
        ("module.noise_std=1", "module.noise_std", 1.0),
        ("module.noise_std=1e-3", "module.noise_std", 0.001),
        ("module.betas=[0,0.5]", "module.betas", [0.0, 0.5]),
        ("module.noise_type=uniform", "module.noise_type", "uniform"),
        ("module.extra={a: 1}", "module.extra", {"a": 1}),
        ("module.schedule=null", "module.schedule", None),
        ("sampling.steps=4", "sampling.steps", 4),
        ("callbacks.meter=null", "callbacks.meter", None),
        ("trainer.precision=32", "trainer.precision", "32"),
        ("trainer.gradient_clip=1", "trainer.gradient_clip", 1.0),
        ("checkpoints.milestones=[10,2e1]", "checkpoints.milestones", [10, 20]),
        ("tag=2024-01-01", "tag", "2024-01-01"),
        ("tag=007", "tag", "007"),
        ("about='a, b'", "about", "a, b"),
        ("about=on", "about", "on"),
        ("data.root=train-{000..010}.tar", "data.root", "train-{000..010}.tar"),
        ("data.root=*.tar", "data.root", "*.tar"),
        ("data.root=/a=b", "data.root", "/a=b"),
        ("trainer={max_steps: 3}", "trainer.max_steps", 3),
        ("module.net={width: 16}", "module.net.width", 16),
        ("module.codec={_target_: lightningmodules.shared.codecs.Pixels, size: 8}", "module.codec.levels", 256),
        ("module.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 1}", "module.optimizer.momentum", 0),
        ("callbacks.second={_target_: tests.unit.config_rooms.Meter}", "callbacks.second.every", 10),
        ("module.noise_std=${data.size}", "module.noise_std", 8.0),
    ],
)
def test_override(compose: Compose, text: str, key: str, value: Any) -> None:
    found = OmegaConf.select(compose(text), key)
    found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    assert found == value
    assert type(found) is type(value)


def test_the_last_of_two_overrides_counts(compose: Compose) -> None:
    assert compose("seed=1", "seed=2").seed == 2


def test_replacing_a_target_drops_the_old_arguments(compose: Compose) -> None:
    module = compose("module.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 1}").module
    assert "betas" not in module.optimizer


def test_a_part_can_be_set_after_it_is_switched_on(compose: Compose) -> None:
    cfg = compose("callbacks.off.every=3", "callbacks.off={_target_: tests.unit.config_rooms.Meter}")
    assert cfg.callbacks.off.every == 3


def test_group_choice_changes_a_section(compose: Compose) -> None:
    cfg = compose("hardware=h100x8", "trainer.devices=4")
    assert (cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.compile) == ("gpu", 4, True)
    other = compose("data=other", data__other="_target_: tests.unit.config_rooms.OtherData\nside: 4\n")
    assert other.data.side == 4
    assert other.module.net.channels == 3


def test_environment_reaches_the_configuration(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_ROOT", "/there")
    assert compose().data.root == "/there/toy"


def test_required_argument_may_come_from_the_command_line(compose: Compose) -> None:
    without = rooms.DATA.replace("root: ${oc.env:TOY_ROOT,/nowhere}/toy", "root: ???")
    assert compose("data.root=here", data__toy=without).data.root == "here"


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_settings_of_a_command(compose: Compose) -> None:
    cfg = compose()
    assert config.check_sampling(cfg) == {"guidance": 2.0}
    assert config.check_sampling(cfg, ["guidance=3", "sampling.steps=8.0"]) == {"guidance": 3.0, "steps": 8}
    assert cfg.sampling == {"guidance": 2.0}


def test_request_of_a_sample_is_no_setting(compose: Compose) -> None:
    with pytest.raises(ValueError, match=r"sampling\.seeds: no such setting"):
        config.check_sampling(compose(), ["seeds=3"])


# ---- saved -----------------------------------------------------------------------------------------------------------


def test_saved_configuration_comes_back(compose: Compose, tmp_path: Path) -> None:
    cfg = compose("tag=007", "module.noise_std=1e-5", "about='null'")
    file = tmp_path / "run" / "config.yaml"
    config.save(cfg, file)
    first = file.read_bytes()
    assert "${" not in file.read_text()
    assert config.load(file) == cfg
    assert config.difference(config.load(file), cfg) == []
    config.save(config.load(file), file)
    assert file.read_bytes() == first
    assert [path.name for path in file.parent.iterdir()] == ["config.yaml"]


def test_failed_save_leaves_the_old_file(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    config.save(compose(), file)
    before = file.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        config.save(compose("seed=1"), file)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob(".config*"))


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "a: 1\n", "\x00"])
def test_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml: not a"):
        config.load(file)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        config.load(tmp_path / "config.yaml")


def test_difference_names_what_shapes_the_result(compose: Compose) -> None:
    old, new = (
        compose(),
        compose("module.layers=5", "module.betas=[0.5,0.9]", "callbacks.off={_target_: tests.unit.config_rooms.Meter}"),
    )
    assert config.difference(old, new) == [
        ("callbacks.off", None, config.ABSENT),
        ("callbacks.off._target_", config.ABSENT, "tests.unit.config_rooms.Meter"),
        ("callbacks.off.every", config.ABSENT, 10),
        ("callbacks.off.settings", config.ABSENT, None),
        ("module.betas", [0.9, 0.95], [0.5, 0.9]),
        ("module.layers", 4, 5),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "hardware=fsdp_4x8",
        "trainer.max_steps=7",
        "trainer.threads=2",
        "checkpoints.keep=9",
        "data.workers=0",
        "fresh=true",
    ],
)
def test_a_run_continues_under_volatile_changes(compose: Compose, text: str) -> None:
    ignored = {"trainer.precision", "trainer.compile"} if text.startswith("hardware") else set()
    assert {key for key, _, _ in config.difference(compose(), compose(text))} == ignored


def test_volatile_covers_whole_words_only() -> None:
    assert is_volatile("checkpoints.every")
    assert is_volatile("callbacks.progress.every")
    assert not is_volatile("callbacks.progress_bar")
    assert not is_volatile("data.seed")


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_settings_table_matches_base_yaml() -> None:
    base = yaml.safe_load((rooms.REAL / "base.yaml").read_text())
    leaves = {name for name in base if name not in (*SECTIONS, "tiny")}
    leaves |= {f"{name}.{key}" for name in ("trainer", "checkpoints") for key in base[name]}
    assert leaves == set(SETTINGS) - set(FROM_COMMAND)


def test_every_setting_has_a_comment() -> None:
    lines = (rooms.REAL / "base.yaml").read_text().splitlines()
    bare = [line for line in lines if ":" in line.split("#")[0] and "#" not in line]
    assert bare == ["trainer:"]  # a section whose settings explain themselves


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (5.0, int, 5),
        (5.5, int, REFUSED),
        (True, int, REFUSED),
        (1, bool, REFUSED),
        (2, float, 2.0),
        ("2", float, REFUSED),
        (float("nan"), int, REFUSED),
        (5.0, int | float, 5.0),
        (None, int, REFUSED),
        (None, int | None, None),
        (None, Annotated[int | None, Minimum(1)], None),
        (0, Annotated[int, Minimum(1)], REFUSED),
        (0, Annotated[int, Minimum(1)] | None, REFUSED),
        (32, Literal["32", "16"], "32"),
        ("8", Literal["32", "16"], REFUSED),
        ([1, 2.0], list[int], [1, 2]),
        ([1, "a"], Sequence[int], REFUSED),
        ([1], tuple[float, float], REFUSED),
        ([1, 2, 3], tuple[float, ...], [1.0, 2.0, 3.0]),
        ("ab", Sequence[str], REFUSED),
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        ("x", Path, "x"),
        (3, Callable[..., Any], REFUSED),
        ({"_target_": "a.b"}, Callable[..., Any], {"_target_": "a.b"}),
        ({"a": 1}, rooms.Net, REFUSED),
        (3, Any, 3),
        (3, "Unknown", 3),
    ],
)
def test_coerce(value: Any, annotation: Any, expected: Any) -> None:
    found = coerce(value, annotation)
    assert found is expected or (found == expected and type(found) is type(expected))


def test_descriptions_and_examples() -> None:
    assert describe(Annotated[int, Minimum(1)] | None) == "a whole number of at least 1 or null"
    assert describe(Literal["a", "b"]) == "one of a, b"
    assert describe(tuple[float, float]) == "a list of 2, each a number"
    assert describe(list[str] | None) == "a list, each text or null"
    assert describe(rooms.Net) == "a mapping with _target_"
    assert example(int, 5.6) == 6
    assert example(tuple[float, float], 0.5) == [0.1, 0.1]
    assert example(Literal["a", "b"] | None, "c") == "a"


def test_suggestions() -> None:
    known = [
        "trainer",
        "trainer.max_steps",
        "seed",
        "module.optimizer.lr",
        "module.net.channels",
        "data.channels",
        "data.batch_size",
    ]
    assert closest_key("trainer.max_step", known) == "trainer.max_steps"
    assert closest_key("lr", known) == "module.optimizer.lr"
    assert closest_key("modul.net.chanels", known) == "module.net.channels"
    assert closest_key("module.nett.channels", known) == "module.net.channels"
    assert closest_key("data.batch", known) == "data.batch_size"
    assert closest_key("Trainer.Max-Steps", known) == "trainer.max_steps"
    assert closest_key("xyz", known) is None
    assert closest("hardwar", ["data", "hardware"]) == "hardware"
