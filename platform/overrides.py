"""Read ``key=value`` arguments of the command line."""

import re
from dataclasses import dataclass
from typing import Any

_NULLS = ("null", "Null", "NULL", "~")
_SWEEP_CALL = re.compile(r"^(choice|range|interval|glob|sort|shuffle|tag)\(.*\)$")
_CLOSING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Override:
    """One argument.

    Args:
        text: the argument as typed.
        sign: ``+``, ``++`` or ``~`` in front of the key (Hydra habits, refused later with the right spelling), or "".
        key: dotted key.
        raw: what stands behind the first ``=``.
        value: ``raw`` as yaml reads it.
    """

    text: str
    sign: str
    key: str
    raw: str
    value: Any


def parse(text: str) -> Override:
    """Split and read one argument.

    Raises:
        ValueError: no ``=``, no value, a sweep, or a value that is not valid yaml.
    """
    head, equals, raw = text.partition("=")
    sign = next((mark for mark in ("++", "+", "~") if head.startswith(mark)), "")
    key = head[len(sign) :]
    if sign == "~" and not equals:
        equals, raw = "=", "null"
    if not equals:
        raise ValueError(
            f"{text!r}: expected key=value, without blanks around '='. Type e.g. {_example_key(key)}=VALUE."
        )
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[\w-]+)*", key):
        raise ValueError(f"{text!r}: {key!r} is no setting's name. Type words joined by dots, e.g. seed=1.")
    if not raw:
        raise ValueError(f"{text}: no value behind '='. Type {key}=null for none, or {key}=\"''\" for empty text.")
    if _is_sweep(raw):
        raise ValueError(
            f"{text}: several values; one command is one run. Type one command per value, {key}=[{raw}] for a list,"
            f" or {key}=\"'{raw}'\" for text with commas."
        )
    return Override(text, sign, key, raw, _read(text, key, raw))


def _example_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z_][\w.]*", key) else "trainer.max_steps"


def _is_sweep(raw: str) -> bool:
    """A comma outside brackets and quotes, or one of Hydra's sweep functions."""
    if _SWEEP_CALL.match(raw):
        return True
    awaited: list[str] = []
    for char in raw:
        if awaited and char == awaited[-1]:
            awaited.pop()
        elif awaited and awaited[-1] in "'\"":
            continue
        elif char in _CLOSING:
            awaited.append(_CLOSING[char])
        elif char in "'\"":
            awaited.append(char)
        elif char == "," and not awaited:
            return True
    return False


def _read(text: str, key: str, raw: str) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        if raw[0] in "[{'\"$":
            problem = str(getattr(error, "problem", None) or error).splitlines()[0]
            raise ValueError(f"{text}: {raw!r} is not valid yaml ({problem}). Type e.g. {key}=[1,2].") from None
        return raw  # *.tar, @x: yaml reserves the first character, but a bare word is plainly meant
    if value is None and raw not in _NULLS:
        return raw  # "#1" would be a comment
    return value
