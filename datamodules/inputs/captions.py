"""Images with captions in a table: CSV, or JSON lines, with a column of file names relative to the table."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from datamodules.inputs.entries import Choices, Folder, Inputs, Item, Refused, names_of, numbering, tally

TABLES = ("metadata.csv", "metadata.jsonl", "captions.csv", "captions.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("caption", "text")
LABEL_COLUMNS = ("label", "class")
_LONGEST_FIELD = 2**20

Row = dict[str, str]


class CaptionTable(Inputs):
    """One input per row: file, caption, further captions (caption2, caption_short, ...), label; all but file optional.

    Args:
        source: the table, or a folder that holds one.
        choices: the size limit is used.

    Raises:
        ValueError: there is no table, it cannot be read, or it has no column of file names.
    """

    kind = "captions"

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__()
        table = find_table(source)
        self._root = Folder(table.parent)
        self._max_bytes = choices.max_bytes
        self._table = table.name
        self._rows = list(rows(table))
        columns = {column for row in self._rows for column in row}
        self._file = _first(FILE_COLUMNS, columns)
        if not self._file:
            raise ValueError(
                f"{table} has the columns {', '.join(sorted(columns)) or '(none)'}, but none of file names "
                f"({', '.join(FILE_COLUMNS)}). Rename the column of the image files to file."
            )
        self._label = _first(LABEL_COLUMNS, columns)
        self._captions = _members(columns)
        labels = (row.get(self._label, "").strip() for row in self._rows)
        self._classes = numbering(label for label in labels if label)
        self.class_names = names_of(self._classes)
        listed = {row.get(self._file, "") for row in self._rows}
        self.left_out = sum(name != table.name and name not in listed for name in self._root.files)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def name(self, number: int) -> str:
        """File and row; a file may stand in several rows."""
        return f"{self._rows[number].get(self._file, '')}#{number + 1}"

    def mark(self, number: int) -> object:
        """The row, and the size of the file."""
        return self._rows[number], self._root.size(self._rows[number].get(self._file, ""))

    def group(self, number: int) -> str:
        """The file: captions of one image are not spread over two splits."""
        return self._rows[number].get(self._file, "")

    def read(self, number: int) -> Item:
        """Bytes of the image, its captions and its class."""
        row = self._rows[number]
        data = self._root.read(row.get(self._file, "").strip(), self._max_bytes)
        captions = {member: row[column] for column, member in self._captions.items() if row.get(column, "").strip()}
        if "txt" not in captions and "txt" in self._captions.values():
            raise Refused("no caption", f"row {number + 1} of {self._table}")
        label = row.get(self._label, "").strip() if self._label else ""
        if self._label and not label:
            raise Refused("no class", f"row {number + 1} of {self._table}")
        return Item(data, captions, self._classes[label] if label else None)


def find_table(source: Path) -> Path:
    """The table itself, or the only one in a folder.

    Raises:
        ValueError: there is none, or more than one.
    """
    if source.is_file():
        return source
    usual = [source / name for name in TABLES if (source / name).is_file()]
    found = usual or sorted(path for path in source.iterdir() if path.suffix.lower() in (".csv", ".jsonl"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{source} holds {len(found)} tables ({', '.join(path.name for path in found[:4])}). "
            "Type the path of the one with the captions."
        )
    raise ValueError(
        f"{source} holds no table of captions (.csv or .jsonl), but {tally(Folder(source).files) or 'nothing'}. "
        f"Put the captions into {TABLES[0]} with the columns file and caption."
    )


def rows(table: Path) -> Iterator[Row]:
    """Rows of a table as text.

    Raises:
        ValueError: it is not utf-8, or not a table.
    """
    reader = _json_rows if table.suffix.lower() == ".jsonl" else _csv_rows
    try:
        yield from reader(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read as a table in utf-8 ({error}). Save it again as utf-8.") from error


def _csv_rows(table: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with table.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            yield {str(name).strip(): value for name, value in row.items() if name is not None and value is not None}


def _json_rows(table: Path) -> Iterator[Row]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{table}, line {number}: not JSON ({error}). Correct or remove the line.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{table}, line {number}: expected an object as in {{'file': 'a.png', ...}}.")
            yield {name: str(value) for name, value in row.items() if isinstance(value, str | int)}


def _first(wanted: tuple[str, ...], columns: set[str]) -> str:
    return next((name for name in wanted if name in columns), "")


def _members(columns: set[str]) -> dict[str, str]:
    """Caption columns and the members they are written to: "txt" for the main one, "<column>.txt" for others."""
    main = _first(CAPTION_COLUMNS, columns)
    found = {main: "txt"} if main else {}
    for name in sorted(columns - {main}):
        if name.startswith("caption") and name.replace("_", "").replace("-", "").isalnum():
            found[name] = f"{name.lower()}.txt"
    return found
