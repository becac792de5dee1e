"""PPO: proximal policy optimisation, tanh-Gaussian policy (Schulman et al. 2017, arXiv 1707.06347). Docs: docs/ppo.md

Maximises E[ sum_t gamma^t ( R_t + alpha H(pi(.|s_t)) ) ]: the entropy is part of the reward and so of the soft value V;
alpha = 0 leaves it out. On data (s, a, R, s') of pi_old, R and alpha in units of the returns' standard deviation, with
the ratio r = pi(a|s) / pi_old(a|s), A_(t+1) = 0 once an episode has ended, and A standardised in each minibatch,

    advantage  A_t = d_t + gamma lambda A_(t+1),  d_t = R - alpha log pi_old(a|s) + gamma (1 - terminated) V(s') - V(s)
    actor      -E[ min( r A, clip(r, 1 - eps, 1 + eps) A ) ],  where A is refreshed: A_t + alpha ( log pi_old - log pi )
    critic     E[ ( V(s) - V_old(s) - A_t )^2 ] / 2

    python ppo_continuous.py --env-id HalfCheetah-v4
    python ppo_continuous.py --resume runs/<run>/checkpoint.pt
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
    alpha: float = 0.0
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
    initial_std: float = 0.5
    "standard deviation of the policy at the start, before squashing"

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
        if not 0 < self.initial_std < math.inf:
            raise ValueError(f"--initial-std must be positive, not {self.initial_std}")


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
    latents: torch.Tensor  # actions before squashing
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


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh into the bounds of the action space; owns the observation normaliser."""

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        obs_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        low, high = torch.as_tensor(action_space.low).float(), torch.as_tensor(action_space.high).float()
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        self.register_buffer("action_low", low, persistent=False)
        self.register_buffer("action_high", high, persistent=False)
        self.normalizer = RunningNormalizer(obs_dim)
        self.net = mlp((obs_dim, args.hidden_dim, args.hidden_dim, action_dim), last_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(args.initial_std)))

    def std(self):
        """Standard deviation before squashing, (action_dim,)."""
        return self.log_std.exp()

    def forward(self, obs, noise_scale=1.0):
        """Draw a latent action (batch, action_dim), before squashing, for normalised obs (batch, obs_dim)."""
        return self.net(obs) + noise_scale * self.std() * torch.randn(len(obs), len(self.log_std), device=obs.device)

    def log_density(self, obs, latent):
        """Log-density (...) of latent actions (..., action_dim), before squashing, at normalised obs."""
        noise = (latent - self.net(obs)) / self.std()
        return (-0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def squash(self, latent):
        """Map latent (batch, action_dim) to actions in the bounds and the log-determinant (batch,) of that map."""
        action = torch.tanh(latent) * self.action_scale + self.action_bias
        action = action.clamp(self.action_low, self.action_high)  # rounding may lead out of them
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2x)), stable for large |x|
        log_slope = 2 * (math.log(2) - latent - F.softplus(-2 * latent))
        return action, (log_slope + self.action_scale.log()).sum(-1)

    def sample(self, obs):
        """Action (batch, action_dim) and its log-probability (batch,), in the action's own units."""
        obs = self.normalizer(obs)
        latent = self(obs)
        action, log_det = self.squash(latent)
        return action, self.log_density(obs, latent) - log_det

    def mean_action(self, obs):
        """Action (batch, action_dim) without noise."""
        return self.squash(self(self.normalizer(obs), noise_scale=0.0))[0]

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
    log_prob = actor.log_density(obs, rollout.latents)
    soft_rewards = rollout.rewards - alpha * (log_prob - actor.squash(rollout.latents)[1])
    return_scaler.update(soft_rewards, rollout.ends)
    scale = return_scaler.scale()
    values, next_values = critic(obs), critic(next_obs)
    discounts = args.gamma * (1 - rollout.terminations)
    traces = args.gamma * args.gae_lambda * (1 - rollout.ends)
    advantages = gae(soft_rewards * scale, values, next_values, discounts, traces)
    refreshed = advantages + alpha * scale * log_prob  # `update` subtracts that of the current policy
    rows = (obs, rollout.latents, log_prob, refreshed, advantages + values, values)
    return tuple(x.flatten(0, 1) for x in rows), scale


def policy_loss(log_prob, old_log_prob, advantages, clip_coef):
    """Clipped surrogate of a minibatch; also returns the ratios (batch,)."""
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), ratio


def ppo_loss(actor, critic, batch, alpha, args):
    """Loss of actor and critic on rows of `training_rows`, alpha in units of the scaled rewards; and metrics."""
    *steps, old_log_prob, advantages, returns, _ = batch
    log_prob = actor.log_density(*steps)
    # the entropy term of the advantage is that of the current policy
    advantages = advantages - alpha * log_prob.detach()
    mean, spread = (advantages.mean(), advantages.std() + 1e-8) if args.norm_adv else (0.0, 1.0)
    advantages = (advantages - mean) / spread
    surrogate, ratio = policy_loss(log_prob, old_log_prob, advantages, args.clip_coef)
    entropy = (actor.std().log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()
    value_loss = 0.5 * (critic(steps[0]) - returns).square().mean()
    loss = surrogate - args.ent_coef * entropy + args.vf_coef * value_loss
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
    shapes = ((*shape, obs_dim), (*shape, obs_dim), (*shape, action_dim), shape, shape, shape)
    rollout = Rollout(*(torch.zeros(s, device=device) for s in shapes))

    def act(obs):
        latents = actor(actor.normalizer(obs))
        return latents, actor.squash(latents)[0]

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
