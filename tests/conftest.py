"""Settings every test needs: our ``platform`` package, one thread, a cache folder of its own."""

import importlib
import os
import shutil
import tempfile

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


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache folder of this test process."""
    shutil.rmtree(_CACHE, ignore_errors=True)
