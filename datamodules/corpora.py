"""Text that every Python brings along, as tar shards: prose of its documentation, its source code, Unicode's names.

All three change with the interpreter's version, which index.json records together with the sha256 of every file read.
Whole files, topics or names go to validation where ``sha1(name) % 20 == 0``, so parts of one file never meet across
the splits. Texts are in utf-8, at most 64 KiB, one per sample, and each text is there once.
"""

import ast
import hashlib
import json
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules import bpe, catalogue
from datamodules.order import Order
from datamodules.writer import DatasetWriter

PROSE, CODE, NAMES = "pydoc-prose", "stdlib-code", "unicode-names"
NAME_ALPHABET = " -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TRAIN_SHARDS = 8
VAL_SHARDS = 2
LARGEST_FILE = 100_000  # bytes
LARGEST_TEXT = 64 * 1024  # bytes

_PSF = "Part of CPython: Python Software Foundation License Version 2, (c) Python Software Foundation."
_UNICODE = (
    "Names of the Unicode Character Database, (c) Unicode, Inc. (Unicode License), as CPython's unicodedata has them."
)
_NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_GENERATED = ("_sysconfigdata", "sitecustomize", "usercustomize")  # about this machine, not part of the library
_COUNTED_NAMES = ("CJK UNIFIED", "HANGUL SYLLABLE")  # nothing but a running number, or spelled by a rule
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # where statements hold statements
_LAST_CODE_POINT = 0x10FFFF


@dataclass(frozen=True)
class Document:
    """A text and where it is from.

    Attributes:
        text: its characters.
        origin: file, topic or name that decides the split.
        place: where inside its origin, "" for all of it.
    """

    text: str
    origin: str
    place: str = ""


def pydoc_prose(root: Path | str) -> None:
    """Write English technical prose: the help topics of pydoc, and every docstring of the standard library.

    Members are ``<number>.txt`` and ``<number>.json`` (origin, place); about 2 MB of text.

    Args:
        root: folder of the shards. A folder that already holds this data set is left as it is.

    Raises:
        ValueError: the folder holds something else or cannot be written.
    """
    if _present(Path(root), PROSE):
        return
    files = _library()
    texts = [*_topics(), *(text for path, data in files.items() for text in _docstrings(path, data))]
    _write(Path(root), PROSE, _PSF, texts, "txt", files)


def pydoc_prose_bpe(root: Path | str, entries: int = 1024) -> None:
    """:func:`pydoc_prose`, and a byte-level BPE tokenizer trained on its training texts in the folder ``tokenizer``.

    Args:
        root: folder of the shards. What is there already is left as it is.
        entries: tokens of the tokenizer, the mark at the end of a text included; >= 257.

    Raises:
        ValueError: the folder holds something else or cannot be written, or a tokenizer of another size.
    """
    pydoc_prose(root)
    bpe.train(root, entries)


def stdlib_code(root: Path | str) -> None:
    """Write the source files of the standard library, without its tests and without files above 100 KB.

    Members are ``<number>.py`` and ``<number>.json`` (origin, place). A file above 64 KiB is cut between two top-level
    statements, so that every text is a program that ``ast.parse`` accepts. About 10 MB of text.

    Args:
        root: folder of the shards. A folder that already holds this data set is left as it is.

    Raises:
        ValueError: the folder holds something else or cannot be written.
    """
    if _present(Path(root), CODE):
        return
    files = {path: data for path, data in _library().items() if len(data) <= LARGEST_FILE}
    texts = [text for path, data in files.items() for text in _programs(path, data)]
    _write(Path(root), CODE, _PSF, texts, "py", files)


def unicode_names(root: Path | str) -> None:
    """Write the names of all characters except the numbered ones of CJK and Hangul, one short text each.

    The only member is ``<number>.txt``; the characters are those of ``NAME_ALPHABET``. About 35,000 names, 0.9 MB.

    Args:
        root: folder of the shards. A folder that already holds this data set is left as it is.

    Raises:
        ValueError: the folder holds something else or cannot be written.
    """
    if _present(Path(root), NAMES):
        return
    names = (unicodedata.name(chr(point), "") for point in range(_LAST_CODE_POINT + 1))
    texts = [Document(name, name) for name in names if name and not name.startswith(_COUNTED_NAMES)]
    _write(Path(root), NAMES, _UNICODE, texts, "txt", {})


def held_out(origin: str) -> bool:
    """Whether the texts of a file, topic or name belong to validation: one origin in 20."""
    return int(hashlib.sha1(origin.encode(), usedforsecurity=False).hexdigest(), 16) % 20 == 0


def _present(root: Path, name: str) -> bool:
    index = catalogue.read(root)
    return index is not None and index.dataset == name


def _library() -> dict[str, bytes]:
    """Source files of the standard library by path inside it, sorted: not tests, packages, or what is not utf-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _NOT_CODE & set(inside.parts) or path.name.startswith(_GENERATED):
            continue
        data = path.read_bytes()
        if _decoded(data) is not None:
            found[inside.as_posix()] = data
    return found


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _parsed(data: bytes) -> ast.Module | None:
    """Syntax tree of a program, None for templates and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own strings
        try:
            return ast.parse(data)
        except SyntaxError:
            return None


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(topics[name], f"pydoc_data/topics/{name}")


def _docstrings(path: str, data: bytes) -> Iterator[Document]:
    """Docstrings of a file's module, classes and functions, in the order of the file."""
    tree = None if path.startswith("pydoc_data/") else _parsed(data)
    nodes: list[ast.AST] = [] if tree is None else [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield Document(ast.get_docstring(node) or "", path, getattr(node, "name", ""))
        for block in reversed(_BLOCKS):  # statements only: walking every expression takes most of the time
            nodes += reversed(getattr(node, block, ()))


def _programs(path: str, data: bytes) -> Iterator[Document]:
    """One file as one text, or as several where it is too long for one."""
    tree = _parsed(data)
    if tree is None:
        return
    lines = data.splitlines(keepends=True)
    ends = np.cumsum([0, *map(len, lines)])
    begins = [min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))]) for node in tree.body]
    cuts = [int(ends[line - 1]) for line in begins[1:]] + [len(data)]
    at = 0
    while at < len(data):
        end = max((cut for cut in cuts if at < cut <= at + LARGEST_TEXT), default=None)
        if end is None:  # one statement of more than 64 KiB is a table, not a program
            end = min(cut for cut in cuts if cut > at)
        else:
            whole = at == 0 and end == len(data)
            yield Document(data[at:end].decode(), path, "" if whole else f"bytes {at}..{end}")
        at = end


def _write(
    root: Path, name: str, licence: str, texts: Iterable[Document], member: str, files: dict[str, bytes]
) -> None:
    """Write documents in a shuffled order, each text once, under running numbers."""
    splits: dict[str, list[Document]] = {"train": [], "val": []}
    seen: set[bytes] = set()
    for document in texts:
        data = document.text.encode("utf-8", "replace")
        digest = hashlib.sha256(data).digest()
        if not document.text.strip() or len(data) > LARGEST_TEXT or digest in seen:
            continue
        seen.add(digest)
        splits["val" if held_out(document.origin) else "train"].append(document)
    total = sum(len(document.text.encode()) for split in splits.values() for document in split)
    sources = {
        "python": sys.version.split()[0],
        "implementation": sys.implementation.name,
        "unicode": unicodedata.unidata_version,
        "files": str(len(files)),
        "texts": str(len(seen)),
        "bytes": str(total),
    }
    card = {"files": {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}}
    with DatasetWriter(root, dataset=name, licence=licence, sources=sources, card=card) as writer:
        first = 0
        for split, shards in (("train", TRAIN_SHARDS), ("val", VAL_SHARDS)):
            found = splits[split]
            _, shuffle = Order([len(found)], seed=0)(np.arange(len(found)))
            samples = _samples([found[i] for i in shuffle], first, member, described=bool(files))
            writer.write(split, samples, per_shard=-(-len(found) // shards))
            first += len(found)


def _samples(
    documents: Iterable[Document], first: int, member: str, described: bool
) -> Iterator[dict[str, bytes | str]]:
    for number, document in enumerate(documents, first):
        sample: dict[str, bytes | str] = {"__key__": f"{number:06d}", member: document.text.encode()}
        if described:
            origin = {"origin": document.origin, "place": document.place}
            sample["json"] = json.dumps(origin, sort_keys=True).encode()
        yield sample
