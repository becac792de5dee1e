"""The tanh-Gaussian policies of sac, wpo and ppo; SAC's losses in all scripts that have them."""

import math

import pytest
import torch

import diffsac_continuous as diffsac
import ppo_continuous as ppo
import sac_continuous as sac
import wpo_continuous as wpo
from tests.common import OFF_POLICY, SCRIPTS, TWINS, make_actor, randomise


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_critics(script, obs_dim=3, action_dim=2, hidden_dim=16):
    return script.SoftQNetwork(obs_dim, action_dim, script.Args(hidden_dim=hidden_dim))


@pytest.mark.parametrize("script", [sac, wpo, ppo])
def test_log_prob_is_the_density_by_a_numerical_jacobian(script):
    actor, obs, h = make_actor(script, action_dim=3, hidden_dim=16), torch.randn(20, 3), 1e-4
    randomise(actor, 0.1)
    torch.manual_seed(1)
    action, log_prob = actor.sample(obs)
    torch.manual_seed(1)
    mean, log_std = (actor.net(obs), actor.log_std) if script is ppo else actor(obs)
    latent = mean + log_std.exp() * torch.randn_like(mean)
    slope = (torch.tanh(latent + h) - torch.tanh(latent - h)) / (2 * h)  # the Jacobian is diagonal
    normal = torch.distributions.Normal(mean, log_std.exp()).log_prob(latent)
    torch.testing.assert_close(action, torch.tanh(latent))
    torch.testing.assert_close(log_prob, (normal - slope.log()).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(actor.mean_action(obs), torch.tanh(mean))


@pytest.mark.parametrize("script", SCRIPTS)
def test_squash_is_finite_for_extreme_latents(script):
    action, log_det = script.squash(torch.tensor([[-40.0], [0.0], [40.0]]).float())
    assert action[:, 0].tolist() == [-1, 0, 1]
    end = math.log(4) - 80  # log(1 - tanh(40)^2), far below the smallest float32 slope
    torch.testing.assert_close(log_det, torch.tensor([end, 0.0, end]).float())


def test_twin_critics_are_two_separate_networks():
    qf, obs, actions = make_critics(sac), torch.randn(5, 3), torch.randn(5, 2)
    for twin, values in enumerate(qf(obs, actions)):
        x = torch.cat((obs, actions), 1)
        for i, (weight, bias) in enumerate(zip(qf.weights, qf.biases, strict=True)):
            x = (x.relu() if i else x) @ weight[twin] + bias[twin]
        torch.testing.assert_close(values, x[:, 0])
    assert not torch.allclose(*qf(obs, actions))


@pytest.mark.parametrize("script", TWINS)
def test_critic_loss_is_the_soft_bellman_error(script):
    qf, ended = make_critics(script), torch.tensor([0.0, 1.0, 0.0, 1.0])
    batch = script.Batch(torch.randn(4, 3), None, torch.rand(4, 2), torch.randn(4), ended)
    next_value = torch.randn(4)
    loss, values = script.critic_loss(qf, batch, next_value, 0.9)
    expected = 0.0
    for i in range(4):
        target = batch.rewards[i] + (0 if ended[i] else 0.9 * next_value[i])
        expected += sum((values[twin, i] - target) ** 2 for twin in range(2)) / 4
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("script", [sac, diffsac])
def test_actor_loss_uses_the_smaller_critic(script):
    actor, obs = make_actor(script), torch.randn(50, 3)
    randomise(actor)
    qf = lambda obs, action: torch.stack((action[:, 0], -action[:, 0]))  # noqa: E731
    torch.manual_seed(2)
    loss, log_prob = script.actor_loss(actor, qf, obs, 0.7)
    torch.manual_seed(2)
    action, expected = actor.sample(obs)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(loss, (0.7 * expected + action[:, 0].abs()).mean())


@pytest.mark.parametrize("script", OFF_POLICY)
def test_temperature_rises_while_the_entropy_is_below_its_target(script):
    # target -2; gradient descent moves against the sign
    for entropy, sign in ((-3.0, -1), (-2.0, 0), (-1.0, 1)):
        log_alpha = torch.tensor(0.5, requires_grad=True)
        script.temperature_loss(log_alpha, torch.tensor([-entropy]), -2.0).backward()
        assert log_alpha.grad.sign() == sign
