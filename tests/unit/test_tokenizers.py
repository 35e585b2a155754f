"""Tokenizers: what goes in comes out, marks have numbers of their own, and nothing wrong passes in silence."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.tokenizers import TEXT8, Bytes, Characters, Pretrained, text8
from tests.tars import write_tar

TEXT = "na\u00efve \u6f22\u5b57 \U0001f600\n"


def test_bytes() -> None:
    tokenizer = Bytes(bos=True, pad=True)
    tokens = tokenizer.encode(TEXT)
    assert tokens.tolist() == list(TEXT.encode())
    assert (tokenizer.eos, tokenizer.bos, tokenizer.pad, tokenizer.size) == (256, 257, 258, 259)
    assert tokenizer.decode([257, *tokens, 256, 258, 258]) == TEXT
    assert (Bytes().size, Bytes(eos=False).size) == (257, 256)
    assert tokenizer.decode([0xFF]) == "\ufffd"
    with pytest.raises(ValueError, match=r"token 259 is not one of the tokenizer's 259"):
        tokenizer.decode([259])


@pytest.mark.parametrize("symbols", [5, 255, 70_000])
def test_characters_of_any_number(symbols: int) -> None:
    points = [0x100 + point for point in range(symbols) if not 0xD800 <= 0x100 + point < 0xE000]
    alphabet = "".join(map(chr, points))
    tokenizer = Characters(alphabet)
    assert tokenizer.size == len(alphabet) + 1 == tokenizer.eos + 1
    tokens = tokenizer.encode(alphabet[::-1])
    assert tokens.tolist() == list(range(len(alphabet)))[::-1]
    assert tokenizer.decode([*tokens.tolist(), tokenizer.eos]) == alphabet[::-1]
    with pytest.raises(ValueError, match=r"'a' \(U\+0061\) is not in the alphabet.*data.tokenizer.unknown"):
        tokenizer.encode(alphabet[:2] + "a")


def test_unknown_characters() -> None:
    assert Characters("ab", unknown="?").encode("abc").tolist() == [0, 1, 2]
    assert Characters("a?b", unknown="?").encode("abc").tolist() == [0, 2, 1]
    for wrong, told in (({"alphabet": "aba"}, "'a' is in it twice"), ({"alphabet": ""}, "it is empty"), ({}, "either")):
        with pytest.raises(ValueError, match=told):
            Characters(**wrong)


def test_27_symbols() -> None:
    assert text8("Don't  PANIC:\tpage 42\n\u00c9t\u00e9 \u2014 2x") == "don t panic page four two ete two x"
    tokenizer = Characters(normalise="text8", eos=False)
    assert tokenizer.size == 27
    assert tokenizer.alphabet == TEXT8
    assert tokenizer.decode(tokenizer.encode("A 1")) == "a one"


def test_alphabet_of_a_corpus(tmp_path: Path) -> None:
    tokenizer = Characters(corpus=tmp_path / "corpus", eos=False)  # made before the corpus is there
    with pytest.raises(ValueError, match=r"data\.tokenizer\.corpus=.* does not exist.*platform prepare"):
        _ = tokenizer.size
    (tmp_path / "corpus").mkdir()
    write_tar(tmp_path / "corpus" / "train-0.tar", {"0": {"txt": b"cab"}, "1": {"py": "\u00e9a".encode()}})
    assert tokenizer.alphabet == "abc\u00e9"
    assert tokenizer.fingerprint == Characters("abc\u00e9", eos=False).fingerprint


def test_fingerprint_tells_tokenizers_apart() -> None:
    found = [
        Bytes(),
        Bytes(eos=False),
        Bytes(eos=False, bos=True),
        Characters("ab"),
        Characters("ba"),
        Characters("ab", eos=False),
        Characters("ab", unknown="b"),
        Characters(" ab", normalise="text8"),
        Characters(" ab"),
    ]
    assert len({tokenizer.fingerprint for tokenizer in found}) == len(found)
    assert Bytes().fingerprint == "35ce8945fdb1da5a691e48fd9e724107"  # stored beside tokens: must never change


def trained(folder: Path, **marks: str) -> Path:
    backend = Backend(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(marks.values()), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat sat on the mat, the hat"] * 10, trainer)
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(4)  # a tokenizer may come with any such setting
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)
    return folder


def test_pretrained(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", eos_token="<e>", pad_token="<p>")
    tokenizer = Pretrained(folder)
    text = "the cat, the hat " + TEXT
    tokens = tokenizer.encode(text)
    assert 4 < len(tokens) < len(text.encode())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, 0, 1)
    assert tokens.max() < tokenizer.size <= 300
    assert tokenizer.decode([*tokens.tolist(), tokenizer.eos]) == text
    assert [part.tolist() for part in tokenizer.encode_batch(["the", text])][1] == tokens.tolist()
    assert tokenizer.fingerprint == Pretrained(str(folder)).fingerprint
    other = Pretrained(trained(tmp_path / "b", cls_token="<c>", sep_token="<s>"))
    assert (other.bos, other.eos) == (0, 1)
    assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_a_text_cannot_write_marks(tmp_path: Path, kind: str) -> None:
    """Not even where the vocabulary holds the mark as if it were a word."""
    folder = tmp_path / kind
    if kind == "bytes":
        trained(folder, eos_token="<e>", pad_token="<p>")
    else:
        words = ["<e>", "<u>", *"<e>abc "]
        pieces = models.Unigram([(word, -float(rank)) for rank, word in enumerate(dict.fromkeys(words))], unk_id=1)
        backend = Backend(pieces if kind == "pieces" else models.WordLevel({w: i for i, w in enumerate(words)}, "<u>"))
        if kind == "words":
            backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="<u>").save_pretrained(folder)
    text = "a <e> b"
    safe, open_ = Pretrained(folder), Pretrained(folder, read_marks=True)
    assert safe.eos == open_.eos == 0
    assert 0 not in safe.encode(text)
    assert 0 in open_.encode(text)
    if kind != "words":
        assert safe.decode(safe.encode(text)).replace(" ", "") == "a<e>b"
    np.testing.assert_array_equal(safe.encode("a b c"), open_.encode("a b c"))
    assert safe.fingerprint != open_.fingerprint
    assert 0 in pickle.loads(pickle.dumps(open_)).encode(text)


def test_pretrained_from_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer\.folder=.*gpt2: expected tokenizer\.json.* no such folder"):
        _ = Pretrained(tmp_path / "gpt2").size
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocab\.json with merges\.txt.*it holds vocab\.json\."):
        _ = Pretrained(tmp_path / "gpt2").size
    (tmp_path / "gpt2" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read the tokenizer there"):
        Pretrained(tmp_path / "gpt2").encode("x")


def test_batches_are_the_single_ones() -> None:
    texts = ["", "ab", TEXT]
    for tokenizer in (Bytes(), Characters("ab", unknown="b")):
        for one, many in zip(map(tokenizer.encode, texts), tokenizer.encode_batch(texts), strict=True):
            np.testing.assert_array_equal(one, many)
