"""Which kind of source something is, from its names and first bytes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from datamodules.inputs import cifar, huggingface, mnist
from datamodules.inputs.captions import FILE_COLUMNS, TABLES, CaptionTable, rows
from datamodules.inputs.cifar import Cifar
from datamodules.inputs.code import CodeTree
from datamodules.inputs.edm_zip import EdmZip
from datamodules.inputs.entries import PICTURES, Choices, Folder, Inputs, ending, tally
from datamodules.inputs.folder import ImageFolder
from datamodules.inputs.huggingface import HuggingFace
from datamodules.inputs.jsonl import JsonLines
from datamodules.inputs.mnist import Mnist
from datamodules.inputs.text import TextFiles

KINDS: dict[str, Callable[[Path, Choices], Inputs]] = {
    "folder": ImageFolder,
    "captions": CaptionTable,
    "cifar": Cifar,
    "mnist": Mnist,
    "edm-zip": EdmZip,
    "huggingface": HuggingFace,
    "text": TextFiles,
    "jsonl": JsonLines,
    "code": CodeTree,
}
_FAMILIES = {**dict.fromkeys(PICTURES, "folder"), ".txt": "text", ".jsonl": "jsonl", ".py": "code"}
_CLEAR = 0.8  # share of the known files that settles the kind of a folder
_GZIP = b"\x1f\x8b"
_IDX = b"\0\0\x08"


def open_inputs(source: Path, kind: str | None, choices: Choices) -> Inputs:
    """The inputs of a source.

    Args:
        source: a file or a folder.
        kind: a key of :data:`KINDS`; None to find out.
        choices: how to read it.

    Raises:
        ValueError: it does not exist, its kind is not clear, or it cannot be read.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist. Type the folder or file to pack.")
    return KINDS[kind or detect(source, choices)](source, choices)


def detect(source: Path, choices: Choices) -> str:
    """Kind of a source.

    Raises:
        ValueError: it is not clear; the message lists what was seen.
    """
    return _of_folder(source, choices) if source.is_dir() else _of_file(source, choices)


def _of_file(path: Path, choices: Choices) -> str:
    name = path.name.lower()
    with path.open("rb") as file:
        head = file.read(8)
    if name.endswith((".tar.gz", ".tgz", ".tar")) and "cifar" in name:
        return "cifar"
    if head[:2] == b"PK" and name.endswith(".zip"):
        return "edm-zip"
    if head[:3] == _IDX or (head[:2] == _GZIP and "idx" in name):
        return "mnist"
    if name.endswith(".csv"):
        return "captions"
    if name.endswith(".jsonl"):
        return _of_jsonl(path)
    if ending(name) == ".py":
        return "code"
    if ending(name) in (choices.extensions or (".txt",)):
        return "text"
    raise ValueError(_unclear(path, f"a file that begins with {head!r}"))


def _of_folder(folder: Path, choices: Choices) -> str:
    inside = {path.name for path in folder.iterdir()}
    if inside.intersection(huggingface.MARKS):
        return "huggingface"
    if "data_batch_1" in inside or inside.intersection(cifar.FOLDERS) or {"train", "test", "meta", *inside} == inside:
        return "cifar"
    if mnist.image_files(folder):
        return "mnist"
    return "captions" if inside.intersection(TABLES) else _by_endings(folder, choices)


def _by_endings(folder: Path, choices: Choices) -> str:
    files = Folder(folder).files
    families = Counter(_FAMILIES[ending(name)] for name in files if ending(name) in _FAMILIES)
    if not families and any(ending(name) == ".tar" for name in files):
        raise ValueError(f"{folder} holds shards (.tar) already. Look at them with data check, or write data index.")
    if choices.extensions:
        return "text"
    tables = [name for name in files if "/" not in name and ending(name) in (".csv", ".jsonl")]
    if families["folder"] and len(tables) == 1 and _names_pictures(folder / tables[0]):
        return "captions"
    best = max(families, key=lambda family: families[family], default="")
    if not best or families[best] < _CLEAR * families.total():
        raise ValueError(_unclear(folder, tally(files) or "nothing"))
    return _of_jsonl(folder / next(n for n in files if ending(n) == ".jsonl")) if best == "jsonl" else best


def _of_jsonl(path: Path) -> str:
    return "captions" if _names_pictures(path) else "jsonl"


def _names_pictures(table: Path) -> bool:
    """Whether the first row of a table has a column of names of image files."""
    try:
        first = next(iter(rows(table)), {})
    except ValueError:
        return False
    return any(ending(first.get(column, "")) in PICTURES for column in FILE_COLUMNS)


def _unclear(source: Path, seen: str) -> str:
    return f"{source}: cannot tell what it is. Seen: {seen}. Choose with --kind {'|'.join(KINDS)}"
