"""The token transformer: rotary positions, conditions, documents, and the parts that save work."""

import pytest
import torch

from lightningmodules.shared import token_transformer
from lightningmodules.shared.token_transformer import TokenTransformer, document_mask, rotate, without

V, L = 7, 10


def network(**options: object) -> TokenTransformer:
    torch.manual_seed(0)
    net = TokenTransformer(V, 16, 2, 2, 8, length=L, dropout=0.0, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return net


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(V, (rows, L), generator=torch.Generator().manual_seed(1))


def test_starts_as_a_network_that_knows_nothing() -> None:
    net = TokenTransformer(V, 16, 2, 2, 8)
    assert not net(tokens()).any()
    with torch.device("meta"):
        small = TokenTransformer(50258)
    assert sum(parameter.numel() for parameter in small.parameters()) == pytest.approx(169.6e6, rel=1e-3)
    opened = TokenTransformer(V, 16, 1, 2, 8, gate_init=1.0)
    assert opened.layers[0].adaLN_modulation.bias.view(6, 16).mean(1).tolist() == [0, 0, 1, 0, 0, 1]


def test_only_distances_matter() -> None:
    net, x = network(), tokens()
    condition = net.condition(None)
    embedded = net.vocab_embed(x)
    here = net.trunk(embedded, condition)
    there = net.trunk(embedded, condition, positions=torch.arange(L) + 40)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    other = net.trunk(embedded, condition, positions=torch.arange(L) * 2)
    assert (here - other).abs().max() > 1e-3
    angle = torch.tensor([[0.5]])
    torch.testing.assert_close(rotate(torch.tensor([[1.0, 0.0]]), angle.cos(), angle.sin())[0, 1], angle.sin()[0, 0])


def test_learnt_positions_tell_masks_apart() -> None:
    plain, placed = network(), network(learned_positions=True)
    placed.load_state_dict(plain.state_dict(), strict=False)
    blank = torch.full((1, L), V - 1)
    with torch.no_grad():
        placed.position_embed.zero_()
        assert torch.equal(placed(blank), plain(blank))
        placed.position_embed[3] = torch.linspace(-1, 1, 16)
        changed = (placed(blank) - plain(blank)).abs().amax(dim=2)[0]
        assert changed.argmax() == 3
        embedded, condition = placed.vocab_embed(tokens(1)[:, :4]), placed.condition(None)
        late = placed.trunk(embedded, condition, positions=torch.arange(3, 7))  # rows are those of the positions given
        assert not torch.allclose(late, placed.trunk(embedded, condition, positions=torch.arange(4, 8)), atol=1e-3)


def test_documents_in_a_row_do_not_see_one_another() -> None:
    net, x = network(), tokens(1)
    condition = net.condition(None)
    document = torch.tensor([[0] * 4 + [1] * 5 + [-1]])
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]])
    packed = net.trunk(net.vocab_embed(x), condition, positions=position, mask=document_mask(document))
    for part in (slice(0, 4), slice(4, 9)):
        alone = net.trunk(net.vocab_embed(x[:, part]), condition)
        torch.testing.assert_close(packed[:, part], alone, atol=1e-5, rtol=1e-5)
    assert packed.isfinite().all()


def test_one_condition_for_all_rows_is_that_of_each() -> None:
    net, x = network(num_classes=3), tokens()
    torch.testing.assert_close(net(x), net(x, torch.zeros(3), torch.full((3,), -1)), atol=1e-6, rtol=1e-5)
    steered = net(x, torch.tensor([0.0, 2.0, 0.0]), torch.tensor([-1, -1, 2]))
    assert torch.allclose(steered[0], net(x)[0], atol=1e-5)
    assert not torch.allclose(steered[1], net(x)[1], atol=1e-3)
    assert not torch.allclose(steered[2], net(x)[2], atol=1e-3)


def test_logits_where_they_are_needed() -> None:
    net, x = network(), tokens()
    sigma = torch.tensor([0.1, 1.0, 3.0])
    condition = net.condition(sigma)
    hidden = net.trunk(net.vocab_embed(x), condition)
    at = torch.tensor([0, 7, 13, 29])
    torch.testing.assert_close(net.logits(hidden, condition, at), net(x, sigma).flatten(0, 1)[at])


def test_large_losses_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), tokens()
    condition = net.condition(torch.tensor([0.1, 1.0, 3.0]))
    at = torch.tensor([0, 7, 13, 20, 29])
    targets = torch.tensor([0, 1, 2, 3, 4])
    grads = []
    for most in (1 << 26, 2 * V):
        monkeypatch.setattr(token_transformer, "LOGITS", most)
        hidden = net.trunk(net.vocab_embed(x), condition)
        nats = net.cross_entropy(hidden, condition, at, targets, mask_id=V - 1)
        grads.append([nats, *torch.autograd.grad(nats.sum(), list(net.output_layer.parameters()), retain_graph=True)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_the_mask_is_never_predicted() -> None:
    logits = torch.randn(2, V)
    assert torch.equal(without(logits, V - 1), logits[:, :-1])
    inside = without(logits, 2)
    assert (inside[:, 2] == -torch.inf).all()
    assert torch.equal(inside[:, 3:], logits[:, 3:])


def test_heads_must_split_the_width() -> None:
    with pytest.raises(ValueError, match=r"module\.net\.hidden"):
        TokenTransformer(V, 18, 1, 2, 8)
