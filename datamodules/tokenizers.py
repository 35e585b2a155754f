"""Text to token numbers and back: bytes, characters, or a trained tokenizer from a local folder.

A tokenizer turns text into its tokens and nothing else. Marks of beginning, end and padding have numbers of their own
where they exist, and whoever builds rows sets them; the mask token of a diffusion model belongs to the model.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules import shards

Tokens = NDArray[np.unsignedinteger[Any]]

TEXT8 = " abcdefghijklmnopqrstuvwxyz"
TEXT_MEMBERS = ("txt", "py")

_DIGITS = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")
_COMBINING = re.compile("[\u0300-\u036f]")
_CODE_POINTS = 0x110000
_SMALL = 2**16  # vocabularies up to this size are stored as uint16
# What a folder may hold, most telling first; the content of the first group that is there makes the fingerprint.
_FILES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
)


class Tokenizer(Protocol):
    """What rows of tokens are built with and rooms decode with.

    Attributes:
        size: number of tokens, marks included; every token is below it.
        pad: number of the padding mark, or None.
        bos: number of the mark at the beginning of a text, or None.
        eos: number of the mark at the end of a text, or None.
        fingerprint: hash of everything that decides which text becomes which numbers.
        one_per_byte: whether a text of n utf-8 bytes has exactly n tokens, so that lengths need no reading.
    """

    one_per_byte: bool

    @property
    def size(self) -> int:
        """Number of tokens, marks included."""

    @property
    def pad(self) -> int | None:
        """Number of the padding mark."""

    @property
    def bos(self) -> int | None:
        """Number of the mark at the beginning of a text."""

    @property
    def eos(self) -> int | None:
        """Number of the mark at the end of a text."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which text becomes which numbers."""

    def encode(self, text: str) -> Tokens:
        """Tokens of a text without any marks, unsigned (n,)."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of several texts."""

    def decode(self, tokens: Any) -> str:
        """Text of tokens, marks left out."""


def storage_type(size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Number format in which the tokens of a vocabulary of ``size`` are stored: uint16 where it suffices, or uint32."""
    return np.dtype("<u2" if size <= _SMALL else "<u4")


class Bytes:
    """The 256 bytes of utf-8, then the marks that are switched on, in the order eos, bos, pad.

    Args:
        eos: have a mark for the end of a text.
        bos: have a mark for its beginning.
        pad: have a mark for padding.
    """

    one_per_byte = True

    def __init__(self, *, eos: bool = True, bos: bool = False, pad: bool = False) -> None:
        self.eos, self.bos, self.pad, self.size = _marks(256, eos, bos, pad)
        self.fingerprint = _hash("bytes", self.eos, self.bos, self.pad)

    def encode(self, text: str) -> Tokens:
        """Tokens of a text without any marks, uint8 (n,).

        Raises:
            ValueError: the text holds half a surrogate pair, which no utf-8 can say.
        """
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Any) -> str:
        """Text of tokens, marks left out; what is no utf-8 becomes U+FFFD.

        Raises:
            ValueError: a token is out of range.
        """
        numbers = _checked(tokens, self.size)
        return numbers[numbers < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")


class Characters:
    """One token per character of an alphabet, in its order; then ``unknown``, eos, bos and pad where there are.

    Args:
        alphabet: the characters, each once. None takes those that occur in ``corpus``.
        corpus: folder of shards with texts, or one text file, to take the alphabet from; read at first use.
        unknown: character that stands for all others (added to the alphabet if it is not there); None makes any other
            character an error.
        normalise: "text8" turns every text into the 27 symbols of ``TEXT8`` first: lower case without accents, digits
            spelled out, anything else a space, one space at a time. None leaves texts as they are.
        eos: have a mark for the end of a text.
        bos: have a mark for its beginning.
        pad: have a mark for padding.

    Raises:
        ValueError: the alphabet is empty or repeats a character, or both or neither of alphabet and corpus are given.
    """

    one_per_byte = False

    def __init__(
        self,
        alphabet: str | None = None,
        *,
        corpus: str | Path | None = None,
        unknown: str | None = None,
        normalise: str | None = None,
        eos: bool = True,
        bos: bool = False,
        pad: bool = False,
    ) -> None:
        if normalise not in (None, "text8"):
            raise ValueError(f"data.tokenizer.normalise={normalise}: expected text8 or null.")
        if unknown is not None and len(unknown) != 1:
            raise ValueError(f"data.tokenizer.unknown={unknown!r}: expected one character, or null to refuse others.")
        if normalise and alphabet is None and corpus is None:
            alphabet = TEXT8
        if (alphabet is None) == (corpus is None):
            raise ValueError(
                "data.tokenizer: Characters needs either the characters themselves (data.tokenizer.alphabet='abc..') "
                "or texts to take them from (data.tokenizer.corpus=FOLDER), not both."
            )
        self.normalise = normalise
        self.unknown = unknown
        self._given = alphabet
        self._corpus = None if corpus is None else Path(corpus).expanduser()
        self._wanted = (eos, bos, pad)
        if alphabet is not None:
            _ = self.alphabet  # refuse a wrong one now; one from a corpus waits until the corpus is there

    @cached_property
    def alphabet(self) -> str:
        """All characters in the order of their tokens."""
        found = self._given
        if found is None:
            assert self._corpus is not None
            found = _characters_of(self._corpus, self.normalise is not None)
        repeated = [character for character, times in Counter(found).items() if times > 1]
        if repeated or not found:
            wrong = f"{repeated[0]!r} is in it twice" if repeated else "it is empty"
            raise ValueError(f"data.tokenizer.alphabet={found!r}: {wrong}. Name each character once.")
        return found if self.unknown is None or self.unknown in found else found + self.unknown

    @property
    def size(self) -> int:
        """Number of tokens, marks included."""
        return self._numbers[3]

    @property
    def eos(self) -> int | None:
        """Number of the mark at the end of a text."""
        return self._numbers[0]

    @property
    def bos(self) -> int | None:
        """Number of the mark at the beginning of a text."""
        return self._numbers[1]

    @property
    def pad(self) -> int | None:
        """Number of the padding mark."""
        return self._numbers[2]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of alphabet, marks, and what happens to other characters."""
        return _hash("characters", self.alphabet, self.unknown, self.normalise, *self._numbers)

    def encode(self, text: str) -> Tokens:
        """Tokens of a text without any marks, unsigned (n,).

        Raises:
            ValueError: a character is not in the alphabet, and there is no ``unknown``.
        """
        if self.normalise:
            text = text8(text)
        tokens = self._table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
        if self.unknown is None and (tokens == self._refused).any():
            strange = text[int((tokens == self._refused).argmax())]
            raise ValueError(
                f"the character {strange!r} (U+{ord(strange):04X}) is not in the alphabet of {len(self.alphabet)} "
                "characters. Add it to data.tokenizer.alphabet, or set data.tokenizer.unknown"
            )
        return tokens

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Any) -> str:
        """Text of tokens, marks left out.

        Raises:
            ValueError: a token is out of range.
        """
        numbers = _checked(tokens, self.size)
        return self._points[numbers[numbers < len(self._points)]].tobytes().decode("utf-32-le")

    @cached_property
    def _numbers(self) -> tuple[int | None, int | None, int | None, int]:
        return _marks(len(self.alphabet), *self._wanted)

    @cached_property
    def _points(self) -> NDArray[np.uint32]:
        """Code point of every token, (characters,)."""
        return np.frombuffer(self.alphabet.encode("utf-32-le"), dtype=np.uint32)

    @property
    def _refused(self) -> int:
        """What the table holds for characters that have no token."""
        return int(np.iinfo(self._table.dtype).max)

    @cached_property
    def _table(self) -> Tokens:
        """Token of every code point."""
        kind = np.uint8 if self.size < 2**8 else np.uint16 if self.size < _SMALL else np.uint32
        other = np.iinfo(kind).max if self.unknown is None else self.alphabet.index(self.unknown)
        table: Tokens = np.full(_CODE_POINTS, other, dtype=kind)
        table[self._points] = np.arange(len(self._points))
        return table


class Pretrained:
    """A trained tokenizer in a local folder, as saved by ``save_pretrained``; nothing is ever downloaded.

    Marks that a tokenizer calls [CLS] and [SEP] serve as bos and eos where it has no others. The folder is read at
    first use.

    Args:
        folder: holds tokenizer.json, or the vocabulary files of an older format.
        read_marks: take "</s>" in a text, or whatever marks are written like, for the mark itself. Otherwise it is
            plain text, so that no document can end itself.
    """

    one_per_byte = False

    def __init__(self, folder: str | Path, *, read_marks: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        self.read_marks = read_marks

    @property
    def size(self) -> int:
        """Number of tokens, marks and added ones included."""
        return self._size

    @property
    def eos(self) -> int | None:
        """Number of the mark at the end of a text."""
        return self._mark("eos", "sep")

    @property
    def bos(self) -> int | None:
        """Number of the mark at the beginning of a text."""
        return self._mark("bos", "cls")

    @property
    def pad(self) -> int | None:
        """Number of the padding mark."""
        return self._mark("pad", "pad")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the vocabulary files' content, of the marks, and of whether texts may hold them."""
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._files()]
        return _hash("pretrained", *contents, self.eos, self.bos, self.pad, self.read_marks)

    def encode(self, text: str) -> Tokens:
        """Tokens of a text without any marks, uint32 (n,)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of several texts; the interpreter lock is free meanwhile."""
        found = self._numbers(list(texts))
        if not self.read_marks:
            for place, tokens in enumerate(found):
                if np.isin(tokens, self._marks).any():  # some vocabularies hold "</s>" as if it were a word
                    found[place] = self._without_marks(texts[place])
        return found

    def _numbers(self, texts: list[str]) -> list[Tokens]:
        backend = getattr(self._loaded, "backend_tokenizer", None)
        if backend is None:  # written in Python
            options = {"add_special_tokens": False, "split_special_tokens": not self.read_marks}
            found = [self._loaded(text, **options)["input_ids"] for text in texts]
        else:
            found = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [np.array(numbers, dtype=np.uint32) for numbers in found]

    def _without_marks(self, text: str) -> Tokens:
        """Tokens of a text whose written marks are taken apart; a mark that comes about even so is left out."""
        names = sorted(filter(None, self._loaded.convert_ids_to_tokens(self._marks.tolist())), key=len, reverse=True)
        apart = re.sub("|".join(map(re.escape, names)), lambda mark: f"{mark[0][:1]}\0{mark[0][1:]}", text)
        tokens = np.concatenate(self._numbers(apart.split("\0") if "\0" not in text else [text]))
        return tokens[~np.isin(tokens, self._marks)]

    def decode(self, tokens: Any) -> str:
        """Text of tokens, marks left out.

        Raises:
            ValueError: a token is out of range.
        """
        numbers = _checked(tokens, self._size).tolist()
        return str(self._loaded.decode(numbers, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: copies load the folder again."""
        return {"folder": self.folder, "read_marks": self.read_marks}

    def _mark(self, *names: str) -> int | None:
        found = (getattr(self._loaded, f"{name}_token_id", None) for name in names)
        return next((int(number) for number in found if number is not None), None)

    def _files(self) -> list[Path]:
        for group in _FILES:
            paths = [self.folder / name for name in group]
            if all(path.is_file() for path in paths):
                return paths
        raise ValueError(self._absent())

    @cached_property
    def _size(self) -> int:
        return max(len(self._loaded), 1 + max(self._loaded.get_vocab().values()))

    @cached_property
    def _loaded(self) -> Any:
        self._files()
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        except Exception as error:  # transformers lets through whatever its parsers raise
            shown = str(error).strip().partition("\n")[0][:200]
            raise ValueError(
                f"data.tokenizer.folder={self.folder}: transformers cannot read the tokenizer there "
                f"({type(error).__name__}: {shown}). Copy the folder again, complete."
            ) from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is not None:  # rows are cut elsewhere
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = not self.read_marks
        return loaded

    @cached_property
    def _marks(self) -> NDArray[np.int64]:
        """Numbers of all marks but the one for what is unknown."""
        unknown = getattr(self._loaded, "unk_token_id", None)
        return np.array([mark for mark in self._loaded.all_special_ids if mark != unknown], dtype=np.int64)

    def _absent(self) -> str:
        wanted = ", or ".join(" with ".join(group) for group in _FILES)
        if not self.folder.is_dir():
            there = "there is no such folder"
        else:
            names = sorted(path.name for path in self.folder.iterdir())
            more = ", .." if len(names) > 8 else ""
            there = f"it holds {', '.join(names[:8])}{more}" if names else "the folder is empty"
        return (
            f"data.tokenizer.folder={self.folder}: expected {wanted}; {there}. "
            "Tokenizers are read from local folders only: copy one there, or set data.tokenizer.folder."
        )


def text8(text: str) -> str:
    """Text in 27 symbols: a-z and single spaces; accents dropped, digits spelled out, all else a space.

    Source: the clean-up of Mahoney's text8 (mattmahoney.net/dc/textdata), without its removal of markup.
    """
    if not text.isascii():
        text = _COMBINING.sub("", unicodedata.normalize("NFKD", text))
    raw = text.lower().encode("ascii", "replace")
    for digit, word in enumerate(_DIGITS):
        raw = raw.replace(b"%d" % digit, b" %s " % word)
    return b" ".join(raw.translate(_LETTERS_ONLY).split()).decode()


_LETTERS_ONLY = bytes(code if 97 <= code <= 122 else 32 for code in range(256))


def _characters_of(corpus: Path, normalised: bool) -> str:
    """Sorted characters of all texts of a corpus."""
    if not corpus.exists():
        raise ValueError(
            f"data.tokenizer.corpus={corpus} does not exist, and the alphabet comes from it. "
            "Type: python -m platform prepare EXPERIMENT"
        )
    found: set[str] = set()
    if corpus.is_file():
        text = corpus.read_bytes().decode("utf-8", "replace")
        return "".join(sorted(set(text8(text) if normalised else text)))
    source = shards.ShardSet(shards.find("*.tar", corpus, "data.tokenizer.corpus"), "data.tokenizer.corpus")
    try:
        for sample in range(int(source.counts.sum())):
            members = source.read(sample)
            text = next((members[name] for name in TEXT_MEMBERS if name in members), b"").decode("utf-8", "replace")
            found.update(text8(text) if normalised else text)
    finally:
        source.close()
    return "".join(sorted(found))


def _marks(first: int, eos: bool, bos: bool, pad: bool) -> tuple[int | None, int | None, int | None, int]:
    """Numbers of eos, bos and pad from ``first`` on, None for the ones not wanted, and the size of it all."""
    numbers: list[int | None] = []
    for wanted in (eos, bos, pad):
        numbers.append(first if wanted else None)
        first += wanted
    return numbers[0], numbers[1], numbers[2], first


def _checked(tokens: Any, size: int) -> NDArray[np.int64]:
    """Tokens as int64 (n,), all of them below ``size``."""
    numbers = np.asarray(tokens, dtype=np.int64).reshape(-1)
    wrong = numbers[(numbers < 0) | (numbers >= size)]
    if wrong.size:
        raise ValueError(f"token {wrong[0]} is not one of the tokenizer's {size} (0..{size - 1})")
    return numbers


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()[:32]
