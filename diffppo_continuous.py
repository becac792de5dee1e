"""DiffPPO: PPO with a diffusion policy (Sanokowski, Patil, Knoll 2025, arXiv 2512.02019). Docs: docs/diffppo.md

Maximises E[ sum_t gamma^t ( R_t + alpha H(pi(.|s_t)) ) ]: the entropy is part of the reward and so of the soft value V;
alpha = 0 leaves it out. On data (s, a, R, s') of pi_old, R and alpha in units of the returns' standard deviation, with
the ratio r = pi(a|s) / pi_old(a|s), A_(t+1) = 0 once an episode has ended, and A standardised in each minibatch,

    advantage  A_t = d_t + gamma lambda A_(t+1),  d_t = R - alpha log pi_old(a|s) + gamma (1 - terminated) V(s') - V(s)
    actor      -E[ min( r A, clip(r, 1 - eps, 1 + eps) A ) ],  where A is refreshed: A_t + alpha ( log pi_old - log pi )
    critic     E[ ( V(s) - V_old(s) - A_t )^2 ] / 2

From a^K ~ q(a^K) = N(0, nu^2 I), K steps with a network u_theta and learned delta_k and sigma_k lead to a^0; tanh(a^0),
scaled, is executed. PPO runs on the augmented problem with states (s, a^k, k) and actions a^(k-1):

    denoising  q(a^(k-1) | a^k, s) = N( (1 - delta_k / 2) a^k + nu^2 delta_k u_theta(s, a^k, k), sigma_k^2 I )       (1)
    noising    pi(a^k | a^(k-1))   = N( (1 - delta_k / 2) a^(k-1), nu^2 delta_k I )                                  (2)
    actor      one ratio r of (1) for each step; l_k = log (1) - log (2) for log pi(a|s); and, as delta_k moves (2),
               -alpha r log (2) in the loss wherever r is not clipped                                                (3)
    rewards    R + alpha ( H(q(a^K)) + log |da / da^0| ) at the end of a chain; inside it gamma = lambda = 1         (4)

alpha = 0 is close to DPPO (Ren et al. 2024, arXiv 2409.00588), with a value function of the latents.

    python diffppo_continuous.py --env-id HalfCheetah-v4
    python diffppo_continuous.py --resume runs/<run>/checkpoint.pt
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch.utils import _pytree as pytree
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    "name of this experiment"
    seed: int = 1
    "seed of python, numpy, torch, the environments and their action spaces"
    env_id: str = "HalfCheetah-v4"
    "gymnasium id: -v4, -v5, dm_control/dog-run-v0 (needs shimmy[dm-control]) or module:id"
    total_timesteps: int = 1_000_000
    "environment steps of the whole run, over all environments"
    num_envs: int = 8
    "environments stepped together"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    "auto takes CUDA, then MPS, then the CPU"
    torch_threads: int = 1
    "CPU threads of torch; more than one is slower for networks of this size"
    compile: bool = False
    "compile the gradient step with torch.compile"
    cuda_graph: bool = False
    "capture the gradient step and the policy as CUDA graphs"
    progress: bool = True
    "show a progress bar"
    track: bool = False
    "also log to Weights & Biases (needs wandb)"
    wandb_project_name: str = "diffusion-maxent-rl"
    "the wandb project"
    wandb_entity: str | None = None
    "the wandb team"
    capture_video: bool = False
    "record the first environment to runs/<run>/videos (needs moviepy)"
    eval_frequency: int = 10_000
    "environment steps between two evaluations; 0 evaluates only at the end"
    eval_episodes: int = 10
    "episodes of one evaluation, each for the stochastic and for the mean action"
    checkpoint_frequency: int = 50_000
    "environment steps between two checkpoints; 0 writes one only at the end"
    resume: str | None = None
    "checkpoint to go on from; its arguments apply, flags given beside --resume override them"

    # Algorithm specific arguments
    async_envs: bool = False
    "step each environment in a process of its own: for slow environments on many cores"
    num_steps: int = 256
    "steps of each environment between two updates"
    learning_rate: float = 3e-4
    "learning rate of actor and critic"
    anneal_lr: bool = True
    "let the learning rate fall linearly to zero"
    gamma: float = 0.99
    "discount factor"
    gae_lambda: float = 0.95
    "lambda of the generalised advantage estimate"
    num_minibatches: int = 32
    "minibatches of one epoch"
    update_epochs: int = 10
    "epochs over the data of one rollout"
    norm_adv: bool = True
    "standardise the advantages of each minibatch"
    clip_coef: float = 0.2
    "clipping range eps of the probability ratio"
    ent_coef: float = 0.0
    "weight of an entropy bonus in the loss: the usual form, which does not look ahead"
    alpha: float = 0.01
    "temperature: weight of the entropy in the reward, in units of the reward"
    alpha_anneal: float = 1.0
    "start at this multiple of --alpha and fall to it geometrically in 70 % of the run"
    vf_coef: float = 0.5
    "weight of the critic's loss"
    max_grad_norm: float = 0.5
    "largest norm of the gradient"
    target_kl: float | None = None
    "end the epochs of an update when the approximate KL divergence passes this"
    hidden_dim: int = 64
    "width of the two hidden layers of every network"

    # Diffusion policy
    diffusion_steps: int = 8
    "denoising steps K from the prior to the action"
    prior_std: float = 0.5
    "standard deviation nu of the prior, before squashing"
    delta_first: float = 1.5
    "delta_K of the first denoising step; a geometric schedule leads to delta_1"
    delta_last: float = 0.01
    "delta_1 of the last of several denoising steps; its noise has standard deviation nu sqrt(delta_1) at first"
    learn_delta: bool = True
    "learn delta_k for each step and action dimension, or keep the schedule; sigma_k is learned anyway"

    def __post_init__(self):
        at_least_one = "total_timesteps num_envs torch_threads eval_episodes num_steps num_minibatches update_epochs"
        not_negative = "seed eval_frequency checkpoint_frequency learning_rate clip_coef ent_coef alpha vf_coef"
        for names, least in ((at_least_one + " hidden_dim alpha_anneal", 1), (not_negative + " max_grad_norm", 0)):
            for name in names.split():
                if not least <= getattr(self, name) < math.inf:
                    raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2**32, not {self.seed}")
        if not (0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(f"--gamma and --gae-lambda must lie in [0, 1], not {self.gamma} and {self.gae_lambda}")
        if self.alpha_anneal > 1 and self.alpha == 0:
            raise ValueError("--alpha-anneal above 1 needs a positive --alpha")
        if not 0 <= (self.target_kl or 0) < math.inf:
            raise ValueError(f"--target-kl must be at least 0, not {self.target_kl}")
        if self.num_envs * self.num_steps < 2 * self.num_minibatches:
            raise ValueError("--num-envs times --num-steps must be at least twice --num-minibatches")
        if not (DELTA_MIN < self.delta_last <= self.delta_first < DELTA_MAX):
            raise ValueError(f"need {DELTA_MIN} < --delta-last <= --delta-first < {DELTA_MAX}")
        if not (self.diffusion_steps >= 1 and 0 < self.prior_std < math.inf):
            raise ValueError("--diffusion-steps must be at least 1 and --prior-std positive")


def fail(message: str) -> NoReturn:
    """End the program as a user's mistake deserves: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_env(env_id, seed, idx, capture_video, run_name):
    """Return a thunk that makes environment `idx` of a run: flat Box observations, episode statistics in its info."""

    def thunk():
        try:
            if env_id.startswith("dm_control/"):
                import shimmy  # noqa: F401  (registers the dm_control environments)
            record = capture_video and idx == 0
            env = gym.make(env_id, render_mode="rgb_array") if record else gym.make(env_id)
            if isinstance(env.observation_space, gym.spaces.Dict):
                env = gym.wrappers.FlattenObservation(env)
            spaces = {"observation": env.observation_space, "action": env.action_space}
            for name, space in spaces.items():
                if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                    fail(f"{env_id} has {name} space {space}, but this script needs a Box with one axis")
            if not (np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()):
                fail(f"{env_id} has unbounded actions, {env.action_space}, but this script needs finite bounds")
            if record:
                env = gym.wrappers.RecordVideo(env, f"runs/{run_name}/videos", name_prefix=f"seed-{seed}")
        except (gym.error.Error, ImportError, TypeError, ValueError) as error:
            fail(f"cannot make the environment {env_id}: {' '.join(str(error).split())}")
        env = gym.wrappers.RecordEpisodeStatistics(env)
        env.action_space.seed(seed + idx)
        return env

    return thunk


class Rollout(NamedTuple):
    """Data of one rollout, (num_steps, num_envs) or with more axes, as obs_dim and action_dim."""

    obs: torch.Tensor
    next_obs: torch.Tensor  # after an episode's end its last observation, not the first one of the next episode
    latents: torch.Tensor  # chains a^K ... a^0, (num_steps, num_envs, K + 1, action_dim)
    rewards: torch.Tensor
    terminations: torch.Tensor  # 1 where the episode ended in a terminal state; a time limit leaves 0 and bootstraps
    ends: torch.Tensor  # 1 where the episode ended, for either reason


class RunningNormalizer(nn.Module):
    """Mean and variance of all rows seen so far, as buffers of the module; only `update` changes them."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.tensor(1e-4))

    def update(self, rows):
        """Take rows (count, dim) into account."""
        total, shift = self.count + len(rows), rows.mean(0) - self.mean
        spread = self.var * self.count + rows.var(0, unbiased=False) * len(rows)
        self.var.copy_((spread + shift.square() * self.count * len(rows) / total) / total)
        self.mean.add_(shift * len(rows) / total)
        self.count.copy_(total)

    def forward(self, x):
        """Standardise x (..., dim) and clip it to [-10, 10]."""
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class ReturnScaler(nn.Module):
    """Divides rewards by the standard deviation of the discounted sums of past rewards, kept as buffers."""

    def __init__(self, num_envs, gamma):
        super().__init__()
        self.gamma, self.normalizer = gamma, RunningNormalizer(1)
        self.register_buffer("discounted", torch.zeros(num_envs), persistent=False)

    def update(self, rewards, ends):
        """Take the rewards of a rollout, (num_steps, num_envs), into account; an end starts a new sum."""
        sums = []
        for reward, end in zip(rewards, ends, strict=True):
            self.discounted.mul_(self.gamma).add_(reward)
            sums.append(self.discounted.clone())
            self.discounted.mul_(1 - end)
        self.normalizer.update(torch.cat(sums)[:, None])

    def scale(self):
        """The factor for rewards, and for all that is in their units."""
        return (self.normalizer.var + 1e-8).rsqrt()


# ALGO LOGIC: initialize agent here:
def mlp(sizes, last_gain):
    """Tanh network, orthogonal initial weights of gain sqrt(2), in the last layer `last_gain`."""
    layers = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, math.sqrt(2) if len(layers) < 2 * len(sizes) - 2 else last_gain)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """Soft value of a state, in units of the scaled rewards."""

    def __init__(self, obs_dim, args):
        super().__init__()
        self.net = mlp((obs_dim, args.hidden_dim, args.hidden_dim, 1), last_gain=1.0)

    def forward(self, obs):
        """Values (...) of states (..., obs_dim), their observations normalised."""
        return self.net(obs).squeeze(-1)


DELTA_MIN, DELTA_MAX = 1e-4, 1.9  # range of a learned delta_k; at 2 the mean of a kernel would change its sign


class Actor(nn.Module):
    """Diffusion policy, squashed by tanh into the bounds, with chains a^K ... a^0; owns the observation normaliser."""

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        obs_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        low, high = torch.as_tensor(action_space.low).float(), torch.as_tensor(action_space.high).float()
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        self.register_buffer("action_low", low, persistent=False)
        self.register_buffer("action_high", high, persistent=False)
        self.normalizer = RunningNormalizer(obs_dim)
        self.diffusion_steps, self.prior_std = args.diffusion_steps, args.prior_std
        k = torch.arange(1, self.diffusion_steps + 1)
        self.register_buffer("order", k.flip(0))  # K ... 1
        position = (self.diffusion_steps - k) / max(self.diffusion_steps - 1, 1)  # 0 at step K, 1 at step 1
        delta = args.delta_first * (args.delta_last / args.delta_first) ** position
        logit = torch.logit((delta - DELTA_MIN) / (DELTA_MAX - DELTA_MIN))[:, None].repeat(1, action_dim)
        self.delta_logit = nn.Parameter(logit) if args.learn_delta else nn.Buffer(logit)
        self.log_std = nn.Parameter((self.prior_std * delta.sqrt()).log()[:, None].repeat(1, action_dim))  # sigma_k
        angle = k[:, None] * 100 ** -torch.linspace(0, 1, 16)
        self.register_buffer("step_embedding", torch.cat((angle.sin(), angle.cos()), dim=1))
        obs_dim += action_dim + self.step_embedding.shape[1]  # the state (s, a^k, k)
        self.net = mlp((obs_dim, args.hidden_dim, args.hidden_dim, action_dim), last_gain=0.0)  # u_theta = 0 at first

    def std(self):
        """Standard deviation sigma_k of the denoising kernels, (K, action_dim), row k - 1 for step k."""
        return self.log_std.exp()

    def augment(self, obs, latent, k):
        """State (s, a^k, k) as a vector from normalised obs, latents a^k and steps k (...)."""
        return torch.cat((obs, latent, self.step_embedding[k - 1]), dim=-1)

    def kernels(self, state, latent, k):
        """Mean and std of the denoising kernel, decay 1 - delta_k / 2 and std of the noising one, (..., action_dim)."""
        delta = DELTA_MIN + (DELTA_MAX - DELTA_MIN) * torch.sigmoid(self.delta_logit[k - 1])
        decay, noising_std = 1 - delta / 2, self.prior_std * delta.sqrt()  # the network is noising_std u_theta
        return decay * latent + noising_std * self.net(state), self.std()[k - 1], decay, noising_std

    def forward(self, obs, noise_scale=1.0):
        """Draw a chain a^K ... a^0, (batch, K + 1, action_dim), for each row of normalised obs (batch, obs_dim)."""
        noise = noise_scale * torch.randn(self.diffusion_steps + 1, len(obs), len(self.action_scale), device=obs.device)
        latents = [self.prior_std * noise[-1]]
        for k, eps in zip(self.order[:, None].expand(-1, len(obs)), noise[:-1].flip(0), strict=True):
            mean, std, _, _ = self.kernels(self.augment(obs, latents[-1], k), latents[-1], k)
            latents.append(mean + std * eps)
        return torch.stack(latents, dim=1)

    def log_density(self, state, latent, next_latent, k):
        """log q(a^(k-1) | a^k, s) and log pi(a^k | a^(k-1)), both (...), at states of `augment`."""
        mean, std, decay, noising_std = self.kernels(state, latent, k)
        kernels = (next_latent - mean, std), (latent - decay * next_latent, noising_std)  # DIFF: (1), (2)
        return tuple((-0.5 * (x / s).square() - s.log() - 0.5 * math.log(2 * math.pi)).sum(-1) for x, s in kernels)

    def chain(self, obs, latents):
        """The K steps of chains (..., K + 1, action_dim) at obs (..., obs_dim): state, latent, next_latent, k."""
        k = self.order.expand(*latents.shape[:-2], -1)
        obs = obs.unsqueeze(-2).expand(*k.shape, -1)
        return self.augment(obs, latents[..., :-1, :], k), latents[..., :-1, :], latents[..., 1:, :], k

    def squash(self, latent):
        """Map latent (batch, action_dim) to actions in the bounds and the log-determinant (batch,) of that map."""
        action = torch.tanh(latent) * self.action_scale + self.action_bias
        action = action.clamp(self.action_low, self.action_high)  # rounding may lead out of them
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2x)), stable for large |x|
        log_slope = 2 * (math.log(2) - latent - F.softplus(-2 * latent))
        return action, (log_slope + self.action_scale.log()).sum(-1)

    def sample(self, obs):
        """Action (batch, action_dim) and its path log-ratio (batch,), in place of a log-probability."""
        obs = self.normalizer(obs)
        latent = self(obs)
        action, log_det = self.squash(latent[:, -1])
        log_prob, log_noising = self.log_density(*self.chain(obs, latent))
        log_prior = -0.5 * (latent[:, 0] / self.prior_std).square() - math.log(self.prior_std * math.sqrt(2 * math.pi))
        return action, log_prior.sum(-1) + (log_prob - log_noising).sum(-1) - log_det

    def mean_action(self, obs):
        """Action (batch, action_dim) of the chain with all noises zero."""
        return self.squash(self(self.normalizer(obs), noise_scale=0.0)[:, -1])[0]

    def get_action(self, obs):
        """Return (action, log_prob, mean_action) of shapes (batch, action_dim), (batch,), (batch, action_dim)."""
        return *self.sample(obs), self.mean_action(obs)


def gae(rewards, values, next_values, discounts, traces):
    """Generalised advantage estimate (Schulman et al. 2016, arXiv 1506.02438), all tensors (steps, num_envs).

    discounts: of next values, 0 at a terminal state. traces: discount times lambda, 0 where an episode ends or is cut.
    """
    advantages = rewards + discounts * next_values - values
    for t in range(len(rewards) - 2, -1, -1):
        advantages[t] += traces[t] * advantages[t + 1]
    return advantages


@torch.no_grad()
def training_rows(actor, critic, return_scaler, rollout, alpha, args):
    """Rows of a rollout for `update`, one for each decision, in units of scaled rewards; and their scale.

    The columns: arguments of `log_density`, log-density, advantages without their own entropy term, returns, values.
    """
    obs, next_obs = actor.normalizer(rollout.obs), actor.normalizer(rollout.next_obs)
    chain = actor.chain(obs, rollout.latents)
    log_prob, log_noising = actor.log_density(*chain)
    soft_rewards = -alpha * (log_prob - log_noising)
    prior_entropy = (math.log(args.prior_std) + 0.5 * math.log(2 * math.pi * math.e)) * len(actor.action_scale)
    soft_rewards[..., -1] += rollout.rewards + alpha * (prior_entropy + actor.squash(rollout.latents[..., -1, :])[1])
    return_scaler.update(soft_rewards.sum(-1), rollout.ends)
    scale = return_scaler.scale()
    values = critic(chain[0])
    next_values = torch.cat((values[..., 1:], values[..., :1].roll(-1, 0)), dim=-1)
    fresh = actor.augment(next_obs, args.prior_std * torch.randn_like(rollout.latents[..., 0, :]), chain[3][..., 0])
    cut = torch.cat((rollout.ends[:-1], torch.ones_like(rollout.ends[-1:])))  # no next chain in the rollout
    next_values[..., -1] = torch.where(cut > 0, critic(fresh), next_values[..., -1])
    discounts, traces = torch.ones_like(values), torch.ones_like(values)  # DIFF: (4)
    discounts[..., -1] = args.gamma * (1 - rollout.terminations)
    traces[..., -1] = args.gamma * args.gae_lambda * (1 - rollout.ends)
    axis = [x.transpose(1, 2).flatten(0, 1) for x in (soft_rewards * scale, values, next_values, discounts, traces)]
    advantages = gae(*axis).view(values.transpose(1, 2).shape).transpose(1, 2)
    refreshed = advantages + alpha * scale * (log_prob - log_noising)  # `update` subtracts the current ones
    rows = (*chain, log_prob, refreshed, advantages + values, values)
    return tuple(x.flatten(0, 2) for x in rows), scale


def policy_loss(log_prob, old_log_prob, advantages, clip_coef):
    """Clipped surrogate of a minibatch; also returns the ratios (batch,)."""
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), ratio


def noising_loss(log_noising, ratio, advantages, clip_coef, alpha):
    """A learned delta moves the noising kernel too: -alpha log pi, wherever the clipped surrogate has a gradient."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    weight = (ratio * (ratio * advantages <= clipped * advantages)).detach()
    return -(alpha * weight * log_noising).mean()  # DIFF: (3)


def ppo_loss(actor, critic, batch, alpha, args):
    """Loss of actor and critic on rows of `training_rows`, alpha in units of the scaled rewards; and metrics."""
    *steps, old_log_prob, advantages, returns, _ = batch
    log_prob, log_noising = actor.log_density(*steps)
    # the entropy term of the advantage is that of the current policy
    advantages = advantages - alpha * (log_prob - log_noising).detach()
    mean, spread = (advantages.mean(), advantages.std() + 1e-8) if args.norm_adv else (0.0, 1.0)
    advantages = (advantages - mean) / spread
    surrogate, ratio = policy_loss(log_prob, old_log_prob, advantages, args.clip_coef)
    entropy = (actor.std().log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()
    value_loss = 0.5 * (critic(steps[0]) - returns).square().mean()
    loss = surrogate - args.ent_coef * entropy + args.vf_coef * value_loss
    loss = loss + noising_loss(log_noising, ratio, advantages, args.clip_coef, alpha / spread)
    approx_kl = (ratio - 1 - ratio.log()).mean()
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    metrics = {"policy_loss": surrogate, "value_loss": value_loss, "entropy": entropy, "approx_kl": approx_kl}
    return loss, metrics | {"clipfrac": clipfrac}


class RandomState:
    """The states of torch's generators, of the CPU and of `device`, as a part of a checkpoint."""

    def __init__(self, device):
        self.modules = {"cpu": torch}
        if device.type != "cpu":
            self.modules[device.type] = getattr(torch, device.type)

    def state_dict(self):
        return {name: module.get_rng_state() for name, module in self.modules.items()}

    def load_state_dict(self, state):
        for name in self.modules.keys() & state.keys():  # a run may go on on another device
            self.modules[name].set_rng_state(state[name])


@torch.no_grad()
def evaluate(actor, envs, seed, device):
    """Run one episode of each of these environments with the stochastic and one with the mean action.

    Returns {metric name: undiscounted returns (num_envs,)}. Leaves the random state of the training run alone.
    """
    state = RandomState(device).state_dict()
    torch.manual_seed(seed)
    seeds = np.random.SeedSequence((seed, 1)).generate_state(envs.num_envs).tolist()  # other ones than for training
    returns = {}
    policies = {"episodic_return": lambda obs: actor.sample(obs)[0], "episodic_return_mean_action": actor.mean_action}
    for name, policy in policies.items():
        obs, _ = envs.reset(seed=seeds)
        returns[name], active = np.zeros(len(seeds)), np.ones(len(seeds), dtype=bool)
        while active.any():
            actions = policy(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
            obs, rewards, terminations, truncations, _ = envs.step(actions)
            returns[name] += active * rewards
            active &= ~(terminations | truncations)
    RandomState(device).load_state_dict(state)
    return returns


def save_checkpoint(path, args, parts, **values):
    """Write `values`, the arguments and the state of all `parts` to `path`.

    A temporary file is written, flushed to the disk and renamed: `path` holds the old checkpoint or the new one, whole.
    """
    checkpoint = {"script": Path(__file__).stem, "args": asdict(args), **values}
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint | {name: part.state_dict() for name, part in parts.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk, above all; an older checkpoint is left alone
        temporary.unlink(missing_ok=True)
        sys.exit(f"error: cannot write the checkpoint {path} ({' '.join(str(error).split())})")


def load_checkpoint(path):
    """Read a checkpoint of this script: a dict with its tensors on the CPU and "args" as `Args`. Unpickles no code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint["script"] == Path(__file__).stem:
            return checkpoint | {"args": Args(**checkpoint["args"])}
        problem = f"was written by {checkpoint['script']}.py"
    except Exception as error:  # whatever is wrong with the file, the user needs its name and one sentence
        problem = f"cannot be read ({type(error).__name__})"
    fail(f"the checkpoint {path} {problem}")


def restore_checkpoint(checkpoint, parts):
    """Give all `parts` the state that `save_checkpoint` found them in; optimisers keep learning rate and mode."""
    try:
        for name, part in parts.items():
            groups = getattr(part, "param_groups", [])
            kept = [{key: group[key] for key in ("lr", "capturable")} for group in groups]
            part.load_state_dict(checkpoint[name])
            for group, settings in zip(getattr(part, "param_groups", []), kept, strict=True):
                group.update(settings)
    except (KeyError, RuntimeError, ValueError) as error:
        fail(f"the checkpoint does not fit the arguments: {' '.join(str(error).split())}")


def make_run_dir(args):
    """Make the folder runs/{env_id}__{exp_name}__{seed}__{time} and return its path."""
    run_name = re.sub(r"[^\w.-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    try:
        os.makedirs(f"runs/{run_name}")
    except FileExistsError:  # two runs in one second
        time.sleep(1)
        return make_run_dir(args)
    except OSError as error:
        fail(f"cannot make the folder runs/{run_name}: {error.strerror}")
    return Path("runs", run_name)


def check_finite(values, global_step, run_dir):
    """Stop the run, exit code 1, if any of these arrays or tensors is not finite; the last checkpoint is left alone."""
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            sys.exit(f"error: {name} is not finite at step {global_step}; the last checkpoint, if any, is in {run_dir}")


class CudaGraph:
    """Runs `function` as it is for some calls, then captures it as a CUDA graph, which later calls replay.

    Every combination of tensor shapes and other arguments has its graph. The next replay overwrites the results.
    """

    def __init__(self, function, warmup=3):
        self.function, self.warmup, self.calls, self.graphs = function, warmup, Counter(), {}
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        leaves = pytree.tree_leaves(inputs)
        key = tuple(x.shape if isinstance(x, torch.Tensor) else x for x in leaves)
        self.calls[key] += 1
        if self.calls[key] <= self.warmup:  # what is allocated lazily must be there before the capture
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if key not in self.graphs:
            static = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = self.function(*static)
            self.graphs[key] = graph, pytree.tree_leaves(static), results
        graph, static, results = self.graphs[key]
        for old, new in zip(static, leaves, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
        graph.replay()
        return results


def main(args: Args):
    torch.set_num_threads(args.torch_threads)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not getattr(torch, device).is_available():
        fail(f"--device {device} is not available on this machine")
    device = torch.device(device)
    if args.cuda_graph and device.type != "cuda":
        fail(f"--cuda-graph needs --device cuda, not {device}")
    for flag, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, flag) and not importlib.util.find_spec(package):
            fail(f"--{flag.replace('_', '-')} needs the package {package}")
    make_env(args.env_id, args.seed, 0, False, "")().close()  # refuses what does not fit before a folder is made
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint and checkpoint["args"].env_id != args.env_id:
        fail(f"the checkpoint {args.resume} is of {checkpoint['args'].env_id}, not of {args.env_id}")
    global_step = checkpoint["global_step"] if checkpoint else 0
    run_dir = Path(args.resume).resolve().parent if checkpoint else make_run_dir(args)

    # TRY NOT TO MODIFY: seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    # env setup
    env_seed = args.seed + global_step  # a resumed run starts new episodes
    thunks = [make_env(args.env_id, env_seed, i, args.capture_video, run_dir.name) for i in range(args.num_envs)]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes of environments inherit it: Ctrl-C is for us
    envs = (AsyncVectorEnv if args.async_envs else SyncVectorEnv)(thunks, autoreset_mode=AutoresetMode.SAME_STEP)
    signal.signal(signal.SIGINT, handler)
    thunks = [make_env(args.env_id, args.seed, i, False, "") for i in range(args.eval_episodes)]
    eval_envs = SyncVectorEnv(thunks, autoreset_mode=AutoresetMode.SAME_STEP)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    actor = Actor(envs.single_observation_space, envs.single_action_space, args).to(device)
    critic = Critic(actor.net[0].in_features, args).to(device)  # sees what the actor sees
    return_scaler = ReturnScaler(args.num_envs, args.gamma).to(device)
    parameters = [*actor.parameters(), *critic.parameters()]
    rate = torch.tensor(args.learning_rate, device=device)  # a tensor, so that a CUDA graph sees it change
    optimizer = torch.optim.Adam(parameters, lr=rate, eps=1e-5, fused=True, capturable=args.cuda_graph)
    parts = {"actor": actor, "critic": critic, "return_scaler": return_scaler, "optimizer": optimizer}
    parts |= {"random_state": RandomState(device)}
    if checkpoint:
        restore_checkpoint(checkpoint, parts)

    # ALGO Logic: Storage setup
    batch_steps = args.num_steps * args.num_envs
    shape = (args.num_steps, args.num_envs)
    shapes = ((*shape, obs_dim), (*shape, obs_dim), (*shape, args.diffusion_steps + 1, action_dim), shape, shape, shape)
    rollout = Rollout(*(torch.zeros(s, device=device) for s in shapes))

    def act(obs):
        latents = actor(actor.normalizer(obs))
        return latents, actor.squash(latents[:, -1])[0]

    def update(batch, alpha):
        """One gradient step on a minibatch, alpha in units of the scaled rewards; returns tensors for the log."""
        loss, metrics = ppo_loss(actor, critic, batch, alpha, args)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        return {f"losses/{name}": value.detach() for name, value in metrics.items()}

    if args.compile:
        update = torch.compile(update)
    if args.cuda_graph:
        update, act = CudaGraph(update), CudaGraph(act)

    def checkpoint_now():
        parameters = dict(nn.ModuleDict({"actor": actor, "critic": critic}).named_parameters())
        check_finite(metrics | parameters, global_step, run_dir)
        writer.flush()  # a checkpoint is never ahead of the curves
        save_checkpoint(run_dir / "checkpoint.pt", args, parts, global_step=global_step)

    def due(frequency):
        return frequency > 0 and global_step % frequency < batch_steps

    if args.track:
        import wandb

        where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": run_dir.name, "resume": "allow"}
        wandb.init(
            name=run_dir.name, config=asdict(args), sync_tensorboard=True, monitor_gym=True, save_code=True, **where
        )
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if checkpoint else None)
    packages = [name for name in ("torch", "gymnasium", "mujoco", "numpy") if importlib.util.find_spec(name)]
    facts = asdict(args) | {name: importlib.metadata.version(name) for name in packages}
    facts |= {"python": sys.version.split()[0], "command": " ".join(sys.argv)}
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in facts.items()))
    stop = []

    def on_signal(number, _):
        stop.append(number)  # leave after the current step, with a checkpoint
        signal.signal(number, signal.SIG_DFL)  # or at once, when the signal comes again

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    # TRY NOT TO MODIFY: start the game
    current_obs, _ = envs.reset(seed=env_seed)
    metrics, start_step, start_time = {}, global_step, time.time()
    progress = tqdm(total=args.total_timesteps, initial=global_step, disable=not args.progress, mininterval=1)
    while global_step < args.total_timesteps and not stop:
        if args.anneal_lr:
            rate.fill_(args.learning_rate * (1 - global_step / args.total_timesteps))
        progress_left = max(0.0, 1 - global_step / (0.7 * args.total_timesteps))
        alpha = args.alpha * args.alpha_anneal**progress_left

        for step in range(args.num_steps):
            global_step += args.num_envs
            # ALGO LOGIC: action logic
            obs = torch.as_tensor(current_obs, dtype=torch.float32, device=device)
            with torch.no_grad():
                latents, actions = act(obs)

            # TRY NOT TO MODIFY: execute the game and log data
            current_obs, reward, terminated, truncated, infos = envs.step(actions.cpu().numpy())
            real_next_obs = current_obs.copy()
            for i in np.flatnonzero(terminated | truncated):  # current_obs[i] already belongs to the next episode
                real_next_obs[i] = infos["final_obs"][i]
                episode = infos["final_info"]["episode"]
                writer.add_scalar("charts/episodic_return", episode["r"][i], global_step)
                writer.add_scalar("charts/episodic_length", episode["l"][i], global_step)
                progress.set_postfix_str(f"episodic_return {episode['r'][i]:.1f}", refresh=False)
            if not (np.isfinite(real_next_obs).all() and np.isfinite(reward).all()):
                check_finite(metrics | {"an observation": real_next_obs, "a reward": reward}, global_step, run_dir)
            data = (obs, real_next_obs, latents, reward, terminated, terminated | truncated)
            for storage, values in zip(rollout, data, strict=True):
                storage[step] = torch.as_tensor(values, dtype=torch.float32)
        progress.update(batch_steps)

        # Optimizing the policy and value network
        rows, scale = training_rows(actor, critic, return_scaler, rollout, alpha, args)
        for _ in range(args.update_epochs):
            order = torch.randperm(len(rows[0]), device=device)
            for batch in zip(*(x[order].tensor_split(args.num_minibatches) for x in rows), strict=True):
                metrics = update(batch, alpha * scale)
            if args.target_kl is not None and metrics["losses/approx_kl"] > args.target_kl:
                break
        actor.normalizer.update(rollout.obs.flatten(0, 1))  # only now: the ratios need what the rollout saw

        check_finite(metrics, global_step, run_dir)
        returns, values = rows[-2:]
        metrics = metrics | {"losses/explained_variance": 1 - (returns - values).var() / (returns.var() + 1e-8)}
        metrics |= {f"diffusion/noise_std_{k}": std for k, std in enumerate(actor.std(), start=1)}
        metrics["diffusion/entropy_bound"] = -actor.sample(rollout.obs[-1])[1].detach()
        for name, value in metrics.items():
            writer.add_scalar(name, value.mean().item(), global_step)
        writer.add_scalar("charts/learning_rate", rate.item(), global_step)
        writer.add_scalar("losses/alpha", alpha, global_step)
        writer.add_scalar("charts/SPS", (global_step - start_step) / (time.time() - start_time), global_step)
        if due(args.eval_frequency) or global_step >= args.total_timesteps:
            for name, returns in evaluate(actor, eval_envs, args.seed, device).items():
                writer.add_scalar(f"eval/{name}", returns.mean(), global_step)
                progress.write(f"step {global_step}: {name} {returns.mean():.1f} +- {returns.std():.1f}")
        if due(args.checkpoint_frequency):
            checkpoint_now()

    checkpoint_now()
    progress.close()
    envs.close()
    eval_envs.close()
    writer.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop and global_step < args.total_timesteps:
        sys.exit(128 + stop[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    resume = parser.parse_known_args()[0].resume  # flags beside it are checked together with the run's own
    main(tyro.cli(Args, default=load_checkpoint(resume)["args"] if resume else tyro.MISSING_NONPROP))
