"""``bench``: the speed measurement of one method."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

from platform.suggest import hint

ROOMS = Path(__file__).resolve().parent.parent / "lightningmodules"


def run(args: argparse.Namespace) -> int:
    """Run ``lightningmodules/<room>/bench.py``.

    Args:
        args: ``room`` and ``args``, the words handed to the room.

    Returns:
        What the room returns, 0 when it measured.

    Raises:
        ValueError: there is no such room, or it has no bench.
    """
    rooms = sorted(file.parent.name for file in ROOMS.glob("*/bench.py"))
    if args.room not in rooms:
        known = f"Type one of: {', '.join(rooms)}." if rooms else "None has one yet."
        raise ValueError(f"there is no lightningmodules/{args.room}/bench.py.{hint(args.room, rooms)} {known}")
    main: Callable[[list[str]], int] = importlib.import_module(f"lightningmodules.{args.room}.bench").main
    return main(args.args)
