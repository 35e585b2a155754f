"""Large numbers as a person reads them."""


def count(value: float) -> str:
    """A number with an SI prefix: 3230000 -> ``3.23 M``."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"


def data_size(value: float) -> str:
    """Bytes with a binary prefix: 3230000 -> ``3.08 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
