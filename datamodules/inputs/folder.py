"""A folder of image files: one sub-folder per class, or plain files; "train" and "val" above that are splits."""

from pathlib import Path

from datamodules.inputs.entries import PICTURES, Choices, Folder, Inputs, Item, Refused, ending, names_of, numbering

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class ImageFolder(Inputs):
    """Every file below a folder is an input; what is no image is refused when it is read.

    Folders with at least one file named as an image are classes.

    Args:
        source: the folder.
        choices: the size limit is used.

    Raises:
        ValueError: the folder is empty.
    """

    kind = "folder"

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__()
        self._folder = Folder(source)
        self._max_bytes = choices.max_bytes
        self.refused = self._folder.refused
        files = self._folder.files
        if not files:
            raise ValueError(f"{source} holds no file. Type the folder of the images.")
        tops = {name.partition("/")[0] for name in files}
        self._split = tops <= SPLITS.keys() and all("/" in name for name in files)
        pictures = [self._inner(name) for name in files if ending(name) in PICTURES]
        self._classes = numbering(name.partition("/")[0] for name in pictures if "/" in name)
        self.class_names = names_of(self._classes)

    def __len__(self) -> int:
        """Number of files."""
        return len(self._folder.files)

    def name(self, number: int) -> str:
        """Path relative to the folder."""
        return self._folder.files[number]

    def mark(self, number: int) -> int:
        """Size of the file."""
        return self._folder.size(self.name(number))

    def part(self, number: int) -> str:
        """Meaning of the first folder if all first folders are names of splits."""
        return SPLITS[self.name(number).partition("/")[0]] if self._split else ""

    def read(self, number: int) -> Item:
        """Bytes of the file, and the class of its folder."""
        name = self.name(number)
        data = self._folder.read(name, self._max_bytes)
        if not self._classes:
            return Item(data)
        inner = self._inner(name)
        top = inner.partition("/")[0] if "/" in inner else ""
        if top not in self._classes:
            raise Refused("no class", "it is in no folder with images")
        return Item(data, label=self._classes[top])

    def _inner(self, name: str) -> str:
        return name.partition("/")[2] if self._split else name
