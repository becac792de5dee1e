"""DiffPPO: PPO with a diffusion policy (Sanokowski, Patil, Knoll 2025, arXiv 2512.02019).

Maximises E[ sum_t gamma^t (r_t + alpha H(pi(.|s_t))) ]; alpha = 0 leaves the entropy out. On a
rollout (s, a, r, s') of pi_old, with r and alpha in units of the returns' standard deviation:

    reward       R = r - alpha log pi_old(a|s)                                                  (1)
    advantage    A_t = R + gamma (1 - terminated) V(s') - V(s) + gamma lambda A_(t+1)           (2)
    own entropy  A' = A + alpha (log pi_old(a|s) - log pi(a|s)), standardised in a minibatch    (3)
    actor        -E[ min(rho A', clip(rho, 1 - eps, 1 + eps) A') ],  rho = pi / pi_old of a|s   (4)
    critic       E[ (V(s) - V_old(s) - A)^2 ] / 2                                               (5)

V_old is V during the rollout. A_(t+1) = 0 where the rollout or an episode ends; a time limit is no
terminal state: V(s') still counts.

The policy changes: K steps with controls c_k = c(s, a^k, k) lead from a^K ~ p = N(0, nu^2 I) to
a = tanh(a^0). PPO sees each as a decision, with states (s, a^k, k) and actions x = a^(k-1):

    step         q(x|a^k, s) = N( sqrt(1 - delta_k) a^k + nu sqrt(delta_k) c_k, diag(std_k^2) ) (6)
    free step    n(x|a^k)    = N( sqrt(1 - delta_k) a^k, nu^2 delta_k I ),  which keeps p       (7)
    log pi       log q - log n at each step, and at the end log p(a^0) - log |da / da^0|        (8)
    discounts    gamma = lambda = 1 inside a chain                                              (9)
    add to (4)   -alpha E[ rho log n ] / divisor of (3), rho constant and 0 where clipped      (10)

delta_k and std_k are learned, each for each step and dimension; (10) is there because n depends on
delta. (8) stands for log pi in (1) and (3); its sum is an upper bound (in the mean) of log pi(a|s).
The ratio rho of (4) is q / q_old.

    python diffppo_continuous.py --env-id HalfCheetah-v4
    python diffppo_continuous.py --resume runs/RUN/checkpoint.pt
"""

import contextlib
import copy
import errno
import importlib.metadata
import importlib.util
import math
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # run
    exp_name: str = Path(__file__).stem  # name of the experiment
    seed: int = 1  # seed of everything random
    env_id: str = "HalfCheetah-v4"  # gymnasium id, or module:id
    num_envs: int = 8  # environments stepped together
    total_timesteps: int = 1_000_000  # steps over all environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live
    torch_threads: int = 1  # CPU threads; one is fastest here
    compile: bool = False  # torch.compile the gradient step
    cuda_graph: bool = False  # replay gradient step and policy (CUDA)
    bf16: bool = False  # off-policy scripts only: ratios need float32
    track: bool = False  # also log to Weights & Biases
    eval_frequency: int = 10_000  # steps between evaluations; 0: at the end
    eval_episodes: int = 10  # episodes per evaluation
    checkpoint_frequency: int = 50_000  # steps, or 10 minutes; 0: at the end
    resume: str | None = None  # checkpoint to resume from

    # algorithm
    async_envs: bool = False  # a process for each environment
    num_steps: int = 256  # steps of each environment in a rollout
    learning_rate: float = 3e-4  # of actor and critic; on Humanoid-v4 1e-4
    anneal_lr: bool = True  # linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.9  # lambda of the advantages (2)
    num_minibatches: int = 32  # gradient steps per epoch
    update_epochs: int = 10  # epochs per rollout
    norm_adv: bool = True  # standardise advantages in each minibatch
    clip_coef: float = 0.2  # eps of (4)
    alpha: float = 0.01  # temperature, in units of the reward
    alpha_anneal: float = 1.0  # alpha falls from this multiple of it
    vf_coef: float = 0.5  # weight of the critic's loss
    max_grad_norm: float = 0.5  # of actor and critic together
    target_kl: float | None = None  # a larger approximate KL ends the epochs
    hidden_dim: int = 64  # width of the hidden layers
    normalize_obs: bool = True  # observations by running mean and std

    # diffusion policy
    diffusion_steps: int = 8  # denoising steps K
    prior_std: float = 0.5  # standard deviation nu of the prior
    delta_first: float = 0.9  # delta_K of the first denoising step
    delta_last: float | None = None  # delta_1 of the last, 1 / K; geometric between
    learn_delta: bool = True  # learn delta per step and dimension


class Rows(NamedTuple):
    """What a gradient step needs, one decision per row, rewards in units of the returns' std."""

    obs: torch.Tensor  # (rows, obs_dim), normalised
    k: torch.Tensor  # (rows,), the denoising step
    latents: torch.Tensor  # (rows, action_dim), a^k
    next_latents: torch.Tensor  # (rows, action_dim), a^(k-1)
    log_prob: torch.Tensor  # (rows,), log q of the rollout's policy
    advantages: torch.Tensor  # (rows,), A + alpha log(q_old / n_old): what of (3) stays
    returns: torch.Tensor  # (rows,), V_old + A


# ALGO LOGIC: networks and losses
def mlp(inputs, outputs, hidden_dim, last_gain):
    """Tanh network, orthogonal weights of gain sqrt(2), in the last layer `last_gain`."""
    sizes = (inputs, hidden_dim, hidden_dim, outputs)
    layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def squash(latent):
    """Action tanh(latent) and the log-determinant (...) of this map; latent (..., dim)."""
    action = torch.tanh(latent)
    log_slope = 2 * (math.log(2) - latent - F.softplus(-2 * latent))  # log(1 - tanh^2), stable
    return action, log_slope.sum(-1)


def log_normal(x, mean, std):
    """Log-density of x (..., dim) under N(mean, diag(std^2)), summed over dim."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


DELTA_MIN, DELTA_MAX = 1e-4, 0.999  # range of a learned delta


def augment(obs, latents, k, steps):
    """States (s, a^k, k) as vectors (..., obs_dim + action_dim + K), k one-hot."""
    return torch.cat((obs, latents, torch.eye(steps, device=k.device)[k - 1]), dim=-1)


class Actor(nn.Module):
    """Diffusion policy (6), squashed by tanh to [-1, 1]."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.steps, self.prior_std = args.diffusion_steps, args.prior_std
        last = args.delta_last or min(1 / self.steps, args.delta_first)  # no step makes most of a^0
        fall = (last / args.delta_first) ** torch.linspace(0, 1, self.steps).flip(0)
        delta = args.delta_first * fall[:, None].repeat(1, action_dim)  # row k - 1 for step k
        logit = torch.logit((delta - DELTA_MIN) / (DELTA_MAX - DELTA_MIN))
        self.delta_logit = nn.Parameter(logit) if args.learn_delta else nn.Buffer(logit)
        inputs = obs_dim + action_dim + self.steps  # (s, a^k, k)
        self.net = mlp(inputs, action_dim, args.hidden_dim, last_gain=0.0)  # c = 0 at first
        self.log_std = nn.Parameter((self.prior_std * delta.sqrt()).log())

    def free_steps(self):
        """Decay sqrt(1 - delta_k) and std nu sqrt(delta_k), (K, action_dim); k in row k - 1."""
        delta = DELTA_MIN + (DELTA_MAX - DELTA_MIN) * self.delta_logit.sigmoid()
        return (1 - delta).sqrt(), self.prior_std * delta.sqrt()

    def mean(self, obs, latents, k):
        """Mean (..., action_dim) of (6) from a^k (..., action_dim); k (...)."""
        decay, std = self.free_steps()
        control = self.net(augment(obs, latents, k, self.steps))
        return decay[k - 1] * latents + std[k - 1] * control  # DIFF: (6)

    def latents(self, obs, noise_scale=1.0):
        """Chain (K + 1, batch, action_dim) of obs (batch, obs_dim); row k is a^k."""
        shape = (self.steps + 1, obs.shape[0], self.log_std.shape[1])
        noise = noise_scale * torch.randn(shape, dtype=obs.dtype, device=obs.device)
        chain = [self.prior_std * noise[-1]]
        for k in range(self.steps, 0, -1):
            mean = self.mean(obs, chain[0], torch.full((obs.shape[0],), k, device=obs.device))
            chain.insert(0, mean + self.log_std[k - 1].exp() * noise[k - 1])
        return torch.stack(chain)

    def log_prob(self, obs, k, latents, next_latents):
        """log q and log n, both (...), of a^(k-1) after a^k; latents (..., action_dim), k (...)."""
        decay, free_std = self.free_steps()
        log_q = log_normal(next_latents, self.mean(obs, latents, k), self.log_std[k - 1].exp())
        log_n = log_normal(next_latents, decay[k - 1] * latents, free_std[k - 1])
        return log_q, log_n  # DIFF: (6), (7)

    def end_cost(self, latents):
        """log p(a^0) - log |da / da^0|, the last terms of (8), (...)."""
        normal = log_normal(latents, 0.0, torch.full_like(latents, self.prior_std))
        return normal - squash(latents)[1]

    def sample(self, obs):
        """Action (batch, action_dim), and the sum (8) in place of a log-probability."""
        latents = self.latents(obs)
        k = torch.arange(1, self.steps + 1, device=obs.device)[:, None].expand(-1, obs.shape[0])
        log_q, log_n = self.log_prob(obs.expand(self.steps, -1, -1), k, latents[1:], latents[:-1])
        return torch.tanh(latents[0]), (log_q - log_n).sum(0) + self.end_cost(latents[0])

    def mean_action(self, obs):
        """Action (batch, action_dim) without noise."""
        return torch.tanh(self.latents(obs, noise_scale=0.0)[0])


def gae(rewards, values, next_values, discounts, lambdas, dones):
    """Advantages (2) of tensors (steps, num_envs), `lambdas` and `dones` may be numbers.

    discounts: of next values, 0 in a terminal state. dones: 1 where an episode ended.
    """
    advantages = rewards + discounts * next_values - values
    traces = discounts * lambdas * (1 - dones)
    for t in range(len(rewards) - 2, -1, -1):
        advantages[t] += traces[t] * advantages[t + 1]
    return advantages


@torch.no_grad()
def make_rows(actor, critic, obs_rms, return_scaler, rollout, alpha, args):
    """`Rows` of a rollout, the scale of its rewards, and metrics."""
    steps, (num_steps, num_envs) = actor.steps, rollout.rewards.shape
    # decisions in the order in which they were made: (num_steps, K, num_envs), k falls from K to 1
    obs = obs_rms(rollout.obs)[:, None].expand(-1, steps, -1, -1)
    k = torch.arange(steps, 0, -1, device=obs.device)[:, None].expand(num_steps, -1, num_envs)
    latents, next_latents = rollout.latents[:, 1:].flip(1), rollout.latents[:, :-1].flip(1)
    log_q, log_n = actor.log_prob(obs, k, latents, next_latents)
    end_cost = actor.end_cost(rollout.latents[:, 0])
    entropy = (log_n - log_q).sum(1) - end_cost
    rewards = alpha * (log_n - log_q)  # DIFF: (8)
    rewards[:, -1] += rollout.rewards - alpha * end_cost
    return_scaler.update(rewards.sum(1), rollout.dones)
    scale = return_scaler.factor()

    values = critic(augment(obs, latents, k, steps))[..., 0]
    prior = actor.prior_std * torch.randn_like(latents[:, 0])
    fresh = critic(augment(obs_rms(rollout.next_obs), prior, k[:, 0], steps))[..., 0]
    following = torch.cat((values[1:, 0], fresh[-1:]))  # the rollout's next chain, where one is
    following = torch.where(rollout.dones == 1, fresh, following)
    next_values = torch.cat((values[:, 1:], following[:, None]), dim=1)
    discounts, lambdas = torch.ones_like(values), torch.ones_like(values)  # DIFF: (9)
    discounts[:, -1] = args.gamma * (1 - rollout.terminations)
    lambdas[:, -1] = args.gae_lambda * (1 - rollout.dones)
    axis = rewards * scale, values, next_values, discounts, lambdas
    advantages = gae(*(x.flatten(0, 1) for x in axis), dones=0).view_as(values)
    explained = 1 - advantages.var() / ((values + advantages).var() + 1e-8)
    kept = advantages + alpha * scale * (log_q - log_n)
    rows = Rows(obs, k, latents, next_latents, log_q, kept, values + advantages)
    metrics = {"losses/explained_variance": explained, "losses/entropy": entropy}
    metrics |= {"diffusion/noise_std_1": actor.log_std[0].exp()}
    return Rows(*(x.flatten(0, 2) for x in rows)), scale, metrics


def actor_loss(log_prob, old_log_prob, advantages, clip_coef):
    """Clipped surrogate (4), and the ratios rho (rows,)."""
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), ratio


def free_step_loss(log_n, ratio, advantages, clip_coef, alpha):
    """Equation (10), with alpha in the units of `advantages`, where (4) has a gradient."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    weight = (ratio * (ratio * advantages <= clipped * advantages)).detach()
    return -(alpha * weight * log_n).mean()  # DIFF: (10)


def ppo_loss(actor, critic, rows, alpha, args):
    """Loss of actor and critic, (3) to (5), alpha in units of the returns' std; and metrics."""
    log_prob, log_n = actor.log_prob(rows.obs, rows.k, rows.latents, rows.next_latents)
    advantages = rows.advantages - alpha * (log_prob - log_n).detach()  # DIFF: (3), (8)
    mean, std = (advantages.mean(), advantages.std() + 1e-8) if args.norm_adv else (0.0, 1.0)
    advantages = (advantages - mean) / std
    pi_loss, ratio = actor_loss(log_prob, rows.log_prob, advantages, args.clip_coef)
    pi_loss = pi_loss + free_step_loss(log_n, ratio, advantages, args.clip_coef, alpha / std)
    states = augment(rows.obs, rows.latents, rows.k, actor.steps)
    v_loss = 0.5 * F.mse_loss(critic(states)[:, 0], rows.returns)  # (5)
    metrics = {"losses/actor_loss": pi_loss, "losses/critic_loss": v_loss}
    metrics |= {"losses/approx_kl": ratio - 1 - (log_prob - rows.log_prob)}
    metrics |= {"losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float()}
    return pi_loss + args.vf_coef * v_loss, metrics


def main(args: Args):
    device = set_up(args)
    envs = make_envs(args.env_id, args.num_envs, args.async_envs)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    actor = Actor(obs_dim, action_dim, args).to(device)
    critic_dim = obs_dim + action_dim + args.diffusion_steps  # of (s, a^k, k)
    critic = mlp(critic_dim, 1, args.hidden_dim, last_gain=1.0).to(device)
    obs_rms = RunningMeanStd(obs_dim, args.normalize_obs).to(device)
    return_scaler = ReturnScaler(args.num_envs, args.gamma).to(device)
    rate = torch.tensor(args.learning_rate, device=device)  # a tensor: CUDA graphs see it change
    adam = partial(torch.optim.Adam, eps=1e-5, fused=True, capturable=args.cuda_graph)
    optimizer = adam([*actor.parameters(), *critic.parameters()], lr=rate)
    shape = (args.num_steps, args.num_envs)
    chains = (args.num_steps, args.diffusion_steps + 1, args.num_envs, action_dim)
    shapes = (*shape, obs_dim), (*shape, obs_dim), chains, shape, shape, shape
    rollout = Rollout(*(torch.zeros(size, device=device) for size in shapes))
    parts = dict(actor=actor, critic=critic, obs_rms=obs_rms, return_scaler=return_scaler)
    run = Run(args, envs, parts | dict(optimizer=optimizer))  # folder, log, checkpoints; resumes
    rate = optimizer.param_groups[0]["lr"]  # a resumed optimiser has a tensor of its own

    def act(obs):
        latents = actor.latents(obs)
        return latents, torch.tanh(latents[0])

    def update(rows, alpha):
        """One gradient step on a minibatch, alpha in units of the returns' std; returns metrics."""
        loss, metrics = ppo_loss(actor, critic, rows, alpha, args)
        descend(optimizer, loss, args.max_grad_norm)
        return {name: value.detach().mean() for name, value in metrics.items()}

    update, act = speed_up(args, device, update, act=act)

    # TRY NOT TO MODIFY: start the game
    obs = run.reset()
    while run.goes_on():
        if args.anneal_lr:
            rate.fill_(args.learning_rate * (1 - run.step / args.total_timesteps))
        alpha = math.exp(run.fixed_log_alpha())

        for t in range(args.num_steps):
            # ALGO LOGIC: act
            with torch.no_grad():
                latents, actions = act(obs_rms(to_tensor(obs, device)))

            # TRY NOT TO MODIFY: step the environments and store the transitions
            actions = actions.cpu().numpy()
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            dones, last_obs = terminations | truncations, next_obs.copy()
            for i in np.flatnonzero(dones):
                last_obs[i] = infos["final_obs"][i]  # next_obs[i] starts the next episode
            run.count(infos, actions=actions, obs=(next_obs, last_obs), rewards=rewards)
            step = obs, last_obs, latents, rewards, terminations, dones
            for storage, values in zip(rollout, step, strict=True):
                storage[t] = to_tensor(values, device)
            obs = next_obs

        # ALGO LOGIC: learn
        networks = actor, critic, obs_rms, return_scaler
        rows, scale, metrics = make_rows(*networks, rollout, alpha, args)
        for _ in range(args.update_epochs):
            order = torch.randperm(len(rows.obs), device=device)
            shuffled = (x[order].tensor_split(args.num_minibatches) for x in rows)
            for batch in zip(*shuffled, strict=True):
                metrics |= update(Rows(*batch), alpha * scale)
            if args.target_kl is not None and metrics["losses/approx_kl"] > args.target_kl:
                break
        obs_rms.update(rollout.obs.flatten(0, 1))  # only now: the ratios need the rollout's
        metrics |= {"charts/learning_rate": rate, "losses/alpha": torch.tensor(alpha)}
        run.log(metrics)
        if run.due(args.eval_frequency):
            run.evaluate(actor, obs_rms)
        run.save_when_due()
    run.close()  # evaluates at the end, saves


# --------------------------------------------------------------------------------------------------
# Frame: the same text in every script (tools/sync.py). Nothing below belongs to the algorithm.

# For `uv run`, which installs what a file needs (PEP 723):
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.17.0",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "numpy==2.4.6",
#     "tqdm==4.70.1",
# ]
# ///

LIMITS = {  # smallest and largest value of a flag, in all scripts
    "num_envs total_timesteps torch_threads eval_episodes buffer_size": (1, math.inf),
    "batch_size hidden_dim diffusion_steps alpha_anneal action_samples": (1, math.inf),
    "num_steps num_minibatches update_epochs policy_delay critic_dim": (1, math.inf),
    "eval_frequency checkpoint_frequency learning_starts utd": (0, math.inf),
    "policy_lr q_lr alpha_lr learning_rate alpha": (0, math.inf),
    "kl_weight_mean kl_weight_std clip_coef vf_coef target_kl critic_entropy": (0, math.inf),
    "max_grad_norm kl_bound": (1e-6, math.inf),
    "target_entropy v_min v_max": (-1e9, 1e9),
    "delta_first delta_last": (0.001, 0.99),
    "prior_std initial_std": (1e-6, 1e6),
    "seed": (0, 2**32 - 1),
    "gamma gae_lambda": (0, 1),
    "num_atoms": (1, 1e6),
    "tau": (1e-6, 1),
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POLICY = ("actor", "obs_rms")  # parts of a run that act


def fail(message):
    """Print one error line to stderr and exit with code 2."""
    print(f"error: {textwrap.shorten(message, 200, placeholder=' ...')}", file=sys.stderr)
    sys.exit(2)


def set_up(args):
    """Refuse flags that cannot work, seed everything random, and return the torch.device."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    for names, (low, high) in LIMITS.items():
        for name in given.keys() & names.split():
            if not low <= given[name] <= high or given[name] == math.inf:
                fail(f"--{name.replace('_', '-')} must lie in [{low}, {high}], not {given[name]}")
    if args.alpha == 0 and given.get("autotune"):
        fail("--alpha must be positive, or fixed with --no-autotune")
    if args.alpha_anneal > 1 and (args.alpha == 0 or given.get("autotune")):
        fail("--alpha-anneal needs a positive --alpha, without --autotune")
    step_wise = "kl_bound" in given and given.get("actor_gradient") != "chain"
    if step_wise and args.diffusion_steps > args.batch_size:
        fail("--diffusion-steps must not be larger than --batch-size")
    if given.get("delta_last", 0) > given.get("delta_first", 1):
        fail("--delta-last must not be larger than --delta-first")
    rows, parts = args.num_envs * given.get("num_steps", 2), given.get("num_minibatches", 1)
    if rows < 2 * parts:
        fail("--num-envs times --num-steps must be at least twice --num-minibatches")
    if args.cuda_graph and rows % parts:
        fail("--cuda-graph needs minibatches of one size: --num-minibatches divides the rollout")
    if given.get("v_min", -1) >= given.get("v_max", 1):
        fail("--v-min must be smaller than --v-max")
    if given.get("normalize_rewards") and not args.v_min < 0 < args.v_max:
        fail("--normalize-rewards needs --v-min < 0 < --v-max")
    if given.get("buffer_size", args.num_envs) < args.num_envs:
        fail("--buffer-size must not be smaller than --num-envs")
    devices = ("cuda", "cpu") if args.device == "auto" else (args.device,)
    devices = [name for name in devices if getattr(torch, name).is_available()]
    if not devices:
        fail(f"--device {args.device} is not available: PyTorch sees none")
    if args.cuda_graph and devices[0] != "cuda":
        fail("--cuda-graph needs a CUDA card, and PyTorch sees none")
    if args.cuda_graph and not importlib.util.find_spec("tensordict"):
        fail("--cuda-graph needs the package tensordict: pip install tensordict")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        fail("--compile needs a C++ compiler, g++ or clang++")
    if args.track and not tracking_works():
        fail("--track needs the package wandb, and `wandb login` or WANDB_MODE=offline")
    if args.bf16 and "clip_coef" in given:
        fail("--bf16 is for off-policy scripts: PPO's ratios would suffer from rounded means")
    if args.bf16 and not has_bf16(devices[0]):
        fail("--bf16 needs a processor or card with bfloat16 instructions: it is slow without")
    torch.set_num_threads(args.torch_threads)
    # oneDNN in place of MKL, which uses no AVX-512 on AMD. Without AMX its kernels stay float32 at
    # this setting; for narrow networks its start costs more than it saves.
    onednn = "avx512f" in instruction_sets() and "amx" not in instruction_sets()
    wide = args.hidden_dim >= 128
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if onednn and wide else "none"
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    return torch.device(devices[0])


def instruction_sets():
    """What Linux says of the processor, these among it; elsewhere an empty string."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def has_bf16(kind):
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and "bf16" in instruction_sets()  # avx512_bf16, amx_bf16; on ARM bf16


def tracking_works():
    with contextlib.suppress(Exception):  # no wandb, or a key that is none
        import wandb

        return os.environ.get("WANDB_MODE", "online") != "online" or wandb.login(prompt=False)


class Interface(gym.Wrapper):
    """Any environment as a script sees it: flat float32 observations, actions in [-1, 1], no infos.

    Raises ValueError for spaces that the scripts cannot train with.
    """

    def __init__(self, env):
        super().__init__(env)
        obs_space, space = env.observation_space, env.action_space
        boxes = obs_space.values() if isinstance(obs_space, gym.spaces.Dict) else [obs_space]
        if any(len(box.shape or ()) > 1 for box in boxes):
            raise ValueError(f"its observations have more than one axis: {obs_space}")
        real = isinstance(space, gym.spaces.Box) and space.dtype.kind == "f"
        if not real or len(space.shape) != 1:
            raise ValueError(f"its actions are not real numbers along one axis: {space}")
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        if not (abs(low) < 1e9).all() or not (abs(high) < 1e9).all() or not (low < high).all():
            raise ValueError(f"the bounds of its actions meet, or are 1e9 and more: {space}")
        self.centre, self.half_width = (high + low) / 2, (high - low) / 2
        self.low, self.high, self.dtype = low, high, space.dtype
        self.bounds = {"action_low": low.tolist(), "action_high": high.tolist()}
        self.mixed, size = not isinstance(obs_space, gym.spaces.Box), gym.spaces.flatdim(obs_space)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, space.shape, np.float32)

    def observation(self, obs):  # a copy: an environment may write all of them into one array
        if self.mixed:
            obs = gym.spaces.flatten(self.env.observation_space, obs)
        with np.errstate(over="ignore"):  # `Run.check` stops at what is then infinite
            return np.array(obs, np.float32).reshape(self.observation_space.shape)

    def reset(self, **options):
        return self.observation(self.env.reset(**options)[0]), {}

    def step(self, action):
        action = np.maximum(self.low, np.minimum(self.high, self.centre + self.half_width * action))
        obs, reward, terminated, truncated, _ = self.env.step(action.astype(self.dtype))
        ended = bool(terminated), bool(truncated)
        return self.observation(obs), float(np.squeeze(reward)), *ended, {}


def make_envs(env_id, num_envs, processes=False):
    """Vector environment of `num_envs` copies of `env_id`, each behind an `Interface`."""

    def make_env(own=os.getpid()):  # noqa: B008  (it shall be that of the caller)
        if os.getpid() != own:  # a signal to our group, such as Ctrl-C, is for us alone
            getattr(os, "setpgrp", int)()  # not on Windows
        return gym.wrappers.RecordEpisodeStatistics(Interface(gym.make(env_id)))

    sys.path.append(os.getcwd())  # where module:id may lie
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # -v4 is the papers' choice
    if importlib.util.find_spec("mujoco"):  # as are its model files with their deprecated words
        quiet = lambda text: "deprecated" in text or print(text, file=sys.stderr)  # noqa: E731
        importlib.import_module("mujoco").set_mju_user_warning(quiet)
    try:
        if env_id.startswith("dm_control/"):
            import shimmy  # noqa: F401  (registers the dm_control environments)
        vector = gym.vector.AsyncVectorEnv if processes else gym.vector.SyncVectorEnv
        return vector([make_env] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        fail(f"cannot train in {env_id}: {error}")


def env_seeds(seed, count, purpose):
    """Seeds of environments; other seeds and purposes (0: evaluation) share none of them."""
    entropies = [np.random.SeedSequence((seed, i, purpose)) for i in range(count)]
    return [int(entropy.generate_state(1)[0]) for entropy in entropies]


def to_tensor(array, device):
    return torch.as_tensor(array, dtype=torch.float32, device=device)


class RunningMeanStd(nn.Module):
    """Normalises by mean and variance of all rows that `update` has seen, unless disabled."""

    EPSILON, CLIP = 1e-2, 10.0  # a dimension that hardly moves is not blown up

    def __init__(self, dim, enabled=True):
        super().__init__()
        self.enabled = enabled
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.tensor(0))

    def update(self, rows):
        """Update the statistics with rows (count, dim)."""
        if self.enabled:
            self.count += len(rows)
            weight, shift = len(rows) / self.count, rows.mean(0) - self.mean
            self.var += weight * (rows.var(0, correction=0) - self.var)
            self.var += weight * (1 - weight) * shift.square()
            self.mean += weight * shift

    def forward(self, x):
        if not self.enabled:
            return x
        return ((x - self.mean) / (self.var + self.EPSILON).sqrt()).clamp(-self.CLIP, self.CLIP)


def descend(optimizer, loss, max_grad_norm=math.inf, max_grad_value=math.inf):
    """One step of an optimiser; no other weights than its own get a gradient."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=weights)
    if max_grad_norm < math.inf:
        nn.utils.clip_grad_norm_(weights, max_grad_norm)
    if max_grad_value < math.inf:
        nn.utils.clip_grad_value_(weights, max_grad_value)
    optimizer.step()


@torch.no_grad()
def move_towards(average, model, tau):
    """Exponential moving average of the weights of `model`."""
    for slow, weight in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(weight, tau)


def speed_up(args, device, *updates, act):
    """Gradient steps, by the flags compiled, in bfloat16 or as CUDA graphs; and the policy."""
    if args.compile:
        updates = [torch.compile(update) for update in updates]
    if args.bf16:  # without a cache of cast weights: an optimiser changes them inside an update
        autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        updates = [autocast(update) for update in updates]
    if args.cuda_graph:
        from tensordict.nn import CudaGraphModule

        *updates, act = (CudaGraphModule(function) for function in (*updates, act))
    return *updates, act


def load_checkpoint(path):
    """Checkpoint of this script, tensors on the CPU, "args" as `Args`. Executes nothing of it."""
    if not Path(path).is_file():
        fail(f"there is no file {path}; a checkpoint is runs/RUN/checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint["script"] == Path(__file__).stem:
            return checkpoint | {"args": Args(**checkpoint["args"])}
        problem = f"was written by {checkpoint['script']}.py"
    except Exception as error:  # whatever is wrong with the file
        problem = f"cannot be read ({type(error).__name__})"
    fail(f"the checkpoint {path} {problem}")


class Run:
    """The folder of a run: its log, progress, evaluations, signals and checkpoints.

    `parts` are what a checkpoint holds, by name: networks, optimisers, normaliser, replay buffer.
    """

    exists = False  # until then a run can be refused without a trace

    def __init__(self, args, envs, parts):
        self.args, self.envs, self.parts, self.step = args, envs, parts, 0
        self.stride = args.num_envs * getattr(args, "num_steps", 1)  # steps of one pass of the loop
        self.eval_envs = make_envs(args.env_id, args.eval_episodes)
        self.folder, self.evaluated, self.best_return = self.open_folder(), 0, -math.inf
        if args.resume:
            self.restore(load_checkpoint(args.resume))
        Run.exists, self.stop_signal, self.last_episode = True, None, "no episode yet"
        self.first_step, self.start_time, self.save_time = self.step, time.time(), time.time()
        self.line_step, self.line_time = self.step, time.time()
        if args.track:
            import wandb

            name = {key: self.folder.resolve().name for key in ("name", "id")}
            wandb.init(**name, resume="allow", config=asdict(args), sync_tensorboard=True)
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        packages = filter(importlib.util.find_spec, ("torch", "gymnasium", "mujoco", "numpy"))
        facts = asdict(args) | {name: importlib.metadata.version(name) for name in packages}
        facts |= {"python": sys.version.split()[0], "command": " ".join(sys.argv)}
        rows = [f"|{name}|{value}|" for name, value in facts.items()]
        self.writer.add_text("hyperparameters", "\n".join(["|param|value|", "|-|-|", *rows]))
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # of a terminal that closes
        nohup = {hangup} if signal.getsignal(hangup) == signal.SIG_IGN else set()
        numbers = {signal.SIGINT, signal.SIGTERM, hangup} - nohup
        self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, disable=None, mininterval=1)
        self.say(f"run folder {self.folder}, step {self.step} of {args.total_timesteps}")
        if args.total_timesteps <= getattr(args, "learning_starts", -1):
            self.say(f"all steps will be random: --learning-starts is {args.learning_starts}")

    def open_folder(self):
        """Make the folder of this run, or take that of the one to resume, and lock it."""
        args = self.args
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(1e6 * time.time())}"
        folder = Path("runs", re.sub(r"[^\w.-]", "-", name))
        if args.resume:
            folder = Path(os.path.relpath(Path(args.resume).resolve().parent))
        try:
            folder.mkdir(parents=True, exist_ok=bool(args.resume))
            self.lock = open(folder / "lock", "w")
        except OSError as error:
            fail(f"cannot make the folder {folder}: {error.strerror}")
        try:
            import fcntl

            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except (BlockingIOError, PermissionError):
            fail(f"another process is training in {folder}")
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        return folder

    def on_signal(self, number, _):
        self.stop_signal = number  # stop after the current step, with a checkpoint
        signal.signal(number, signal.SIG_DFL)  # or at once, when the signal comes again

    def reset(self):
        """First observations (num_envs, obs_dim); a resumed run begins new episodes."""
        if self.args.resume and self.due(self.args.eval_frequency) and self.evaluated < self.step:
            self.evaluate(*(self.parts[part] for part in POLICY))  # a signal had cut it short
        self.envs.action_space.seed(self.args.seed + self.step)
        obs, _ = self.envs.reset(seed=env_seeds(self.args.seed, self.args.num_envs, 1 + self.step))
        self.check({"an observation": obs})
        return obs

    def goes_on(self):
        return self.step < self.args.total_timesteps and self.stop_signal is None

    def due(self, frequency):
        """Whether the last steps reached a multiple of `frequency`."""
        return frequency > 0 and self.step % frequency < self.stride

    def updates_due(self):
        """Gradient steps now: --utd for each environment step past --learning-starts."""
        learned = max(0, self.step - self.args.num_envs - self.args.learning_starts)
        due = max(0, self.step - self.args.learning_starts)
        return math.floor(self.args.utd * due) - math.floor(self.args.utd * learned)

    def fixed_log_alpha(self):
        """With --no-autotune; the factor --alpha-anneal is gone after 70 % of the run."""
        left = max(0.0, 1 - self.step / (0.7 * self.args.total_timesteps))
        alpha = self.args.alpha * self.args.alpha_anneal**left
        return math.log(alpha) if alpha else -1e9

    def check(self, values):
        """Stop the run, exit code 1, at a value that is not finite or over 1e18 (squares fail)."""
        for name, value in values.items():
            if not (abs(value) < 1e18).all():
                where = f"the last checkpoint, if any, is in {self.folder}"
                sys.exit(f"error: {name} is not finite at step {self.step} (or over 1e18); {where}")

    def count(self, infos, actions, obs, rewards):
        """Count a step of all environments, check its numbers, log the episodes that ended."""
        self.step += self.args.num_envs
        self.check({"an action": actions, "an observation": np.stack(obs), "a reward": rewards})
        for i in np.flatnonzero(infos.get("_final_info", ())):
            episode = infos["final_info"]["episode"]
            self.last_episode = f"return {episode['r'][i]:.1f}"
            self.writer.add_scalar("charts/episodic_return", episode["r"][i], self.step)
            self.writer.add_scalar("charts/episodic_length", episode["l"][i], self.step)
            self.bar.set_postfix_str(self.last_episode, refresh=False)
        wait = 60 if self.line_step > self.first_step else 10
        if self.bar.disable and time.time() > self.line_time + wait:  # no terminal
            speed = (self.step - self.line_step) / (time.time() - self.line_time)
            left = tqdm.format_interval((self.args.total_timesteps - self.step) / speed)
            self.say(f"step {self.step}: {self.last_episode}, {speed:.0f} steps/s, {left} left")
            self.line_step, self.line_time = self.step, time.time()
        self.bar.update(self.args.num_envs)

    def say(self, line):
        try:
            self.bar.write(line)
            sys.stdout.flush()
        except OSError:  # a pipe or terminal that has gone costs the line, not the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def log(self, metrics):
        """Write the means of tensors or arrays; stop the run if one is not finite."""
        for name, value in metrics.items():
            self.check({name: value})
            self.writer.add_scalar(name, value.mean().item(), self.step)
        speed = (self.step - self.first_step) / (time.time() - self.start_time)
        self.writer.add_scalar("charts/SPS", speed, self.step)

    @torch.no_grad()
    def evaluate(self, actor, obs_rms):
        """Log the returns of --eval-episodes episodes of the policy, with and without its noise.

        The policy with the best mean so far is kept in policy_best.pt. Environments and start
        states are not those of the training, whose random numbers are left alone. An episode ends
        after 10,000 steps at the latest; a signal ends the evaluation.
        """
        self.say(f"step {self.step}: evaluating") if self.bar.disable else None
        envs, device, found = self.eval_envs, obs_rms.mean.device, {}
        policies = {"": lambda obs: actor.sample(obs)[0], "_mean_action": actor.mean_action}
        for name, policy in policies.items():
            devices = [] if device.type == "cpu" else [device]
            with torch.random.fork_rng(devices, device_type=device.type):
                torch.manual_seed(self.args.seed)
                obs, _ = envs.reset(seed=env_seeds(self.args.seed, envs.num_envs, 0))
                returns, active, steps = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool), 0
                while active.any() and steps < 10_000:
                    if self.stop_signal:
                        return
                    actions = policy(obs_rms(to_tensor(obs, device))).cpu().numpy()
                    obs, rewards, terminations, truncations, _ = envs.step(actions)
                    returns += active * rewards
                    active &= ~(terminations | truncations)
                    steps += 1
            found[f"episodic_return{name}"] = returns
        words, self.evaluated = f"step {self.step}:", self.step
        for name, returns in found.items():
            self.check({f"eval/{name}": returns})
            self.writer.add_scalar(f"eval/{name}", returns.mean(), self.step)
            words += f" {name} {returns.mean():.1f} +- {returns.std():.1f}"
        self.say(words)
        mean = found["episodic_return"].mean().item()
        if mean > self.best_return:
            self.best_return = mean
            self.save("policy_best.pt", only=POLICY)

    def save(self, name="checkpoint.pt", only=None):
        """Write parts (all, or `only` some) beside the old file, then replace it: one is whole."""
        parts = {key: part for key, part in self.parts.items() if only is None or key in only}
        state = {key: part.state_dict() for key, part in parts.items()}
        for part in (key for key in parts if isinstance(parts[key], nn.Module)):
            self.check({f"{part}.{key}": value for key, value in state[part].items()})
        state |= {"script": Path(__file__).stem, "args": asdict(self.args)}
        state |= {"global_step": self.step, **self.envs.get_attr("bounds")[0]}
        state |= {"best_return": self.best_return} if only else {"evaluated": self.evaluated}
        path, temporary = self.folder / name, self.folder / f"{name}.tmp"
        try:
            self.writer.flush()  # a checkpoint is never ahead of the curves
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            full = getattr(cause, "errno", None) in FULL_DISK
            problem = "the disk is full" if full else " ".join(str(error).split())
            if only is None:
                sys.exit(f"error: cannot write the checkpoint {path}: {problem}")
            self.say(f"cannot write {path}: {problem}")

    def save_when_due(self):
        """At multiples of --checkpoint-frequency, and ten minutes after the last time."""
        frequency = self.args.checkpoint_frequency
        late = frequency and time.time() > self.save_time + 600
        if self.goes_on() and (late or self.due(frequency)):  # else `close` does
            self.save()
            self.save_time = time.time()

    def restore(self, checkpoint):
        """Load all parts; optimisers keep the learning rates of the flags."""
        fixed = "env_id seed normalize_obs normalize_rewards v_min v_max num_atoms prior_std"
        for name in fixed.split():  # the run has learned with these
            old = getattr(checkpoint["args"], name, None)
            if old != getattr(self.args, name, None):
                fail(f"the checkpoint has --{name.replace('_', '-')} {old}: it cannot be changed")
        if "temperature" in checkpoint and getattr(self.args, "autotune", False):
            if checkpoint["temperature"]["log_alpha"].exp() == 0:
                fail("the checkpoint has temperature 0, which --autotune cannot change")
        if not self.parts.keys() <= checkpoint.keys():
            fail(f"{self.args.resume} holds a policy alone: resume from a checkpoint.pt")
        self.step = checkpoint["global_step"]
        self.evaluated = checkpoint.get("evaluated", self.step)
        if (best := self.folder / "policy_best.pt").exists():
            self.best_return = load_checkpoint(best)["best_return"]
        torch.manual_seed(self.args.seed + self.step)
        try:
            for name, part in self.parts.items():
                state = checkpoint[name]
                if "param_groups" in state:
                    groups = part.state_dict()["param_groups"]
                    if len(groups[0]["params"]) != len(state["param_groups"][0]["params"]):
                        raise ValueError(f"{name} is of another number of weights")
                    state = copy.deepcopy(state)  # or the file stays mapped
                    state["param_groups"] = groups
                part.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            fail(f"the checkpoint does not fit the arguments: {error}")

    def close(self):
        """Evaluate at the end, save, say how to go on; exit with 128 + signal if one stopped it."""
        finished = self.step >= self.args.total_timesteps
        if finished and self.evaluated < self.step:
            self.evaluate(*(self.parts[part] for part in POLICY))
        self.save()
        self.save("policy.pt", only=POLICY)
        for thing in (self.bar, self.envs, self.eval_envs, self.writer, self.lock):
            thing.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        again = f"python {sys.argv[0]} --resume {self.folder / 'checkpoint.pt'}"
        if finished and (self.stop_signal is None or self.evaluated == self.step):
            return self.say(f"finished; to train longer: {again} --total-timesteps N")
        self.say(f"checkpoint written at step {self.step}; go on with: {again}")
        sys.exit(128 + self.stop_signal)


def start():
    """Run main with the flags of the command line, on top of those of the run to resume."""
    args = tyro.cli(Args)
    if args.resume:
        args = tyro.cli(Args, default=load_checkpoint(args.resume)["args"])
    try:
        main(args)
    except (MemoryError, RuntimeError) as error:
        if Run.exists or not re.search("memory|overflow|allocate", str(error)):
            raise
        fail(f"networks and buffers of these sizes do not fit into memory: {error}")
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        sys.exit(f"error: the disk is full: {error}")


# --------------------------------------------------------------------------------------------------
# Rollout: the same text in every on-policy script (tools/sync.py).


class Rollout(NamedTuple):
    """Transitions of all environments."""

    obs: torch.Tensor  # (num_steps, num_envs, obs_dim), not normalised
    next_obs: torch.Tensor  # likewise, of the same episode
    latents: torch.Tensor  # (num_steps, ...), before squashing; of DiffPPO whole chains
    rewards: torch.Tensor  # (num_steps, num_envs)
    terminations: torch.Tensor  # (num_steps, num_envs), 1 in a terminal state
    dones: torch.Tensor  # (num_steps, num_envs), 1 where an episode ended, for either reason


# --------------------------------------------------------------------------------------------------
# Returns: the same text in four scripts (tools/sync.py).


class ReturnScaler(nn.Module):
    """Divides rewards by max(std, largest / bound) of the discounted sums of past rewards.

    The second keeps all sums within +-bound, for critics 0.8 of their support, as in FlashSAC.
    """

    def __init__(self, num_envs, gamma, bound=math.inf):
        super().__init__()
        self.gamma, self.bound, self.rms = gamma, bound, RunningMeanStd(1)
        self.register_buffer("largest", torch.zeros(1))
        self.register_buffer("sums", torch.zeros(num_envs), persistent=False)

    def update(self, rewards, dones):
        """Update with rows (num_steps, num_envs); the end of an episode starts a new sum."""
        seen = []
        for reward, done in zip(rewards, dones, strict=True):
            self.sums = self.gamma * self.sums + reward
            seen.append(self.sums)
            self.sums = self.sums * (1 - done)
        self.rms.update(torch.cat(seen)[:, None])
        self.largest.copy_(torch.maximum(self.largest, torch.cat(seen).abs().amax()))

    def factor(self):
        """What rewards are multiplied by, and all that is in their units."""
        return torch.minimum((self.rms.var + 1e-8).rsqrt(), self.bound / self.largest)


if __name__ == "__main__":
    start()
