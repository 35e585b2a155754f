"""Text metrics against recorded numbers of the definitions and of published packages."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from callbacks.features import text


@pytest.fixture(scope="module")
def recorded():
    return load_file(Path(__file__).parent / "metrics.safetensors")


def test_entropy(recorded):
    entropy = text.unigram_entropy(recorded["text.tokens"].long())
    torch.testing.assert_close(entropy, recorded["text.unigram_entropy_nats"], rtol=1e-8, atol=0)
    torch.testing.assert_close(entropy.mean()[None], recorded["text.unigram_entropy_mean"], rtol=1e-8, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct(recorded, n):
    corpus, mean = text.distinct(recorded["text.tokens"].tolist(), n)
    assert corpus == pytest.approx(recorded[f"text.distinct_{n}_corpus"].item(), rel=1e-8)
    assert mean == pytest.approx(recorded[f"text.distinct_{n}_mean"].item(), rel=1e-8)


def test_generative_perplexity(recorded):
    counted = text.scored_targets(recorded["text.ppl_tokens"].long(), eos=0)
    assert torch.equal(counted, recorded["text.ppl_valid_mask"].bool())
    assert text.perplexity(recorded["text.ppl_nll"], counted) == pytest.approx(recorded["text.gen_ppl"].item(), 1e-8)
    assert text.scored_targets(recorded["text.ppl_tokens"].long(), eos=None).all()


def test_pass_at_k(recorded):
    ours = [text.pass_at_k(*row) for row in recorded["code.passk_nck"].tolist()]
    assert ours == pytest.approx(recorded["code.passk"].tolist(), rel=1e-8)


def test_parses():
    assert text.parses("x = 1\n")
    assert not text.parses("x = = 1")
    assert not text.parses("# only a comment")
    assert not text.parses("\0")


def test_lines_parse():
    window = "ed, it)\n        if self.x:\n            return 1\n        y = 2\n        retu"
    assert not text.parses(window)
    assert text.lines_parse(window)
    assert not text.lines_parse(window.replace("y = 2", "y = "))
    assert not text.lines_parse("x = 1\ny = 2")  # nothing whole inside
    assert not text.lines_parse("")


def test_rules():
    assert text.repeats("abab")
    assert not text.repeats("abba")
    assert not text.repeats("aba")
    assert text.names_a_character("LATIN SMALL LETTER A\nDIGIT ONE")
    assert not text.names_a_character("LATIN SMALL LETTER AA B")
    assert not text.names_a_character("")
