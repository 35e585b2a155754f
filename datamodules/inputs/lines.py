"""Lines of large text files by number, found once and read by offset, so that memory holds only their places."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.inputs.entries import Refused, safe_name, too_large

_STEP = 2**24
_NEWLINE = 10


class Lines:
    """All lines of several files, numbered through.

    Args:
        root: folder that the names start from.
        files: relative names, in order.

    Attributes:
        refused: files that cannot be read, with the reason.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root = root.resolve()
        self.files: list[str] = []
        self.refused: list[tuple[str, Refused]] = []
        self._offsets: list[NDArray[np.int64]] = []
        self._lock = threading.Lock()
        self._open: tuple[int, int] | None = None
        for name in files:
            try:
                offsets = self._find(name)
            except Refused as refusal:
                self.refused.append((name, refusal))
                continue
            self.files.append(name)
            self._offsets.append(offsets)
        self._starts = np.cumsum([0] + [len(offsets) - 1 for offsets in self._offsets])

    def __len__(self) -> int:
        """Number of lines."""
        return int(self._starts[-1])

    def name(self, number: int) -> str:
        """File and line, counted from 1."""
        file, line = self._locate(number)
        return f"{self.files[file]}#{line + 1}"

    def length(self, number: int) -> int:
        """Bytes of a line with its end."""
        file, line = self._locate(number)
        return int(self._offsets[file][line + 1] - self._offsets[file][line])

    def read(self, number: int, max_bytes: int) -> bytes:
        """A line without its end.

        Raises:
            Refused: it is longer than the limit, or the file has gone.
        """
        file, line = self._locate(number)
        begin, end = int(self._offsets[file][line]), int(self._offsets[file][line + 1])
        if end - begin > max_bytes + 2:  # line end not counted
            raise too_large(end - begin, max_bytes)
        with self._lock:  # one file is open at a time; reading a line takes microseconds
            if self._open is None or self._open[0] != file:
                self._close()
                self._open = (file, os.open(self.root / self.files[file], os.O_RDONLY | os.O_CLOEXEC))
            data = os.pread(self._open[1], end - begin, begin)
        return data.removesuffix(b"\n").removesuffix(b"\r")

    def close(self) -> None:
        """Close the open file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _locate(self, number: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return file, int(number - self._starts[file])

    def _find(self, name: str) -> NDArray[np.int64]:
        """Where each line begins, and the end of the last one."""
        safe_name(name)
        path = self.root / name
        real = path.resolve()
        if not real.is_relative_to(self.root):
            raise Refused("link out of the source", f"to {real}")
        if not path.is_file():
            raise Refused("not a regular file" if path.exists() else "missing file")
        found = [np.zeros(1, dtype=np.int64)]
        at = 0
        try:
            with path.open("rb") as file:
                while block := file.read(_STEP):
                    ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == _NEWLINE) + at + 1
                    found.append(ends.astype(np.int64))
                    at += len(block)
        except OSError as error:
            raise Refused("cannot be read", str(error.strerror or error)) from error
        offsets = np.concatenate(found)
        return offsets if offsets[-1] == at else np.append(offsets, at)
