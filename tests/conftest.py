"""Settings every test needs: our ``platform`` package, one thread, a cache folder of its own."""

import importlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

import platform

# pytest itself imports the standard library's module before the checkout is on the path; reloading turns that very
# module object into our package. After `pip install -e .` there is nothing left to do here.
if not hasattr(platform, "__path__"):
    importlib.reload(platform)
assert hasattr(platform, "__path__"), "the checkout must come first on sys.path"

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CACHE = tempfile.mkdtemp(prefix="platform-test-cache-")
os.environ["PLATFORM_CACHE"] = _CACHE  # never read or write the developer's own cache


_LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Undo what a run inside this process leaves behind: signal handlers, and the launcher's environment.

    Processes that a later test starts would inherit both, take themselves for ranks and survive Ctrl-C.
    """
    yield
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in _LAUNCHER:
        os.environ.pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache folder of this test process."""
    shutil.rmtree(_CACHE, ignore_errors=True)
