"""Does a configured value fit a type annotation, and what to say when it does not."""

import collections.abc
import inspect
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

REFUSED: Any = object()  # what coerce returns for a value that does not fit
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_EXAMPLES = {int: 1, float: 0.1, bool: True, str: "text"}


@dataclass(frozen=True)
class Minimum:
    """Smallest allowed number, for ``Annotated[int, Minimum(1)]``."""

    value: float


def coerce(value: Any, annotation: Any) -> Any:
    """A value as an annotation wants it.

    Whole floats become integers where an integer is wanted (``5e3`` is a float in yaml), integers become floats where
    a float is wanted; nothing else is converted.

    Args:
        value: None, bool, int, float, str, list or dict, as yaml gives them.
        annotation: a type, ``Literal``, ``Annotated`` with :class:`Minimum`, union, container or ``Any``. Types that
            yaml cannot write (a callable, a class) are satisfied only by a mapping with ``_target_``.

    Returns:
        The value, converted; :data:`REFUSED` when it does not fit.
    """
    if _anything(annotation) or (isinstance(value, dict) and "_target_" in value):
        return value
    if value is None:
        return None if annotation is type(None) or _allows_none(annotation) else REFUSED
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _at_least(coerce(value, arguments[0]), arguments[1:])
    if origin in (Union, types.UnionType):
        return _first_fitting(value, arguments)
    if origin is Literal:
        return next((choice for choice in arguments if str(choice) == str(value)), REFUSED)
    if annotation in (bool, int, float, str):
        return _scalar(value, annotation)
    kind = origin or annotation
    if kind in _LISTS:
        return _list(value, kind, arguments)
    if kind in _MAPPINGS:
        return value if isinstance(value, dict) else REFUSED
    if hasattr(kind, "__fspath__"):
        return value if isinstance(value, str) else REFUSED
    return REFUSED


def describe(annotation: Any) -> str:
    """What an annotation accepts, in words: ``a whole number of at least 1 or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation in _WORDS:
        return _WORDS[annotation or type(None)]
    if origin is Annotated:
        minimum = next((extra.value for extra in arguments[1:] if isinstance(extra, Minimum)), None)
        return describe(arguments[0]) + ("" if minimum is None else f" of at least {minimum:g}")
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    kind = origin or annotation
    if kind in _LISTS:
        items = [argument for argument in arguments if argument is not Ellipsis]
        if kind is tuple and items and Ellipsis not in arguments:
            return f"a list of {len(items)}, each {describe(items[0])}"
        return f"a list, each {describe(items[0])}" if items else "a list"
    if kind in _MAPPINGS:
        return "a mapping {name: value}"
    if hasattr(kind, "__fspath__"):
        return "a path"
    return "anything" if _anything(annotation) else "a mapping with _target_"


def example(annotation: Any, value: Any, default: Any = None) -> Any:
    """A value that would have been accepted: the nearest whole number, the default, or a plain one of the type."""
    if isinstance(value, float) and coerce(max(1, round(value)), annotation) is not REFUSED:
        return max(1, round(value))
    if default is not None and coerce(default, annotation) is not REFUSED:
        return default
    origin, parts = get_origin(annotation), get_args(annotation)
    if (origin or annotation) in _LISTS:
        items = [part for part in parts if part is not Ellipsis] or [float]
        return [example(item, None) for item in items]
    if origin is Literal:
        return parts[0]
    if origin in (Annotated, Union, types.UnionType):
        return next((found for found in (example(part, None) for part in parts) if found is not None), None)
    return _EXAMPLES.get(annotation)


def _anything(annotation: Any) -> bool:
    return annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, TypeVar | str)


def _allows_none(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _allows_none(get_args(annotation)[0])
    return get_origin(annotation) in (Union, types.UnionType, Literal) and (
        type(None) in get_args(annotation) or None in get_args(annotation)
    )


def _scalar(value: Any, wanted: type) -> Any:
    if isinstance(value, bool) or wanted is bool:  # True is an int to Python, but never a number of steps
        return value if type(value) is wanted else REFUSED
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if wanted is float and isinstance(value, int):
        return float(value)
    return value if isinstance(value, wanted) else REFUSED


def _at_least(value: Any, extras: tuple[Any, ...]) -> Any:
    if isinstance(value, int | float):
        for extra in extras:
            if isinstance(extra, Minimum) and value < extra.value:
                return REFUSED
    return value


def _first_fitting(value: Any, members: tuple[Any, ...]) -> Any:
    """Prefer the member that takes the value unchanged: 5.0 for ``int | float`` stays 5.0."""
    fits = [fit for fit in (coerce(value, member) for member in members) if fit is not REFUSED]
    same = [fit for fit in fits if type(fit) is type(value)]
    return next(iter(same or fits), REFUSED)


def _list(value: Any, kind: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, list):
        return REFUSED
    if kind is tuple and arguments and Ellipsis not in arguments:
        if len(value) != len(arguments):
            return REFUSED
        members = arguments
    else:
        members = (arguments[0] if arguments else Any,) * len(value)
    items = [coerce(item, member) for item, member in zip(value, members, strict=True)]
    return REFUSED if any(item is REFUSED for item in items) else items
