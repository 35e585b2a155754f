"""The command line: help, mistakes, exit codes, signals."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from platform import cli, signals, verbs

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "lightning", "hydra", "omegaconf", "numpy", "yaml", "webdataset", "PIL")


def call(*words: str) -> int:
    """Exit code of a command run in this process."""
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("words", [["--help"], ["help"], ["-h"]])
def test_help_names_every_verb(words, capsys):
    assert call(*words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, verb in verbs.VERBS.items():
        assert f"  {name} " in out
        assert verb.about in out


def test_nothing_prints_help_on_stderr_only(capfd):
    assert call() == 0
    out, err = capfd.readouterr()
    assert os.uname().sysname in out
    assert len(out.splitlines()) == 1
    assert "usage: python -m platform VERB" in err


@pytest.mark.parametrize("name", verbs.VERBS)
def test_help_of_a_verb(name, capsys):
    assert call(name, "--help") == 0
    out = capsys.readouterr().out
    verb = verbs.VERBS[name]
    assert verb.about in out
    assert f"example: python -m platform {verb.example}" in out
    words = verb.example.split()
    assert words[0] == name
    verbs.parse(name, words[1:])  # the example is accepted
    for action in verbs.parser_of(name)._actions:
        if action.option_strings and action.dest not in ("help", "experiment", "out" if name == "weights" else ""):
            assert "(default: " in action.help, action.option_strings


def test_help_and_mistakes_are_quick_and_import_nothing_heavy():
    code = f"""
import sys
from platform import cli
for words in (["--help"], ["fit", "--help"], ["ft"], ["fit", "--tinny"], ["sample"]):
    try:
        cli.main(words)
    except SystemExit:
        pass
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    seconds = []
    for _ in range(5):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "platform", "--help"], cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 0.5


# What is typed -> the whole answer. The help line that follows each of them is left out here.
MISTAKES = {
    "ft": "'ft' is not a verb. Did you mean fit?",
    "quikstart": "'quikstart' is not a verb.",
    "quickstart": "'quickstart' is an experiment, not a verb. Type python -m platform fit quickstart",
    "fit --tinny": "unrecognized arguments: --tinny. Did you mean --tiny?",
    "fit quickstart seed": "'seed' is neither an option nor of the form key=value.",
    "sample": "the following arguments are required: RUN",
    "sample r --seeds 9-3": "argument --seeds: '9-3' is not a list of seeds. Type for example 0-63 or 0-7,20,30-31.",
    "sample r --batch 0": "argument --batch: '0' is not an integer of at least 1.",
    "sample r --label x": "argument --label: 'x' is not an integer of at least -1.",
    "sample r --weights emma": (
        "argument --weights: 'emma' names no weights. Type raw, ema, or ema with a decay: ema0.999."
    ),
    "sample r guidance": "'guidance' is neither an option nor of the form key=value.",
    "sample r --prompt a --prompt b": "--prompt came twice. Type one, and a command for each of the others.",
    "evaluate r --answers 3": "--answers goes with --problems FILE, the programs to be written.",
    "prepare": "no experiment was named. python -m platform show lists them.",
    "board --port 70000": "argument --port: '70000' is not an integer from 1 to 65535.",
    "weights export r": "weights export needs a folder to write. Add --out DIR.",
    "weights import f.pth --out d": "weights import needs to know what the file is. Add --as EXPERIMENT.",
    "bench nowhere": "there is no lightningmodules/nowhere/bench.py.",
    "board nowhere": "nowhere is not a folder (seen from {cwd}). Type board FOLDER, or start a run.",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_with_two_and_a_message(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(*words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith(MISTAKES[words].format(cwd=tmp_path))
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "experiment", "overrides", "tiny"),
    [
        ("", "quickstart", [], False),
        ("seed=1 --tiny tag=x", "quickstart", ["seed=1", "tag=x"], True),
        ("--tiny tarflow_mnist seed=1", "tarflow_mnist", ["seed=1"], True),
        ("tarflow_mnist +new.key=1 a=[1,2] b={c:-1}", "tarflow_mnist", ["+new.key=1", "a=[1,2]", "b={c:-1}"], False),
    ],
)
def test_words_of_fit(words, experiment, overrides, tiny):
    args = verbs.parse("fit", words.split())
    assert (args.experiment, args.overrides, args.tiny) == (experiment, overrides, tiny)


def test_words_of_the_other_verbs():
    words = ["runs/x", "--seeds", "3,0-2,1", "guidance=1.5", "--label", "-1", "--weights", "ema0.999", "--no-grid"]
    args = verbs.parse("sample", words)
    assert (args.run, args.seeds, args.overrides) == ("runs/x", [3, 0, 1, 2], ["guidance=1.5"])
    assert (args.label, args.weights, args.grid, args.batch, args.out) == (-1, "ema0.999", False, 64, None)
    assert verbs.parse("sample", ["r"]).seeds == list(range(64))
    assert verbs.parse("show", []).experiment is None
    assert verbs.parse("show", ["seed=1"]).experiment == "quickstart"
    assert verbs.parse("board", []).runs == "runs"
    args = verbs.parse("bench", ["tarflow", "--tokens", "64", "--help"])
    assert (args.room, args.args) == ("tarflow", ["--tokens", "64", "--help"])
    args = verbs.parse("weights", ["import", "a.pth", "--as", "quickstart", "--out", "d"])
    assert (args.action, args.source, args.experiment, args.out) == ("import", "a.pth", "quickstart", "d")


def in_our_code(source: str):
    """A function whose code seems to lie in the package ``platform``."""
    space = {}
    exec(compile(source, str(ROOT / "platform" / "imagined.py"), "exec"), space)
    return space["verb"]


def run_as_doctor(monkeypatch, verb, *words: str) -> int:
    monkeypatch.setattr(cli, "_dispatch", lambda name: verb)
    return call("doctor", *words)


def test_our_own_value_error_is_the_users_mistake(monkeypatch, capsys):
    verb = in_our_code("def verb(args):\n    raise ValueError('came, expected, where, type')")
    assert run_as_doctor(monkeypatch, verb) == 2
    assert capsys.readouterr().err == "came, expected, where, type\n"
    assert run_as_doctor(monkeypatch, verb, "--trace") == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_mistake_behind_hydras_wrapping(monkeypatch, capsys, tmp_path):
    from hydra.utils import instantiate

    file = {"_target_": "pathlib.Path", "_args_": [str(tmp_path / "nothing")]}
    verb = in_our_code("def verb(args, do=None):\n    return do()")
    monkeypatch.setattr(
        verb, "__defaults__", (lambda: instantiate({"_target_": "platform.verify.read", "file": file}),)
    )
    assert run_as_doctor(monkeypatch, verb) == 2
    assert capsys.readouterr().err == "there is no such file.\n"


def test_prepare_builds_and_describes(monkeypatch, capsys):
    from omegaconf import OmegaConf

    made = []
    data = argparse.Namespace(prepare_data=lambda: made.append(1), describe=lambda: {"root": "/x", "val_shards": 2})
    monkeypatch.setattr("hydra.utils.instantiate", lambda cfg, **_: data)
    monkeypatch.setattr("platform.config.compose", lambda name, words, tiny: OmegaConf.create({"data": {}}))
    assert call("prepare", "quickstart") == 0
    assert made == [1]
    assert capsys.readouterr().out.splitlines()[1:] == ["  root        /x", "  val_shards  2"]


@pytest.mark.parametrize(
    "source",
    [
        "def verb(args):\n    raise RuntimeError('a bug')",
        "def verb(args):\n    int('not by a raise statement')",
        "def verb(args):\n    import json; json.loads('raised elsewhere')",
        "def verb(args):\n  try:\n    raise ValueError('handled')\n  except ValueError:\n    raise KeyError",
    ],
)
def test_everything_else_is_a_bug(monkeypatch, capsys, source):
    assert run_as_doctor(monkeypatch, in_our_code(source)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_missing_dependency(monkeypatch, capsys):
    assert run_as_doctor(monkeypatch, in_our_code("def verb(args):\n    import not_a_package_of_anybody")) == 2
    assert "not_a_package_of_anybody is not installed" in capsys.readouterr().err
    assert run_as_doctor(monkeypatch, in_our_code("def verb(args):\n    import platform.not_there")) == 1


def test_interruption(monkeypatch, capsys):
    assert run_as_doctor(monkeypatch, in_our_code("def verb(args):\n    raise KeyboardInterrupt")) == 75
    assert capsys.readouterr().err.strip() == "interrupted; the same command continues"


def test_codes_of_verbs_and_exits_pass(monkeypatch):
    assert run_as_doctor(monkeypatch, lambda args: 75) == 75
    assert run_as_doctor(monkeypatch, in_our_code("def verb(args):\n    raise SystemExit(7)")) == 7


def test_reader_that_goes_away():
    done = subprocess.run(
        f"{sys.executable} -u -m platform fit --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr


def test_other_ranks_say_who_they_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    run_as_doctor(monkeypatch, in_our_code("def verb(args):\n    raise ValueError('oh')"))
    assert capsys.readouterr().err == "rank 3: oh\n"


@pytest.fixture
def _handlers(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    monkeypatch.setattr(signals, "_received", 0)
    monkeypatch.setattr(signals, "_interrupted", False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
class TestSignals:
    def test_they_only_set_a_flag(self):
        signals.install()
        assert signals.requested() == 0
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.requested() == signal.SIGUSR1  # the first one counts

    def test_second_ctrl_c_leaves(self, capfd):
        signals.install()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested() == signal.SIGINT
        assert "Ctrl-C again leaves at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    def test_ctrl_c_after_another_signal_still_needs_two(self):
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    def test_fit_installs_them_before_its_imports(self, monkeypatch):
        seen = []

        def imported(name: str) -> argparse.Namespace:
            seen.append((name, signal.getsignal(signal.SIGTERM)))
            return argparse.Namespace(run=lambda args: 0)

        monkeypatch.setattr("importlib.import_module", imported)
        assert call("fit") == 0
        assert seen == [("platform.fit", signals._note)]
