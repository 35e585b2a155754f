"""Source-code trees: one document per file, hidden folders such as .git left out."""

from pathlib import Path

from datamodules.inputs.entries import Choices
from datamodules.inputs.text import TextFiles


class CodeTree(TextFiles):
    """Files with the wanted endings below a folder; documents are members "py", or "txt" if other endings are asked.

    Args:
        source: the folder or one file.
        choices: endings (".py" unless given), size limit.

    Raises:
        ValueError: there is no such file.
    """

    kind = "code"
    endings = (".py",)
    hidden = False

    def __init__(self, source: Path, choices: Choices) -> None:
        super().__init__(source, choices)
        self.member = "py" if choices.extensions in ((), (".py",)) else "txt"
