"""Rows of tokens: every token of every document once, true borders, exact continuation, damage accounted for."""

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.pretokenize import pretokenize
from datamodules.text import Text
from datamodules.tokenizers import Bytes, Characters
from tests.tars import write_tar

Batch = dict[str, Any]
ALPHABET = "abcdefghijklmnopqrstuvwxyz "
CHARACTERS = Characters(ALPHABET)
T = 16


def document(number: int) -> str:
    """Any length from 0 on, mostly shorter than a row, some of several rows; no two alike beyond a few letters."""
    random = np.random.default_rng(number)
    length = int(random.integers(0, 12) if number % 5 else random.integers(20, 60))
    return "".join(ALPHABET[i] for i in random.integers(0, 27, length))


def write_texts(folder: Path, counts: list[int], split: str = "train", first: int = 0, **bad: bytes) -> None:
    folder.mkdir(exist_ok=True)
    for shard, count in enumerate(counts):
        keys = [f"d{number:04d}" for number in range(first, first + count)]
        first += count
        content = {
            key: {"txt": bad.get(key, document(int(key[1:])).encode()), "cls": key[-1:].encode()} for key in keys
        }
        write_tar(folder / f"{split}-{shard:06d}.tar", content)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "raw"
    write_texts(folder, [13, 9, 17, 11, 12])
    write_texts(folder, [8, 9], split="val", first=100)
    for name, tokenizer in (("bytes", Bytes()), ("letters", CHARACTERS)):
        pretokenize(folder.with_name(name), texts=folder, tokenizer=tokenizer)
    return folder


def text(root: Path, rank: int = 0, world: int = 1, seen: int | None = None, **options: Any) -> Text:
    defaults = {"train": "train-*.tar", "val": "val-*.tar", "tokenizer": Bytes(), "length": T, "batch_size": 12}
    data = Text(root=root, **{**defaults, "window": 2, "workers": 0, **options})
    data.setup("fit")
    module = SimpleNamespace() if seen is None else SimpleNamespace(samples_seen=seen)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=module)  # type: ignore[assignment]
    return data


def rows(data: Text, number: int | None = None) -> Iterator[Batch]:
    """Single rows of the training sequence."""
    stream = iter(data.train_dataloader())
    try:
        for batch in stream:
            for row in range(len(batch["key"])):
                if number == 0:
                    return
                number = None if number is None else number - 1
                yield {name: column[row] for name, column in batch.items()}
    finally:
        stream.close()
        data.teardown("fit")


def same(left: Batch, right: Batch) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) if isinstance(left[name], torch.Tensor) else left[name] == right[name]
        for name in left
    )


def documents_of(parts: list[Batch], decode: Any) -> Counter[str]:
    """Documents put together again from rows with borders, by position inside the document."""
    found: Counter[str] = Counter()
    open_pieces: dict[int, list[int]] = {}
    for row in parts:
        for number in range(int(row["document"].max()) + 1):
            here = row["document"] == number
            begin = int(row["position"][here][0])
            tokens = row["tokens"][here].tolist()
            assert row["position"][here].tolist() == list(range(begin, begin + len(tokens)))
            pieces = open_pieces.pop(begin, []) if begin else []
            pieces += tokens
            if pieces[-1] == decode.eos:
                found[decode.decode(pieces)] += 1
            else:
                open_pieces[len(pieces)] = pieces  # lengths are different enough in these tests
    assert not open_pieces
    return found


@pytest.mark.parametrize("folder", ["raw", "tokens"])
@pytest.mark.parametrize("tokenizer", [Bytes(), CHARACTERS], ids=["bytes", "letters"])
@pytest.mark.parametrize("mode", ["concat", "pack", "padded"])
def test_every_token_once(root: Path, mode: str, tokenizer: Any, folder: str) -> None:
    where = root if folder == "raw" else root.with_name("bytes" if tokenizer.size == 257 else "letters")
    member = "txt" if folder == "raw" else "tok"
    data = text(where, mode=mode, tokenizer=tokenizer, member=member, documents=True, batch_size=1)
    expected = Counter(document(number) for number in range(62))
    epoch = data.training_sequence().length()
    stored = sum(len(name) + 1 for name in expected.elements())
    if mode == "concat":
        check_stream(data, 5 * epoch, stored)
        return
    parts = list(rows(data, epoch))
    for row in parts:
        assert torch.equal(row["valid"], row["document"] >= 0)
        assert (row["tokens"][~row["valid"]] == tokenizer.eos).all()
    if mode == "padded":
        found = Counter(tokenizer.decode(row["tokens"][row["valid"]]) for row in parts)
        assert found == Counter(name[:T] for name in expected.elements())
        assert sum(int((row["tokens"] == tokenizer.eos)[row["valid"]].sum()) for row in parts) == sum(
            len(name) < T for name in expected.elements()
        )
        return
    assert sum(int(row["valid"].sum()) for row in parts) == stored
    whole = [name for name in expected.elements() if len(name) < T]
    inside = Counter(
        tokenizer.decode(row["tokens"][row["document"] == number])
        for row in parts
        for number in range(int(row["document"].max()) + 1)
    )
    assert not Counter(whole) - inside
    assert len(parts) < 1.15 * stored / T


def check_stream(data: Text, count: int, stored: int) -> None:
    """Full rows, in which the tokens of every document of every epoch that is over stand once."""
    parts = list(rows(data, count))
    pieces = data.training_sequence()(np.arange(count))
    seen: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
    for row, at, epoch, sample, begin, length in zip(*(column.tolist() for column in pieces), strict=True):
        tokens = parts[row]["tokens"][at : at + length].tolist()
        seen.setdefault((epoch, sample), []).append((begin, tokens))
    assert all(row["valid"].all() for row in parts)
    assert sum(len(tokens) for found in seen.values() for _, tokens in found) == count * T
    for epoch in range(count * T // stored - 1):
        for sample in range(62):
            joined = [token for _, tokens in sorted(seen[epoch, sample]) for token in tokens]
            assert joined == [*data.tokenizer.encode(document(sample)).tolist(), data.tokenizer.eos]
    firsts = np.searchsorted(pieces.row, np.arange(24))
    assert len(set(pieces.sample[firsts].tolist())) > 12  # rows of one document do not stand together


def test_borders_of_documents(root: Path) -> None:
    """Raw and stored documents, borders by hand."""
    for where, member in ((root, "txt"), (root.with_name("bytes"), "tok")):
        data = text(where, documents=True, member=member)
        pieces = data.training_sequence()(np.arange(12))
        batch = next(iter(data.train_dataloader()))
        for row, at, sample, begin, length in zip(
            pieces.row, pieces.at, pieces.sample, pieces.begin, pieces.length, strict=True
        ):
            place = slice(int(at), int(at + length))
            whole = [*document(int(sample)).encode(), 256]
            assert batch["tokens"][row, place].tolist() == whole[begin : begin + length]
            assert batch["position"][row, place].tolist() == list(range(begin, begin + length))
            assert len(set(batch["document"][row, place].tolist())) == 1
        assert batch["document"].dtype == torch.int32
        assert (batch["document"][:, 0] == 0).all()
        steps = batch["document"].diff(dim=1)
        assert ((steps == 0) | (steps == 1)).all()
        first = pieces.sample[np.searchsorted(pieces.row, np.arange(12))]
        assert [key.partition("+")[0] for key in batch["key"]] == [f"d{sample:04d}" for sample in first]


@pytest.mark.parametrize("options", [{}, {"mode": "pack"}, {"mode": "padded", "num_classes": 10}, {"member": "tok"}])
def test_continuation_and_ranks(root: Path, options: dict[str, Any]) -> None:
    where = root.with_name("bytes") if options.get("member") == "tok" else root
    total = 96
    ideal = list(rows(text(where, batch_size=12, **options), total))
    for position, world, micro, workers in ((0, 3, 2, 0), (12, 1, 4, 2), (36, 2, 3, 1), (84, 4, 1, 0)):
        state = text(where, seen=position, **options).state_dict()
        assert state["next_key"] == ideal[position]["key"]
        merged: dict[int, Batch] = {}
        for rank in range(world):
            data = text(where, rank, world, seen=position, micro_batch=micro, workers=workers, **options)
            data.load_state_dict(state)
            for number, row in enumerate(rows(data, (total - position) // world)):
                batch, inside = divmod(number, micro)
                merged[position + (batch * world + rank) * micro + inside] = row
        assert sorted(merged) == list(range(position, total))
        assert all(same(merged[at], ideal[at]) for at in merged)


def test_what_a_position_means(root: Path) -> None:
    state = text(root, seen=24).state_dict()
    text(root).load_state_dict(state)
    for change in ({"length": 8}, {"mode": "pack"}, {"add_eos": False}, {"tokenizer": CHARACTERS}, {"window": 3}):
        with pytest.raises(ValueError, match=rf"data\.{next(iter(change))} was"):
            text(root, **change).load_state_dict(state)


@pytest.mark.parametrize("mode", ["concat", "pack", "padded"])
def test_validation_has_every_token_once(root: Path, mode: str) -> None:
    expected = Counter(document(number)[: T if mode == "padded" else None] for number in range(100, 117))
    for world in (1, 3):
        loaders = [text(root, rank, world, mode=mode, val_batch_size=6).val_dataloader() for rank in range(world)]
        assert len({len(loader) for loader in loaders}) == 1
        batches = [batch for loader in loaders for batch in loader]
        tokens = np.concatenate([batch["tokens"][batch["valid"]] for batch in batches]).tolist()
        letters = Counter("".join(expected.elements()).encode())
        assert Counter(token for token in tokens if token < 256) == letters
    seeds = [text(root, mode=mode, seed=seed, window=seed + 1).val_dataloader() for seed in (0, 1)]
    assert all(same(left, right) for left, right in zip(*seeds, strict=True))


def test_wrapped_rows(root: Path) -> None:
    tokenizer = Bytes(bos=True)
    data = text(root, tokenizer=tokenizer, wrap=True)
    wrapped = list(islice(data.train_dataloader(), 3))
    for batch in wrapped:
        assert (batch["tokens"][:, 0] == 257).all()
        assert (batch["tokens"][:, -1] == 256).all()
        assert batch["valid"].all()
    plain = text(root, tokenizer=tokenizer, length=T - 2)
    for batch, inside in zip(wrapped, plain.train_dataloader(), strict=False):
        assert torch.equal(batch["tokens"][:, 1:-1], inside["tokens"])
    padded = next(iter(text(root, tokenizer=tokenizer, wrap=True, mode="padded", num_classes=10).train_dataloader()))
    for tokens, valid, key, label in zip(*(padded[name] for name in ("tokens", "valid", "key", "label")), strict=True):
        assert tokens[valid].tolist() == [257, *document(int(key[1:])).encode()[: T - 2], 256]
        assert label == int(key[-1])


def test_mixture_of_texts(root: Path) -> None:
    parts = {"a": {"path": "train-*.tar", "weight": 3}, "b": {"path": "val-*.tar", "weight": 1}}
    data = text(root, train=parts, val=None, batch_size=8, documents=True)
    many = list(rows(data, 40))
    assert Counter(row["key"].partition("/")[0] for row in many) == {"a": 30, "b": 10}
    assert all(row["valid"].all() for row in many)
    letters = {name: text(root, train=part["path"], val=None, batch_size=8) for name, part in parts.items()}
    pure = Counter(b for row in rows(letters["a"], 30) for b in row["tokens"].tolist())
    assert pure == Counter(b for row in many if row["key"][0] == "a" for b in row["tokens"].tolist())


@pytest.mark.parametrize("tokenizer", [Bytes(), CHARACTERS], ids=["bytes", "letters"])
@pytest.mark.parametrize("mode", ["concat", "pack", "padded"])
def test_bad_documents(tmp_path: Path, mode: str, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    bad = {"d0003": b"ab\xff\xfecd", "d0011": b"\x80"} | ({} if tokenizer.size == 257 else {"d0020": b"A"})
    write_texts(tmp_path, [15, 15], **bad)
    with pytest.raises(ValueError, match=r"train-00000.\.tar, sample d00.*(not utf-8 at byte|not in the alphabet)"):
        list(rows(text(tmp_path, val=None, mode=mode, tokenizer=tokenizer), 40))
    caplog.set_level(logging.WARNING)
    data = text(tmp_path, val=None, mode=mode, tokenizer=tokenizer, max_bad_fraction=0.2, batch_size=4)
    length = data.training_sequence().length()
    found = list(rows(data, 2 * length if mode == "concat" else length))
    assert data.bad_samples == len(bad)
    assert {key for key in bad if any(key in message for message in caplog.messages)} == set(bad)
    good = "".join(document(n)[: T if mode == "padded" else None] for n in range(30) if f"d{n:04d}" not in bad)
    letters = Counter(good)
    shown = Counter("".join(tokenizer.decode(row["tokens"][row["valid"]]) for row in found))
    if mode != "concat":
        assert shown == letters
    else:  # shuffled rows: an epoch has no end of its own
        assert not letters - shown
        assert sum(int((~row["valid"]).sum()) for row in found) >= (9 if tokenizer.size == 257 else 3)


def test_a_shard_that_goes_while_training(root: Path, tmp_path: Path) -> None:
    for member, folder in (("txt", root), ("tok", root.with_name("bytes"))):
        copy = tmp_path / member
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        data = text(copy, member=member, max_bad_fraction=0.5, batch_size=4)
        length = data.training_sequence().length()
        starts = data.source_of("train").starts
        data.teardown("fit")
        (copy / "train-000001.tar").unlink()
        parts = list(rows(data, 2 * length))
        gone = range(int(starts[1]), int(starts[2]))
        assert data.bad_samples == len(gone)
        expected = np.zeros((2 * length, T), dtype=bool)
        pieces = data.training_sequence()(np.arange(2 * length))
        for row, at, sample, number in zip(pieces.row, pieces.at, pieces.sample, pieces.length, strict=True):
            expected[row, at : at + number] = sample not in gone
        np.testing.assert_array_equal(np.stack([row["valid"] for row in parts]), expected)


def test_a_shard_that_was_away_while_tokens_were_counted(root: Path) -> None:
    """Its documents have no places, so they count as bad, although they can be read later."""
    for member, folder in (("txt", root), ("tok", root.with_name("bytes"))):
        data = text(folder, member=member, max_bad_fraction=0.5, batch_size=4)
        source = data.source_of("train")
        real = type(source).sizes
        source.sizes = lambda shard, name, r=real, s=source: r(s, shard, name) * (shard != 2)  # type: ignore
        length = data.training_sequence().length()
        del source.sizes
        list(rows(data, 2 * length))
        away = range(int(source.starts[2]), int(source.starts[3]))
        assert data.bad_samples == sum(len(document(number)) > 0 for number in away) > 5


def test_settings_that_cannot_be(root: Path, tmp_path: Path) -> None:
    for change, told in (
        ({"length": 0}, r"data\.length=0: expected at least 1 token\."),
        ({"mode": "rows"}, r"data\.mode=rows: expected concat or pack or padded"),
        ({"mode": "pack", "wrap": True}, r"data\.wrap=True: expected false with data\.mode=pack"),
        ({"num_classes": 3}, r"data\.num_classes=3: expected 0"),
        ({"wrap": True}, r"data\.wrap=true, but the tokenizer has not a bos and an eos\..*data\.wrap=false"),
        ({"tokenizer": Bytes(eos=False)}, r"data\.add_eos=true, but the tokenizer has not an eos"),
        ({"member": "py"}, r"have \.txt, \.cls, but no \.py\. Set data\.member=txt"),
        ({"member": "tok"}, r"no \.tok"),
    ):
        with pytest.raises(ValueError, match=told):
            text(root, **change)
    tokens = root.with_name("letters")
    with pytest.raises(ValueError, match=rf"made by the tokenizer {CHARACTERS.fingerprint}, but data\.tokenizer is"):
        text(tokens, member="tok")
    (tmp_path / "bare").mkdir()
    for path in tokens.glob("*.tar"):
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"index\.json .* does not say which tokenizer"):
        text(tmp_path / "bare", member="tok", tokenizer=CHARACTERS)


def test_pretokenize(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.with_name("bytes").iterdir()}
    pretokenize(root.with_name("bytes"), texts=root, tokenizer=Bytes())
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(ValueError, match=r"bytes holds tokens of the tokenizer .*data\.root to another folder"):
        pretokenize(root.with_name("bytes"), texts=root, tokenizer=CHARACTERS)
    caplog.set_level(logging.WARNING)
    pretokenize(
        tmp_path / "a",
        texts=tmp_path / "raw",
        tokenizer=CHARACTERS,
        source=lambda f: write_texts(f, [9, 9], d0002=b"B"),
    )
    assert "d0002" in caplog.text
    data = text(tmp_path / "a", val=None, tokenizer=CHARACTERS, member="tok", mode="padded", num_classes=10)
    assert int(data.source_of("train").counts.sum()) == 17
    assert data.source_of("train").described("tokenizer")["vocabulary"] == 28
    for row in rows(data, 17):
        assert CHARACTERS.decode(row["tokens"][row["valid"]]) == document(int(row["key"][1:]))[:T]
        assert int(row["label"]) == int(row["key"][-1])


# Prompts


@pytest.mark.parametrize("mode", ["padded", "pack"])
def test_the_prompt_of_a_document_is_marked(tmp_path: Path, mode: str) -> None:
    texts = ["ab->cd", "->e", "f->g->h", "none", "late->", "", "a->b", "no>-pe", "too long a prompt->x"]
    write_tar(tmp_path / "train-000000.tar", {f"d{i}": {"txt": text.encode()} for i, text in enumerate(texts)})
    data = text(tmp_path, val=None, mode=mode, given_to="->", batch_size=3, length=16, documents=True)
    seen = {}
    for row in islice(rows(data), 9 if mode == "padded" else 5):
        for number in range(int(row["document"].max()) + 1):
            here = row["document"] == number
            tokens, given = row["tokens"][here], row["given"][here]
            seen[Bytes().decode(tokens)] = Bytes().decode(tokens[given])
        assert not row["given"][row["document"] < 0].any()
    expected = {name[:16]: name[: name.find("->") + 2] if "->" in name[:16] else "" for name in texts}
    if mode == "pack":  # the rest of a long document is no prompt
        expected[texts[-1][16:]] = ""
    assert {**expected, **seen} == expected
    assert len(seen) >= 6


def test_prompts_need_whole_documents_and_a_mark_with_tokens(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.given_to=x: expected no text with data\.mode=concat"):
        text(root, given_to="x")
    with pytest.raises(ValueError, match="given_to='!' has no token"):
        text(root, mode="padded", given_to="!", tokenizer=Characters(normalise="text8", eos=False), add_eos=False)
