"""Masked text from the command line: the bound over time, the authors' checkpoints, and what is refused."""

import json
import math
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from callbacks import text_quality, texts
from callbacks.features.scorer import Trained
from callbacks.sampling import prompted
from datamodules.tokenizers import Bytes, Characters
from datamodules.writer import DatasetWriter
from lightningmodules.cadd.network import CaddNet
from lightningmodules.causal import weights as causal
from lightningmodules.shared.codecs import Tokens
from platform import cli, config
from platform.assemble import blueprint
from platform.runs import METRICS, load_module
from tests.toy import untrained

QUIET = ["callbacks.samples=null", "callbacks.quality=null", "trainer.max_steps=2", "trainer.val_every=0"]
TABLE = "callbacks.samples={_target_: callbacks.texts.Texts, prompts: [%s]}"
LEAST = {"data.val_batch_size": "64", "callbacks.likelihood.max_batches": "4"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs of the copy task."""
    folder = tmp_path_factory.mktemp("runs")
    few = [f"{key}={value}" for key, value in LEAST.items()]
    for name in ("mdlm_copy", "cadd_copy"):
        assert cli.main(["fit", name, "--tiny", *QUIET, *few, f"runs={folder}"]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one message of a command that is refused."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


# ---- the bound ----


@pytest.mark.parametrize(("name", "parts"), [("mdlm_copy", set()), ("cadd_copy", {"cross_entropy", "latent"})])
def test_the_bound_is_logged_by_tenths_of_the_time(runs: Path, name: str, parts: set[str]) -> None:
    rows = [json.loads(line) for line in (runs / f"{name}-tiny" / METRICS).read_text().splitlines()]
    values = {row["tag"]: row["value"] for row in rows if row["step"] == 2}
    names = [f"t{k / 10:.1f}-{(k + 1) / 10:.1f}" for k in range(10)]
    expected = {f"likelihood/{part}_{name}" for part in {"bound", *parts} for name in names}
    assert {tag for tag in values if tag.startswith("likelihood/")} == expected
    bound = [values[f"likelihood/bound_{name}"] for name in names]
    assert sum(bound) == pytest.approx(values["metrics/bits_per_token"])
    assert min(bound) > 0
    for part, whole in zip(names, bound, strict=True):
        if parts:
            assert sum(values[f"likelihood/{kind}_{part}"] for kind in parts) == pytest.approx(whole)


def test_holes_in_a_prompt_are_filled(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(runs / "cadd_copy-tiny"), "--seeds", "0-3", "--out", str(tmp_path / "o"), "steps=4"]
    assert cli.main([*words, "--prompt", "ab<mask:3>cd<mask>h"]) == 0
    texts = [file.read_text() for file in sorted((tmp_path / "o").glob("seed_*.txt"))]
    assert all(text[:2] + text[5:7] + text[8] == "abcdh" and len(text) == 16 for text in texts)
    assert len({text[2:5] for text in texts}) > 1
    assert "--prompt has 20 tokens" in refused(capsys, *words[:2], "--prompt", "ab<mask:18>")


def test_outer_spaces_of_a_prompt_stay() -> None:
    module = SimpleNamespace(codec=SimpleNamespace(tokenizer=Characters(normalise="text8")), device="cpu")
    found = prompted(module, None, "The <mask:2> SAT, ").prompt  # type: ignore[arg-type]
    assert found is not None
    assert module.codec.tokenizer.decode(found[0, :4].tolist() + found[0, 6:].tolist()) == "the  sat "
    assert found[0, 4:6].tolist() == [-1, -1]


def test_entropy_of_samples_by_themselves_and_together() -> None:
    found = text_quality._entropies(torch.tensor([[1, 1, 1], [4, 4, 4]]), "")
    assert found == {"metrics/entropy": 0.0, "metrics/entropy_corpus": pytest.approx(math.log(2))}


def test_a_sample_is_scored_document_by_document() -> None:
    tokenizer = Bytes()
    assert tokenizer.eos == 256
    row = [256, *b"one", 256, 256, *b"two"]
    assert text_quality._documents(SimpleNamespace(tokenizer=tokenizer), row) == ["one", "two"]
    scorer = SimpleNamespace(tokenizer=tokenizer)
    assert Trained._joined(scorer, ["one", "two"]) == [*b"one", 256, *b"two"]  # type: ignore[arg-type]
    letters = SimpleNamespace(tokenizer=Characters(normalise="text8", eos=False))
    assert len(Trained._joined(letters, ["one", "two"])) == 6  # type: ignore[arg-type]


def test_texts_without_a_token_have_no_perplexity() -> None:
    """Not the best one."""
    quality = text_quality.TextQuality(n=2, scorer=SimpleNamespace(name="s", score=lambda samples, device: (0.0, 0)))  # type: ignore[arg-type]
    codec = Tokens(Bytes(), 3)
    module = SimpleNamespace(codec=codec, device=torch.device("cpu"))
    rows = [{"tokens": torch.tensor([[1, 2, 3], [4, 4, 4]]), "valid": torch.tensor([[True] * 3, [True, True, False]])}]
    trainer = SimpleNamespace(datamodule=SimpleNamespace(val_dataloader=lambda: rows))
    found = quality._values(trainer, module, torch.full((2, 3), 256))  # type: ignore[arg-type]
    assert math.isnan(found["metrics/gen_ppl_s"])
    assert found["metrics/entropy_data"] == pytest.approx(math.log(3))  # of the full row alone


def test_mauve_wants_a_model_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_quality.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="expected a folder with config"):
        text_quality.TextQuality(mauve="gpt2-large")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    if not any(kind in str(tmp_path) for kind in ("gpt2", "bert")):
        with pytest.raises(ValueError, match="says gpt2 or bert"):
            text_quality.TextQuality(mauve=str(tmp_path / "model"))


# ---- the authors' checkpoints ----


def lightning_checkpoint(net: CaddNet, offset: float = 1.0) -> dict[str, object]:
    """What their training writes: prefixed weights, averages as a list, and objects of theirs."""
    state = net.state_dict()
    return {
        "state_dict": OrderedDict((f"backbone.{key}", value) for key, value in state.items()),
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": [p.detach() + offset for p in net.parameters()]},
        "hyper_parameters": {"config": Path("stands for an object")},
        "global_step": 7,
    }


@pytest.fixture(scope="module")
def network() -> CaddNet:
    torch.manual_seed(3)
    net = blueprint(config.compose("mdlm_copy", [])).averaged()["net"]
    assert isinstance(net, CaddNet)
    real = net.to_empty(device="cpu")
    for tensor in real.state_dict().values():
        tensor.normal_(std=0.05)
    return real


def test_a_training_checkpoint_is_imported_with_its_averages(
    network: CaddNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "best.ckpt"
    torch.save(lightning_checkpoint(network), file)
    assert cli.main(["weights", "import", str(file), "--as", "mdlm_copy", "--out", str(tmp_path / "in")]) == 0
    assert "0 missing, 0 unexpected" in capsys.readouterr().out
    module, _ = load_module(str(tmp_path / "in"))
    ours: dict[str, Tensor] = module.net.state_dict()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach() + 1.0)
    assert module.sample([0, 1], steps=4).max() < 8
    assert cli.main(["weights", "export", str(tmp_path / "in"), "--out", str(tmp_path / "out.pth")]) == 0
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(back[f"backbone.{name}"], value) for name, value in ours.items())
    assert back.keys() == lightning_checkpoint(network)["state_dict"].keys()  # type: ignore[attr-defined]


def test_checkpoints_that_are_none_are_refused(
    network: CaddNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "sprung",)

    whole = lightning_checkpoint(network)
    short = {**whole, "ema": {"shadow_params": [torch.zeros(1)]}}
    for name, content, message in (
        ("objects.ckpt", {"weights": Trap()}, "holds weights; expected a training checkpoint of kuleshov-group/mdlm"),
        ("trap.ckpt", {"state_dict": {"backbone.x": Trap()}}, "holds state_dict; expected a training checkpoint"),
        ("short.ckpt", short, "averages 1 tensors, its backbone has"),
        ("other.ckpt", {"state_dict": {"conv.weight": torch.zeros(1)}}, "no state dict of a masked-diffusion network"),
    ):
        torch.save(content, tmp_path / name)
        said = refused(capsys, "weights", "import", tmp_path / name, "--as", "mdlm_copy", "--out", tmp_path / "in")
        assert message in said
    torch.save(whole, tmp_path / "whole.ckpt")
    said = refused(capsys, "weights", "import", tmp_path / "whole.ckpt", "--as", "mdlm_owt", "--out", tmp_path / "in")
    assert "module.net.hidden=48, here 768" in said
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:5000])
    said = refused(capsys, "weights", "import", tmp_path / "cut.ckpt", "--as", "mdlm_copy", "--out", tmp_path / "in")
    assert "(5,000 bytes) cannot be read as weights" in said
    assert not (tmp_path / "in").exists()
    assert not (tmp_path / "sprung").exists()


# ---- judges ----


def test_a_model_trained_here_scores_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own tokenizer, bytes, whatever the texts are made of."""
    for name in ("mdlm_text27", "causal_pydoc", "mdlm_digits"):
        untrained(name, tmp_path / name)
    words = ["evaluate", str(tmp_path / "mdlm_text27"), "--n", "4", "--scorer", str(tmp_path / "causal_pydoc")]
    assert cli.main([*words, "--metrics", "quality", "steps=2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {line[0]: float(line[1]) for line in lines if line and line[0].startswith("metrics/")}
    assert "metrics/bits_per_character" not in found
    assert 50 < found["metrics/gen_ppl_causal_pydoc"] < 1500  # of 257 tokens, and nothing is learnt yet
    said = refused(capsys, "evaluate", tmp_path / "mdlm_digits", "--metrics", "quality")
    assert "--metrics quality: mdlm_digits measures fid, likelihood." in said
    said = refused(capsys, "evaluate", tmp_path / "mdlm_digits", "--scorer", tmp_path / "causal_pydoc")
    assert "--scorer judges texts, and mdlm_digits has no callbacks.quality" in said
    said = refused(capsys, "evaluate", tmp_path / "mdlm_text27", "--scorer", tmp_path / "nothing")
    assert "callbacks.quality.scorer.folder=" in said
    said = refused(capsys, "evaluate", tmp_path / "mdlm_text27", "--scorer", tmp_path / "mdlm_digits")
    assert "holds weights of lightningmodules.cadd.module.Cadd; only a causal model scores" in said
    said = refused(capsys, *words, "--metrics", "likelihood")
    assert "--scorer judges texts, and --metrics likelihood leaves them out" in said


@pytest.mark.parametrize("older", [False, True])
def test_keys_of_a_causal_model(older: bool) -> None:
    """Those of the older files lack the first word, and hold masks besides."""
    first, masks = ("", {"h.0.attn.bias": torch.zeros(2)}) if older else ("transformer.", {})
    official = {f"{first}wte.weight": torch.ones(3, 2), f"{first}h.0.attn.c_attn.weight": torch.zeros(2), **masks}
    found = causal.translate(official)
    names = ["gpt.lm_head.weight", "gpt.transformer.h.0.attn.c_attn.weight", "gpt.transformer.wte.weight"]
    assert sorted(found) == names
    with pytest.raises(
        ValueError, match=r"no weights of a GPT-2: transformer\.wte\.weight is not among them, but other"
    ):
        causal.translate({"other": torch.zeros(1)})


# ---- tables and films ----


def test_whatever_a_text_holds_a_film_has_a_line_per_reveal() -> None:
    codec = Tokens(Bytes(), 6)
    text = torch.from_numpy(Bytes().encode("a\r\n\x0bb\x1c").astype("int64"))
    states = [torch.full((6,), codec.mask_id), text.clone().index_fill(0, torch.tensor([0]), codec.mask_id), text]
    lines = texts.film(states, codec)
    assert lines[1:] == ["\u2591\\r\\n\\x0bb\\x1c", "a\\r\\n\\x0bb\\x1c"]
    assert all(len(line.splitlines()) == 1 for line in lines)
    shown = texts.table([{"seed": 0, "text": "a\r\nb\rc|\u2028d"}], "head")
    assert len(shown.splitlines()) == 5
    assert shown.endswith("| 0 | a<br>b\\\\rc&#124;\\\\u2028d |")


# ---- mixed precision, several ranks ----


def test_fused_optimiser_clipped_under_mixed_precision(tmp_path: Path) -> None:
    """As the full-size recipes do; Lightning alone refuses it."""
    settings = ["trainer.precision=bf16-mixed", "trainer.gradient_clip=1.0", "module.optimizer.fused=true"]
    assert cli.main(["fit", "mdlm_copy", "--tiny", *QUIET, *settings, f"runs={tmp_path}"]) == 0


def test_ranks_that_need_different_numbers_of_calls_sample_together(tmp_path: Path) -> None:
    """Of a sharded network, whose every call is one of all ranks; steps that reveal nothing on a rank need none."""
    settings = [
        "trainer.devices=2",
        "trainer.max_steps=1",
        "trainer.val_every=1",
        "callbacks.quality.n=3",
        "callbacks.samples={_target_: callbacks.texts.Texts, n: 3, film_every: 0}",
        "sampling.steps=32",
    ]
    few = [f"{key}={value}" for key, value in LEAST.items()]
    command = [sys.executable, "-m", "platform", "fit", "mdlm_copy", "--tiny", *settings, *few, f"runs={tmp_path}"]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    run = tmp_path / "mdlm_copy-tiny"
    (table,) = run.glob("samples/step_*1/ema_*.jsonl")
    counted = [json.loads(line)["evaluations"] for line in table.read_text().splitlines()]
    logged = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    (mean,) = [row["value"] for row in logged if row["tag"] == "metrics/evaluations"]
    (held_out,) = [row["value"] for row in logged if row["tag"] == "metrics/valid_data"]
    assert held_out == 1.0
    assert len(set(counted)) > 1
    assert mean == pytest.approx(sum(counted) / 3)


# ---- mistakes ----


def test_mistakes_are_told_in_one_message(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, rest = runs / "mdlm_copy-tiny", ["--tiny", *QUIET, f"runs={tmp_path}"]
    absent = "data.tokenizer={_target_: datamodules.tokenizers.Pretrained, folder: /nowhere}"
    with DatasetWriter(tmp_path / "texts", dataset="x", licence="x", sources={}) as writer:
        samples = [{"__key__": f"{i:03d}", "txt": b"" if i == 3 else b"abcab"} for i in range(8)]
        writer.write("train", samples, per_shard=8)
    assert cli.main(["weights", "export", str(run), "--out", str(tmp_path / "weights")]) == 0
    own = [
        f"data.root={tmp_path / 'texts'}",
        "data.source=null",
        "data.val=null",
        "data.mode=padded",
        "data.member=txt",
    ]
    for message, words in (
        ("module.codec.vocabulary=100, but data.tokenizer has 8 tokens",
         ["fit", "mdlm_copy", "module.codec.vocabulary=100", *rest]),
        ("know 9 tokens, mask included; the tokenizer of this run makes 18",
         ["fit", "mdlm_digits", "--tiny", f"module.start={tmp_path / 'weights'}", rest[-1]]),
        ("data.tokenizer.folder=/nowhere: expected tokenizer.json", ["fit", "mdlm_copy", absent, *rest]),
        ("The row 003 has no token that could be masked", ["fit", "mdlm_copy", *own, *rest]),
        ("--prompt has 17 tokens, and a sample of this model has 16", ["sample", run, "--prompt", "a" * 17]),
        ("'z' (U+007A) is not in the alphabet of 8 characters", ["sample", run, "--prompt", "az"]),
        ("sampling.block=-3: expected positions per block", ["sample", run, "block=-3"]),
        ("sampling.steps=2 is fewer than one per block", ["sample", run, "block=4", "steps=2"]),
        ("--prompt: '<mask:x>' is no hole", ["sample", run, "--prompt", "<mask:x>"]),
        ("--prompt is not utf-8", ["sample", run, "--prompt", "\udcff"]),
        ("sampling.temperature=nan: expected a number", ["sample", run, "temperature=.nan"]),
        ("lies in a run folder or weights folder. Type that", ["sample", run / "checkpoints"]),
    ):  # fmt: skip
        said = refused(capsys, *words)
        assert message in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("sampling.steps=0: expected at least one step", ["mdlm_copy", "sampling.steps=0"]),
        ("sampling.remask=cap: order=wino masks again", ["cadd_copy", "sampling.order=wino", "sampling.remask=cap"]),
        ("sampling.guidance=2: there is neither", ["mdlm_copy", "sampling.guidance=2"]),
        ("callbacks.samples.prompts: 'abcdefghabcdefgha' has 17 tokens", ["mdlm_copy", TABLE % "abcdefghabcdefgha"]),
        ("callbacks.samples.prompts: 'xyz': the character 'x'", ["mdlm_copy", TABLE % "xyz"]),
        ("callbacks.samples.n=0: expected at least 1", ["mdlm_prose", "callbacks.samples.n=0"]),
        ("The prompt has holes", ["causal_pydoc", "callbacks.samples.prompts=['a<mask>']"]),
        ("module.net.vocabulary=300, but data.tokenizer has 257", ["causal_pydoc", "module.net.vocabulary=300"]),
        ("module.codec.mask=99: expected a token of the vocabulary", ["mdlm_copy", "module.codec.mask=99"]),
    ],
)
def test_what_could_not_be_drawn_is_refused_before_training(
    message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "fit", *words, "--tiny", f"runs={tmp_path}")
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*/checkpoints/step*"))
    assert not [file for file in tmp_path.glob(f"*/{METRICS}") if file.read_text()]
