"""Losses against sums written out, and their balance."""

import math

import pytest
import torch

from specexit.training.losses import Balance, gradient_norms, signal_losses, token_loss
from specexit.training.schedule import Optimizer, clip_gradients, default_rate, rate_factor, unroll_depth


@pytest.mark.parametrize("held", [2**20, 7 * 3, 1])
def test_token_loss_is_cross_entropy_with_the_bases_distribution(held, rng):
    hidden = torch.randn(9, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = 3 * torch.randn(9, 7, generator=rng, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0])
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(9):
        logits = head @ hidden[i]
        for v in range(7):
            p = targets[i].exp()[v] / targets[i].exp().sum()
            expected = expected - weights[i] * p * (logits[v] - logits.exp().sum().log())
    loss = token_loss(hidden, head, targets, weights, held=held)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), wanted)
    later, above = torch.cat((targets[:2] * torch.nan, targets)), torch.cat((torch.zeros(2), weights))
    loss = token_loss(torch.cat((hidden, hidden[:2])), head, later, above, 2, held)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), wanted)


def test_token_loss_of_no_row_is_zero_and_has_a_gradient(rng):
    hidden = torch.randn(4, 5, generator=rng, requires_grad=True)
    head = torch.randn(7, 5, generator=rng, requires_grad=True)
    loss = token_loss(hidden, head, torch.randn(4, 7, generator=rng), torch.zeros(4))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().sum() == head.grad.abs().sum() == 0


def test_rows_without_weight_may_hold_anything(rng):
    hidden = torch.randn(4, 5, generator=rng)
    targets, weights = torch.randn(4, 7, generator=rng), torch.tensor([1.0, 0.0, 1.0, 0.0])
    head = torch.randn(7, 5, generator=rng)
    clean = token_loss(hidden, head, targets, weights)
    targets[1], hidden[3] = float("nan"), float("inf")
    assert torch.equal(token_loss(hidden, head, targets, weights), clean)


def test_signal_losses_follow_their_definition(rng):
    raw = torch.randn(2, 6, 3, generator=rng, dtype=torch.float64)
    values = torch.rand(2, 6, 3, generator=rng, dtype=torch.float64)
    values[..., 2] *= 6
    weights = torch.randint(0, 3, (2, 6, 3), generator=rng).double()
    expected = [0.0, 0.0, 0.0]
    for b in range(2):
        for r in range(6):
            (z0, z1, z2), (c, g, left), w = raw[b, r].tolist(), values[b, r].tolist(), weights[b, r].tolist()
            p, q = 1 / (1 + math.exp(-z0)), 1 / (1 + math.exp(-z1))
            expected[0] -= w[0] * (c * math.log(p) + (1 - c) * math.log(1 - p))
            expected[1] += w[1] * (q - g) ** 2
            expected[2] += w[2] * (z2 - left) ** 2
    assert signal_losses(raw, values, weights).tolist() == pytest.approx(expected)
    raw[0, 0], weights[0, 0] = float("nan"), 0.0
    leaf = raw.requires_grad_()
    losses = signal_losses(leaf, values, weights)
    assert losses.isfinite().all()


def test_the_weighted_gradient_has_its_share(rng):
    at = torch.randn(6, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    heads = torch.randn(4, 4, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 100.0, 1e-3, 1.0])
    losses = list((at @ heads).square().sum(0))
    norms = gradient_norms(losses, at).sqrt()
    for loss, norm in zip(losses, norms, strict=True):
        (gradient,) = torch.autograd.grad(loss, at, retain_graph=True)
        assert norm.item() == pytest.approx(gradient.norm().item())
    balance = Balance(share=0.3)
    assert balance.weights == [0.0, 0.0, 0.0]
    balance.update(norms.tolist())
    for weight, loss in zip(balance.weights, losses[1:], strict=True):
        (gradient,) = torch.autograd.grad(weight * loss, at, retain_graph=True)
        assert gradient.norm().item() == pytest.approx(0.3 * norms[0].item())


def test_the_means_run_and_are_not_pulled_to_zero(rng):
    balance = Balance(share=1.0, keep=0.5)
    for norms in ([2.0, 1.0, 4.0, 0.0], [4.0, 1.0, 0.0, 0.0]):
        balance.update(norms)
    assert balance.means == pytest.approx([(0.5 * 2 + 4) / 1.5, 1.0, 0.5 * 4 / 1.5, 0.0])
    assert balance.weights == pytest.approx([10 / 3, 2.5, 0.0])
    other = Balance(share=1.0, keep=0.5)
    other.restore(balance.state())
    other.update([1.0, 2.0, 3.0, 4.0])
    balance.update([1.0, 2.0, 3.0, 4.0])
    assert other.weights == balance.weights


def test_a_loss_that_nothing_depends_on_weighs_nothing(rng):
    at = torch.randn(3, generator=rng, requires_grad=True)
    assert gradient_norms([at.sum(), torch.zeros((), requires_grad=True) * 1.0], at).tolist() == [3.0, 0.0]


def test_the_rate_rises_stays_and_falls():
    rates = [rate_factor(step, 400) for step in range(400)]
    assert rates[:30] == pytest.approx([(n + 1) / 30 for n in range(30)])
    assert set(rates[30:200]) == {1.0}
    assert rates[199:] == sorted(rates[199:], reverse=True)
    assert rates[300] == pytest.approx(0.5)
    assert min(rates[200:]) == 0.02
    assert rate_factor(0, 1) == 1.0
    assert default_rate(128) == 3e-3
    assert default_rate(4096) == pytest.approx(9.375e-5)


def test_the_unroll_deepens():
    depths = [unroll_depth(step, 100, 6) for step in range(100)]
    assert [depths[n] for n in (0, 9, 10, 34, 35, 69, 70, 99)] == [1, 1, 3, 3, 5, 5, 6, 6]
    assert {unroll_depth(step, 100, 1) for step in range(100)} == {1}
    assert sorted({unroll_depth(step, 100, 2) for step in range(100)}) == [1, 2]
    assert unroll_depth(0, 1, 6) == 1


def test_groups_are_clipped_apart(rng):
    big, small, other = (torch.randn(5, generator=rng) for _ in range(3))
    big *= 100
    small *= 1e-3
    before = [x.clone() for x in (big, small, other)]
    norm = clip_gradients([[big, other], [], [small]], 1.0)
    whole = torch.cat((before[0], before[2])).norm()
    assert norm.item() == pytest.approx(torch.cat(before).norm().item())
    torch.testing.assert_close(big, before[0] / whole, rtol=1e-4, atol=0)
    torch.testing.assert_close(other, before[2] / whole, rtol=1e-4, atol=0)
    assert torch.equal(small, before[1])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_optimizer_moves_what_has_a_gradient_only(kind, rng):
    weights = {
        name: torch.nn.Parameter(torch.randn(6, 4, generator=rng)) for name in ("qkv_weight", "fc_weight", "lm_head")
    }
    before = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = Optimizer(weights, kind, 0.1)
    weights["qkv_weight"].grad = torch.randn(6, 4, generator=rng)
    fc = torch.randn(6, 4, generator=rng)
    fc[:3] = 0
    weights["fc_weight"].grad = fc
    optimizer.step(0.5)
    assert not torch.equal(weights["qkv_weight"], before["qkv_weight"])
    assert torch.equal(weights["fc_weight"][:3], before["fc_weight"][:3])
    assert not torch.isclose(weights["fc_weight"][3:], before["fc_weight"][3:]).any()
    assert torch.equal(weights["lm_head"], before["lm_head"])
    assert weights["qkv_weight"].grad is None
