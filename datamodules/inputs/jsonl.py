"""JSON lines with one document per line, in one of its fields."""

import json
from pathlib import Path

from datamodules.inputs.entries import Choices, Folder, Inputs, Item, Refused, ending, tally
from datamodules.inputs.lines import Lines


class JsonLines(Inputs):
    """One input per line of the ``.jsonl`` files below a folder, or of one file.

    Args:
        source: the folder or the file.
        choices: name of the field, and the size limit (of the whole line).

    Raises:
        ValueError: there is no such file.
    """

    kind = "jsonl"
    member = "txt"

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__()
        self._field = choices.text_field
        self._max_bytes = choices.max_bytes
        if source.is_file():
            source, names = source.parent, [source.name]
        else:
            folder = Folder(source)
            names = [name for name in folder.files if ending(name) == ".jsonl"]
            self.refused = folder.refused
            self.left_out = len(folder.files) - len(names)
            if not names:
                raise ValueError(f"{source} holds no .jsonl file, but {tally(folder.files) or 'nothing'}.")
        self._lines = Lines(source, names)
        self.refused = [*self.refused, *self._lines.refused]

    def __len__(self) -> int:
        """Number of lines."""
        return len(self._lines)

    def name(self, number: int) -> str:
        """File and line."""
        return self._lines.name(number)

    def mark(self, number: int) -> int:
        """Length of the line."""
        return self._lines.length(number)

    def read(self, number: int) -> Item:
        """The field's text."""
        line = self._lines.read(number, self._max_bytes)
        if not line.strip():
            raise Refused("empty")
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise Refused("not utf-8", str(error.reason)) from error
        except (ValueError, RecursionError) as error:
            raise Refused("not JSON", str(error)[:100]) from error
        text = row.get(self._field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise Refused("no text", f"no field {self._field!r} with text; --text-field names another")
        try:
            return Item(text.encode("utf-8"))
        except UnicodeEncodeError as error:  # "\ud800" is JSON, but no text
            raise Refused("not utf-8", error.reason) from error

    def close(self) -> None:
        """Close the open file."""
        self._lines.close()
