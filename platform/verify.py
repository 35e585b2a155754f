"""``verify``: replay files of reference numbers and compare each quantity."""

import argparse
import ast
import importlib
import math
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from platform.suggest import hint

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("lightningmodules/*/golden.py", "callbacks/features/golden.py")
AGREE, DIFFER, UNREADABLE = 0, 1, 2


def run(args: argparse.Namespace) -> int:
    """Compare every file; one that cannot be read does not keep the others from being compared.

    Args:
        args: ``files``, safetensors files whose metadata key ``method`` names the method; ``trace``.

    Returns:
        0 when all quantities agree, 1 when any differs or was not checked, 2 when a file cannot be replayed at all.
    """
    codes = []
    for file in map(Path, args.files):
        try:
            codes.append(_compare(file, args.trace))
        except ValueError as error:
            if args.trace:
                traceback.print_exc()
            print(f"{file}: cannot be replayed: {error}", file=sys.stderr, flush=True)
            codes.append(UNREADABLE)
    return max(codes)


def methods(root: Path = ROOT) -> dict[str, str]:
    """Which module replays which method, read from the sources without importing them.

    Args:
        root: the checkout.

    Returns:
        Name of the method -> dotted name of a module with ``METHODS``, ``check`` and ``references``.
    """
    found = {}
    for file in sorted(path for place in PLACES for path in root.glob(place)):
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            value = getattr(statement, "value", None)
            if value is not None and any(isinstance(target, ast.Name) and target.id == "METHODS" for target in targets):
                found.update(dict.fromkeys(ast.literal_eval(value), module))
    return found


def read(file: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: it is missing, damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError("that is a folder; name the files in it." if file.is_dir() else "there is no such file.")
    size = file.stat().st_size
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"no readable safetensors file ({error}; {size:,} bytes). Is the copy complete?") from error


def _compare(file: Path, trace: bool) -> int:
    tensors, metadata = read(file)
    room = _room(metadata)
    wanted: set[str] = set(room.references(tensors))
    if not wanted:
        raise ValueError(f"it holds no reference quantity of method {metadata['method']}.")
    print(f"{file}: {metadata['method']}", flush=True)
    width = max(map(len, wanted))
    seen: set[str] = set()
    bad = 0
    try:
        for name, error, tolerance in _checks(room, tensors, metadata, file):
            good = error <= tolerance < math.inf  # false for nan on either side
            row = f"  {name:<{width}}  error {error:9.3g}  tolerance {tolerance:9.3g}"
            print(row, "ok" if good else "FAIL", sep="  ", flush=True)
            seen.add(name)
            bad += not good
    except ValueError as error:
        if not seen:  # the room refuses the file as a whole
            raise
        bad += _broke_off(error, trace)
    except Exception as error:  # what was compared before, and the other files, still count
        bad += _broke_off(error, trace)
    missed = sorted(wanted - seen)
    for name in missed:
        print(f"  {name:<{width}}  not checked  FAIL")
    bad += len(missed)
    print(f"  {len(seen | wanted)} quantities, {f'{bad} FAIL' if bad else 'all ok'}", flush=True)
    return DIFFER if bad else AGREE


def _checks(
    room: ModuleType, tensors: Mapping[str, "Tensor"], metadata: dict[str, str], file: Path
) -> Iterator[tuple[str, float, float]]:
    results: Any = room.check(tensors, metadata, file)
    for name, error, tolerance in results:
        yield str(name), float(error), float(tolerance)


def _broke_off(error: Exception, trace: bool) -> int:
    if trace:
        traceback.print_exception(error)
    print(f"  the comparison broke off: {type(error).__name__}: {error}  FAIL")
    return 1


def _room(metadata: Mapping[str, str]) -> ModuleType:
    known = methods()
    name = metadata.get("method")
    if name is None:
        raise ValueError(f"its metadata has no key 'method'. Known methods: {', '.join(sorted(known))}.")
    if name not in known:
        raise ValueError(f"no method is called {name!r}.{hint(name, known)} Known methods: {', '.join(sorted(known))}.")
    return importlib.import_module(known[name])
