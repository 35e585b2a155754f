"""Did you mean: the nearest name to one that does not exist."""

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher, get_close_matches


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like ``word``, or None when none is alike; case and ``-`` against ``_`` do not count."""
    plain = {choice.lower().replace("-", "_"): choice for choice in choices}
    word = word.lower().replace("-", "_")
    found = get_close_matches(word, list(plain), n=1, cutoff=0.6)
    found = found or [choice for choice in sorted(plain) if len(word) > 2 and choice.startswith(word)]
    return plain[found[0]] if found else None


def hint(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean X?`` with a leading blank, or nothing."""
    found = closest(word, choices)
    return f" Did you mean {found}?" if found else ""


def closest_key(key: str, known: Collection[str]) -> str | None:
    """The dotted key that was probably meant.

    Three tries: a key that ends in the same word (``lr`` -> ``module.optimizer.lr``), the same path with one misspelt
    word (``trainer.max_step`` -> ``trainer.max_steps``), and the most similar spelling of all.

    Args:
        key: dotted key that does not exist.
        known: dotted keys that exist, sections included.
    """
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return min(same_leaf, key=lambda name: (-SequenceMatcher(None, key, name).ratio(), len(name), name))
    first, _, rest = key.partition(".")
    top = closest(first, {name.split(".", 1)[0] for name in known}) if rest else None
    return (
        _walk(key, known)
        or next(iter(get_close_matches(key, list(known), n=1, cutoff=0.75)), None)
        or (f"{top}.{rest}" if top and top != first else None)
    )


def _walk(key: str, known: Collection[str]) -> str | None:
    """Follow the path word by word, replacing each unknown word by its nearest sibling."""
    prefix = ""
    for word in key.split("."):
        siblings = {name[len(prefix) :].split(".", 1)[0] for name in known if name.startswith(prefix)}
        found = word if word in siblings else closest(word, siblings)
        if found is None:
            return None
        prefix += found + "."
    return prefix[:-1]
