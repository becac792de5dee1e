"""How close a policy comes to the exact maximum-entropy optimum in the environments of toys/, and how its chain works.

    python tools/multimodality.py table runs/*/checkpoint.pt --figure docs/images/double_well.png
    python tools/multimodality.py chain runs/<run>/checkpoint.pt --figure docs/images/chain.png

`table` prints Markdown, one row for each checkpoint, and mean and population standard deviation over runs of one
script:

    TV            total variation distance between the histogram of actions and the exact density, mean over headings
    KL            KL divergence of the policy from the optimum in nats, by a histogram of 400 cells, mean over headings
    modes         modes that hold at least a quarter of their exact mass, of all, and the least share of the exact mass
    E[R]          mean reward of a step in whole episodes, and its difference to the optimum's at the same headings
    evidence gap  log Z per step minus the mean of log w per step, w = exp(sum R / alpha) / q(actions): for a Gaussian
                  policy the KL divergence, at the headings visited; for a chain that of whole chains, an upper bound
    log Z error   estimate from the weights minus the exact value, per step; of single steps and of whole episodes, each
                  with the effective sample size 1 / sum w^2 of normalised weights, as a share of the samples

The last two are nan for the GMM at temperatures other than 1, where log Z depends on the heading. q is the density of
the actions for a Gaussian policy; a diffusion policy has its chain and the noising kernels in the weights instead:
log w = sum R / alpha - sum of the path log-ratios, which leaves the mean of w what it is.

--modes writes the mass of every mode at every heading, the exact one and the policy's, as csv.
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toys  # noqa: E402
from tools.enjoy import load_actor  # noqa: E402

STEPS = 100
CELLS = {"TurningDoubleWell-v0": 40, "TurningGMM-v0": 100}  # of the histograms


@dataclass
class Policy:
    """A checkpoint's actor, the script's arguments, the environment and its temperature."""

    name: str  # without the seed
    actor: torch.nn.Module
    args: object
    env: toys.Turning
    alpha: float


def load_policy(path, distinguish=()):
    """Load the actor of any script's checkpoint; refuses what was not trained on toys/.

    The arguments named by `distinguish`, such as alpha_anneal, become part of its name.
    """
    actor, checkpoint, _ = load_actor(path)
    args = checkpoint["args"]
    if not args.env_id.startswith("toys:"):
        sys.exit(f"error: {path} is of {args.env_id}, not of an environment in toys/")
    alpha = args.alpha
    if getattr(args, "autotune", False):
        alpha = checkpoint["temperature"]["log_alpha"].exp().item()
    if alpha == 0:
        sys.exit(f"error: {path} is of a run with --alpha 0, for which there is no optimal density")
    name = " ".join(
        [
            args.exp_name.removesuffix("_continuous"),
            *(f"{key}={getattr(args, key, None)}" for key in distinguish),
        ]
    )
    return Policy(name, actor, args, gym.make(args.env_id).unwrapped, alpha)


@torch.no_grad()
def sample(policy, headings):
    """Actions and log-probabilities (or path log-ratios) at headings (count,), both (count,)."""
    obs = torch.as_tensor(policy.env.observe(headings), dtype=torch.float32)
    action, log_prob = policy.actor.sample(obs)
    return action[:, 0].double().numpy(), log_prob.double().numpy()


def log_mean_exp(log_weights):
    """Log of the mean weight, and the effective sample size as a share of the count."""
    top = log_weights.max()
    weights = np.exp(log_weights - top)
    return top + np.log(weights.mean()), weights.sum() ** 2 / (len(weights) * (weights**2).sum())


def divergence(action, actions, density, cells=400):
    """KL divergence of samples (count,) from a density on the grid `actions`, in nats, by their histogram."""
    counts = np.histogram(action, cells, (-1, 1))[0]
    shares = counts[counts > 0] / len(action)
    entropy = -(shares * np.log(shares * cells / 2)).sum() + (len(shares) - 1) / (
        2 * len(action)
    )  # Miller and Madow
    nearest = ((action + 1) / 2 * len(actions)).astype(int).clip(0, len(actions) - 1)
    return -entropy - np.log(density[nearest] + 1e-300).mean()


def modes_of(env, heading):
    """Positions of the modes at a heading; those of the GMM that lie within two std of another are one."""
    if isinstance(env, toys.TurningDoubleWell):
        return np.array([-0.5, 0.5])
    modes = []
    for mean in np.sort(toys.MEANS[toys.sector(heading)]):
        if modes and mean - modes[-1][-1] < 2 * toys.STD:
            modes[-1].append(mean)
        else:
            modes.append([mean])
    return np.array([np.mean(mode) for mode in modes])


def compare(policy, samples, trajectories, seed=0):
    """Numbers of one row of the table, and the histograms (headings, cells) with the exact masses for the figure.

    The row's "modes" are tuples of heading in degrees, position, exact mass and the policy's mass.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    env = policy.env
    exact = toys.optimum(env, policy.alpha, policy.args.gamma, sectors=3)
    cells = CELLS[env.spec.id]
    edges = np.linspace(-1, 1, cells + 1)
    masses = exact.density.reshape(len(exact.headings), cells, -1).mean(-1) * 2 / cells
    histograms, modes, least, single, kl = np.zeros_like(masses), [], [], [], []
    for i, heading in enumerate(exact.headings):
        action, log_prob = sample(policy, np.full(samples, heading))
        histograms[i] = np.histogram(action, edges)[0] / samples
        means = modes_of(env, heading)
        nearest = np.abs(action[:, None] - means).argmin(1)
        nearest_exact = np.abs(exact.actions[:, None] - means).argmin(1)
        shares = [(nearest == j).mean() for j in range(len(means))]
        whole = [
            exact.density[i, nearest_exact == j].sum() * 2 / len(exact.actions)
            for j in range(len(means))
        ]
        modes += [(np.rad2deg(heading), *mode) for mode in zip(means, whole, shares, strict=True)]
        least.append(np.min(np.divide(shares, whole)))
        kl.append(divergence(action, exact.actions, exact.density[i]))
        single.append(env.reward(np.full(samples, heading), action) / policy.alpha - log_prob)
    single_z, single_size = np.mean([log_mean_exp(weights) for weights in single], axis=0)
    headings = env.first_headings(random, (trajectories,))
    log_weights, rewards, optimum = np.zeros(trajectories), 0.0, 0.0
    for _ in range(STEPS):
        action, log_prob = sample(policy, headings)
        reward = env.reward(headings, action)
        log_weights += reward / policy.alpha - log_prob
        rewards += reward.mean() / STEPS
        nearest = np.cos(headings[:, None] - exact.headings).argmax(1)
        optimum += exact.mean_reward[nearest].mean() / STEPS
        headings = headings + env.turn(action)
    episode_z, episode_size = log_mean_exp(log_weights)
    known = np.ptp(exact.log_partition) < 1e-6  # else log Z of an episode depends on its course
    partition = exact.log_partition.mean() if known else np.nan
    row = {
        "tv": 0.5 * np.abs(histograms - masses).sum(1).mean(),
        "kl": float(np.mean(kl)),
        "kept": sum(share >= whole / 4 for _, _, whole, share in modes),
        "modes": modes,
        "least": float(np.mean(least)),
        "reward": float(rewards),
        "regret": float(rewards - optimum),
        "gap": float(partition - log_weights.mean() / STEPS),
        "single_error": float(single_z - partition),
        "single_size": float(single_size),
        "episode_error": float(episode_z / STEPS - partition),
        "episode_size": float(episode_size),
    }
    return row, exact.headings, edges, histograms, masses


def markdown(name, alpha, rows):
    """One row of the table: the numbers of one checkpoint, or mean and standard deviation of several."""

    def number(key, form=".3f", scale=1):
        values = scale * np.array([row[key] for row in rows])
        return f"{values.mean():{form}}" + (
            f" ± {values.std():{form.lstrip('+')}}" if len(rows) > 1 else ""
        )

    kept, modes = sum(row["kept"] for row in rows), sum(len(row["modes"]) for row in rows)
    return (
        f"| {name} | {alpha:.3g} | {number('tv')} | {number('kl')} | {kept}/{modes} ({number('least', '.2f')}) "
        f"| {number('reward')} ({number('regret', '+.3f')}) | {number('gap')} | {number('single_error', '+.3f')}, "
        f"{number('single_size', '.0f', 100)} % | {number('episode_error', '+.3f')}, "
        f"{number('episode_size', '.1f', 100)} % |"
    )


def table(
    checkpoints: Annotated[list[Path], tyro.conf.Positional],
    samples: int = 20_000,
    trajectories: int = 1_000,
    figure: Path | None = None,
    headings: int = 3,
    modes: Path | None = None,
    distinguish: tuple[str, ...] = (),
) -> None:
    """Print the table, from `samples` actions at each heading and `trajectories` episodes; draw some histograms.

    The arguments named by `distinguish`, such as alpha_anneal, go into the first column, and runs that differ in them
    are not averaged.
    """
    results, rows_of = [], defaultdict(list)
    policies = [load_policy(path, distinguish) for path in checkpoints]
    if figure and len({policy.args.env_id for policy in policies}) > 1:
        sys.exit("error: --figure draws checkpoints of one environment")
    print(
        "| policy | alpha | TV | KL | modes (least) | E[R] (regret) | evidence gap | log Z error, ESS: step | episode |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for policy in policies:
        results.append((policy, *compare(policy, samples, trajectories)))
        fixed = None if getattr(policy.args, "autotune", False) else policy.alpha
        rows_of[policy.name, policy.args.env_id, fixed].append((policy.alpha, results[-1][1]))
        print(
            markdown(f"{policy.name}, seed {policy.args.seed}", policy.alpha, [results[-1][1]]),
            flush=True,
        )
    for (name, env_id, _), runs in rows_of.items():
        if len(runs) > 1:
            alphas, rows = zip(*runs, strict=True)
            print(
                markdown(
                    f"{name}, {env_id.removeprefix('toys:')}, {len(runs)} runs",
                    np.mean(alphas),
                    rows,
                )
            )
    if modes:
        modes.parent.mkdir(parents=True, exist_ok=True)
        with modes.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("env_id", "script", "seed", "heading", "mode", "exact_mass", "mass"))
            for policy, row, *_ in results:
                run = (policy.args.env_id, policy.name, policy.args.seed)
                writer.writerows((*run, *(f"{x:.4g}" for x in mode)) for mode in row["modes"])
    if figure:
        drawing, axes = plt.subplots(
            headings, len(results), figsize=(2.1 * len(results), 1.9 * headings), squeeze=False
        )
        for column, (policy, _, angles, edges, histograms, masses) in zip(
            axes.T, results, strict=True
        ):
            width = edges[1] - edges[0]
            column[0].set_title(f"{policy.name}, seed {policy.args.seed}", fontsize=9)
            column[-1].set_xlabel("action")
            for axis, i in zip(
                column, np.linspace(0, len(angles) - 1, headings).astype(int), strict=True
            ):
                axis.stairs(
                    histograms[i] / width, edges, fill=True, color="#56B4E9", label="policy"
                )
                axis.stairs(masses[i] / width, edges, color="black", linewidth=1.2, label="exact")
                axis.set_xlim(-1, 1)
                if axis in axes[:, 0]:
                    axis.set_ylabel(f"heading {np.rad2deg(angles[i]):g}°", fontsize=9)
        axes[0, 0].legend(fontsize=6, frameon=False, handlelength=1)
        save(drawing, figure)


def chain_latents(actor, obs):
    """Latents a^0 ... a^K of any diffusion actor, (K + 1, count)."""
    if hasattr(actor, "latents"):
        return actor.latents(obs)[..., 0]
    chain = actor.chain(obs)
    return getattr(chain, "latents", chain[0])[..., 0]


def save(drawing, path):
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)


def chain(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    figure: Path,
    heading: float | None = None,
    samples: int = 20_000,
) -> None:
    """Draw the chain of a diffusion policy at one heading: particles and densities, from the prior to the action.

    The heading is in degrees; by default the first of the table.
    """
    policy = load_policy(checkpoint)
    if not hasattr(policy.args, "diffusion_steps"):
        sys.exit(f"error: {policy.name} has no chain")
    exact = toys.optimum(policy.env, policy.alpha, policy.args.gamma, sectors=3)
    psi = exact.headings[0] if heading is None else np.deg2rad(heading)
    torch.manual_seed(0)
    obs = torch.as_tensor(policy.env.observe(np.full(samples, psi)), dtype=torch.float32)
    with torch.no_grad():
        actions = torch.tanh(chain_latents(policy.actor, obs)).double().numpy()
    steps = len(actions) - 1
    edges = np.linspace(-1, 1, CELLS[policy.env.spec.id] + 1)
    nearest = np.abs(np.angle(np.exp(1j * (exact.headings - psi)))).argmin()
    drawing, axis = plt.subplots(figsize=(1.15 * (steps + 2) + 1, 4))
    colours = np.where(actions[0, :150] < 0, "#0072B2", "#D55E00")
    for i, colour in enumerate(colours):
        axis.plot(np.arange(steps + 1), actions[::-1, i], color=colour, linewidth=0.5, alpha=0.45)
    highest = max(np.histogram(a, edges, density=True)[0].max() for a in actions)
    middles = (edges[1:] + edges[:-1]) / 2
    for position, k in enumerate(range(steps, -1, -1)):
        density = np.histogram(actions[k], edges, density=True)[0] / highest
        axis.fill_betweenx(
            middles,
            position,
            position + 0.8 * density,
            step="mid",
            color="black",
            alpha=0.55,
            linewidth=0,
        )
    scale = 0.8 / highest
    axis.fill_betweenx(
        exact.actions, steps + 1, steps + 1 + scale * exact.density[nearest], color="#009E73"
    )
    axis.set_xticks(range(steps + 2), [f"$a^{{{k}}}$" for k in range(steps, -1, -1)] + ["exact"])
    axis.set_ylabel("tanh of the latent")
    axis.set_ylim(-1, 1)
    axis.set_title(
        f"{policy.name}, seed {policy.args.seed}: from the prior to the action, heading {np.rad2deg(psi):g}°",
        fontsize=10,
    )
    save(drawing, figure)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"table": table, "chain": chain})
