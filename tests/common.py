"""Shared by the tests: small networks, controls whose value is known, and running a script as its user would."""

import math
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from gymnasium.spaces import Box

import diffppo_continuous
import diffsac_continuous
import diffwpo_continuous
import dime
import ppo_continuous
import sac_continuous
import wpo_continuous

ROOT = Path(__file__).resolve().parent.parent
WASSERSTEIN = [wpo_continuous, diffwpo_continuous]
PAIR = [sac_continuous, diffsac_continuous]  # the third edition; the others keep the second for now
OFF_POLICY = [*PAIR, *WASSERSTEIN]
ON_POLICY = [ppo_continuous, diffppo_continuous]
SCRIPTS = OFF_POLICY + ON_POLICY + [dime]
SECOND = [script for script in SCRIPTS if script not in PAIR]


def quiet(script):
    """The flag that the second edition needs for no progress bar."""
    return [] if script in PAIR else ["--no-progress"]


def make_actor(script, obs_dim=3, low=(-1.0,), high=(1.0,), **flags):
    """An actor of a script, for a box of actions from low to high ([-1, 1] in the third edition)."""
    if script in PAIR:
        return script.Actor(obs_dim, len(low), script.Args(**flags))
    observation_space = Box(-np.inf, np.inf, (obs_dim,))
    action_space = Box(np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32))
    return script.Actor(observation_space, action_space, script.Args(**flags))


def save_policy(script, path, args, actor, global_step=0):
    """Write a checkpoint that holds an actor, as tools/ need it."""
    if script not in PAIR:
        return script.save_checkpoint(path, args, {"actor": actor}, global_step=global_step)
    obs_dim = (actor.fc1 if hasattr(actor, "fc1") else actor.fc_obs).in_features
    state = {"script": script.__name__, "args": asdict(args), "global_step": global_step}
    parts = {"actor": actor, "obs_rms": script.RunningMeanStd(obs_dim, args.normalize_obs)}
    torch.save(state | {name: part.state_dict() for name, part in parts.items()}, path)


def randomise(actor, scale=0.3):
    """Move all weights of an actor away from their special initial values."""
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def actor_loss(script, actor, qf, obs, alpha, **flags):
    """The actor's loss of an off-policy script, without a trust region, and log_prob."""
    if script in WASSERSTEIN:
        return script.policy_loss(actor, actor, qf, obs, alpha, script.Args(**flags))[:2]
    if script in PAIR:
        return script.actor_loss(actor, qf, obs, alpha)
    return script.policy_loss(actor, qf, obs, alpha)


def pathwise_loss(actor, qf, obs, alpha):
    """SAC's actor loss of any actor, and log_prob."""
    action, log_prob = actor.sample(obs)
    return (alpha * log_prob - qf(obs, action).amin(0)).mean(), log_prob


def chain(actor, obs, seed):
    """The action, log_prob, latents and noise of one seeded call of a diffusion actor's `sample`."""
    torch.manual_seed(seed)
    action, log_prob = actor.sample(obs)
    torch.manual_seed(seed)
    return action, log_prob, *actor(obs)


def linear_control_actor(script, slope, offset, delta, prior_std=1.0):
    """A diffusion actor whose network is exactly u_k(a) = slope_k a + offset_k (rows k - 1, one action dimension).

    A ReLU network can switch on k: two units relu(+-a) and one constant unit belong to each step, and a large negative
    bias, a function of the step embedding alone, silences the units of the other steps.
    """
    steps, silence = len(delta), 1e3
    actor = make_actor(script, 1, diffusion_steps=steps, hidden_dim=3 * steps, prior_std=prior_std)
    bias = torch.full((steps, steps, 3), -silence)
    bias[torch.arange(steps), torch.arange(steps)] = torch.tensor([0.0, 0.0, 1.0])
    set_delta(actor, torch.as_tensor(delta)[:, None])
    std = prior_std * torch.as_tensor(delta).sqrt()
    with torch.no_grad():
        actor.fc_obs.weight.zero_(), actor.fc_obs.bias.zero_(), actor.fc2.bias.zero_()
        actor.fc_step.weight.copy_(
            torch.linalg.lstsq(actor.step_embedding, bias.flatten(1)).solution.T
        )
        actor.fc_latent.weight.copy_(torch.tensor([1.0, -1.0, 0.0]).repeat(steps)[:, None])
        actor.fc2.weight.copy_(torch.eye(3 * steps))
        slope, offset = std * torch.as_tensor(slope), std * torch.as_tensor(offset)
        actor.fc_control.weight.copy_(torch.stack((slope, -slope, offset), dim=1).reshape(1, -1))
        actor.fc_control.bias.zero_()
    return actor


def set_delta(actor, delta):
    """Give a diffusion actor the coefficients delta, (K, action_dim)."""
    low, high = diffwpo_continuous.DELTA_MIN, diffwpo_continuous.DELTA_MAX
    with torch.no_grad():
        actor.delta_logit.copy_(torch.logit((delta - low) / (high - low)))


def gauss_hermite(dimensions, points=3):
    """Nodes (points**dimensions, dimensions) and weights of a mean over N(0, I), exact to degree 2 points - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    grid = np.stack(np.meshgrid(*[nodes] * dimensions, indexing="ij"), axis=-1).reshape(
        -1, dimensions
    )
    weight_grid = np.stack(
        np.meshgrid(*[weights / weights.sum()] * dimensions, indexing="ij"), axis=-1
    )
    return torch.from_numpy(grid), torch.from_numpy(
        weight_grid.reshape(-1, dimensions).prod(axis=1)
    )


def log_normal(x, mean, std):
    """Log-density of independent normals, summed over the last axis."""
    return (
        -0.5 * ((x - mean) / std) ** 2
        - torch.log(std * torch.ones_like(x))
        - 0.5 * math.log(2 * math.pi)
    ).sum(-1)


def run_script(monkeypatch, script, *flags):
    """Run a script in this process and folder as `python script.py flags...` would; return its exit code."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script.__name__}.py"), *map(str, flags)])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    return 0
