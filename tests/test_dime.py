"""dime.py: the chain against references, quadrature and grids."""

import math

import numpy as np
import pytest
import torch

import dime
from tests.common import log_normal, make_actor, randomise

PRIOR_COST = -0.5 * math.log(
    2 * math.pi * math.e * 2.5**2
)  # mean log-density of the prior, per dimension


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def test_log_ratio_is_the_sum_of_kernel_log_densities():
    actor = make_actor(dime, action_dim=2, diffusion_steps=5, hidden_dim=16)
    randomise(actor, 0.1)
    obs = torch.randn(30, 3)
    torch.manual_seed(3)
    action, log_prob = actor.sample(obs)
    torch.manual_seed(3)
    latents, noise = actor.chain(obs)
    scale, kappa = (torch.log(1 + torch.exp(x)) for x in (actor.raw_eta, actor.raw_kappa))
    expected = log_normal(latents[5], 0.0, torch.tensor(2.5))
    for i in range(5):  # the order of the chain: i = 0 is the first denoising step
        k = 5 - i
        schedule = 0.999 * math.cos(math.pi / 2 * (0.008 + i / 5) / 1.008) ** 2 + 0.001
        eta = scale * schedule / kappa
        angle = i * torch.linspace(0.1, 100, 256) + actor.phase
        time = actor.fc_time2(actor.gelu(actor.fc_time1(torch.cat((angle.sin(), angle.cos())))))
        weight = torch.cat(
            (actor.fc_latent.weight, actor.fc_obs.weight, actor.fc_time.weight), dim=1
        )
        x = torch.cat((latents[k], obs, time.expand(30, -1)), dim=1) @ weight.T + actor.fc_obs.bias
        control = actor.fc_control(actor.gelu(actor.fc3(actor.gelu(actor.fc2(actor.gelu(x))))))
        std, decay = (2 * eta).sqrt(), 1 - eta / 2.5**2
        mean = decay * latents[k] + eta * control
        torch.testing.assert_close(latents[k - 1], mean + std * noise[k - 1], rtol=1e-6, atol=1e-6)
        expected = (
            expected
            + log_normal(latents[k - 1], mean, std)
            - log_normal(latents[k], decay * latents[k - 1], std)
        )
    slope = 1 - torch.tanh(latents[0]) ** 2
    torch.testing.assert_close(log_prob, expected - slope.log().sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(action, torch.tanh(latents[0]))


@pytest.mark.parametrize(
    "steps,cost", [(2, 2.85524), (4, 2.85548), (8, 2.85594), (16, 2.85677), (32, 2.85807)]
)
def test_running_cost_of_the_first_policy(steps, cost):
    """With f = 0: per dimension by moments of the latents and quadrature of the log-determinant."""
    actor = make_actor(dime, 1, diffusion_steps=steps, hidden_dim=8)
    _, decay, std = (x.flatten() for x in actor.kernels())
    variance, latent_cost = 2.5**2, 0.0
    for k in range(steps, 0, -1):
        g, two_eta = decay[k - 1].item(), std[k - 1].item() ** 2
        new = g**2 * variance + two_eta
        latent_cost += -0.5 + (variance * (1 - 2 * g**2) + g**2 * new) / (2 * two_eta)
        variance = new
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    x = nodes * variance**0.5
    log_det = 2 * (math.log(2) - x - np.logaddexp(0, -2 * x))
    assert latent_cost - (weights * log_det).sum() / weights.sum() == pytest.approx(cost, abs=2e-5)
    with torch.no_grad():
        log_prob = actor.sample(torch.zeros(200_000, 1))[1]
    assert log_prob.mean().item() == pytest.approx(
        cost + PRIOR_COST, abs=5 * log_prob.std().item() / 200_000**0.5
    )


def test_volume_of_the_action_box_for_any_parameters():
    actor = make_actor(dime, 1, action_dim=2, diffusion_steps=8, hidden_dim=16)
    randomise(actor, 0.03)
    with torch.no_grad():
        weight = torch.exp(-actor.sample(torch.zeros(400_000, 1))[1])
    error = weight.std().item() / 400_000**0.5
    assert error < 0.1 and weight.mean().item() == pytest.approx(4.0, abs=5 * error)


def riccati(mean, std, eta, prior_std=2.5):
    """Smallest path KL to N(mean, std^2) over all controls, by dynamic programming."""
    p, q, const = 1 / (2 * std**2), -mean / (2 * std**2), 0.0
    for step in reversed(eta):
        g = 1 - step / prior_std**2
        denominator = g**2 + 4 * step * p
        a, b = g / denominator, -4 * step * q / denominator
        const += g**2 * b**2 / (4 * step) + p * b**2 + 2 * q * b + g**2 / 2 + 2 * step * p
        p, q = (
            (1 - g * a) ** 2 / (4 * step) + p * a**2,
            -(1 - g * a) * g * b / (4 * step) + p * a * b + q * a,
        )
    constant = -len(eta) / 2 - 0.5 * math.log(2 * math.pi * math.e * prior_std**2)
    return (
        p * prior_std**2
        + const
        + constant
        + 0.5 * math.log(2 * math.pi * std**2)
        + mean**2 / (2 * std**2)
    )


@pytest.mark.parametrize(
    "steps,gap", [(2, 1.2043), (4, 0.9845), (8, 0.6916), (16, 0.3878), (32, 0.1595)]
)
def test_bound_of_the_schedule_tightens_with_the_number_of_steps(steps, gap):
    actor = make_actor(dime, 1, diffusion_steps=steps, hidden_dim=8)
    eta = actor.kernels()[0].flatten().flip(0).tolist()
    assert riccati(0.0, 1.0, eta) == pytest.approx(gap, abs=2e-4)


def test_training_reaches_the_gaussian_target():
    """Path KL to N(0.5, 0.8^2) by the script's loss: near the optimum of its steps, never below."""
    torch.manual_seed(3)
    actor = make_actor(dime, 1, diffusion_steps=4, hidden_dim=32)
    mean, std, alpha = 0.5, 0.8, 0.5

    # alpha log-density of the target over latents, minus the log-determinant that the loss adds
    class Critic:
        def value(self, obs, action):
            latent = torch.atanh(action.clamp(-1 + 1e-12, 1 - 1e-12))
            value = -0.5 * ((latent - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
            return alpha * (value.sum(-1) - dime.squash(latent)[1])

    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 1200)
    for _ in range(1200):
        loss, _ = dime.actor_loss(actor, Critic(), torch.zeros(256, 1), alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        path_kl = dime.actor_loss(actor, Critic(), torch.zeros(200_000, 1), alpha)[0].item() / alpha
    optimum = riccati(mean, std, actor.kernels()[0].flatten().flip(0).tolist())
    initial = riccati(
        mean, std, make_actor(dime, 1, diffusion_steps=4).kernels()[0].flatten().flip(0).tolist()
    )
    assert optimum - 0.01 < path_kl < optimum + 0.05
    assert optimum < 0.5 * initial  # learning the step size tightens the bound


def test_gradient_of_the_chain_against_finite_differences():
    actor = make_actor(dime, diffusion_steps=4, hidden_dim=16)
    randomise(actor, 0.1)
    args = dime.Args(critic_dim=16, num_atoms=11)
    qf, obs = dime.SoftQNetwork(3, 1, args), torch.randn(50, 3)
    for norm in qf.norms:
        norm.mean.normal_(0, 0.3)

    def loss():
        torch.manual_seed(1)
        return dime.actor_loss(actor, qf, obs, 0.3)[0]

    parameters = [actor.raw_eta, actor.raw_kappa, actor.phase, actor.fc_latent.weight]
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(loss(), parameters), strict=True
    ):
        index, values = (0,) * parameter.dim(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * 1e-5
                values.append(loss().item())
                parameter[index] -= sign * 1e-5
        assert gradient[index].item() == pytest.approx(
            (values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7
        )


def test_gradients_of_the_actor_are_clipped_entry_by_entry(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("sys.argv", ["dime.py"])
    largest, step = [], torch.optim.Adam.step

    def spy(optimizer, *rest, **more):
        weights = optimizer.param_groups[0]["params"]
        if len(weights) > 10 and weights[0].dim() == 0:  # the actor: the first is raw_eta
            largest.append(max(w.grad.abs().max().item() for w in weights if w.grad is not None))
        return step(optimizer, *rest, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    flags = {"hidden_dim": 16, "batch_size": 16, "learning_starts": 40, "eval_episodes": 1}
    flags |= {"critic_dim": 16, "diffusion_steps": 3, "alpha": 1e4}
    dime.main(dime.Args(env_id="Pendulum-v1", total_timesteps=46, **flags))
    assert len(largest) == 4 and max(largest) == 1
