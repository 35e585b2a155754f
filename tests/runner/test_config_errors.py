"""What a person reads after a mistake in a command or an experiment file: every message, word for word."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from platform import cli, config, signatures
from tests.unit import config_rooms as rooms

ROOT = Path(__file__).resolve().parents[2]
Refuse = Callable[..., str]

TYPED = {
    # unknown names
    "trainer.max_step=5": (
        "trainer.max_step: no such setting. Did you mean trainer.max_steps? Set on the command line "
        "(trainer.max_step=5). Type trainer.max_steps=5."
    ),
    "+trainer.max_step=5": (
        "trainer.max_step: no such setting. Did you mean trainer.max_steps? Set on the command line "
        "(+trainer.max_step=5). Type trainer.max_steps=5 (no '+' is needed)."
    ),
    "++module.widht=5": (
        "module.widht: no such setting. Did you mean module.net.width? Set on the command line "
        "(++module.widht=5). Type module.net.width=5 (no '++' is needed)."
    ),
    "+trainer.max_steps=5": (
        "+trainer.max_steps=5: every setting is there already, no '+' is needed. Type trainer.max_steps=5."
    ),
    "~callbacks.meter": (
        "~callbacks.meter: settings cannot be deleted. To switch a part off type callbacks.meter=null."
    ),
    "~callbacks.metre": (
        "callbacks.metre: no such setting. Did you mean callbacks.meter? Set on the command line "
        "(~callbacks.metre). Type callbacks.meter=null (no '~' is needed)."
    ),
    "max_steps=5": (
        "max_steps: no such setting. Did you mean trainer.max_steps? Set on the command line (max_steps=5). "
        "Type trainer.max_steps=5."
    ),
    "module.noise_sdt=3": (
        "module.noise_sdt: no such setting. Did you mean module.noise_std? Set on the command line "
        "(module.noise_sdt=3). Type module.noise_std=3."
    ),
    "module.net.widht=3": (
        "module.net.widht: no such setting. Did you mean module.net.width? Set on the command line "
        "(module.net.widht=3). Type module.net.width=3."
    ),
    "modul.layers=3": (
        "modul.layers: no such setting. Did you mean module.layers? Set on the command line (modul.layers=3). "
        "Type module.layers=3."
    ),
    "xyz.abc=3": (
        "xyz.abc: no such setting. Set on the command line (xyz.abc=3). All settings: python -m platform show toy"
    ),
    "hydra.run.dir=x": (
        "hydra.run.dir: no such setting. Set on the command line (hydra.run.dir=x). All settings: python -m "
        "platform show toy"
    ),
    "hardwar=cpu": (
        "hardwar: no such setting. Did you mean hardware? Set on the command line (hardwar=cpu). Type "
        "hardware=CHOICE, one of cpu, fsdp_4x8, gpu, h100x8."
    ),
    "hardware=h100": (
        "hardware=h100: no such choice. Did you mean hardware=h100x8? Choices: cpu, fsdp_4x8, gpu, h100x8. "
        "Set on the command line. Type hardware=h100x8."
    ),
    "+hardware=gpu": ("+hardware=gpu: no '+' is needed. Type hardware=gpu."),
    "data=toyy": (
        "data=toyy: no such choice. Did you mean data=toy? Choices: toy. Set on the command line. Type data=toy."
    ),
    "sampling.guidence=2": (
        "sampling.guidence: no such setting. Did you mean sampling.guidance? Room.sample takes guidance, "
        "steps. Set on the command line (sampling.guidence=2). Type sampling.guidance=2."
    ),
    "callbacks.metre.every=3": (
        "callbacks.metre.every: no such setting. Did you mean callbacks.meter.every? Set on the command line "
        "(callbacks.metre.every=3). Type callbacks.meter.every=3."
    ),
    "callbacks.off.every=3": (
        "callbacks.off.every=3: callbacks.off is switched off (null, in experiments/base.yaml line 29). Set "
        "callbacks.off first."
    ),
    "callbacks.meter.settings.guidance=3": (
        "callbacks.meter.settings.guidance=3: callbacks.meter.settings follows sampling. Type sampling.guidance=3."
    ),
    "callbacks.meter.settings={guidence: 2}": (
        "callbacks.meter.settings.guidence: no such setting. Did you mean callbacks.meter.settings.guidance? "
        "Room.sample takes guidance, steps. Set on the command line (callbacks.meter.settings={guidence: 2}). "
        "Correct the name there."
    ),
    "callbacks.meter.settings={steps: many}": (
        "callbacks.meter.settings.steps=many: expected a whole number or null. Set on the command line "
        "(callbacks.meter.settings={steps: many}). Type e.g. callbacks.meter.settings.steps=1."
    ),
    "trainer={max_step: 3}": (
        "trainer.max_step: no such setting. Did you mean trainer.max_steps? Set on the command line "
        "(trainer={max_step: 3}). Correct the name there."
    ),
    "experiment=other": (
        "experiment=other: experiment is not a setting of its own; write the experiment as the first word."
    ),
    "tiny_run=true": ("tiny_run=true: tiny_run is not a setting of its own; add or drop --tiny."),
    # wrong types
    "trainer.max_steps=5.5": (
        "trainer.max_steps=5.5: expected a whole number of at least 1. Set on the command line "
        "(trainer.max_steps=5.5). Type e.g. trainer.max_steps=6."
    ),
    "trainer.max_steps=0": (
        "trainer.max_steps=0: expected a whole number of at least 1. Set on the command line "
        "(trainer.max_steps=0). Type e.g. trainer.max_steps=1."
    ),
    "trainer.max_steps=many": (
        "trainer.max_steps=many: expected a whole number of at least 1. Set on the command line "
        "(trainer.max_steps=many). Type e.g. trainer.max_steps=1."
    ),
    "trainer.precision=16": (
        "trainer.precision=16: expected one of 32, bf16-mixed. Set on the command line "
        "(trainer.precision=16). Type e.g. trainer.precision=32."
    ),
    "trainer=3": ("trainer=3: expected a mapping of settings. Set on the command line (trainer=3)."),
    "callbacks=null": ("callbacks=null: expected a mapping of settings. Set on the command line (callbacks=null)."),
    "callbacks.meter=5": (
        "callbacks.meter=5: expected a mapping with _target_, or null for off. Set on the command line "
        "(callbacks.meter=5). Type e.g. callbacks.meter=null."
    ),
    "module=null": ("module=null: expected a mapping of settings. Set on the command line (module=null)."),
    "module.layers=null": (
        "module.layers=null: expected a whole number. Set on the command line (module.layers=null). Type e.g."
        " module.layers=4."
    ),
    "module.layers=true": (
        "module.layers=true: expected a whole number. Set on the command line (module.layers=true). Type e.g."
        " module.layers=4."
    ),
    "module.vp=1": (
        "module.vp=1: expected true or false. Set on the command line (module.vp=1). Type e.g. module.vp=false."
    ),
    "module.noise_type=gausian": (
        "module.noise_type=gausian: expected one of gaussian, uniform. Set on the command line "
        "(module.noise_type=gausian). Type e.g. module.noise_type=gaussian."
    ),
    "module.betas=[0.9]": (
        "module.betas=[0.9]: expected a list of 2, each a number. Set on the command line "
        "(module.betas=[0.9]). Type e.g. module.betas=[0.9,0.95]."
    ),
    "module.betas.0=3": (
        "module.betas.0=3: module.betas is [0.9,0.95], not a mapping. Give the whole value: module.betas=[0.9,0.95]."
    ),
    "module.codec=3": (
        "module.codec=3: expected a mapping with _target_ or null. Set on the command line (module.codec=3)."
    ),
    "sampling.steps=few": (
        "sampling.steps=few: expected a whole number or null. Set on the command line (sampling.steps=few). "
        "Type e.g. sampling.steps=1."
    ),
    "checkpoints.milestones=5": (
        "checkpoints.milestones=5: expected a list, each a whole number of at least 1. Set on the command "
        "line (checkpoints.milestones=5). Type e.g. checkpoints.milestones=[1]."
    ),
    "tag=a/b": (
        "tag='a/b' names a folder: expected letters, digits and . _ = - only. Set on the command line "
        "(tag=a/b). Type e.g. tag=a-b."
    ),
    # form
    "module.layers": ("'module.layers': expected key=value, without blanks around '='. Type e.g. module.layers=VALUE."),
    "module.layers = 3": (
        "'module.layers = 3': 'module.layers ' is no setting's name. Type words joined by dots, e.g. seed=1."
    ),
    "module.layers=": (
        "module.layers=: no value behind '='. Type module.layers=null for none, or module.layers=\"''\" for empty text."
    ),
    "module.layers=1,2": (
        "module.layers=1,2: several values; one command is one run. Type one command per value, "
        "module.layers=[1,2] for a list, or module.layers=\"'1,2'\" for text with commas."
    ),
    "module.layers=range(1,5)": (
        "module.layers=range(1,5): several values; one command is one run. Type one command per value, "
        "module.layers=[range(1,5)] for a list, or module.layers=\"'range(1,5)'\" for text with commas."
    ),
    "module.betas=[1,2": (
        "module.betas=[1,2: '[1,2' is not valid yaml (expected ',' or ']', but got '<stream end>'). Type e.g."
        " module.betas=[1,2]."
    ),
    # targets and references
    "module._target_=tests.unit.config_rooms.Rom": (
        "module._target_=tests.unit.config_rooms.Rom: no 'Rom' in tests.unit.config_rooms. Did you mean Room?"
        " Set on the command line (module._target_=tests.unit.config_rooms.Rom). Type the full path, "
        "package.module.Name."
    ),
    "module.schedule._target_=tests.unit.config_rooms.level": (
        "module.schedule.warmup_steps: no such setting. Did you mean module.schedule.total_steps? "
        "tests.unit.config_rooms.level takes step, total_steps. Set in experiments/toy.yaml line 13."
        " A new _target_ needs its whole mapping: module.schedule='{_target_: ..., ...}'."
    ),
    "module.codec={_target_: lightningmodules.shared.codecs.Pixels, sise: 8}": (
        "module.codec.sise: no such setting. Did you mean module.codec.size? "
        "lightningmodules.shared.codecs.Pixels takes size, channels, levels, white. Set on the command line "
        "(module.codec={_target_: lightningmodules.shared.codecs.Pixels, sise: 8}). Correct the name there."
    ),
    "module.codec={_target_: lightningmodules.shared.codecs.Pixels}": (
        "module.codec.size: required, but missing from what is set on the command line "
        "(module.codec={_target_: lightningmodules.shared.codecs.Pixels}); expected a whole number. Type "
        "module.codec.size=1."
    ),
    "module.noise_std=${data.sise}": (
        "module.noise_std=${data.sise}: Interpolation key 'data.sise' not found. Did you mean data.size? Set "
        "on the command line (module.noise_std=${data.sise}). Type module.noise_std=VALUE, or correct what it"
        " refers to."
    ),
    "module.noise_std=${oc.env:NO_SUCH_VARIABLE}": (
        "module.noise_std=${oc.env:NO_SUCH_VARIABLE}: the environment variable NO_SUCH_VARIABLE is not set. "
        "Set on the command line (module.noise_std=${oc.env:NO_SUCH_VARIABLE}). Type module.noise_std=VALUE, "
        "or correct what it refers to."
    ),
}

WRITTEN = [
    # file, old text, new text, message
    (
        "toy",
        "max_steps: 100",
        "max_step: 100",
        (
            "trainer.max_step: no such setting. Did you mean trainer.max_steps? Set in experiments/toy.yaml line "
            "16. Correct the name there."
        ),
    ),
    (
        "toy",
        "max_steps: 100",
        "val_every: 5",
        (
            "trainer.max_steps: required, but missing from what is set in experiments/base.yaml line 8; expected "
            "a whole number of at least 1. Type trainer.max_steps=1."
        ),
    ),
    (
        "toy",
        "noise_std: 0.1",
        "noise_sdt: 0.1",
        (
            "module.noise_sdt: no such setting. Did you mean module.noise_std? tests.unit.config_rooms.Room takes"
            " net, codec, optimizer, schedule, noise_std, noise_type, layers, betas, decays, extra, transform, "
            "vp, untyped. Set in experiments/toy.yaml line 14. Correct the name there."
        ),
    ),
    (
        "toy",
        "noise_std: 0.1",
        "noise_std: big",
        (
            "module.noise_std=big: expected a number. Set in experiments/toy.yaml line 14. Type e.g. "
            "module.noise_std=0.05."
        ),
    ),
    (
        "toy",
        "lr: 1.0e-3",
        "lrr: 1.0e-3",
        (
            "module.optimizer.lrr: no such setting. Did you mean module.optimizer.lr? torch.optim.AdamW takes "
            "params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused."
            " Set in experiments/toy.yaml line 12. Correct the name there."
        ),
    ),
    (
        "toy",
        "about: a toy",
        "epochs: 3",
        ("epochs: no such setting. Set in experiments/toy.yaml line 7. All settings: python -m platform show toy"),
    ),
    (
        "toy",
        "about: a toy",
        "tag: 5",
        ("tag=5: expected text or null. Set in experiments/toy.yaml line 7. Type e.g. tag=text."),
    ),
    (
        "toy",
        "about: a toy",
        "about: [",
        ("experiments/toy.yaml line 9: not valid yaml: expected ',' or ']', but got '<scalar>'. Correct that line."),
    ),
    (
        "toy",
        "  - base\n",
        "",
        (
            "checkpoints: required, but experiment toy does not set it; expected a mapping of settings. List the "
            "file that holds it in the experiment's defaults, or write it there."
        ),
    ),
    (
        "toy",
        "data: toy",
        "data: toyy",
        (
            "experiments/toy.yaml, defaults: data: toyy names no file experiments/data/toyy.yaml. Did you mean "
            "toy? Choices: toy."
        ),
    ),
    (
        "toy",
        "guidance: 2.0",
        "guidence: 2.0",
        (
            "sampling.guidence: no such setting. Did you mean sampling.guidance? Room.sample takes guidance, "
            "steps. Set in experiments/toy.yaml line 15. Correct the name there."
        ),
    ),
    (
        "toy",
        "about: a toy",
        "callbacks: {metre: {every: 5}}",
        (
            "callbacks.metre={every: 5}: expected a mapping with _target_, or null for off. Did you mean "
            "callbacks.meter? Set in experiments/toy.yaml line 7. Type e.g. callbacks.meter=null."
        ),
    ),
    (
        "toy",
        "about: a toy",
        "checkpoints: {evry: 5}",
        (
            "checkpoints.evry: no such setting. Did you mean checkpoints.every? Set in experiments/toy.yaml line "
            "7. Correct the name there."
        ),
    ),
    (
        "toy",
        "config_rooms.Room\n",
        "config_rooms.Rooms\n",
        (
            "module._target_=tests.unit.config_rooms.Rooms: no 'Rooms' in tests.unit.config_rooms. Did you mean "
            "Room? Set in experiments/toy.yaml line 10. Type the full path, package.module.Name."
        ),
    ),
    (
        "toy",
        "lightningmodules.shared",
        "lightningmodule.shared",
        (
            "module.schedule._target_=lightningmodule.shared.optim.warmup_cosine: no 'lightningmodule'. Did you "
            "mean lightningmodules? Set in experiments/toy.yaml line 13. Type the full path, package.module.Name."
        ),
    ),
    (
        "data__toy",
        "root: ${oc.env:TOY_ROOT,/nowhere}/toy",
        "",
        (
            "data.root: required, but missing from what is set in experiments/data/toy.yaml line 1; expected "
            "text. Type data.root=VALUE."
        ),
    ),
    (
        "data__toy",
        "seed: ${seed}",
        "sede: 3",
        (
            "data.sede: no such setting. Did you mean data.seed? tests.unit.config_rooms.Data takes root, size, "
            "channels, workers, seed. Set in experiments/data/toy.yaml line 4. Correct the name there."
        ),
    ),
    (
        "data__toy",
        "_target_: tests.unit.config_rooms.Data",
        "",
        (
            "data: no _target_ in what is set in experiments/data/toy.yaml line 1; expected the dotted path of a "
            "class there."
        ),
    ),
]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """The message that composing the toy experiment ends with."""
    monkeypatch.setattr(signatures, "FILLED", (*signatures.FILLED, "tests."))

    def run(*overrides: str, name: str = "toy", tiny: bool = False, **files: str) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            config.compose(name, overrides, tiny=tiny, folder=rooms.write(tmp_path, **files))
        assert cli.user_mistake(caught.value) is not None  # so the command ends with 2 and without traceback
        return str(caught.value)

    return run


@pytest.mark.parametrize("typed", TYPED)
def test_mistake_in_a_command(refuse: Refuse, typed: str) -> None:
    assert refuse(typed) == TYPED[typed]


@pytest.mark.parametrize(("file", "old", "new", "message"), WRITTEN, ids=lambda value: value[:24])
def test_mistake_in_a_file(refuse: Refuse, file: str, old: str, new: str, message: str) -> None:
    text = {"toy": rooms.TOY, "data__toy": rooms.DATA}[file]
    assert refuse(**{file: text.replace(old, new)}) == message


def test_mistake_in_a_miniature_names_its_line(refuse: Refuse) -> None:
    text = rooms.TOY.replace("max_steps: 2}", "max_stepps: 2}")
    assert refuse(tiny=True, toy=text) == (
        "trainer.max_stepps: no such setting. Did you mean trainer.max_steps? Set in experiments/toy.yaml line 20."
        " Correct the name there."
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tooy", "tooy: no such experiment in experiments/. Did you mean toy? List them: python -m platform show"),
        (
            "experiments/toy.yaml",
            "experiments/toy.yaml: no such experiment in experiments/. Did you mean toy?"
            " List them: python -m platform show",
        ),
        ("zzz", "zzz: no such experiment in experiments/. List them: python -m platform show"),
        ("base", "base: holds what every run has, but is no experiment. List them: python -m platform show"),
    ],
)
def test_unknown_experiment(refuse: Refuse, name: str, message: str) -> None:
    assert refuse(name=name) == message


def test_group_that_the_experiment_lacks(refuse: Refuse) -> None:
    assert refuse("hardware=gpu", toy=rooms.TOY.replace("  - hardware: cpu\n", "")) == (
        "hardware=gpu: experiments/toy.yaml has no hardware in its defaults, so there is nothing to replace."
        " Add 'hardware: gpu' to its defaults."
    )


def test_error_inside_a_room_is_not_a_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_room.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = rooms.TOY.replace("tests.unit.config_rooms.Room", "broken_room.Room")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        config.compose("toy", [], folder=rooms.write(tmp_path, toy=text))


def test_plain_mistakes_are_found_without_torch(tmp_path: Path) -> None:
    folder = rooms.write(tmp_path)
    program = f"""
import sys
from pathlib import Path
from platform import config
for words in ("tooy seed=1", "toy trainer.max_step=5", "toy hardware=h100", "toy seed=x", "toy xyz=1"):
    name, typed = words.split()
    try:
        config.compose(name, [typed], folder=Path({str(folder)!r}))
    except ValueError:
        continue
    sys.exit(f"{{typed}} was accepted")
found = sorted({{"torch", "lightning"}} & set(sys.modules))
sys.exit(f"imported {{found}}" if found else 0)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quikstart"], "quikstart: no such experiment in experiments/. Did you mean quickstart?"),
        (["quickstart", "trainer.max_step=5"], "trainer.max_step: no such setting. Did you mean trainer.max_steps?"),
        (["quickstart", "+trainer.max_step=5"], "trainer.max_step: no such setting. Did you mean trainer.max_steps?"),
        (["quickstart", "hardware=h100"], "hardware=h100: no such choice. Did you mean hardware=h100x8?"),
        (["quickstart", "module.noise_sdt=1"], "module.noise_sdt: no such setting. Did you mean module.noise_std?"),
        (["quickstart", "module.noise_std=much"], "module.noise_std=much: expected a number."),
    ],
)
def test_command_ends_with_two(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert shown.out == ""
    assert "Traceback" not in shown.err
