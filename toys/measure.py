"""How close a policy comes to the exact optimum in the environments of toys/.

A table, a row for each checkpoint, and means over the seeds; histograms of actions:

    python toys/measure.py table runs/toys*/checkpoint.pt --figure figures/double_well.png

The chain of a diffusion policy, from the prior on the left to the action on the right:

    python toys/measure.py chain CHECKPOINT --figure figures/chain.png

TV is the total variation distance between the histogram of actions and the exact density, mean over
headings. A mode counts if it holds a quarter of its exact mass. E[R] is the mean reward of a step
in whole episodes; in brackets its difference to the optimum's at the same headings. The evidence
gap is log Z - mean of log w of a step, w = exp(R / alpha) / q: for a Gaussian policy the KL
divergence from the optimum at the headings visited, for a chain that of whole chains, an upper
bound. It is nan for the GMM at temperatures other than 1, where log Z depends on the heading.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro

try:
    import matplotlib.pyplot as plt
except ImportError as error:
    print(f"error: {error}; pip install -r requirements-dev.txt", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toys  # noqa: E402
from tools.enjoy import fail, load_actor  # noqa: E402

STEPS = 100
CELLS = {"TurningDoubleWell-v0": 40, "TurningGMM-v0": 100}  # of the histograms


class Policy(NamedTuple):
    name: str
    seed: int
    actor: object
    env: toys.Turning
    alpha: float
    gamma: float


def load_policy(path):
    """The policy of a checkpoint of any script that was trained on toys/."""
    actor, checkpoint, _ = load_actor(path)
    args = checkpoint["args"]
    if not args.env_id.startswith("toys:"):
        fail(f"{path} is of {args.env_id}, not of an environment in toys/")
    alpha = args.alpha
    if getattr(args, "autotune", False):
        if "temperature" not in checkpoint:
            fail(f"{path} holds a policy alone; its temperature is in checkpoint.pt")
        alpha = checkpoint["temperature"]["log_alpha"].exp().item()
    if alpha == 0:
        fail(f"{path} is of a run with --alpha 0, for which there is no optimal density")
    env, name = gym.make(args.env_id).unwrapped, args.exp_name.removesuffix("_continuous")
    if hasattr(args, "diffusion_steps"):
        name += f", K = {args.diffusion_steps}"
    return Policy(name, args.seed, actor, env, alpha, args.gamma)


@torch.no_grad()
def sample(policy, headings):
    """Actions and log-probabilities (or path log-ratios) at headings (count,), both (count,)."""
    obs = torch.as_tensor(policy.env.observe(headings), dtype=torch.float32)
    action, log_prob = policy.actor.sample(obs)
    return action[:, 0].double().numpy(), log_prob.double().numpy()


def modes_of(env, heading):
    """Positions of the modes; those of the GMM that lie within two std of another are one."""
    if isinstance(env, toys.TurningDoubleWell):
        return np.array([-0.5, 0.5])
    means = np.sort(toys.MEANS[toys.sector(heading)])
    apart = np.flatnonzero(np.diff(means) >= 2 * toys.STD) + 1
    return np.array([group.mean() for group in np.split(means, apart)])


def compare(policy, samples, episodes):
    """Numbers of a row; for the figure headings, edges, histograms and exact masses."""
    torch.manual_seed(0)
    env, cells = policy.env, CELLS[policy.env.spec.id]
    exact = toys.optimum(env, policy.alpha, policy.gamma, sectors=3)
    edges = np.linspace(-1, 1, cells + 1)
    masses = exact.density.reshape(len(exact.headings), cells, -1).mean(-1) * 2 / cells
    histograms, shares = np.zeros_like(masses), []  # shares: of each mode's exact mass
    for i, heading in enumerate(exact.headings):
        action, _ = sample(policy, np.full(samples, heading))
        histograms[i] = np.histogram(action, edges)[0] / samples
        means = modes_of(env, heading)
        nearest, nearest_exact = (
            np.abs(x[:, None] - means).argmin(1) for x in (action, exact.actions)
        )
        for j in range(len(means)):
            whole = exact.density[i, nearest_exact == j].sum() * 2 / len(exact.actions)
            shares.append((nearest == j).mean() / whole)
    headings = env.first_headings(np.random.default_rng(0), (episodes,))
    gap, reward, optimum = exact.log_partition.mean(), 0.0, 0.0
    for _ in range(STEPS):
        action, log_prob = sample(policy, headings)
        paid = env.reward(headings, action)
        gap -= (paid / policy.alpha - log_prob).mean() / STEPS
        reward += paid.mean() / STEPS
        nearest = np.cos(headings[:, None] - exact.headings).argmax(1)
        optimum += exact.mean_reward[nearest].mean() / STEPS
        headings = headings + env.turn(action)
    known = np.ptp(exact.log_partition) < 1e-6
    row = {"tv": 0.5 * np.abs(histograms - masses).sum(1).mean(), "modes": len(shares)}
    row |= {"kept": sum(share >= 0.25 for share in shares), "reward": reward}
    row |= {"regret": reward - optimum, "gap": gap if known else np.nan}
    return row, exact.headings, edges, histograms, masses


def markdown(name, alpha, rows):
    """A row of the table: one checkpoint, or mean and standard deviation of several."""

    def number(key, form=".3f"):
        values = np.array([row[key] for row in rows])
        spread = f" ± {values.std():.3f}" if len(rows) > 1 else ""
        return f"{values.mean():{form}}{spread}"

    kept, modes = (sum(row[key] for row in rows) for key in ("kept", "modes"))
    reward = f"{number('reward')} ({number('regret', '+.3f')})"
    return (
        f"| {name} | {alpha:.3g} | {number('tv')} | {kept}/{modes} | {reward} | {number('gap')} |"
    )


def save(drawing, path):
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)


def table(
    checkpoints: Annotated[list[Path], tyro.conf.Positional],
    samples: int = 20_000,
    episodes: int = 1_000,
    figure: Path | None = None,
    headings: int = 3,
) -> None:
    """Print the table, from `samples` actions at each heading; draw histograms at some headings."""
    policies = [load_policy(path) for path in checkpoints]
    if figure and len({policy.env.spec.id for policy in policies}) > 1:
        fail("--figure draws checkpoints of one environment")
    print("| policy | alpha | TV | modes | E[R] | evidence gap |\n|---|---|---|---|---|---|")
    results, groups = [compare(policy, samples, episodes) for policy in policies], defaultdict(list)
    for policy, (row, *_) in zip(policies, results, strict=True):
        groups[policy.name, policy.env.spec.id].append((policy.alpha, row))
        print(markdown(f"{policy.name}, seed {policy.seed}", policy.alpha, [row]), flush=True)
    for (name, env_id), runs in groups.items():
        if len(runs) > 1:
            alphas, rows = zip(*runs, strict=True)
            print(markdown(f"{name}, {env_id}, {len(runs)} runs", np.mean(alphas), rows))
    if figure:
        size = (2.1 * len(results), 1.9 * headings)
        drawing, axes = plt.subplots(headings, len(results), figsize=size, squeeze=False)
        for column, policy, result in zip(axes.T, policies, results, strict=True):
            _, angles, edges, histograms, masses = result
            column[0].set_title(f"{policy.name}, seed {policy.seed}", fontsize=9)
            column[-1].set_xlabel("action")
            places = np.linspace(0, len(angles) - 1, headings).astype(int)
            for axis, i in zip(column, places, strict=True):
                density = histograms[i] / np.diff(edges), masses[i] / np.diff(edges)
                axis.stairs(density[0], edges, fill=True, color="#56B4E9", label="policy")
                axis.stairs(density[1], edges, color="black", linewidth=1.2, label="exact")
                axis.set_xlim(-1, 1)
                if axis in axes[:, 0]:
                    axis.set_ylabel(f"heading {np.rad2deg(angles[i]):g}°", fontsize=9)
        axes[0, 0].legend(fontsize=6, frameon=False, handlelength=1)
        save(drawing, figure)


def latents_of(actor, obs):
    """Latents a^0 ... a^K of any diffusion actor, (K + 1, count)."""
    if hasattr(actor.actor, "latents"):
        return actor.latents(obs)[..., 0]
    chain = actor.chain(obs)
    return getattr(chain, "latents", chain[0])[..., 0]


def chain(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    figure: Path,
    heading: float = 0.0,
    samples: int = 20_000,
) -> None:
    """Draw 150 chains at a heading (in degrees), and densities of tanh(a^k) for k = K ... 0."""
    policy = load_policy(checkpoint)
    if not hasattr(policy.actor.actor, "steps"):
        fail(f"{policy.name} has no chain")
    exact = toys.optimum(policy.env, policy.alpha, policy.gamma, sectors=3)
    psi = np.deg2rad(heading)
    torch.manual_seed(0)
    obs = torch.as_tensor(policy.env.observe(np.full(samples, psi)), dtype=torch.float32)
    with torch.no_grad():
        actions = torch.tanh(latents_of(policy.actor, obs)).double().numpy()
    steps, edges = len(actions) - 1, np.linspace(-1, 1, CELLS[policy.env.spec.id] + 1)
    drawing, axis = plt.subplots(figsize=(1.15 * (steps + 2) + 1, 4))
    for i in range(150):  # coloured by the side on which they end
        colour = "#0072B2" if actions[0, i] < 0 else "#D55E00"
        axis.plot(np.arange(steps + 1), actions[::-1, i], color=colour, linewidth=0.5, alpha=0.45)
    densities = [np.histogram(row, edges, density=True)[0] for row in actions[::-1]]
    scale, middles = 0.8 / max(map(np.max, densities)), (edges[1:] + edges[:-1]) / 2
    for place, density in enumerate(densities):
        shape = {"step": "mid", "color": "black", "alpha": 0.55, "linewidth": 0}
        axis.fill_betweenx(middles, place, place + scale * density, **shape)
    nearest = np.cos(exact.headings - psi).argmax()
    optimum = steps + 1 + scale * exact.density[nearest]
    axis.fill_betweenx(exact.actions, steps + 1, optimum, color="#009E73")
    axis.set_xticks(range(steps + 2), [f"$a^{{{k}}}$" for k in range(steps, -1, -1)] + ["exact"])
    axis.set(ylabel="tanh of the latent", ylim=(-1, 1))
    axis.set_title(f"{policy.name}, seed {policy.seed}: heading {heading:g}°", fontsize=10)
    save(drawing, figure)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"table": table, "chain": chain})
