"""DiffSAC: SAC with a diffusion policy (Sanokowski, Patil, Knoll 2025, arXiv 2512.02019).

Maximises E[ sum_t gamma^t (r_t + alpha H(pi(.|s_t))) ]. For transitions (s, a, r, s') from the
replay buffer, twin critics Q_i, their moving averages Q̄_i, a' ~ pi(.|s') and a_new ~ pi(.|s):

    target       y = r + gamma (1 - terminated) (min_i Q̄_i(s', a') - alpha log pi(a'|s'))       (1)
    critic       E[ sum_i (Q_i(s, a) - y)^2 ]                                                   (2)
    actor        E[ alpha log pi(a_new|s) - min_i Q_i(s, a_new) ]                               (3)
    temperature  -E[ alpha (log pi(a_new|s) + target entropy) ]                                 (4)

The policy changes: K steps lead from noise a^K ~ p = N(0, nu^2 I) to a = tanh(a^0). Step k replaces
a share delta_k of the variance by noise_k ~ N(0, I); a network adds a control c_k = c(s, a^k, k).
log pi has no closed form: (6) takes its place in (1), (3) and (4). Given a, the mean of (6) is
log pi(a|s) + KL( steps to a || steps back from a with c = 0 ), an upper bound of log pi(a|s).

    step k       a^(k-1) = sqrt(1 - delta_k) a^k + nu sqrt(delta_k) (c_k + noise_k)             (5)
    for log pi   log p(a^0) - log |da / da^0| + sum_k (|c_k|^2 / 2 + c_k . noise_k)             (6)

--actor-gradient chain differentiates (3) through all K steps. step, the default, takes one a^k of
each chain that (1) has drawn, and redraws step k from it: in (4) and (7) to (9) s is the s' of (1)
(if terminal, s) and a the chain's end.

V_j(s, a^j) stands for the steps that follow: the mean of min_i Q̄_i(s, a) - alpha cost_j given a^j.
A network of (s, a^j, j) returns e (a guess of a^0), rest and cost: V_j = min_i Q̄_i(s, tanh e) +
rest - alpha cost. V_0: e = a^0, rest = 0, cost_0.

    cost_j       log p(a^0) - log |da / da^0| + sum_(i<=j) |c_i|^2 / 2
    critic V     |e - a^0|^2 + (rest - min_i Q̄_i(s, a) + min_i Q̄_i(s, tanh e))^2
                 + alpha^2 (cost - cost_j)^2,  with e constant inside Q̄                        (7)
    actor        E[ alpha |c_k|^2 / 2 - V_(k-1)(s, a^(k-1)) ],  a^k constant, Q for Q̄ in V     (8)
    or           0.3 D where D = K |c_k - c̄_k|^2 / 2 >= --kl-bound; c̄: averaged weights       (9)

With V exact for Q, K times the mean gradient of (8) is that of (3), if K divides the batch.

    python diffsac_continuous.py --env-id Humanoid-v4 --diffusion-steps 8
    python diffsac_continuous.py --resume runs/RUN/checkpoint.pt
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
    num_envs: int = 1  # environments stepped together
    total_timesteps: int = 1_000_000  # steps over all environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live
    torch_threads: int = 1  # CPU threads; one is fastest here
    compile: bool = False  # torch.compile the gradient step
    cuda_graph: bool = False  # replay gradient step and policy (CUDA)
    bf16: bool = False  # gradient step's products in bfloat16
    track: bool = False  # also log to Weights & Biases
    eval_frequency: int = 10_000  # steps between evaluations; 0: at the end
    eval_episodes: int = 10  # episodes per evaluation
    checkpoint_frequency: int = 50_000  # steps, or 10 minutes; 0: at the end
    resume: str | None = None  # checkpoint to resume from

    # algorithm
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # weight of the new in moving averages
    batch_size: int = 256  # transitions per gradient step
    learning_starts: int = 5_000  # steps with random actions
    utd: float = 1.0  # gradient steps per environment step
    hidden_dim: int = 256  # width of the hidden layers
    policy_lr: float = 3e-4  # learning rate of the actor
    q_lr: float = 1e-3  # learning rate of the critics
    alpha: float = 1.0  # first temperature; fixed: --no-autotune
    autotune: bool = True  # tune alpha towards the target entropy
    alpha_anneal: float = 1.0  # fixed alpha: falls from this multiple of it
    alpha_lr: float = 3e-4  # learning rate of the temperature
    target_entropy: float | None = None  # nats, actions in [-1, 1]; -dim(A)
    normalize_obs: bool = True  # observations by running mean and std

    # diffusion policy
    diffusion_steps: int = 8  # denoising steps K
    prior_std: float = 1.0  # standard deviation nu of the prior
    delta_first: float = 0.9  # delta_K of the first denoising step
    delta_last: float = 0.01  # delta_1 of the last; geometric between
    learn_delta: bool = True  # learn delta per step and dimension
    actor_gradient: Literal["step", "chain"] = "step"  # through one step, or K
    kl_bound: float = 1.0  # bound on D of (9), nats; step only


# ALGO LOGIC: networks and losses
class SoftQNetwork(nn.Module):
    """Twin critics as one batched network: every weight has a leading axis of size 2."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        sizes = (obs_dim + action_dim, args.hidden_dim, args.hidden_dim, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            bound = fan_in**-0.5  # the default of nn.Linear
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, obs, actions):
        """Q-values (2, batch) of obs (batch, obs_dim) and actions (batch, action_dim)."""
        (weight1, weight2, weight3), (bias1, bias2, bias3) = self.weights, self.biases
        x = torch.cat((obs, actions), dim=-1).expand(2, -1, -1)
        x = F.relu(torch.baddbmm(bias1, x, weight1))
        x = F.relu(torch.baddbmm(bias2, x, weight2))
        return (x * weight3.mT).sum(-1) + bias3.squeeze(-1)  # a product with one column is slower


def squash(latent):
    """Action tanh(latent) and the log-determinant (...) of this map; latent (..., dim)."""
    action = torch.tanh(latent)
    log_slope = 2 * (math.log(2) - latent - F.softplus(-2 * latent))  # log(1 - tanh^2), stable
    return action, log_slope.sum(-1)


DELTA_MIN, DELTA_MAX = 1e-4, 0.999  # range of a learned delta


class Chain(NamedTuple):
    """A chain per row of obs: latents[k] is a^k; controls[k - 1], noises[k - 1] are step k's."""

    obs: torch.Tensor  # (batch, obs_dim)
    latents: torch.Tensor  # (K + 1, batch, action_dim)
    controls: torch.Tensor  # (K, batch, action_dim)
    noises: torch.Tensor  # (K, batch, action_dim)


class Actor(nn.Module):
    """Diffusion policy (5), squashed by tanh to [-1, 1]."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.steps, self.prior_std = args.diffusion_steps, args.prior_std
        fall = (args.delta_last / args.delta_first) ** torch.linspace(0, 1, self.steps).flip(0)
        delta = args.delta_first * fall[:, None].expand(-1, action_dim)  # row k - 1 for step k
        logit = torch.logit((delta - DELTA_MIN) / (DELTA_MAX - DELTA_MIN))
        self.delta_logit = nn.Parameter(logit) if args.learn_delta else nn.Buffer(logit)
        # one layer on (s, k, a^k), cut into three: the part of s stays outside the loop over k
        self.fc_obs = nn.Linear(obs_dim, args.hidden_dim)
        self.fc_step = nn.Embedding(self.steps, args.hidden_dim)
        self.fc_latent = nn.Linear(action_dim, args.hidden_dim, bias=False)
        self.fc2 = nn.Linear(args.hidden_dim, args.hidden_dim)
        self.fc_control = nn.Linear(args.hidden_dim, action_dim)
        nn.init.zeros_(self.fc_control.weight)  # c = 0 at first: the policy is the squashed prior
        nn.init.zeros_(self.fc_control.bias)

    def kernels(self):
        """Decay sqrt(1 - delta_k) and std nu sqrt(delta_k), (K, action_dim); k in row k - 1."""
        delta = DELTA_MIN + (DELTA_MAX - DELTA_MIN) * self.delta_logit.sigmoid()
        return (1 - delta).sqrt(), self.prior_std * delta.sqrt()

    def control(self, obs_features, latent, k):
        """c(s, a^k, k), (..., action_dim), of `fc_obs(obs)` and a^k; k broadcasts to (...)."""
        x = F.relu(obs_features + self.fc_step.weight[k - 1] + self.fc_latent(latent))
        return self.fc_control(F.relu(self.fc2(x))).to(latent.dtype)

    def chain(self, obs, noise_scale=1.0):
        """Run the `Chain` of each obs (batch, obs_dim), from the prior to the latent action."""
        shape = (self.steps + 1, obs.shape[0], self.fc_latent.in_features)
        noise = noise_scale * torch.randn(shape, dtype=obs.dtype, device=obs.device)
        noises, prior_noise = noise[:-1], noise[-1]
        latent = self.prior_std * prior_noise  # a^K
        latents, controls = [latent], []
        obs_features, (decay, std) = self.fc_obs(obs), self.kernels()
        for k in range(self.steps, 0, -1):
            control = self.control(obs_features, latent, k)
            latent = decay[k - 1] * latent + std[k - 1] * (control + noises[k - 1])  # DIFF: (5)
            latents.insert(0, latent)
            controls.insert(0, control)
        return Chain(obs, torch.stack(latents), torch.stack(controls), noises)

    def end_cost(self, latent):
        """log p(a^0) - log |da / da^0|, the first terms of (6); latent a^0 (..., action_dim)."""
        log_p = -0.5 * (latent / self.prior_std).square() - math.log(self.prior_std * math.tau**0.5)
        return log_p.sum(-1) - squash(latent)[1]

    def outcome(self, chain):
        """Action (batch, action_dim) of a chain, and the bound (6), (batch,)."""
        end = chain.latents[0]
        control_cost = 0.5 * chain.controls.square() + chain.controls * chain.noises
        return torch.tanh(end), self.end_cost(end) + control_cost.sum((0, -1))  # DIFF: (6)

    def sample(self, obs):
        """Reparameterised action (batch, action_dim), and (6) in place of a log-probability."""
        return self.outcome(self.chain(obs))

    def mean_action(self, obs):
        """Action (batch, action_dim) without noise."""
        return torch.tanh(self.chain(obs, noise_scale=0.0).latents[0])


def critic_loss(qf, batch, next_value, gamma):
    """Squared error of (2), summed over the twins, and the Q-values (2, batch)."""
    target = batch.rewards + gamma * (1 - batch.terminations) * next_value
    q = qf(batch.obs, batch.actions)
    return (q - target).square().mean(1).sum(), q


def actor_loss(actor, qf, obs, alpha):
    """Equation (3), and log_prob (batch,)."""
    actions, log_prob = actor.sample(obs)
    q = qf(obs, actions).amin(0)
    return (alpha * log_prob - q).mean(), log_prob


def latent_critic_network(obs_dim, action_dim, args):
    """Network of (s, a^j, j / K); its outputs are e, rest and cost, as in `latent_critic`."""
    first = nn.Linear(obs_dim + action_dim + 1, args.hidden_dim)
    second = nn.Linear(args.hidden_dim, args.hidden_dim)
    last = nn.Linear(args.hidden_dim, action_dim + 2)
    nn.init.zeros_(last.weight)  # no slope before there is evidence of one
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def latent_critic(actor, vf, obs, latent, j):
    """e (batch, action_dim), rest and cost (batch,) of V_j at a^j; j (batch,)."""
    outputs = vf(torch.cat((obs, latent, (j / actor.steps)[:, None]), dim=-1)).to(obs.dtype)
    end = torch.where(j[:, None] > 0, outputs[:, :-2], latent)
    rest = torch.where(j > 0, outputs[:, -2], 0.0)
    cost = torch.where(j > 0, outputs[:, -1], actor.end_cost(latent))
    return end, rest, cost


def latent_critic_loss(actor, qf_target, vf, chain, q, alpha):
    """Mean of (7) over the batch. Row i has j = 1 + i % (K - 1); with K = 1 V is not used."""
    obs, rows = chain.obs, torch.arange(len(chain.obs), device=chain.obs.device)
    j = 1 + rows % max(actor.steps - 1, 1)  # V_0 is known, V_K is not needed
    end, rest, cost = latent_critic(actor, vf, obs, chain.latents[j, rows], j)
    with torch.no_grad():
        control_cost = 0.5 * chain.controls.square().sum(-1).cumsum(0)  # row j - 1: steps 1 ... j
        sampled_cost = actor.end_cost(chain.latents[0]) + control_cost[j - 1, rows]
        sampled_rest = q - qf_target(obs, torch.tanh(end)).amin(0)
    v_loss = F.mse_loss(rest, sampled_rest) + alpha**2 * F.mse_loss(cost, sampled_cost)  # DIFF: (7)
    return v_loss + (end - chain.latents[0]).square().sum(-1).mean()


def step_actor_loss(actor, average_actor, qf, vf, chain, alpha, args):
    """Mean of (8), or (9) in rows out of bounds, and D (batch,). Row i has k = 1 + i % K."""
    obs, rows = chain.obs, torch.arange(len(chain.obs), device=chain.obs.device)
    k = 1 + rows % actor.steps
    latent = chain.latents[k, rows]
    average_control = average_actor.control(average_actor.fc_obs(obs), latent, k)
    control, (decay, std) = actor.control(actor.fc_obs(obs), latent, k), actor.kernels()
    # fresh noise: V has just been fitted to the same chains
    x = decay[k - 1] * latent + std[k - 1] * (control + torch.randn_like(latent))
    end, rest, cost = latent_critic(actor, vf, obs, x, k - 1)
    value = qf(obs, torch.tanh(end)).amin(0) + rest - alpha * cost  # V_(k-1)
    surrogate = 0.5 * alpha * control.square().sum(-1) - value  # DIFF: (8)
    kl = 0.5 * actor.steps * (control - average_control).square().sum(-1)
    return torch.where(kl < args.kl_bound, surrogate, 0.3 * kl).mean(), kl  # DIFF: (9)


def temperature_loss(log_alpha, log_prob, target_entropy):
    """Equation (4): its gradient raises alpha while the entropy is below the target."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


def main(args: Args):
    device = set_up(args)
    envs = make_envs(args.env_id, args.num_envs)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    target_entropy = -action_dim if args.target_entropy is None else args.target_entropy

    actor = Actor(obs_dim, action_dim, args).to(device)
    qf = SoftQNetwork(obs_dim, action_dim, args).to(device)
    qf_target = copy.deepcopy(qf).requires_grad_(False)
    vf = latent_critic_network(obs_dim, action_dim, args).to(device)
    average_actor = copy.deepcopy(actor).requires_grad_(False)
    log_alpha = torch.tensor(args.alpha).log().clamp(min=-1e9)
    temperature = nn.ParameterDict({"log_alpha": log_alpha}).to(device)
    obs_rms = RunningMeanStd(obs_dim, args.normalize_obs).to(device)
    adam = partial(torch.optim.Adam, fused=True, capturable=args.cuda_graph)
    actor_optimizer = adam(actor.parameters(), lr=args.policy_lr)
    q_optimizer = adam(qf.parameters(), lr=args.q_lr)
    v_optimizer = adam(vf.parameters(), lr=args.q_lr)
    alpha_optimizer = adam(temperature.parameters(), lr=args.alpha_lr)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    parts = dict(actor=actor, qf=qf, qf_target=qf_target, temperature=temperature, obs_rms=obs_rms)
    parts |= dict(actor_optimizer=actor_optimizer, q_optimizer=q_optimizer)
    parts |= dict(alpha_optimizer=alpha_optimizer, buffer=buffer)
    parts |= dict(average_actor=average_actor, vf=vf, v_optimizer=v_optimizer)
    run = Run(args, envs, parts)  # folder, log, signals, checkpoints; resumes

    def update(batch):
        """One gradient step of the critics, the actor and the temperature; returns metrics."""
        batch = batch._replace(obs=obs_rms(batch.obs), next_obs=obs_rms(batch.next_obs))
        alpha = temperature.log_alpha.detach().exp()

        with torch.no_grad():
            # (4), (7) to (9) use this chain too; a terminal s' has no action: its row gets s
            states = torch.where(batch.terminations[:, None] == 1, batch.obs, batch.next_obs)
            chain = actor.chain(states)
            next_actions, next_log_prob = actor.outcome(chain)
            next_q = qf_target(states, next_actions).amin(0)
        q_loss, q = critic_loss(qf, batch, next_q - alpha * next_log_prob, args.gamma)
        descend(q_optimizer, q_loss)

        if args.actor_gradient == "chain":
            pi_loss, log_prob = actor_loss(actor, qf, batch.obs, alpha)  # as in SAC
        else:
            descend(v_optimizer, latent_critic_loss(actor, qf_target, vf, chain, next_q, alpha))
            pi_loss, kl = step_actor_loss(actor, average_actor, qf, vf, chain, alpha, args)
            log_prob = next_log_prob
        descend(actor_optimizer, pi_loss)

        if args.autotune:
            alpha_loss = temperature_loss(temperature.log_alpha, log_prob, target_entropy)
            descend(alpha_optimizer, alpha_loss)

        move_towards(qf_target, qf, args.tau)
        move_towards(average_actor, actor, args.tau)
        metrics = {"losses/critic_loss": q_loss, "losses/qf_values": q, "losses/alpha": alpha}
        metrics |= {"losses/actor_loss": pi_loss, "losses/entropy": -log_prob}
        metrics |= {"diffusion/control_energy": 0.5 * chain.controls.square().sum((0, -1))}
        metrics |= {"diffusion/noise_std_1": actor.kernels()[1][0]}
        if args.actor_gradient == "step":
            metrics |= {"diffusion/kl_to_average": kl}
            metrics |= {"diffusion/in_trust_region": (kl < args.kl_bound).float()}
        return {name: value.detach() for name, value in metrics.items()}

    update, act = speed_up(args, device, update, act=actor.sample)

    # TRY NOT TO MODIFY: start the game
    obs, metrics = run.reset(), {}
    while run.goes_on():
        # ALGO LOGIC: act
        if run.step < args.learning_starts:
            actions = envs.action_space.sample()
        else:
            with torch.no_grad():
                actions = act(obs_rms(to_tensor(obs, device)))[0].cpu().numpy()

        # TRY NOT TO MODIFY: step the environments and store the transitions
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        last_obs = next_obs.copy()
        for i in np.flatnonzero(terminations | truncations):
            last_obs[i] = infos["final_obs"][i]  # next_obs[i] starts the next episode
        run.count(infos, actions=actions, obs=(next_obs, last_obs), rewards=rewards)
        buffer.add(obs, last_obs, actions, rewards, terminations)
        obs_rms.update(to_tensor(obs, device))
        obs = next_obs

        # ALGO LOGIC: learn
        if not args.autotune:
            temperature.log_alpha.data.fill_(run.fixed_log_alpha())
        for _ in range(run.updates_due()):
            metrics = update(buffer.sample(args.batch_size))
        if metrics and run.due(100):
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
# Replay: the same text in every off-policy script (tools/sync.py).


class Batch(NamedTuple):
    """Transitions, one per row."""

    obs: torch.Tensor  # (batch, obs_dim)
    next_obs: torch.Tensor  # (batch, obs_dim), of the same episode
    actions: torch.Tensor  # (batch, action_dim)
    rewards: torch.Tensor  # (batch,)
    terminations: torch.Tensor  # (batch,), 1 in a terminal state; a time limit leaves 0


class ReplayBuffer:
    """Ring buffer of transitions in float32 tensors on `device`."""

    def __init__(self, capacity, obs_dim, action_dim, device):
        shapes = ((obs_dim,), (obs_dim,), (action_dim,), (), ())
        self.data = Batch(*(torch.empty(capacity, *shape, device=device) for shape in shapes))
        self.capacity, self.device, self.position, self.size = capacity, device, 0, 0

    def add(self, *transitions):
        """Append one transition of each environment: arrays in the order of `Batch`."""
        count = len(transitions[0])
        rows = (torch.arange(count, device=self.device) + self.position) % self.capacity
        for data, values in zip(self.data, transitions, strict=True):
            data[rows] = to_tensor(values, self.device)
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, batch_size):
        """A `Batch` of rows drawn uniformly with replacement."""
        rows = torch.randint(self.size, (batch_size,), device=self.device)
        return Batch(*(data[rows] for data in self.data))

    def state_dict(self):
        # through numpy: torch.save writes whole storages, and this makes none of the empty part
        filled = [torch.from_numpy(data[: self.size].cpu().numpy()) for data in self.data]
        return {"position": self.position, "size": self.size, "data": filled}

    def load_state_dict(self, state):
        """Load transitions, oldest first; the newest that fit are kept."""
        self.size = min(state["size"], self.capacity)
        self.position = self.size % self.capacity
        for data, filled in zip(self.data, state["data"], strict=True):
            data[: self.size] = filled.roll(-state["position"], 0)[state["size"] - self.size :]


if __name__ == "__main__":
    start()
