"""Byte-level BPE, trained on a corpus of shards and kept beside them.

Byte-level: every text can be written in it, and the first entries are the mark and the 256 bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from datamodules import catalogue, shards
from datamodules.tokenizers import TEXT_MEMBERS
from datamodules.writer import sync_folder, write_text

FOLDER = "tokenizer"  # below the folder of the shards
END = "<|endoftext|>"
LEAST = 257  # the bytes and the mark
_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}


def train(root: Path | str, entries: int) -> Path:
    """Train on the training shards of a corpus, unless that has been done; seconds per 2 MB.

    ``tokenizer/`` then holds tokenizer.json, the settings that transformers reads, and ``index.json`` with the sha256
    of the tokenizer and of the corpus' own index. Equal texts give equal files under one version of tokenizers.

    Args:
        root: folder with ``train-*.tar``.
        entries: tokens, the mark at the end of a text included; frequent pairs are merged until there are so many.

    Returns:
        The folder of the tokenizer.

    Raises:
        ValueError: the folder holds a tokenizer of another size, or the texts give no so many entries.
    """
    folder = Path(root) / FOLDER
    if entries < LEAST:
        raise ValueError(f"data.source.entries={entries}: expected at least the {LEAST} of bytes and mark, e.g. 1024.")
    if (folder / catalogue.FILE_NAME).is_file():
        kept = json.loads((folder / catalogue.FILE_NAME).read_text())
        if kept["entries"] != entries:
            raise ValueError(
                f"data.source.entries={entries}, but {folder} holds a tokenizer of {kept['entries']} entries. Set it to"
                " that, or data.root to a new folder."
            )
        return folder
    text, version = _trained(Path(root), entries)
    index = {
        "entries": entries,
        "tokenizers": version,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "corpus": hashlib.sha256((Path(root) / catalogue.FILE_NAME).read_bytes()).hexdigest(),
    }
    aside = folder.with_name(f".{FOLDER}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        write_text(aside / "tokenizer.json", text)
        write_text(aside / "tokenizer_config.json", json.dumps(_CONFIG, indent=1) + "\n")
        write_text(aside / catalogue.FILE_NAME, json.dumps(index, indent=1) + "\n")
        aside.rename(folder)
        sync_folder(folder.parent)
    except OSError:
        if not (folder / catalogue.FILE_NAME).is_file():  # or another process was faster, with the same result
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _trained(root: Path, entries: int) -> tuple[str, str]:
    """Content of tokenizer.json, and the version of the package that made it."""
    import tokenizers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(root), trainer)
    if tokenizer.get_vocab_size() != entries:
        raise ValueError(
            f"data.source.entries={entries}: the texts of {root} give only {tokenizer.get_vocab_size()} entries. Set it"
            " to that or less, or add texts."
        )
    return tokenizer.to_str(pretty=True), tokenizers.__version__


def _texts(root: Path) -> Iterator[str]:
    source = shards.ShardSet(shards.find("train-*.tar", root, "data.root"), "data.root")
    try:
        for sample in range(int(source.counts.sum())):
            members = source.read(sample)
            yield from (members[kind].decode("utf-8", "replace") for kind in TEXT_MEMBERS if kind in members)
    finally:
        source.close()
