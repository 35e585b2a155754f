"""The runner (``python -m platform``), and a superset of the standard library's module of the same name.

Python and half of its ecosystem import ``platform`` for ``platform.system()`` and friends. Whenever this folder comes
first on the path it answers those calls too: the standard library's own code is executed in this namespace, so every
function keeps its globals, its caches and its patchability. Nothing else belongs into this file; whatever it imported
would be imported by every Python process started in the checkout.
"""


def _adopt() -> None:
    """Execute the standard library's ``platform`` source in this module's namespace."""
    namespace = globals()
    if "python_implementation" in namespace:  # reloaded over the standard library's module: its names are here already
        return
    import os
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("platform", [os.path.dirname(os.__file__)])
    assert spec is not None
    assert spec.loader is not None
    doc = namespace["__doc__"]
    # get_code, unlike reading the source, uses the cached bytecode
    exec(spec.loader.get_code("platform"), namespace)  # type: ignore[attr-defined]
    namespace["__doc__"] = doc


_adopt()
del _adopt
