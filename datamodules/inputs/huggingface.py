"""A Hugging Face data set saved on disk with ``save_to_disk``; columns are chosen by their feature types."""

import threading
from pathlib import Path
from typing import Any

from datamodules.inputs.entries import Choices, Folder, Inputs, Item, Refused, within

MARKS = ("state.json", "dataset_dict.json")  # files that save_to_disk writes
_SPLITS = {"validation": "val", "valid": "val", "dev": "val"}


class HuggingFace(Inputs):
    """One input per row: the image or text column, the class label, and text columns as captions of an image.

    Args:
        source: the folder that ``save_to_disk`` wrote, of one data set or of a dictionary of splits.
        choices: size limit, and the text column.

    Raises:
        ValueError: the library is not installed, or no column can be used.
    """

    kind = "huggingface"
    published = True

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__()
        self._max_bytes = choices.max_bytes
        self._root = Folder(source)
        self._lock = threading.Lock()
        loaded = _load(source)
        self._splits: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
        self._fingerprints = {split: getattr(rows, "_fingerprint", "") for split, rows in self._splits.items()}
        features = next(iter(self._splits.values())).features
        self._columns = _Columns(features, choices.text_field, source)
        self.member = "image" if self._columns.image else "txt"
        self.class_names = self._columns.class_names
        if self._columns.image:
            import datasets

            raw = datasets.Image(decode=False)
            self._splits = {n: rows.cast_column(self._columns.image, raw) for n, rows in self._splits.items()}
        self._rows = [(split, row) for split, rows in self._splits.items() for row in range(len(rows))]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def name(self, number: int) -> str:
        """Split and row."""
        split, row = self._rows[number]
        return f"{split or 'row'}#{row}"

    def mark(self, number: int) -> object:
        """The library's own fingerprint of the split."""
        return self._fingerprints[self._rows[number][0]]

    def part(self, number: int) -> str:
        """The data set's own split."""
        split = self._rows[number][0]
        return _SPLITS.get(split, split)

    def read(self, number: int) -> Item:
        """Content of a row."""
        split, row = self._rows[number]
        with self._lock:
            values = self._splits[split][row]
        columns = self._columns
        label = values.get(columns.label) if columns.label else None
        if label is not None and label < 0:
            label = None  # the library's mark for a row without a class
        if not columns.image:
            text = values.get(columns.text)
            if not isinstance(text, str):
                raise Refused("no text", f"column {columns.text}")
            return Item(within(text.encode("utf-8", "surrogatepass"), self._max_bytes), label=label)
        image = values.get(columns.image) or {}
        data = image.get("bytes")
        if data is None:
            data = self.linked(image.get("path"))
        captions = {member: values[name] for name, member in columns.captions.items() if values.get(name)}
        return Item(within(data, self._max_bytes), captions, label)

    def linked(self, path: str | None) -> bytes:
        """An image that a row names instead of holding it; only inside the data set's folder.

        Raises:
            Refused: it lies elsewhere, or cannot be read.
        """
        if not path:
            raise Refused("empty")
        inner = Path(path)
        if inner.is_absolute():
            if not inner.is_relative_to(self._root.root):
                raise Refused("link out of the source", f"to {path}")
            inner = inner.relative_to(self._root.root)
        return self._root.read(inner.as_posix(), self._max_bytes)


class _Columns:
    """Which column is what, by feature type."""

    def __init__(self, features: Any, text_field: str, source: Path) -> None:
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        texts = [
            name for name, feature in features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
        ]
        self.image = images[0] if images else ""
        self.label = next((name for name in ("fine_label", "label") if name in labels), labels[0] if labels else "")
        self.text = text_field if text_field in texts else (texts[0] if len(texts) == 1 else "")
        if not self.image and not self.text:
            listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise ValueError(
                f"{source} has the columns {listed}: no image, and not one text. "
                "Name the column of the text with --text-field COLUMN."
            )
        self.class_names = list(features[self.label].names) if self.label else []
        main = next((name for name in (text_field, "caption", "text") if name in texts), "")
        main = main or (texts[0] if len(texts) == 1 else "")
        self.captions = {main: "txt"} if main else {}
        for name in texts:
            if name.startswith("caption") and name != main and name.replace("_", "").isalnum():
                self.captions[name] = f"{name.lower()}.txt"


def _load(source: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source} is a Hugging Face data set, and the library that reads it is not installed. "
            "Type: pip install datasets"
        ) from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_from_disk(str(source))
    except Exception as error:  # the library raises its own and pyarrow's types
        raise ValueError(
            f"{source} cannot be loaded as a Hugging Face data set ({type(error).__name__}: {error}). "
            "Save it again with save_to_disk."
        ) from error
