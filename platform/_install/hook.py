"""Gives the standard library's ``platform`` module the submodules of this checkout.

``pip install`` copies this file into site-packages, where one line of a ``.pth`` file calls :func:`install` whenever
Python starts. It costs next to nothing there: no import, only a small object that waits for the name ``platform``.
The standard library's module stays as it is and stays the one that is found; it merely gains a ``__path__``.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is not imported in every Python process of the environment
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class PlatformFinder:
    """Finds ``platform`` as Python would, and adds the place of our submodules.

    Args:
        folder: absolute path of the package folder ``platform``.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Answer for the one name, stay silent for all others (see ``importlib.abc.MetaPathFinder``)."""
        if name != "platform":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.submodule_search_locations is None:  # a checkout on sys.path is a package already
            spec.submodule_search_locations = [self.folder]
        return spec


def install(folder: str) -> None:
    """Start waiting for ``import platform``.

    Args:
        folder: absolute path of the package folder ``platform``.
    """
    module = sys.modules.get("platform")
    if module is not None and not hasattr(module, "__path__"):  # another start-up file imported it before us
        module.__path__ = [folder]
        module.__package__ = "platform"
        if module.__spec__ is not None:
            module.__spec__.submodule_search_locations = [folder]
    if not any(isinstance(finder, PlatformFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PlatformFinder(folder))
