"""Speed of the data layer beside its limits and beside other loaders: ``python -m platform bench data``."""
