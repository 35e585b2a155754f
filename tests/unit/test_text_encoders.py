"""Frozen text encoders: families, masks, and what is said when files are missing."""

import json
import shutil

import pytest
import torch

from lightningmodules.shared.text_encoders import Pretrained, RandomBytes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Randomly initialised encoders of three families with one small tokenizer."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "seven", "handwritten"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    small = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    small |= {"intermediate_size": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    made = {
        "t5": transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        "clip": transformers.CLIPTextModel(transformers.CLIPTextConfig(**small, max_position_embeddings=8)),
        "gemma": transformers.AutoModel.from_config(
            transformers.Gemma2Config(**small, num_key_value_heads=1, head_dim=8)
        ),
    }
    root = tmp_path_factory.mktemp("encoders")
    for name, model in made.items():
        model.save_pretrained(root / name)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        ).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("family", ["t5", "clip", "gemma"])
def test_families(folders, family):
    encoder = Pretrained(str(folders / family), length=8)
    features, mask = encoder.encode(["a handwritten seven", "", "a " * 20])
    assert features.shape == (3, 8, encoder.width)
    assert features.dtype == torch.float32
    assert mask.sum(1).tolist() == [3, 0, 8]
    assert not features[~mask].any()
    assert features[0, :3].any()
    alone, _ = encoder.encode(["a handwritten seven"])
    torch.testing.assert_close(alone[0], features[0], atol=1e-5, rtol=1e-5)
    assert encoder.fingerprint != Pretrained(str(folders / family), length=7).fingerprint


def test_embeddings_are_what_a_language_model_s_first_layer_reads(folders):
    encoder = Pretrained(str(folders / "gemma"), length=8, states="embeddings")
    features, mask = encoder.encode(["a handwritten seven", ""])
    model, tokenizer = encoder._load()
    tokens = tokenizer(["a handwritten seven"], return_tensors="pt")
    read = model(**tokens, output_hidden_states=True).hidden_states[0][0]
    torch.testing.assert_close(features[0, : len(read)], read)
    assert not features[~mask].any()
    scaled = model.get_input_embeddings()
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(scaled.weight))  # as before transformers 5
    torch.testing.assert_close(encoder.encode(["a handwritten seven", ""])[0], features)
    assert encoder.fingerprint != Pretrained(str(folders / "gemma"), length=8).fingerprint
    with pytest.raises(ValueError, match="expected last, or embeddings of a Gemma"):
        Pretrained(str(folders / "t5"), states="embeddings")


def test_missing_files(tmp_path, folders):
    with pytest.raises(ValueError, match="no such folder"):
        Pretrained(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match=r"the weights .* missing. There is: config.json"):
        Pretrained(str(tmp_path))
    other = json.loads((folders / "t5" / "config.json").read_text()) | {"model_type": "bert"}
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="model_type='bert'"):
        Pretrained(str(tmp_path))


def test_random_bytes_are_the_same_everywhere():
    state = torch.random.get_rng_state()
    first, mask = RandomBytes(width=16, length=8).encode(["seven", "eight"])
    assert torch.equal(torch.random.get_rng_state(), state)
    again, _ = RandomBytes(width=16, length=8).encode(["seven"])
    torch.testing.assert_close(again[0], first[0])
    assert mask.sum(1).tolist() == [6, 6]
    assert (first[0] - first[1]).abs().max() > 0.01
    other, _ = RandomBytes(width=16, length=8, seed=1).encode(["seven"])
    assert (other[0] - first[0]).abs().max() > 0.01


def test_weights_that_lack_a_part_are_refused(tmp_path, folders):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders / "gemma", tmp_path / "gemma")
    file = tmp_path / "gemma" / "model.safetensors"
    weights = load_file(file)
    del weights["norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gemma: the weights lack norm.weight, which Gemma2Model needs"):
        Pretrained(str(tmp_path / "gemma"), length=8).encode(["a"])
