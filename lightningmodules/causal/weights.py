"""Between state dicts of transformers' GPT2LMHeadModel and ours."""

from collections.abc import Mapping

from torch import Tensor

PREFIX = "gpt."
TIED = "lm_head.weight"
TRUNK = "transformer."
BUFFERS = (".attn.bias", ".attn.masked_bias")  # of older files


def translate(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our keys; the output matrix, which older files leave out, is the embedding, and so may be "transformer.".

    Raises:
        ValueError: the file holds no such model.
    """
    if "wte.weight" in official:
        official = {TRUNK + key: value for key, value in official.items() if not key.endswith(BUFFERS)}
    if TRUNK + "wte.weight" not in official:
        some = ", ".join(sorted(official)[:3])
        raise ValueError(f"These are no weights of a GPT-2: {TRUNK}wte.weight is not among them, but {some}.")
    ours = {PREFIX + key: value for key, value in official.items()}
    ours.setdefault(PREFIX + TIED, official[TRUNK + "wte.weight"])
    return ours


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of transformers."""
    return {key.removeprefix(PREFIX): value for key, value in state.items()}
