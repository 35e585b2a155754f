"""How callbacks ask a room for samples: work is cut into equal chunks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightningmodules.base import GenerativeModule
from lightningmodules.shared.conditioning import Condition

_HOLES = re.compile(r"<mask(?::(\d{1,6}))?>")  # more digits than any row has tokens
_NEARLY = re.compile(r"<mask(?:[:\s][^<>]*)?>", re.IGNORECASE)


def plain(value: Any) -> Any:
    """Mappings and sequences of a configuration as dict and list, so that they can be written to JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def guidance_of(settings: Mapping[str, Any]) -> float:
    """The guidance the settings ask for; 1 means none."""
    return float(settings.get("guidance", 1.0))


def draw(
    module: GenerativeModule, seeds: Sequence[int], labels: Sequence[int], settings: Mapping[str, Any], chunk: int
) -> Tensor:
    """Samples in model space for a list of seeds, in chunks of at most ``chunk``.

    Args:
        module: the room; its active weights are used.
        seeds: one per sample.
        labels: one class per sample; ignored by rooms without classes.
        settings: keywords for ``sample``.
        chunk: samples per call, which bounds memory.

    Returns:
        (len(seeds), *codec.shape) on the module's device.
    """
    parts = []
    for start in range(0, len(seeds), chunk):
        rows = slice(start, start + chunk)
        parts.append(module.sample(seeds[rows], module.condition(labels[rows]), **settings))
    return torch.cat(parts)


def prompted(
    module: GenerativeModule,
    condition: Condition | None,
    prompt: str,
    rows: int = 1,
    settings: Mapping[str, Any] | None = None,
    holes: bool = True,
) -> Condition:
    """The condition with a caption, or with a text that every sample begins with, which may have holes.

    Args:
        module: the room. One that draws pictures of captions has ``caption``; one that draws text has a codec with a
            tokenizer.
        condition: what the samples are conditioned on besides, ``rows`` of it, or None.
        prompt: the text.
        rows: number of samples.
        settings: of the sampler; an ``aspect`` ratio among them becomes part of a caption where the training had it.
        holes: "<mask>" in a text stands for a token to be drawn, "<mask:20>" for twenty.

    Raises:
        ValueError: the model takes neither, or the tokenizer cannot write the prompt.
    """
    if hasattr(module, "caption"):
        aspect = {name: value for name, value in (settings or {}).items() if name == "aspect"}
        told: Condition = getattr(module, "caption")([prompt] * rows, **aspect)  # noqa: B009 - rooms may lack it
        return told
    tokenizer = getattr(module.codec, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"prompt {prompt!r}: this model takes no text. Leave the prompt out.")
    if holes and (odd := _NEARLY.search(_HOLES.sub("", prompt))):
        raise ValueError(f"{odd[0]!r} is no hole. Type <mask> for one token to be drawn, <mask:20> for twenty.")
    numbers: list[int] = []
    for i, part in enumerate(_HOLES.split(prompt) if holes else [prompt]):  # text, number of tokens, text, ...
        numbers += [-1] * int(part or 1) if i % 2 else _numbers(tokenizer, part)
    tokens = torch.tensor(numbers, dtype=torch.int64, device=module.device)
    return replace(condition or Condition(), prompt=tokens.expand(rows, -1))


def asked_for(module: GenerativeModule, prompt: str, where: str) -> Condition:
    """The condition of one sample with a prompt, checked before anything is drawn.

    Args:
        module: the room.
        prompt: see :func:`prompted`.
        where: what begins the messages.

    Raises:
        ValueError: the tokenizer or the model cannot take it, or it leaves nothing to draw.
    """
    try:
        prompt.encode()
        condition = prompted(module, None, prompt)
        tokens = condition.prompt
    except UnicodeEncodeError:
        raise ValueError(
            f"{where} is not utf-8. Type it in a terminal, or write it in a file, of that encoding."
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if tokens is not None:  # else a caption, which has its own length
        length, longest = tokens.shape[1], module.codec.shape[0]
        if length > longest or (length == longest and bool((tokens >= 0).all())):
            raise ValueError(
                f"{where} has {length} tokens, and a sample of this model has {longest}. Give a shorter one."
            )
    return condition


def _numbers(tokenizer: Any, part: str) -> list[int]:
    """Tokens of a part of a text; one that cleans texts must not take it for a whole one and cut its outer spaces."""
    if getattr(tokenizer, "normalise", None) is None:
        return list(tokenizer.encode(part).tolist())
    return list(tokenizer.encode(f"a{part}a").tolist()[1:-1])


def shares(count: int, rank: int, world: int, chunk: int) -> Iterator[tuple[list[int], int]]:
    """This rank's part of ``range(count)``, in as many chunks as every other rank has.

    A sharded network can only be called by all ranks together, so a rank that runs out repeats its last number, and
    the repeats are not counted.

    Args:
        count: numbers to share, >= world.
        rank: this rank.
        world: number of ranks.
        chunk: largest chunk.

    Yields:
        (numbers, how many of them count).
    """
    mine = list(range(rank, count, world))
    longest = -(-count // world)
    padded = mine + [mine[-1] if mine else 0] * (longest - len(mine))
    for start in range(0, longest, chunk):
        numbers = padded[start : start + chunk]
        yield numbers, max(0, min(len(mine) - start, len(numbers)))
