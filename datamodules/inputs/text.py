"""Text files: one document per file, or one per line."""

from pathlib import Path

from datamodules.inputs.entries import Choices, Folder, Inputs, Item, ending, tally
from datamodules.inputs.lines import Lines


class TextFiles(Inputs):
    """Files with the wanted endings below a folder, or one file.

    Args:
        source: the folder or the file.
        choices: endings (".txt" unless given), size limit, and whether lines are documents.

    Raises:
        ValueError: there is no such file.
    """

    kind = "text"
    member = "txt"
    endings = (".txt",)
    hidden = True

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__()
        self._max_bytes = choices.max_bytes
        if source.is_file():
            source, names = source.parent, [source.name]
            self._folder = None
        else:
            self._folder = Folder(source, self.hidden)
            wanted = choices.extensions or self.endings
            names = [name for name in self._folder.files if ending(name) in wanted]
            self.refused = self._folder.refused
            self.left_out = len(self._folder.files) - len(names)
            if not names:
                raise ValueError(
                    f"{source} holds no {' or '.join(wanted)} file, but {tally(self._folder.files) or 'nothing'}. "
                    "Name the endings to read, e.g. --extensions .txt,.md"
                )
        self._root = self._folder or Folder(source, hidden=False)
        self._names = names
        self._lines = Lines(source, names) if choices.split_lines else None
        if self._lines is not None:
            self.refused = [*self.refused, *self._lines.refused]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._names) if self._lines is None else len(self._lines)

    def name(self, number: int) -> str:
        """Path relative to the folder, with the line."""
        return self._names[number] if self._lines is None else self._lines.name(number)

    def mark(self, number: int) -> int:
        """Size of the document."""
        return self._root.size(self._names[number]) if self._lines is None else self._lines.length(number)

    def read(self, number: int) -> Item:
        """Bytes of the document."""
        if self._lines is not None:
            return Item(self._lines.read(number, self._max_bytes))
        return Item(self._root.read(self._names[number], self._max_bytes))

    def close(self) -> None:
        """Close the open file."""
        if self._lines is not None:
            self._lines.close()
