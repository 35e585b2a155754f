"""The recipes: one flat yaml per experiment, with the groups ``data`` and ``hardware``."""
