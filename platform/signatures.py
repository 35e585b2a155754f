"""What the callable named by a ``_target_`` accepts; its defaults written into a configuration."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from platform.suggest import hint

FILLED = ("lightningmodules.", "datamodules.", "callbacks.", "torch.optim.")  # packages whose defaults are written out
RESERVED = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")  # Hydra's own keys
_NO_DEFAULT: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """One keyword of a callable: its annotation, its default, and whether it can only be given by name."""

    annotation: Any
    default: Any = _NO_DEFAULT
    keyword_only: bool = False

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is _NO_DEFAULT

    @property
    def plain(self) -> bool:
        """Whether it has a default that yaml can hold."""
        return not self.required and _is_plain(self.default)


@dataclass(frozen=True)
class Signature:
    """Explicit keywords of a callable.

    Args:
        target: dotted path.
        arguments: by name, in the order of definition.
        any_keyword: it also takes ``**kwargs``, so unknown names cannot be refused.
    """

    target: str
    arguments: Mapping[str, Argument]
    any_keyword: bool

    @property
    def filled(self) -> bool:
        """Whether its defaults are written into configurations."""
        return self.target.startswith(FILLED)


def fill(tree: Any) -> None:
    """Write every missing default under each ``_target_`` of a nested configuration, in place.

    Args:
        tree: mappings, lists and plain values, interpolations unresolved; every ``_target_`` can be imported.
    """
    for node in targets(tree).values():
        signature = of(node["_target_"])
        for name, argument in signature.arguments.items() if signature.filled else ():
            if name not in node and argument.plain:
                node[name] = as_yaml(argument.default)


def targets(tree: Any, key: str = "") -> dict[str, dict[str, Any]]:
    """Dotted key -> mapping, for every mapping with a ``_target_`` in a nested configuration."""
    if isinstance(tree, list):
        items: Iterable[tuple[Any, Any]] = enumerate(tree)
    elif isinstance(tree, dict):
        items = tree.items()
    else:
        return {}
    found = {key: tree} if isinstance(tree, dict) and "_target_" in tree else {}
    for name, value in items:
        found |= targets(value, f"{key}.{name}" if key else str(name))
    return found


@functools.cache
def of(target: str) -> Signature:
    """Signature of the class or function at a dotted path.

    Raises:
        ValueError: nothing importable is there.
    """
    return read(target, locate(target))


def read(name: str, function: Callable[..., Any], without: Iterable[str] = ()) -> Signature:
    """Signature of a callable, leaving out some arguments."""
    try:
        parameters = list(_inspect(function).parameters.values())
    except (TypeError, ValueError):  # written in C without a signature
        return Signature(name, {}, any_keyword=True)
    named = {
        parameter.name: Argument(_annotation(parameter), parameter.default, parameter.kind is parameter.KEYWORD_ONLY)
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name not in without
    }
    return Signature(name, named, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters))


def locate(target: str) -> Callable[..., Any]:
    """Import what a dotted path names.

    Raises:
        ValueError: no such module, no such name in it, or not callable. Errors inside the module pass through.
    """
    words = target.split(".")
    found: Any = None
    for depth, word in enumerate(words, start=1):
        path = ".".join(words[:depth])
        try:
            found = getattr(found, word) if depth > 1 and hasattr(found, word) else importlib.import_module(path)
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):  # the module is there, something it imports is not
                raise
            inside = f" in {'.'.join(words[: depth - 1])}" if depth > 1 else ""
            raise ValueError(f"no {word!r}{inside}.{hint(word, _names(found))}") from None
    if not callable(found):
        raise ValueError(f"{target} is a {type(found).__name__}; expected a class or a function.")
    return found


def _names(parent: Any) -> list[str]:
    if parent is None:
        return [prefix.split(".")[0] for prefix in FILLED]
    modules = [found.name for found in pkgutil.iter_modules(getattr(parent, "__path__", []))]
    return [name for name in [*modules, *vars(parent)] if not name.startswith("_")]


def _inspect(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # a type that only the checker imports: annotations stay text, and text is not checked
        return inspect.signature(function)


def _annotation(parameter: inspect.Parameter) -> Any:
    """The annotation, or the type of the default where there is none."""
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    kind = type(parameter.default)
    return {bool: bool, int: int | float, float: float, str: str}.get(kind, Any)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def as_yaml(value: Any) -> Any:
    """A plain default as yaml reads it back: tuples become lists."""
    if isinstance(value, list | tuple):
        return [as_yaml(item) for item in value]
    return {key: as_yaml(item) for key, item in value.items()} if isinstance(value, dict) else value
