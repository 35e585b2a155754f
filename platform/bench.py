"""``bench``: the speed measurement of one method, or of the data layer."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

from platform.suggest import hint

ROOMS = Path(__file__).resolve().parent.parent / "lightningmodules"
DATA = "data"  # datamodules/bench


def run(args: argparse.Namespace) -> int:
    """Run ``lightningmodules/<room>/bench.py``, or the measurement of the data layer.

    Args:
        args: ``room`` and ``args``, the words handed to the room.

    Returns:
        What the room returns, 0 when it measured.

    Raises:
        ValueError: there is no such room, or it has no bench.
    """
    rooms = sorted(file.parent.name for file in ROOMS.glob("*/bench.py"))
    if args.room not in [DATA, *rooms]:
        known = f"Type one of: {', '.join([DATA, *rooms])}."
        raise ValueError(f"there is no lightningmodules/{args.room}/bench.py.{hint(args.room, [DATA, *rooms])} {known}")
    module = "datamodules.bench.main" if args.room == DATA else f"lightningmodules.{args.room}.bench"
    main: Callable[[list[str]], int] = importlib.import_module(module).main
    return main(args.args)
