"""Experiment files as text: which exist, what they list in ``defaults``, and which line set a key."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platform.overrides import Override
from platform.suggest import hint

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
BASE = "base"
_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Layer:
    """One file that takes part in an experiment.

    Args:
        name: path as shown in messages, ``experiments/quickstart.yaml``.
        package: dotted place its keys go to, "" for the top.
        lines: dotted key in the finished configuration -> line, from 1.
        content: the file's top mapping.
    """

    name: str
    package: str
    lines: Mapping[str, int]
    content: Mapping[str, Any]


def experiments(folder: Path = EXPERIMENTS) -> list[str]:
    """Names that ``fit`` takes, sorted."""
    return sorted(file.stem for file in folder.glob("*.yaml") if file.stem != BASE)


def groups(folder: Path = EXPERIMENTS) -> dict[str, list[str]]:
    """Group name -> its choices: ``{"hardware": ["cpu", ...], "data": [...]}``."""
    return {
        sub.name: sorted(file.stem for file in sub.glob("*.yaml"))
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and any(sub.glob("*.yaml"))
    }


def read(file: Path, group: str = "") -> Layer:
    """Read one file without composing.

    Raises:
        ValueError: the file is not valid yaml, or not a mapping.
    """
    import yaml

    text, name = file.read_text(encoding="utf-8"), "/".join(("experiments", *([group] if group else []), file.name))
    try:
        node, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{name}{line}: not valid yaml: {error.problem}. Correct that line.") from None
    if not isinstance(content, dict | None):
        raise ValueError(f"{name}: expected a mapping of settings (key: value), found {type(content).__name__}.")
    header = _PACKAGE.search(text)
    package = group if header is None else header.group(1).replace("_global_", "")
    lines = dict(_lines(node, f"{package}." if package else ""))
    if package:
        lines[package] = 1
    return Layer(name, package, lines, content or {})


def layers(experiment: str, choices: Mapping[str, str], folder: Path = EXPERIMENTS) -> list[Layer]:
    """Files of an experiment in the order in which they are merged; later ones win.

    Args:
        experiment: file name without suffix.
        choices: options of groups taken instead of the ones in ``defaults``.
        folder: the experiments folder.

    Raises:
        ValueError: a file named in a ``defaults`` list does not exist.
    """
    return list(_walk(folder / f"{experiment}.yaml", "", choices, folder))


def _walk(file: Path, group: str, choices: Mapping[str, str], folder: Path) -> Iterator[Layer]:
    layer = read(file, group)
    listed = list(layer.content.get("defaults") or [])
    for item in listed if "_self_" in listed else ["_self_", *listed]:
        if item == "_self_":
            yield layer
            continue
        sub, option = next(iter(item.items())) if isinstance(item, dict) else (group, item)
        sub = str(sub).split("@")[0].split()[-1].strip("/") if sub else ""
        option = choices.get(sub, option)
        target = folder / sub / f"{option}.yaml"
        if not target.is_file():
            there = sorted(other.stem for other in target.parent.glob("*.yaml"))
            raise ValueError(
                f"{layer.name}, defaults: {f'{sub}: ' if sub else ''}{option} names no file"
                f" experiments/{sub}{'/' if sub else ''}{option}.yaml.{hint(str(option), there)}"
                f" Choices: {', '.join(there) or 'none'}."
            )
        yield from _walk(target, sub, choices, folder)


def _lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        yield from _lines(value, f"{name}.")


class Origins:
    """Where the value of a key came from, for messages.

    Args:
        files: layers in merge order.
        typed: overrides of the command line.
        tiny: whether the ``tiny:`` blocks were merged.
    """

    def __init__(self, files: Iterable[Layer], typed: Iterable[Override], tiny: bool) -> None:
        self.files, self.typed, self.tiny = list(files), list(typed), tiny

    def raw(self, key: str) -> str | None:
        """The text behind ``key=`` on the command line, or None."""
        return next((change.raw for change in reversed(self.typed) if change.key == key), None)

    def find(self, key: str) -> str:
        """``on the command line (a=1)``, ``in experiments/x.yaml line 3``, or ``by default``."""
        for change in reversed(self.typed):
            if key == change.key or key.startswith(f"{change.key}."):
                return f"on the command line ({change.text})"
        for name in ([f"tiny.{key}"] if self.tiny else []) + [key]:
            for layer in reversed(self.files):
                if name in layer.lines:
                    return f"in {layer.name} line {layer.lines[name]}"
        return "by default"

    def home(self, key: str) -> str:
        """As :meth:`find`, for the nearest enclosing mapping that was set somewhere; "" when there is none."""
        while key:
            found = self.find(key)
            if found != "by default":
                return found
            key = key.rpartition(".")[0]
        return ""
