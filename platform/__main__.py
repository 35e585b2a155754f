"""Entrance of the program: ``python -m platform``, ``python platform`` and ``python path/to/platform``."""

import importlib
import importlib.util
import os
import sys

_PACKAGE = os.path.dirname(os.path.realpath(__file__))
_ROOT = os.path.dirname(_PACKAGE)


def _put_root_first() -> None:
    """Let the rooms, callbacks and datamodules of this checkout be found, and before anything of the same name.

    Started as ``python platform``, Python puts the package folder itself on the path, where its files would pose as
    top-level modules; that entry goes.
    """
    unwanted = {_PACKAGE, _ROOT}
    sys.path[:] = [_ROOT, *(entry for entry in sys.path if os.path.realpath(entry or os.curdir) not in unwanted)]


def _graft() -> None:
    """Make ``platform`` this very package, also in the processes that will be started from here."""
    import platform

    if _PACKAGE not in map(os.path.realpath, getattr(platform, "__path__", ())):
        importlib.reload(platform)  # the same module object, so earlier imports see the package too
    # Lightning restarts the program by the name in this spec, and `__main__` is not a name that `-m` could find.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("platform.__main__")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))


def _start() -> int:
    _put_root_first()
    if not __package__:
        _graft()
    from platform import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_start())
