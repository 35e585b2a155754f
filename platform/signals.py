"""Signals set a flag and do nothing else; the training loop looks at it between updates.

Installed before torch is imported, so that a signal during the long start of the program does not kill it. Only the
standard library is used here.
"""

import os
import signal
from types import FrameType

_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received = 0  # the first signal
_interrupted = False


def install() -> None:
    """Let SIGTERM, SIGUSR1 and SIGINT set the flag; harmless when called again.

    The first Ctrl-C asks for an orderly stop like the others, the second raises ``KeyboardInterrupt``.
    """
    for number in _WATCHED:
        signal.signal(number, _note)


def requested() -> int:
    """Number of the first signal received since the start, 0 when there was none."""
    return _received


def _note(number: int, frame: FrameType | None) -> None:
    global _received, _interrupted
    _received = _received or number
    if number != signal.SIGINT:
        return
    if _interrupted:
        raise KeyboardInterrupt
    _interrupted = True
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one line per machine
        # os.write because print is not re-entrant and the signal may arrive inside a print
        os.write(2, b"\nstopping after this update and saving; Ctrl-C again leaves at once\n")
