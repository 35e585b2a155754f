"""Between state dicts of transformers' GPT2LMHeadModel and ours."""

from collections.abc import Mapping

from torch import Tensor

PREFIX = "gpt."
TIED = "lm_head.weight"


def translate(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our keys; the output matrix, which older files leave out, is the embedding."""
    ours = {PREFIX + key: value for key, value in official.items()}
    ours.setdefault(PREFIX + TIED, official["transformer.wte.weight"])
    return ours


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of transformers."""
    return {key.removeprefix(PREFIX): value for key, value in state.items()}
