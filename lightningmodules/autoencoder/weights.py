"""Between AutoencoderKL files of Hugging Face diffusers and ours; the names agree."""

from collections.abc import Mapping

from torch import Tensor

from lightningmodules.shared.autoencoder import translate as translate  # the runner asks the room for it
from lightningmodules.shared.statedict import match as match  # likewise


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as diffusers' one: the same."""
    return dict(state)
