"""Two small environments whose maximum-entropy optimum is known.

`toys:TurningDoubleWell-v0` and `toys:TurningGMM-v0`: a walker in the plane sees its heading psi as
(cos psi, sin psi) and turns by an action a in [-1, 1], 100 times. Only the turn is rewarded, and
several turns are best: a policy with one mode cannot be optimal at a low temperature.

    double well   with u = a^2, u* = 1/4, h = 0.85:
                  R = h + (1 - h) (1 - (1 - u / u*)^2)  for u <= u*
                  R = 1 - ((u - u*) / (1 - u*))^2       above
                  so that R(+-1/2) = 1, R(0) = 0.85, R(+-1) = 0.
                  The turn is +45 degrees for a >= 0, else -45.
    GMM           R = log p(a | sector of the heading): for each sector of 45 degrees a mixture of
                  five normals with std 0.05. The turn is 120 degrees times a.

In the double well neither the reward nor what follows depends on the heading: exp(R / alpha) / Z is
optimal for every discount factor. In the GMM every sector has Z = 1 at alpha = 1 (the mass outside
[-1, 1] is below 1e-6), so that the soft value is zero everywhere and p itself is optimal; at other
temperatures `optimum` iterates the soft values.

After the environments in the code of Sanokowski, Patil, Knoll (arXiv 2512.02019).
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np

SECTORS = 8
# of the mixtures, one row for each sector
MEANS = np.random.default_rng(0).uniform(-0.75, 0.75, size=(SECTORS, 5))
STD, FLOOR = 0.05, np.log(1e-12)
WELL, HILL = 0.25, 0.85


def double_well_reward(heading, action):
    """Reward of actions (...); headings do not matter."""
    u = np.square(action)
    inner = HILL + (1 - HILL) * (1 - (1 - u / WELL) ** 2)
    return np.where(u <= WELL, inner, 1 - ((u - WELL) / (1 - WELL)) ** 2)


def double_well_turn(action):
    """Turn in radians: a sector to the left or to the right."""
    return np.where(action >= 0, 1.0, -1.0) * 2 * np.pi / SECTORS


def sector(heading):
    """Sector 0 ... 7 of headings in radians (...)."""
    return (np.mod(heading, 2 * np.pi) / (2 * np.pi / SECTORS)).astype(int) % SECTORS


def gmm_reward(heading, action):
    """Log-density of actions (...) in the mixture of the heading's sector, at least log 1e-12."""
    z = (np.asarray(action)[..., None] - MEANS[sector(np.asarray(heading))]) / STD
    log_density = np.logaddexp.reduce(-0.5 * z**2, axis=-1) - np.log(5 * STD * np.sqrt(2 * np.pi))
    return np.maximum(log_density, FLOOR)


def gmm_turn(action):
    """Turn in radians, up to 120 degrees."""
    return np.asarray(action) * np.deg2rad(120)


class Turning(gym.Env):
    """A walker, by reward and turn as functions of heading and action (numbers or arrays)."""

    def __init__(self, reward, turn, snap):
        self.reward, self.turn, self.snap = reward, turn, snap
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def first_headings(self, random, shape=()):
        """Uniform headings in radians, multiples of 45 degrees if they `snap`."""
        if self.snap:
            return 2 * np.pi * random.integers(SECTORS, size=shape) / SECTORS
        return 2 * np.pi * random.uniform(size=shape)

    @staticmethod
    def observe(heading):
        """Observation (..., 2) of headings (...)."""
        return np.stack((np.cos(heading), np.sin(heading)), axis=-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.heading = self.first_headings(self.np_random)
        return self.observe(self.heading), {}

    def step(self, action):
        turn = float(np.clip(action[0], -1, 1))
        reward = float(self.reward(self.heading, turn))
        self.heading = self.heading + float(self.turn(turn))
        return self.observe(self.heading), reward, False, False, {}


class TurningDoubleWell(Turning):
    """See the module: rewarded are turns of +-1/2."""

    def __init__(self):
        super().__init__(double_well_reward, double_well_turn, snap=True)


class TurningGMM(Turning):
    """See the module: rewarded are the five turns of the heading's sector."""

    def __init__(self):
        super().__init__(gmm_reward, gmm_turn, snap=False)


@dataclass
class Optimum:
    """The exact maximum-entropy policy on a grid of headings (H,) and actions (A,).

    Actions are the middles of equal cells.
    """

    headings: np.ndarray
    actions: np.ndarray
    density: np.ndarray  # (H, A), of actions at each heading
    entropy: np.ndarray  # (H,), in nats
    mean_reward: np.ndarray  # (H,)
    log_partition: (
        np.ndarray
    )  # (H,), log of the integral of exp((R + gamma (V(s') - V(s))) / alpha)


def optimum(env, alpha, gamma=0.99, actions=4000, sectors=15):
    """The `Optimum` of one of the two environments (wrapped or not) at temperature alpha > 0.

    V, the soft value, is constant in the double well and, at alpha = 1, in the GMM: there
    `log_partition` is log of the integral of exp(R / alpha), exact but for the grid of actions.
    Otherwise V is carried by `sectors` headings in each sector, interpolated linearly.
    Raises ValueError if alpha is not positive, RuntimeError if V has not converged.
    """
    env = env.unwrapped
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be positive, not {alpha}")
    grid = (np.arange(actions) + 0.5) / actions * 2 - 1
    width = 2 / actions
    count = SECTORS if env.snap else SECTORS * sectors
    headings = 2 * np.pi * (np.arange(count) + (0.0 if env.snap else 0.5)) / count
    rewards = env.reward(headings[:, None], grid[None])
    values, shift = np.zeros(count), 2 * np.pi / count
    # in cells of the grid of headings
    following = (headings[:, None] + env.turn(grid)[None] - headings[0]) / shift
    lower = np.floor(following + 1e-9).astype(int)
    share = following - lower
    for _ in range(10_000):
        ahead = values[lower % count] * (1 - share) + values[(lower + 1) % count] * share
        exponents = (rewards + gamma * (ahead - values[:, None])) / alpha
        top = exponents.max(axis=1, keepdims=True)
        log_partition = top[:, 0] + np.log(np.exp(exponents - top).sum(axis=1) * width)
        new = alpha * log_partition + gamma * values
        new -= new.mean()  # a constant reward only shifts all values
        change, values = np.abs(new - values).max(), new
        if change < 1e-9:
            break
    else:
        raise RuntimeError(f"soft values still change by {change:.1g}")
    density = np.exp(exponents - log_partition[:, None])
    entropy = -(density * np.log(density + 1e-300)).sum(axis=1) * width
    mean_reward = (density * rewards).sum(axis=1) * width
    return Optimum(headings, grid, density, entropy, mean_reward, log_partition)


gym.register(id="TurningDoubleWell-v0", entry_point=TurningDoubleWell, max_episode_steps=100)
gym.register(id="TurningGMM-v0", entry_point=TurningGMM, max_episode_steps=100)
