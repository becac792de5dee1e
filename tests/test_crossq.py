"""crossq_continuous.py; its critics are DIME's too: renormalisation, projection, losses, scale."""

import numpy as np
import pytest
import torch

import crossq_continuous as crossq
from tests.common import make_actor


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def test_batch_renorm_worked_example():
    """By hand: statistics, corrections, output and the statistics afterwards."""
    norm = crossq.BatchRenorm(2, warmup=0)
    norm.mean[:] = torch.tensor([1.0, 2.0])
    norm.var[:] = torch.tensor([4.0, 1.0])
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]]).expand(2, 3, 2)
    expected = torch.tensor([[-0.50006, -0.99917], [0.49988, 0.99894], [1.49981, 5.99424]])
    torch.testing.assert_close(norm(x, train=True)[1], expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(norm.mean[0], torch.tensor([[1.01, 2.02]]))
    torch.testing.assert_close(
        norm.var[1], torch.tensor([[3.986667, 1.076667]]), rtol=1e-5, atol=1e-5
    )
    plain = torch.stack(
        [(x[0, :, j] - norm.mean[0, 0, j]) / (norm.var[0, 0, j] + 1e-3).sqrt() for j in range(2)],
        dim=1,
    )
    torch.testing.assert_close(norm(x, train=False)[0], plain)


@pytest.mark.parametrize("warm", [False, True])
def test_batch_renorm_scales_and_shifts_after_the_correction(warm):
    """weight ((x - m) / s r + d) + bias, and by the running statistics in evaluation."""
    torch.manual_seed(0)
    norm = crossq.BatchRenorm(3, warmup=0 if warm else 10)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.mean):
            values.copy_(torch.randn(2, 1, 3))
        norm.var.copy_(0.5 + torch.rand(2, 1, 3))
    x = 2 * torch.randn(2, 50, 3) + 1
    running_mean, running_std = norm.mean.clone(), (norm.var.clone() + norm.eps).sqrt()
    expected = norm.weight * (x - running_mean) / running_std + norm.bias
    torch.testing.assert_close(norm(x, train=False), expected)
    mean, std = x.mean(1, keepdim=True), (x.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    r = (std / running_std).clamp(1 / 3, 3) if warm else 1.0
    d = ((mean - running_mean) / running_std).clamp(-5, 5) if warm else 0.0
    torch.testing.assert_close(
        norm(x, train=True), norm.weight * ((x - mean) / std * r + d) + norm.bias
    )


def test_batch_renorm_warms_up_as_plain_batch_normalisation():
    norm, x = crossq.BatchRenorm(3, warmup=2), torch.randn(2, 50, 3) * 4 + 7
    plain = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    for _ in range(2):
        torch.testing.assert_close(norm(x, train=True), plain)
    mean, var = norm.mean.clone(), norm.var.clone()
    renormed = norm(x, train=True)
    assert (renormed - plain).abs().max() > 0.5
    r = ((x.var(1, unbiased=False, keepdim=True) + 1e-3) / (var + 1e-3)).sqrt().clamp(1 / 3, 3)
    d = ((x.mean(1, keepdim=True) - mean) / (var + 1e-3).sqrt()).clamp(-5, 5)
    torch.testing.assert_close(renormed, plain * r + d)
    for _ in range(
        3000
    ):  # once the running statistics have converged, training and evaluation agree
        norm(x, train=True)
    torch.testing.assert_close(norm(x, train=True), norm(x, train=False), rtol=1e-6, atol=1e-6)
    assert norm.batches == 3004 and set(norm.state_dict()) == {
        "weight",
        "bias",
        "mean",
        "var",
        "batches",
    }


def test_batch_renorm_has_finite_gradients_on_constant_columns():
    norm = crossq.BatchRenorm(3, warmup=0).float()
    x = torch.randn(2, 20, 3, dtype=torch.float32)
    x[..., 0], x[..., 1] = 5.0, 1000 + 1e-4 * x[..., 1]
    x.requires_grad_()
    norm(x, train=True).square().sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(norm.weight.grad).all()


def test_projection_against_a_loop():
    atoms, probs = torch.linspace(-2, 3, 6), torch.rand(40, 6).softmax(1)
    values = torch.randn(40, 6) * 2
    values[0], values[1], values[2] = -2.0, 3.0, 1.0  # on the ends, on an atom
    values[3], values[4] = -50.0, 50.0  # outside
    expected = torch.zeros(40, 6)
    for row in range(40):
        for p, v in zip(probs[row], values[row].clamp(-2, 3), strict=True):
            for m in range(6):
                expected[row, m] += p * max(0.0, 1 - abs(v - atoms[m]).item() / 1.0)
    projected = crossq.project(probs, values, atoms)
    torch.testing.assert_close(projected, expected)
    torch.testing.assert_close(projected.sum(1), torch.ones(40))
    inside = values.abs().amax(1) < 2
    assert inside.sum() >= 3
    torch.testing.assert_close((projected @ atoms)[inside], (probs * values).sum(1)[inside])
    assert projected[3, 0] == pytest.approx(1) and projected[4, -1] == pytest.approx(1)


ARGS = dict(critic_dim=16, num_atoms=11, v_min=-5.0, v_max=5.0)


def critics(**flags):
    return crossq.SoftQNetwork(3, 1, crossq.Args(**ARGS | flags))


def test_critic_loss_is_the_projected_cross_entropy():
    qf, args = critics(), crossq.Args(**ARGS, gamma=0.9, critic_entropy=0.005)
    ended = torch.tensor([0.0, 1, 0, 0, 1, 0])
    batch = crossq.Batch(*torch.randn(2, 6, 3), torch.rand(6, 1), torch.randn(6), ended)
    next_actions, next_log_prob = torch.rand(6, 1), torch.randn(6)
    both = torch.cat((batch.obs, batch.next_obs)), torch.cat((batch.actions, next_actions))
    logits = qf(*both, train=True)
    for norm in qf.norms:  # take back the update of the running statistics
        norm.mean.zero_(), norm.var.fill_(1.0), norm.batches.zero_()
    loss, values, clipped = crossq.critic_loss(qf, batch, next_actions, next_log_prob, 0.3, args)
    assert all(norm.batches == 1 for norm in qf.norms)
    p, expected, outside = logits.softmax(-1), 0.0, 0.0
    for row in range(6):
        target = torch.zeros(11)
        for i in range(11):
            weight = 0.5 * (p[0, 6 + row, i] + p[1, 6 + row, i]).detach()
            alive = 1 - ended[row]
            value = batch.rewards[row] + 0.9 * alive * (qf.atoms[i] - 0.3 * next_log_prob[row])
            outside += weight.item() * (abs(value) > 5) / 6
            for m in range(11):
                target[m] += weight * max(0.0, 1 - abs(value.clamp(-5, 5) - qf.atoms[m]).item())
        for twin in range(2):
            log_p = p[twin, row].log()
            expected += (-(target * log_p).sum() + 0.005 * (p[twin, row] * log_p).sum()) / 6
    torch.testing.assert_close(loss, expected)
    assert clipped.mean().item() == pytest.approx(float(outside))
    torch.testing.assert_close(values, (p @ qf.atoms)[:, :6])
    for parameter in qf.parameters():  # the target is a constant
        gradients = [torch.autograd.grad(x, parameter, retain_graph=True) for x in (loss, expected)]
        assert gradients[1][0].abs().max() > 0
        torch.testing.assert_close(*gradients)


def test_actor_loss():
    class Critic:
        def value(self, obs, action):
            return 3 * action[:, 0]

    actor, obs = make_actor(crossq, hidden_dim=16), torch.randn(20, 3)
    torch.manual_seed(1)
    loss, _ = crossq.actor_loss(actor, Critic(), obs, 0.4)
    torch.manual_seed(1)
    action, log_prob = actor.sample(obs)
    torch.testing.assert_close(loss, (0.4 * log_prob - 3 * action[:, 0]).mean())


def test_joint_pass_shares_batch_statistics_and_evaluation_does_not():
    qf = critics()
    obs, actions = torch.randn(8, 3), torch.randn(8, 1)
    other = torch.cat((obs[:4], torch.randn(4, 3)))
    assert not torch.allclose(
        qf(obs, actions, train=True)[:, :4], qf(other, actions, train=True)[:, :4]
    )
    torch.testing.assert_close(qf(obs, actions)[:, :4], qf(other, actions)[:, :4])
    each = qf(obs, actions).softmax(-1) @ qf.atoms
    torch.testing.assert_close(qf.value(obs, actions), (each[0] + each[1]) / 2)
    scalar = critics(num_atoms=1)
    torch.testing.assert_close(scalar.value(obs, actions), scalar(obs, actions)[..., 0].amin(0))


def test_scalar_critics_have_the_loss_of_sac():
    """Squared error to the smaller of the joint pass's Q-values at s', which are constants."""
    qf, args = critics(num_atoms=1), crossq.Args(**ARGS | {"num_atoms": 1}, gamma=0.9)
    ended = torch.tensor([0.0, 1, 0, 0, 1, 0])
    batch = crossq.Batch(*torch.randn(2, 6, 3), torch.rand(6, 1), torch.randn(6), ended)
    next_actions, next_log_prob = torch.rand(6, 1), torch.randn(6)
    both = torch.cat((batch.obs, batch.next_obs)), torch.cat((batch.actions, next_actions))
    q = qf(*both, train=True)[..., 0]
    loss, values, clipped = crossq.critic_loss(qf, batch, next_actions, next_log_prob, 0.3, args)
    next_value = q[:, 6:].detach().amin(0) - 0.3 * next_log_prob
    target = batch.rewards + 0.9 * (1 - ended) * next_value
    expected = (q[:, :6] - target).square().sum() / 6
    torch.testing.assert_close((loss, values), (expected, q[:, :6]))
    for parameter in qf.parameters():
        gradients = [torch.autograd.grad(x, parameter, retain_graph=True) for x in (loss, expected)]
        assert gradients[1][0].abs().max() > 0
        torch.testing.assert_close(*gradients)
    assert not clipped.any()


@pytest.mark.parametrize("num_atoms", [51, 1])
def test_critics_learn_known_values(num_atoms):
    """Two states in a ring and one before the end: values of the soft Bellman equation, solved."""
    torch.set_default_dtype(torch.float32)
    rewards, gamma, cost = torch.tensor([1.0, -0.5, 2.0]), 0.8, torch.tensor([0.3, 0.1, 0.0])
    args = crossq.Args(critic_dim=32, num_atoms=num_atoms, gamma=gamma, critic_entropy=0.0)
    obs = torch.eye(3).repeat(40, 1)
    next_obs = torch.eye(3)[[1, 0, 2]].repeat(40, 1)
    ended, action = torch.tensor([0.0, 0, 1]).repeat(40), torch.zeros(120, 1)
    batch = crossq.Batch(obs, next_obs, action, rewards.repeat(40), ended)
    qf, next_log_prob = crossq.SoftQNetwork(3, 1, args), cost[[1, 0, 2]].repeat(40) / 0.5
    optimizer = torch.optim.Adam(qf.parameters(), lr=3e-3, betas=(0.5, 0.999))
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 1500)
        loss = crossq.critic_loss(qf, batch, action, next_log_prob, 0.5, args)[0]
        crossq.descend(optimizer, loss)
    # Q = r + gamma (1 - terminated) P (Q - cost)
    moves = gamma * torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]])
    values = torch.linalg.solve(torch.eye(3) - moves, rewards - moves @ cost)
    with torch.no_grad():
        learnt = qf.value(torch.eye(3), torch.zeros(3, 1))
    torch.testing.assert_close(learnt, values, rtol=0, atol=0.05)


def test_scale_of_returns():
    """By hand: sums of two environments over an end, their deviation, and the largest of them."""
    scaler = crossq.ReturnScaler(2, gamma=0.5, bound=5.0)
    assert scaler.factor() == pytest.approx(1)
    scaler.update(torch.tensor([[1.0, 0.0], [2.0, -4.0]]), torch.tensor([[0.0, 0], [1, 0]]))
    scaler.update(torch.tensor([[8.0, 1.0]]), torch.zeros(1, 2))
    sums = [1.0, 0.0, 2.5, -4.0, 8.0, -1.0]
    assert scaler.largest == 8 and scaler.factor() == pytest.approx(1 / np.std(sums), rel=1e-6)
    tight = crossq.ReturnScaler(2, gamma=0.5, bound=1.0)
    tight.load_state_dict(scaler.state_dict())
    assert tight.factor() == pytest.approx(1 / 8)
    constant = crossq.ReturnScaler(1, gamma=0.0, bound=5.0)  # no deviation at all
    constant.update(torch.full((50, 1), -300.0), torch.zeros(50, 1))
    assert constant.factor() == pytest.approx(5 / 300)
