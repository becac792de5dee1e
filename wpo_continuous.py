"""WPO: Wasserstein policy optimisation in SAC's frame (Pfau et al. 2025, arXiv 2505.00663). Docs: docs/wpo.md

Maximum-entropy RL maximises E[ sum_t gamma^t ( R_t + alpha H(pi(.|s_t)) ) ]. With (s, a, R, s') from the replay buffer,
twin critics Q_i, their Polyak averages Q'_i, and b ~ pi(.|s), b' ~ pi(.|s') drawn afresh, the losses are

    critic       E[ sum_i ( Q_i(s, a) - R - gamma (1 - terminated) ( min_i Q'_i(s', b') - alpha log pi(b'|s') ) )^2 ]
    actor        E[ alpha log pi(b|s) - min_i Q_i(s, b) ] = alpha KL( pi(.|s) || exp(Q(s, .) / alpha) / Z(s) ) + const
    temperature  -E[ alpha ( log pi(b|s) + target entropy ) ]

WPO takes the steepest path in the 2-Wasserstein distance, with a penalty on the KL from the averaged policy. Let x be b
before squashing, p its density, phi the mean and std of p, F their Fisher information; theta moves phi by chain rule:

    flow         d p / dt = -div_x( p v ),   v(s, x) = grad_x [ min_i Q_i(s, b) - alpha log pi(b|s) ]              (W1)
    projection   d phi / dt = E[ F^-1 ( grad_phi grad_x log p(x|s) ) v(s, x) ]                                     (W2)

alpha = 0 is the paper's objective. For a diagonal Gaussian (W2) is SAC's gradient, at alpha = 0 sample by sample, else
in the mean: the penalty and several samples of b are new. (W2) is for richer densities, as in diffwpo_continuous.py.

    python wpo_continuous.py --env-id HalfCheetah-v4
    python wpo_continuous.py --resume runs/<run>/checkpoint.pt
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
    action_samples: int = 2
    "actions drawn for each state in the actor's loss"
    precondition: bool = True
    "multiply by the inverse Fisher matrix of the Gaussian, or follow the raw mixed derivative"
    kl_weights: tuple[float, float] = (0.03, 0.03)
    "weights of the KLs of mean and std from the Polyak-averaged policy; the first ones with --kl-bounds"
    kl_bounds: tuple[float, float] | None = None
    "learn the weights, at --alpha-lr, so that the KLs of each action dimension meet these bounds, e.g. 0.0025 0.0001"

    def __post_init__(self):
        at_least_one = "total_timesteps num_envs torch_threads eval_episodes buffer_size batch_size hidden_dim"
        at_least_one += " n_step action_samples"
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


LOG_STD_MIN, LOG_STD_MAX = -20, 2


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh into the bounds of the action space."""

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        obs_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        low, high = torch.as_tensor(action_space.low).float(), torch.as_tensor(action_space.high).float()
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        self.register_buffer("action_low", low, persistent=False)
        self.register_buffer("action_high", high, persistent=False)
        self.fc1 = nn.Linear(obs_dim, args.hidden_dim)
        self.fc2 = nn.Linear(args.hidden_dim, args.hidden_dim)
        self.fc_mean = nn.Linear(args.hidden_dim, action_dim)
        self.fc_logstd = nn.Linear(args.hidden_dim, action_dim)

    def forward(self, obs):
        """Mean and log standard deviation of the Gaussian before squashing, both (batch, action_dim)."""
        x = F.relu(self.fc2(F.relu(self.fc1(obs))))
        return self.fc_mean(x), self.fc_logstd(x).clamp(LOG_STD_MIN, LOG_STD_MAX)

    def squash(self, latent):
        """Map latent (batch, action_dim) to actions in the bounds and the log-determinant (batch,) of that map."""
        action = torch.tanh(latent) * self.action_scale + self.action_bias
        action = action.clamp(self.action_low, self.action_high)  # rounding may lead out of them
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2x)), stable for large |x|
        log_slope = 2 * (math.log(2) - latent - F.softplus(-2 * latent))
        return action, (log_slope + self.action_scale.log()).sum(-1)

    def sample(self, obs):
        """Reparameterised action (batch, action_dim) and its log-probability (batch,), in the action's own units."""
        mean, log_std = self(obs)
        return self.act(mean, log_std, torch.randn_like(mean))

    def act(self, mean, log_std, noise):
        """Action and log-probability of a noise (..., action_dim)."""
        log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        action, log_det = self.squash(mean + log_std.exp() * noise)
        return action, log_prob - log_det

    def mean_action(self, obs):
        """Action (batch, action_dim) without noise."""
        return self.squash(self(obs)[0])[0]

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
    mean, log_std = actor(obs)
    kl = kl_divergences(mean, log_std, *actor_target(obs))
    obs, mean, log_std = (x.repeat(args.action_samples, 1) for x in (obs, mean, log_std))
    noise, std = torch.randn_like(mean).requires_grad_(), log_std.exp()
    actions, log_prob = actor.act(mean.detach(), log_std.detach(), noise)
    value = qf(obs, actions).amin(0) - alpha * log_prob
    velocity = torch.autograd.grad(value.sum(), noise, retain_graph=True)[0] / std.detach()  # DIFF: (W1) via eps
    noise, latent = noise.detach(), (mean + std * noise).detach()
    # the score is (m - x) / sigma^2: F^-1 times its derivatives by m and sigma is 1 and eps, as those of m + sigma eps
    surrogate = mean + std * noise if args.precondition else (mean - latent) / std.square()
    return -(surrogate * velocity).sum(-1).mean(), log_prob.detach(), kl  # DIFF: (W2)


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
            for name, value in metrics.items():
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
