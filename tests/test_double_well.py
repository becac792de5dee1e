"""The double well's reward as a one-state problem with a learned critic: modes at a = +-0.5."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import diffsac_continuous
import diffwpo_continuous
import sac_continuous


def double_well(action):
    """Reward (batch,) of actions (batch, 1): 1 at +-0.5, 0.85 at 0, 0 at +-1 (numpy or torch)."""
    u = (action[:, 0] / 0.5) ** 2
    inner = 0.85 + 0.15 * (1 - (1 - u) ** 2)
    return inner + (u > 1) * (1 - ((u - 1) / 3) ** 2 - inner)


def exact_masses(alpha, bins=40):
    """Probabilities of exp(reward/alpha)/Z in equal bins of [-1, 1]."""
    points = np.linspace(-1, 1, 400 * bins + 1)
    middle = 0.5 * (points[1:] + points[:-1])
    masses = np.exp(double_well(middle[:, None]) / alpha).reshape(bins, -1).sum(axis=1)
    return masses / masses.sum()


def train(script, alpha, updates, seed, actor_gradient="chain", **flags):
    """Fit actor and critics to the one-state problem with the script's own losses."""
    torch.manual_seed(seed)
    args = script.Args(hidden_dim=64, **flags)
    actor, qf = script.Actor(1, 1, args), script.SoftQNetwork(1, 1, args)
    average, step = copy.deepcopy(actor).requires_grad_(False), actor_gradient == "step"
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    actor_optimizer, q_optimizer = adam(actor.parameters()), adam(qf.parameters())
    if step:
        vf = script.latent_critic_network(1, 1, args)
        v_optimizer = adam(vf.parameters())
    obs, ended = torch.zeros(256, 1), torch.ones(256)
    for _ in range(updates):
        with torch.no_grad():  # half of the critics' data from the policy, half uniform
            chain = actor.chain(obs) if step else None
            action = (actor.outcome(chain) if step else actor.sample(obs))[0]
            uniform = torch.arange(256)[:, None] % 2 == 0
            played = torch.where(uniform, 2 * torch.rand(256, 1) - 1, action)
            q = qf(obs, action).amin(0)
        batch = script.Batch(obs, obs, played, double_well(played), ended)
        script.descend(q_optimizer, script.critic_loss(qf, batch, torch.zeros(256), 0.99)[0])
        if step:
            v_loss = script.latent_critic_loss(actor, qf, vf, chain, q, alpha)
            script.descend(v_optimizer, v_loss)
        if script is diffwpo_continuous:
            loss, _ = script.actor_loss(actor, average, qf, vf, chain, alpha, args)
        elif step:
            loss, _ = script.step_actor_loss(actor, average, qf, vf, chain, alpha, args)
        else:
            loss, _ = script.actor_loss(actor, qf, obs, alpha)
        script.descend(actor_optimizer, loss)
        script.move_towards(average, actor, 0.005)
    return actor


def total_variation(actor, alpha):
    with torch.no_grad():
        action = actor.sample(torch.zeros(50_000, 1))[0]
    histogram = torch.histc(action, 40, -1, 1).numpy() / len(action)
    return 0.5 * np.abs(histogram - exact_masses(alpha)).sum(), (action < 0).float().mean().item()


def test_exact_density_has_the_known_mean_reward():
    for alpha, mean_reward in ((0.05, 0.97138), (0.2, 0.92759)):
        middle = np.linspace(-1, 1, 20_001)
        weight = np.exp(double_well(middle[:, None]) / alpha)
        assert (weight * double_well(middle[:, None])).sum() / weight.sum() == pytest.approx(
            mean_reward, abs=2e-5
        )


def test_gaussian_policy_cannot_fit_two_modes():
    distance, _ = total_variation(train(sac_continuous, 0.05, 1000, seed=1), 0.05)
    assert 0.35 < distance < 0.55


@pytest.mark.parametrize(
    "script,actor_gradient,alpha,updates,limit",
    [
        (diffsac_continuous, "chain", 0.2, 1500, 0.12),
        (diffsac_continuous, "step", 0.2, 2500, 0.12),
        (diffwpo_continuous, "step", 0.2, 2500, 0.12),
    ],
)
def test_diffusion_policy_fits_two_modes(script, actor_gradient, alpha, updates, limit):
    actor = train(script, alpha, updates, 1, actor_gradient, diffusion_steps=8)
    distance, left = total_variation(actor, alpha)
    assert distance < limit
    assert left == pytest.approx(0.5, abs=0.15)
