"""DiffWPO: WPO with a diffusion policy (Sanokowski, Patil, Knoll 2025, arXiv 2512.02019). Docs: docs/diffwpo.md

Maximum-entropy RL maximises E[ sum_t gamma^t ( R_t + alpha H(pi(.|s_t)) ) ]. With (s, a, R, s') from the replay buffer,
twin critics Q_i, their Polyak averages Q'_i, and b ~ pi(.|s), b' ~ pi(.|s') drawn afresh, the losses are

    critic       E[ sum_i ( Q_i(s, a) - R - gamma (1 - terminated) ( min_i Q'_i(s', b') - alpha log pi(b'|s') ) )^2 ]
    actor        E[ alpha log pi(b|s) - min_i Q_i(s, b) ] = alpha KL( pi(.|s) || exp(Q(s, .) / alpha) / Z(s) ) + const
    temperature  -E[ alpha ( log pi(b|s) + target entropy ) ]

WPO takes the steepest path in the 2-Wasserstein distance, with a penalty on the KL from the averaged policy. Let x be b
before squashing, p its density, phi the mean and std of p, F their Fisher information; theta moves phi by chain rule:

    flow         d p / dt = -div_x( p v ),   v(s, x) = grad_x [ min_i Q_i(s, b) - alpha log pi(b|s) ]              (W1)
    projection   d phi / dt = E[ F^-1 ( grad_phi grad_x log p(x|s) ) v(s, x) ]                                     (W2)

From a^K ~ q(a^K) = N(0, nu^2 I), K steps with a network u_theta and learned delta_k lead to a^0; b = tanh(a^0), scaled:

    denoising  q(a^(k-1) | a^k, s) = N( (1 - delta_k / 2) a^k + nu^2 delta_k u_theta(s, a^k, k), nu^2 delta_k I )   (1)
    noising    pi(a^k | a^(k-1))   = N( (1 - delta_k / 2) a^(k-1), nu^2 delta_k I )                                  (2)

The density of b is unknown, but by the data-processing inequality the reverse KL between whole chains is an upper bound
on the one above. It has the same form, with log pi(b|s) replaced by the path log-ratio

    log q(a^K) + sum_k l_k - log |db / da^0|,   l_k = log q(a^(k-1) | a^k, s) - log pi(a^k | a^(k-1)),               (3)

the negative mean of which is a lower bound on the entropy. `Actor` returns it as `log_prob`. (W2) moves every denoising
kernel, with its own F. For x = a^(k-1) the velocity v is the gradient through the rest of the chain, at constant a^k,

    v_k = grad [ min_i Q_i(s, b) + alpha log |db / da^0| - alpha sum_(j<=k) l_j ],                                   (4)

without a latent critic. delta also follows alpha grad log pi(a^k | a^(k-1)): with F^-1 the mean is DiffSAC's gradient.

    python diffwpo_continuous.py --env-id Humanoid-v4 --diffusion-steps 8
    python diffwpo_continuous.py --resume runs/<run>/checkpoint.pt
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
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
    num_envs: int = 1
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
    buffer_size: int = 1_000_000
    "transitions kept for replay"
    gamma: float = 0.99
    "discount factor"
    tau: float = 0.005
    "weight of the new critic in each Polyak update of the target networks"
    batch_size: int = 256
    "transitions in one gradient step"
    learning_starts: int = 5_000
    "environment steps with uniformly random actions before the first gradient step"
    utd: float = 1.0
    "gradient steps per environment step"
    hidden_dim: int = 256
    "width of the two hidden layers of every network"
    policy_lr: float = 3e-4
    "learning rate of the actor"
    q_lr: float = 1e-3
    "learning rate of the critics"
    alpha: float = 1.0
    "temperature: the first value, or the fixed one with --no-autotune"
    autotune: bool = True
    "steer the temperature so that the policy's entropy meets the target"
    alpha_anneal: float = 1.0
    "with --no-autotune: start at this multiple of --alpha and fall to it geometrically in 70 % of the run"
    alpha_lr: float = 3e-4
    "learning rate of the temperature"
    target_entropy: float | None = None
    "entropy target in nats, in the environment's action units; default: -dim(A) for actions scaled to [-1, 1]"
    n_step: int = 1
    "rewards in one critic target; the entropies of the steps between are left out"
    precondition: bool = True
    "multiply by the inverse Fisher matrix of the kernel, or follow the raw mixed derivative, delta fixed"
    kl_weights: tuple[float, float] = (0.03, 0.03)
    "weights of the KLs of mean and std from the Polyak-averaged policy; the first ones with --kl-bounds"
    kl_bounds: tuple[float, float] | None = None
    "learn the weights, at --alpha-lr, so that the KLs of each action dimension meet these bounds, e.g. 0.0025 0.0001"

    # Diffusion policy
    diffusion_steps: int = 8
    "denoising steps K from the prior to the action"
    prior_std: float = 1.0
    "standard deviation nu of the prior, before squashing"
    delta_first: float = 1.0
    "delta_K of the first denoising step; a geometric schedule leads to delta_1"
    delta_last: float = 0.01
    "delta_1 of the last of several denoising steps; its noise has standard deviation nu sqrt(delta_1)"
    learn_delta: bool = True
    "learn delta_k for each step and action dimension, or keep the schedule"

    def __post_init__(self):
        at_least_one = "total_timesteps num_envs torch_threads eval_episodes buffer_size batch_size hidden_dim"
        at_least_one += " n_step"
        not_negative = "seed eval_frequency checkpoint_frequency learning_starts utd policy_lr q_lr alpha alpha_lr"
        for names, least in ((at_least_one + " alpha_anneal", 1), (not_negative, 0)):
            for name in names.split():
                if not least <= getattr(self, name) < math.inf:
                    raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        if self.autotune and self.alpha == 0:
            raise ValueError("--alpha must be positive, or fixed with --no-autotune")
        if self.alpha_anneal > 1 and (self.autotune or self.alpha == 0):
            raise ValueError("--alpha-anneal above 1 needs --no-autotune and a positive --alpha")
        if not all(0 <= value < math.inf for value in (*self.kl_weights, *(self.kl_bounds or ()))):
            raise ValueError("--kl-weights and --kl-bounds must be at least 0")
        if not math.isfinite(self.target_entropy or 0):
            raise ValueError(f"--target-entropy must be finite, not {self.target_entropy}")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2**32, not {self.seed}")
        if not (0 <= self.gamma <= 1 and 0 < self.tau <= 1):
            raise ValueError(f"--gamma must lie in [0, 1] and --tau in (0, 1], not {self.gamma} and {self.tau}")
        if self.buffer_size < self.num_envs:
            raise ValueError(f"--buffer-size must be at least --num-envs, {self.num_envs}, not {self.buffer_size}")
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


class Batch(NamedTuple):
    """Transitions, one a row: obs and next_obs (batch, obs_dim), actions (batch, action_dim), the others (batch,)."""

    obs: torch.Tensor
    next_obs: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    terminations: torch.Tensor  # 1 where the episode ended in a terminal state; a time limit leaves 0 and bootstraps


class ReplayBuffer:
    """Ring buffer of transitions in float32 tensors on `device`, allocated at once but touched only as it fills."""

    def __init__(self, capacity, obs_dim, action_dim, device):
        shapes = ((obs_dim,), (obs_dim,), (action_dim,), (), ())
        self.data = Batch(*(torch.empty(capacity, *shape, device=device) for shape in shapes))
        self.capacity, self.device, self.position, self.size = capacity, device, 0, 0

    def add(self, *transitions):
        """Append one transition of each environment: arrays in the order of `Batch`, first axis num_envs."""
        count = len(transitions[0])
        rows = (torch.arange(count, device=self.device) + self.position) % self.capacity
        for data, values in zip(self.data, transitions, strict=True):
            data[rows] = torch.as_tensor(values, dtype=torch.float32, device=self.device)
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, batch_size):
        """Return a `Batch` of rows drawn uniformly with replacement."""
        rows = torch.randint(self.size, (batch_size,), device=self.device)
        return Batch(*(data[rows] for data in self.data))

    def state_dict(self):
        # going through numpy gives each slice a storage of its own, without a copy: torch.save writes whole storages
        filled = [torch.from_numpy(data[: self.size].cpu().numpy()) for data in self.data]
        return {"position": self.position, "size": self.size, "data": filled}

    def load_state_dict(self, state):
        self.size = min(state["size"], self.capacity)
        self.position = self.size % self.capacity
        for data, filled in zip(self.data, state["data"], strict=True):  # oldest first; keep the newest that fit
            data[: self.size] = filled.roll(-state["position"], 0)[state["size"] - self.size :]


def n_step_transitions(window, gamma, obs, next_obs, actions, rewards, terminations, ended):
    """Add a step to `window`, a deque of the last n; yield what it completes, rows over n steps or up to an end."""
    window.append((obs, actions, 0 * rewards, 0 * rewards + 1, np.ones_like(ended)))
    for i, (first_obs, first_actions, returns, discounts, going) in enumerate(window):
        returns += discounts * rewards
        done = going & (ended | (i == 0 and len(window) == window.maxlen))  # the oldest row is complete
        # terminations such that gamma (1 - terminations) is the discount over all these steps
        yield first_obs[done], next_obs[done], first_actions[done], returns[done], (1 - discounts * ~terminations)[done]
        discounts *= gamma
        going &= ~ended


# ALGO LOGIC: initialize agent here:
class SoftQNetwork(nn.Module):
    """Twin critics Q_1, Q_2 as one batched network: every weight has a leading axis of size two."""

    def __init__(self, obs_dim, action_dim, hidden_dim):
        super().__init__()
        sizes = (obs_dim + action_dim, hidden_dim, hidden_dim, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            bound = fan_in**-0.5  # as nn.Linear
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, obs, actions):
        """Values (2, batch) of obs (batch, obs_dim) and actions (batch, action_dim) in the environment's units."""
        (weight1, weight2, weight3), (bias1, bias2, bias3) = self.weights, self.biases
        x = torch.cat((obs, actions), dim=-1).expand(2, -1, -1)
        x = F.relu(torch.baddbmm(bias1, x, weight1))
        x = F.relu(torch.baddbmm(bias2, x, weight2))
        return (x * weight3.mT).sum(-1) + bias3.squeeze(-1)  # faster than a matrix product with a single column


DELTA_MIN, DELTA_MAX = 1e-4, 1.9  # range of a learned delta_k; at 2 the mean of a kernel would change its sign


class Actor(nn.Module):
    """Diffusion policy: K denoising steps from N(0, nu^2 I), squashed by tanh into the bounds of the action space.

    Row k - 1 of a tensor of K rows belongs to step k: step K is the first one taken, step 1 makes the action.
    """

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        obs_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        low, high = torch.as_tensor(action_space.low).float(), torch.as_tensor(action_space.high).float()
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        self.register_buffer("action_low", low, persistent=False)
        self.register_buffer("action_high", high, persistent=False)
        self.diffusion_steps, self.prior_std = args.diffusion_steps, args.prior_std
        k = torch.arange(1, self.diffusion_steps + 1)
        position = (self.diffusion_steps - k) / max(self.diffusion_steps - 1, 1)  # 0 at step K, 1 at step 1
        delta = args.delta_first * (args.delta_last / args.delta_first) ** position
        logit = torch.logit((delta - DELTA_MIN) / (DELTA_MAX - DELTA_MIN))[:, None].repeat(1, action_dim)
        self.delta_logit = nn.Parameter(logit) if args.learn_delta and args.precondition else nn.Buffer(logit)
        angle = k[:, None] * 100 ** -torch.linspace(0, 1, 16)
        self.register_buffer("step_embedding", torch.cat((angle.sin(), angle.cos()), dim=1))
        # the first layer on (obs, embedding of k, a^k), cut into three: only the last part is inside the loop over k
        self.fc_obs = nn.Linear(obs_dim, args.hidden_dim)
        self.fc_step = nn.Linear(self.step_embedding.shape[1], args.hidden_dim, bias=False)
        self.fc_latent = nn.Linear(action_dim, args.hidden_dim, bias=False)
        self.fc2 = nn.Linear(args.hidden_dim, args.hidden_dim)
        self.fc_control = nn.Linear(args.hidden_dim, action_dim)
        nn.init.zeros_(self.fc_control.weight)  # u_theta = 0 at first: the chain stays close to the prior
        nn.init.zeros_(self.fc_control.bias)

    def kernels(self):
        """Decay 1 - delta_k / 2 and standard deviation nu sqrt(delta_k) of the kernels, both (K, 1, action_dim)."""
        delta = DELTA_MIN + (DELTA_MAX - DELTA_MIN) * torch.sigmoid(self.delta_logit)
        return (1 - delta / 2)[:, None], (self.prior_std * delta.sqrt())[:, None]

    def forward(self, obs, noise_scale=1.0):
        """Run a chain for each row of obs (batch, obs_dim): latents a^0 ... a^K and noises, (K + 1, batch, action_dim).

        The last row of the noises makes the sample of the prior, row k - 1 is eps_k of step k.
        """
        shape = (self.diffusion_steps + 1, len(obs), len(self.action_scale))
        noise = noise_scale * torch.randn(shape, dtype=obs.dtype, device=obs.device)
        noise.requires_grad_(torch.is_grad_enabled())  # a leaf: `policy_loss` asks for its gradient
        decay, std = self.kernels()
        obs_features, step_features = self.fc_obs(obs), self.fc_step(self.step_embedding)
        latent = self.prior_std * noise[-1]
        latents = [latent]
        for k in range(self.diffusion_steps, 0, -1):
            x = F.relu(obs_features + step_features[k - 1] + self.fc_latent(latent))
            control = self.fc_control(F.relu(self.fc2(x)))  # nu sqrt(delta_k) u_theta: its cost is half its square
            latent = decay[k - 1] * latent + std[k - 1] * (control + noise[k - 1])  # DIFF: (1)
            latents.append(latent)
        return torch.stack(latents[::-1]), noise

    def means(self, obs, latents):
        """Means (K, batch, action_dim) of all denoising kernels (1) at given a^0 ... a^K, in one pass."""
        decay, std = self.kernels()
        x = F.relu(self.fc_obs(obs) + self.fc_step(self.step_embedding)[:, None] + self.fc_latent(latents[1:]))
        return decay * latents[1:] + std * self.fc_control(F.relu(self.fc2(x)))

    def squash(self, latent):
        """Map latent (batch, action_dim) to actions in the bounds and the log-determinant (batch,) of that map."""
        action = torch.tanh(latent) * self.action_scale + self.action_bias
        action = action.clamp(self.action_low, self.action_high)  # rounding may lead out of them
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2x)), stable for large |x|
        log_slope = 2 * (math.log(2) - latent - F.softplus(-2 * latent))
        return action, (log_slope + self.action_scale.log()).sum(-1)

    def sample(self, obs):
        """Reparameterised action (batch, action_dim) and its path log-ratio (batch,), in place of a log-probability."""
        return self.act(*self(obs))

    def act(self, latents, noise):
        """Action and path log-ratio of a chain from `forward`."""
        decay, std = self.kernels()
        # l_k: both kernels of a step have the same standard deviation, so that their normalisers cancel
        residual = (latents[1:] - decay * latents[:-1]) / std
        log_ratio = 0.5 * (residual.square() - noise[:-1].square()).sum((0, -1))
        log_prior = (-0.5 * noise[-1].square() - math.log(self.prior_std) - 0.5 * math.log(2 * math.pi)).sum(-1)
        action, log_det = self.squash(latents[0])
        return action, log_prior + log_ratio - log_det  # DIFF: (3)

    def mean_action(self, obs):
        """Action (batch, action_dim) of the chain with all noises zero."""
        return self.squash(self(obs, noise_scale=0.0)[0][0])[0]

    @torch.no_grad()
    def diagnostics(self, obs):
        """Metrics of the chain: entropy bound and energy of the control in nats, delta_k and noise std of each step."""
        (latents, noise), (decay, std) = self(obs), self.kernels()
        control = (latents[:-1] - decay * latents[1:]) / std - noise[:-1]
        metrics = {"entropy_bound": -self.sample(obs)[1], "control_energy": 0.5 * control.square().sum((0, -1))}
        for k in range(1, self.diffusion_steps + 1):
            metrics |= {f"delta_{k}": 2 * (1 - decay[k - 1]), f"noise_std_{k}": std[k - 1]}
        return {f"diffusion/{name}": value for name, value in metrics.items()}

    def get_action(self, obs):
        """Return (action, log_prob, mean_action) of shapes (batch, action_dim), (batch,), (batch, action_dim)."""
        return *self.sample(obs), self.mean_action(obs)


def critic_loss(actor, qf, qf_target, batch, alpha, gamma):
    """Squared soft Bellman error, summed over the twin critics; also returns their values (2, batch)."""
    with torch.no_grad():
        next_actions, next_log_prob = actor.sample(batch.next_obs)
        next_value = qf_target(batch.next_obs, next_actions).amin(0) - alpha * next_log_prob
        target = batch.rewards + gamma * (1 - batch.terminations) * next_value
    qf_values = qf(batch.obs, batch.actions)
    return (qf_values - target).square().mean(1).sum(), qf_values


def kl_divergences(mean, log_std, target_mean, target_log_std):
    """KL( target || policy ), first if only the mean differs, then if only the std does: (2, ..., action_dim)."""
    kl_mean = 0.5 * ((mean - target_mean) / target_log_std.exp()).square()
    kl_std = log_std - target_log_std + 0.5 * (2 * (target_log_std - log_std)).exp() - 0.5
    return torch.stack((kl_mean.mean(-2), kl_std.mean(-2)))


def policy_loss(actor, actor_target, qf, obs, alpha, args):
    """Surrogate, before squashing, descended by (W2), not a meaningful value; log_prob; KLs from `actor_target`."""
    latents, noise = actor(obs)
    actions, log_prob = actor.act(latents, noise)
    value = qf(obs, actions).amin(0) - alpha * log_prob
    (decay, std), latents = actor.kernels(), latents.detach()
    velocity = torch.autograd.grad(value.sum(), noise, retain_graph=True)[0][:-1] / std.detach()  # DIFF: (4) via eps_k
    mean, noise, latent = actor.means(obs, latents), noise.detach()[:-1], latents[:-1]
    # the score is (m - x) / sigma^2: F^-1 times its derivatives by m and sigma is 1 and eps, as those of m + sigma eps
    surrogate = mean + std * noise if args.precondition else (mean - latent) / std.square()
    kl = kl_divergences(mean, std.log(), actor_target.means(obs, latents), actor_target.kernels()[1].log()).sum(1)
    noising = 0.5 * ((latents[1:] - decay * latent) / std).square() + std.log()  # -log pi(a^k | a^(k-1)) + const
    return (alpha * noising - surrogate * velocity).sum((0, -1)).mean(), log_prob.detach(), kl  # DIFF: (W2)


def temperature_loss(log_alpha, log_prob, target_entropy):
    """Raises the temperature while the mean of -log_prob is below the target entropy."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


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
    envs = SyncVectorEnv(thunks, autoreset_mode=AutoresetMode.SAME_STEP)
    thunks = [make_env(args.env_id, args.seed, i, False, "") for i in range(args.eval_episodes)]
    eval_envs = SyncVectorEnv(thunks, autoreset_mode=AutoresetMode.SAME_STEP)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    actor = Actor(envs.single_observation_space, envs.single_action_space, args).to(device)
    qf = SoftQNetwork(obs_dim, action_dim, args.hidden_dim).to(device)
    qf_target = copy.deepcopy(qf).requires_grad_(False)
    actor_target = copy.deepcopy(actor).requires_grad_(False)
    temperature = nn.ParameterDict({"log_alpha": torch.tensor(float(args.alpha)).log()}).to(device)
    kl_weights, kl_bounds = torch.tensor((args.kl_weights, args.kl_bounds or (0.0, 0.0)), device=device)[..., None]
    temperature["log_kl_weights"] = kl_weights.log().repeat(1, action_dim)
    target_entropy = args.target_entropy
    if target_entropy is None:  # -dim(A) is meant for actions in [-1, 1]; other units shift the entropy
        target_entropy = (actor.action_scale.log() - 1).sum().item()
    adam = partial(torch.optim.Adam, fused=True, capturable=args.cuda_graph)
    actor_optimizer = adam(actor.parameters(), lr=args.policy_lr)
    q_optimizer = adam(qf.parameters(), lr=args.q_lr)
    alpha_optimizer = adam(temperature.parameters(), lr=args.alpha_lr)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    parts = {"actor": actor, "qf": qf, "qf_target": qf_target, "temperature": temperature, "buffer": buffer}
    parts |= {"actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer, "alpha_optimizer": alpha_optimizer}
    parts |= {"actor_target": actor_target, "random_state": RandomState(device)}
    if checkpoint:
        restore_checkpoint(checkpoint, parts)
    last_log_alpha = math.log(args.alpha) if args.alpha else -math.inf

    def update(batch):
        """One gradient step of the critics, the actor and the temperature; returns tensors for the log."""
        alpha = temperature.log_alpha.detach().exp()
        qf_loss, qf_values = critic_loss(actor, qf, qf_target, batch, alpha, args.gamma)
        q_optimizer.zero_grad()
        qf_loss.backward()
        q_optimizer.step()

        actor_loss, log_prob, kl = policy_loss(actor, actor_target, qf, batch.obs, alpha, args)
        weights = temperature.log_kl_weights.exp() if args.kl_bounds else kl_weights
        actor_optimizer.zero_grad()
        (actor_loss + (weights.detach() * kl).sum()).backward()
        actor_optimizer.step()

        if args.kl_bounds:
            dual_loss = (weights * (kl_bounds - kl.detach())).sum()
            alpha_optimizer.zero_grad()
            dual_loss.backward()
            alpha_optimizer.step()

        if args.autotune:
            alpha_loss = temperature_loss(temperature.log_alpha, log_prob, target_entropy)
            alpha_optimizer.zero_grad()
            alpha_loss.backward()
            alpha_optimizer.step()

        with torch.no_grad():
            torch._foreach_lerp_(list(qf_target.parameters()), list(qf.parameters()), args.tau)
            torch._foreach_lerp_(list(actor_target.parameters()), list(actor.parameters()), args.tau)
        metrics = {"qf_loss": qf_loss, "qf_values": qf_values, "actor_loss": actor_loss, "alpha": alpha}
        metrics |= {"kl_mean": kl[0], "kl_std": kl[1], "kl_weight_mean": weights[0], "kl_weight_std": weights[1]}
        return {f"losses/{name}": value.detach() for name, value in (metrics | {"entropy": -log_prob}).items()}

    act = actor.sample
    if args.compile:
        update = torch.compile(update)
    if args.cuda_graph:
        update, act = CudaGraph(update), CudaGraph(act)

    def checkpoint_now():
        parameters = dict(nn.ModuleDict({"actor": actor, "critic": qf}).named_parameters())
        check_finite(metrics | parameters, global_step, run_dir)
        writer.flush()  # a checkpoint is never ahead of the curves
        save_checkpoint(run_dir / "checkpoint.pt", args, parts, global_step=global_step, updates_due=updates_due)

    def due(frequency):
        return frequency > 0 and global_step % frequency < args.num_envs

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
    obs, _ = envs.reset(seed=env_seed)
    window = deque(maxlen=args.n_step)
    metrics, updates_due = {}, checkpoint["updates_due"] if checkpoint else 0.0
    start_step, start_time = global_step, time.time()
    progress = tqdm(total=args.total_timesteps, initial=global_step, disable=not args.progress, mininterval=1)
    while global_step < args.total_timesteps and not stop:
        # ALGO LOGIC: put action logic here
        if global_step < args.learning_starts:
            actions = envs.action_space.sample()
        else:
            with torch.no_grad():
                actions = act(torch.as_tensor(obs, dtype=torch.float32, device=device))[0].cpu().numpy()

        # ALGO LOGIC: training; on a GPU it goes on while the environments step
        if global_step >= args.learning_starts and buffer.size:
            if not args.autotune:
                progress_left = max(0.0, 1 - global_step / (0.7 * args.total_timesteps))
                temperature.log_alpha.data.fill_(last_log_alpha + progress_left * math.log(args.alpha_anneal))
            updates_due += args.utd * args.num_envs
            while updates_due >= 1:
                batch = buffer.sample(args.batch_size)
                metrics = update(batch)
                updates_due -= 1

        # TRY NOT TO MODIFY: execute the game and log data
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        global_step += args.num_envs
        progress.update(args.num_envs)
        real_next_obs = next_obs.copy()
        for i in np.flatnonzero(terminations | truncations):  # next_obs[i] already belongs to the next episode
            real_next_obs[i] = infos["final_obs"][i]
            episode = infos["final_info"]["episode"]
            writer.add_scalar("charts/episodic_return", episode["r"][i], global_step)
            writer.add_scalar("charts/episodic_length", episode["l"][i], global_step)
            progress.set_postfix_str(f"episodic_return {episode['r'][i]:.1f}", refresh=False)
        if not (np.isfinite(real_next_obs).all() and np.isfinite(rewards).all()):
            check_finite(metrics | {"an observation": real_next_obs, "a reward": rewards}, global_step, run_dir)
        step = (obs, real_next_obs, actions, rewards, terminations, terminations | truncations)
        for transitions in n_step_transitions(window, args.gamma, *step):
            buffer.add(*transitions)

        # CRUCIAL step easy to overlook
        obs = next_obs

        if due(100) and metrics:
            check_finite(metrics, global_step, run_dir)
            for name, value in (metrics | actor.diagnostics(batch.obs)).items():
                writer.add_scalar(name, value.mean().item(), global_step)
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
