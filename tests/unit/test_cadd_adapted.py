"""The network of adapted language models: that of transformers without its causal mask, read one position before."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightningmodules.cadd.adapted import AdaptedNet
from lightningmodules.cadd.module import Cadd
from lightningmodules.cadd.weights import infer, read
from lightningmodules.shared.codecs import Tokens
from lightningmodules.shared.token_transformer import document_mask

V, ROWS, L = 9, 12, 7  # tokens with the mask, rows in the files, length
SIZES: dict[str, Any] = {"hidden": 32, "blocks": 2, "heads": 4, "kv_heads": 2, "inner": 40, "rows": ROWS, "length": L}


class Letters:
    size = V

    def decode(self, tokens: Any) -> str:
        return "".join("abcdefghi"[token] for token in tokens)


@pytest.fixture(scope="module")
def official() -> Any:
    """A small random Qwen2, biases included."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=ROWS,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(official: Any, tmp_path: Path) -> Path:
    """Its weights in two parts, as large models come."""
    state = {key: value.contiguous() for key, value in official.state_dict().items()}
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / part)
    index = {"weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def room(start: Path | None, **options: Any) -> Cadd:
    module = Cadd(
        net=functools.partial(AdaptedNet, **SIZES),
        codec=Tokens(Letters(), L, mask=V - 1),
        optimizer=torch.optim.AdamW,
        start=None if start is None else str(start),
        **options,
    )
    module.configure_model()
    return module.eval()


def bidirectional(official: Any, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
    """Logits of transformers' model where every position sees every other, or those it may see."""
    see = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool) if seen is None else seen
    with torch.no_grad():
        logits: Tensor = official(tokens, attention_mask=see.expand(len(tokens), 1, -1, -1), use_cache=False).logits
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)[..., :V]


def test_weights_load_by_their_names_and_give_the_same_numbers(official: Any, folder: Path) -> None:
    net = room(folder, latent="off").net
    tokens = torch.randint(V, (3, L))
    expected = bidirectional(official, tokens)
    torch.testing.assert_close(net(tokens), expected, atol=2e-5, rtol=1e-5)
    assert (expected - official(tokens).logits[..., :V]).abs().max() > 0.1  # neither causal nor unshifted
    at = torch.tensor([0, 3, L, 2 * L + 1])
    condition = net.condition(None)
    some = net.logits(net.trunk(net.embed(tokens), condition), condition, at)
    torch.testing.assert_close(some, expected.flatten(0, 1)[at], atol=2e-5, rtol=1e-5)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    mask = document_mask(documents)
    apart = net.logits(net.trunk(net.embed(tokens[:1]), condition, mask=mask), condition)
    torch.testing.assert_close(apart, bidirectional(official, tokens[:1], mask), atol=2e-5, rtol=1e-5)
    assert infer(read(folder)) == {"hidden": 32, "blocks": 2, "rows": ROWS}


def test_a_latent_continues_the_model_exactly_and_learns(official: Any, folder: Path) -> None:
    module = room(folder, latent="on", latent_gate=0.0)
    off = room(folder, latent="off")
    batch = {"tokens": torch.randint(V - 1, (3, L))}
    losses: list[Any] = []
    for which in (module, off):
        torch.manual_seed(1)
        losses.append(which.loss(batch)["loss"])
    assert torch.equal(*losses)
    losses[0].backward()
    gate = module.net.get_parameter("latent_gate").grad
    assert gate is not None
    assert gate.abs().sum() > 0
    rows = module.sample([0, 1], steps=4, order="entropy")
    assert rows.max() < V - 1
    with pytest.raises(ValueError, match=r"sampling\.order=wino needs predictions at the tokens' own positions"):
        module.sample([0], order="wino")
    with pytest.raises(ValueError, match=r"at the position before it.*Type data.documents=false"):
        module.loss(batch | {"document": torch.zeros(3, L, dtype=torch.int64)})


def test_time_reaches_a_network_that_has_no_path_for_it() -> None:
    for switch in (True, "auto"):
        net = room(None, latent="on", time_conditioning=switch).net
        assert net.time_map is not None
        torch.nn.init.ones_(net.time_map.weight)
        assert (net.condition(torch.tensor([0.5])) != 0).any()
    assert room(None, latent="on", time_conditioning=False).net.time_map is None


def test_recomputation_changes_no_gradient() -> None:
    found: list[Any] = []
    for recompute in (False, True):
        torch.manual_seed(2)
        net = AdaptedNet(V, **{**SIZES, "recompute": recompute})
        net(torch.arange(L).view(1, L)).square().sum().backward()
        found.append(net.get_parameter("layers.0.mlp.up_proj.weight").grad)
    assert torch.equal(*found)


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"module\.start=.*b\.safetensors is missing, one of 2 parts"):
        room(folder)
    with pytest.raises(ValueError, match=r"module\.net\.rows=12 is less than the 20 tokens"):
        AdaptedNet(20, **SIZES)
    with pytest.raises(ValueError, match="kv_heads=3 do not fit"):
        AdaptedNet(V, **{**SIZES, "kv_heads": 3})
