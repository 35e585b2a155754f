"""What a STARFlow begins with: weights of another stage, the card of its latents, the empty caption of its features."""

import base64
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightningmodules.shared import dcp
from lightningmodules.shared.autoencoder import AutoencoderKL
from lightningmodules.shared.codecs import Latents, Pixels
from lightningmodules.shared.text_encoders import RandomBytes
from lightningmodules.starflow.module import StarFlow
from lightningmodules.starflow.network import StarFlowNet
from lightningmodules.starflow.weights import to_official

HERE = torch.device("cpu")


def room(size: int = 4, net: dict[str, Any] | None = None, **options: Any) -> StarFlow:
    told = {"head_dim": 20, "txt_size": 3, "txt_dim": 5, "pt_seq_len": 4}
    make = partial(StarFlowNet, 2, size, 1, 40, 2, [1, 2], **{**told, **(net or {})})
    options = {"codec": Pixels(size, 2, levels=17, white=240), "condition": "text", **options}
    return StarFlow(net=make, optimizer=partial(torch.optim.AdamW, lr=1e-3), **options)


def begun(**options: Any) -> StarFlow:
    made = room(**options)
    made.configure_model()
    return made.eval()


def test_a_higher_resolution_goes_on_with_the_weights_of_a_lower_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    low = begun()
    for parameter in low.net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    state = low.net.state_dict()
    (tmp_path / "exported").mkdir()
    save_file({f"net.{key}": value for key, value in state.items()}, tmp_path / "exported" / "weights.safetensors")
    torch.save(to_official(state, constants=(4, 3, 20)), tmp_path / "official.pth")
    dcp.write_folder(state, tmp_path / "sharded.dcp")
    for name in ("exported", "exported/weights.safetensors", "official.pth", "sharded.dcp"):
        high = begun(size=8, start=str(tmp_path / name))
        for key, value in high.net.state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
    # the same places of the picture have the same angles: every second row and column of the finer grid
    coarse, fine = (one.net.steps[0].rotation((n, n), 0, HERE)[0] for one, n in ((low, 4), (high, 8)))  # type: ignore[index]
    torch.testing.assert_close(fine.view(8, 8, -1)[::2, ::2], coarse.view(4, 4, -1))
    assert begun(size=8, start=None).net.state_dict()["blocks.0.sos_embed"].ne(state["blocks.0.sos_embed"]).any()


def test_wrong_starts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"module\.start=nowhere: no such file\. Export the weights of the stage before"
    ):
        begun(start="nowhere")
    with pytest.raises(ValueError, match=r"no weights there\. Export the weights of the stage before"):
        begun(start=str(tmp_path))  # e.g. a run folder
    (tmp_path / "trap.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="holds something else than tensors"):
        begun(start=str(tmp_path / "trap.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: This is no state dict of STARFlow"):
        begun(start=str(tmp_path / "other.pth"))
    torch.save(begun(net={"rope": False}).net.state_dict(), tmp_path / "learnt.pth")
    with pytest.raises(ValueError, match=r"only a network with module\.net\.rope=true continues at another one"):
        begun(size=8, net={"rope": False}, start=str(tmp_path / "learnt.pth"))
    with pytest.raises(ValueError, match=r"2 unexpected .* Set module\.net as in the run"):
        begun(start=str(tmp_path / "learnt.pth"))


def features_of(caption: str) -> torch.Tensor:
    features, mask = RandomBytes(8, 3).encode([caption])
    return features[0, mask[0], :5].contiguous()


class Source:
    """Data whose card says what ``prepare`` writes."""

    features = "emb.t5"

    def __init__(self, **card: Any) -> None:
        self.card = card

    def source_of(self, _: str) -> Any:
        return SimpleNamespace(described=lambda name: self.card.get(name, {}))


def met(made: StarFlow, data: Source) -> StarFlow:
    made.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    made.setup("fit")
    return made


def test_nothing_is_the_stored_empty_caption() -> None:
    raw = base64.b64encode(features_of("").half().numpy().tobytes()).decode()
    entry = {"emb.t5": {"dtype": "float16", "shape": [None, 5]}}
    stored = Source(**entry, empty_caption={"emb.t5": raw})
    starflow = met(room(), stored)
    starflow.configure_model()
    null = starflow.told.null(2, HERE)  # type: ignore[union-attr]
    assert null.shape == (2, 3, 5)
    torch.testing.assert_close(null[1, :1], features_of(""), atol=2e-3, rtol=0)
    assert not null[:, 1:].any()
    continued = begun()
    assert not continued.told.null(1, HERE).any()  # type: ignore[union-attr]
    continued.load_state_dict(starflow.state_dict())
    assert torch.equal(continued.told.null(2, HERE), null)  # type: ignore[union-attr]
    with_encoder = begun(text_encoder=partial(RandomBytes, 5 * 4, 3))  # not asked where the data says what nothing is
    assert torch.equal(met(with_encoder, stored).told.null(2, HERE), null)  # type: ignore[union-attr]
    assert not met(begun(), Source(**entry)).told.null(1, HERE).any()  # type: ignore[union-attr]
    own_words = met(begun(null_caption="{ratio}"), stored)  # where "nothing" is another caption it does not stand in
    assert not own_words.told.null(1, HERE).any()  # type: ignore[union-attr]


def test_latents_that_do_not_fit_are_refused_before_anything_is_built() -> None:
    make = partial(AutoencoderKL, 1, 1, 2, (8, 8), 1, 4)
    codec = Latents(4, 2, scale=0.5, autoencoder=make, pixels=Pixels(8, 1, 17, 240))
    card = {"shape": [4, 4, 4], "encoder": codec.autoencoder.fingerprint(), "scale": 0.5, "shift": 0.0}
    made = met(room(codec=codec), Source(lat=card))
    assert not hasattr(made, "net")
    with pytest.raises(ValueError, match=r"Type module\.codec\.scale=0\.7"):
        met(room(codec=codec), Source(lat={**card, "scale": 0.7}))
    with pytest.raises(ValueError, match="come from the encoder another"):
        met(room(codec=codec), Source(lat={**card, "encoder": "another"}))
