"""What ``pip install`` puts into site-packages so that ``python -m platform`` is found from any folder."""
