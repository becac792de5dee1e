"""The second edition's Gaussian policy, on wpo_continuous.py, and what the scripts share: the density of the squashed Gaussian, the losses, the twin critics."""

import math

import pytest
import torch

import wpo_continuous
from tests.common import OFF_POLICY, PAIR, SECOND, make_actor, randomise

BOUNDS = [((-1.0,), (1.0,)), ((-2.0, -0.4, 0.0), (2.0, 0.4, 3.0))]


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("low,high", BOUNDS)
def test_log_prob_is_the_density_by_a_numerical_jacobian(low, high):
    actor = make_actor(wpo_continuous, low=low, high=high, hidden_dim=16)
    randomise(actor, 0.1)
    obs = torch.randn(20, 3)
    torch.manual_seed(1)
    action, log_prob = actor.sample(obs)
    torch.manual_seed(1)
    mean, log_std = actor(obs)
    latent = mean + log_std.exp() * torch.randn_like(mean)
    h = 1e-4
    slope = (actor.squash(latent + h)[0] - actor.squash(latent - h)[0]) / (
        2 * h
    )  # the Jacobian is diagonal
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(latent).sum(
        -1
    ) - slope.log().sum(-1)
    assert log_prob.shape == (20,)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-5)
    assert (action > torch.tensor(low)).all() and (action < torch.tensor(high)).all()


def test_rounding_does_not_lead_out_of_the_bounds():
    for script in SECOND:
        low, high = torch.tensor([[-1.5, -0.1, 0.7], [0.7, 1.7, 0.9]], dtype=torch.float32)
        actor = make_actor(script, low=low, high=high).float()
        action = actor.squash(
            torch.linspace(-20, 20, 41, dtype=torch.float32)[:, None].expand(-1, 3)
        )[0]
        assert (action >= low).all() and (action <= high).all()
        assert (action[0] == low).all() and (action[-1] == high).all()


def test_squash_is_finite_and_inside_the_bounds_for_extreme_latents():
    for script in SECOND:
        actor = make_actor(script, low=(-0.3,), high=(2.7,)).float()
        action, log_det = actor.squash(torch.tensor([[-40.0], [0.0], [40.0]], dtype=torch.float32))
        torch.testing.assert_close(
            action[:, 0], torch.tensor([-0.3, 1.2, 2.7], dtype=torch.float32)
        )
        # log(1.5 (1 - tanh(40)^2)) = log 1.5 + log 4 - 80, far below the smallest float32 slope
        end = math.log(1.5) + math.log(4) - 80
        torch.testing.assert_close(
            log_det, torch.tensor([end, math.log(1.5), end], dtype=torch.float32)
        )


def test_get_action_returns_action_log_prob_and_mean():
    for script in SECOND:
        actor, obs = make_actor(script, low=(-2.0, 0.0), high=(2.0, 1.0)), torch.randn(7, 3)
        action, log_prob, mean_action = actor.get_action(obs)
        assert action.shape == mean_action.shape == (7, 2) and log_prob.shape == (7,)
        torch.testing.assert_close(mean_action, actor.get_action(obs)[2])  # no noise in it
        scale, bias = actor.action_scale, actor.action_bias
        assert ((action - bias).abs() <= scale).all() and (
            (mean_action - bias).abs() <= scale
        ).all()
        assert not torch.equal(action, actor.get_action(obs)[0])


def test_twin_critics_are_two_separate_networks():
    qf = wpo_continuous.SoftQNetwork(3, 2, 16)
    obs, actions = torch.randn(5, 3), torch.randn(5, 2)
    for twin, values in enumerate(qf(obs, actions)):
        x = torch.cat((obs, actions), 1)
        for i, (weight, bias) in enumerate(zip(qf.weights, qf.biases, strict=True)):
            x = (x.relu() if i else x) @ weight[twin] + bias[twin]
        torch.testing.assert_close(values, x[:, 0])
    assert not torch.allclose(*qf(obs, actions))


@pytest.mark.parametrize("script", [script for script in OFF_POLICY if script not in PAIR])
def test_critic_loss_is_the_soft_bellman_error(script):
    actor, qf, target = (
        make_actor(script),
        script.SoftQNetwork(3, 1, 16),
        script.SoftQNetwork(3, 1, 16),
    )
    randomise(actor)
    batch = script.Batch(
        torch.randn(4, 3),
        torch.randn(4, 3),
        torch.rand(4, 1),
        torch.randn(4),
        torch.tensor([0.0, 1.0, 0.0, 1.0]),
    )
    torch.manual_seed(5)
    loss, values = script.critic_loss(actor, qf, target, batch, 0.3, 0.9)
    torch.manual_seed(5)
    next_action, next_log_prob = actor.sample(batch.next_obs)
    expected = 0.0
    for i in range(4):
        q = min(target(batch.next_obs, next_action)[twin, i].item() for twin in range(2))
        y = batch.rewards[i].item()
        if not batch.terminations[i]:
            y += 0.9 * (q - 0.3 * next_log_prob[i].item())
        expected += sum((values[twin, i].item() - y) ** 2 for twin in range(2)) / 4
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert all(p.grad is None for p in [*actor.parameters(), *target.parameters()])


def test_temperature_rises_while_the_entropy_is_below_its_target():
    for entropy, sign in (
        (-3.0, -1),
        (-2.0, 0),
        (-1.0, 1),
    ):  # target -2; gradient descent moves against the sign
        log_alpha = torch.tensor(0.5, requires_grad=True)
        wpo_continuous.temperature_loss(log_alpha, torch.tensor([-entropy]), -2.0).backward()
        assert log_alpha.grad.sign() == sign
