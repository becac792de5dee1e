"""Environments with a known course, for the tests: `tests.scripted_env:Scripted-v0` and others."""

import warnings

import gymnasium as gym
import numpy as np


class Scripted(gym.Env):
    """Observation (episode, t), reward t. Odd episodes terminate at 3, even ones are cut at 5."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    episode = -1

    def observation(self):
        return np.array([self.episode, self.t], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        odd = self.episode % 2 == 1
        return self.observation(), float(self.t), odd and self.t == 3, not odd and self.t == 5, {}


BOX, IMAGE = gym.spaces.Box(-1.0, 1.0, (1,)), gym.spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8)


class Spaces(gym.Env):
    """An environment of any spaces; it is made, never stepped far."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class PaysTheAction(Spaces):
    """The reward is the action, times a factor."""

    def __init__(self, factor=1.0):
        super().__init__(BOX, BOX)
        self.factor = factor

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed) if seed is not None else None
        return super().reset(seed=seed)

    def step(self, action):
        return self.observation_space.sample(), self.factor * float(action[0]), False, False, {}


class NotANumber(Spaces):
    """Its reward is not a number from its 51st step on."""

    def __init__(self):
        super().__init__(BOX, BOX)
        self.steps = 0

    def step(self, action):
        self.steps += 1
        return (
            self.observation_space.sample(),
            float("nan") if self.steps > 50 else 0.0,
            False,
            False,
            {},
        )


gym.register("Scripted-v0", Scripted)
gym.register("PaysTheAction-v0", PaysTheAction, max_episode_steps=20)
for name, factor in {"Pays128th-v0": 1 / 128, "Pays-v0": 1.0, "Pays128-v0": 128.0}.items():
    gym.register(name, PaysTheAction, kwargs={"factor": factor}, max_episode_steps=20)
gym.register("Image-v0", lambda: Spaces(IMAGE, BOX))
gym.register("Unbounded-v0", lambda: Spaces(BOX, gym.spaces.Box(-np.inf, np.inf, (1,))))
gym.register("Dict-v0", lambda: Spaces(gym.spaces.Dict(a=BOX, b=BOX), BOX), max_episode_steps=20)
gym.register("NotANumber-v0", NotANumber, max_episode_steps=20)
gym.register("Discrete-v0", lambda: Spaces(gym.spaces.Discrete(5), BOX), max_episode_steps=20)


class Plain(gym.Env):
    """Normal observations, episodes of 10 steps; subclasses change one thing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    steps = episodes = 0

    def observe(self):
        return self.np_random.normal(size=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes += 1
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), self.reward(action), False, False, {}

    def reward(self, action):
        return -float(np.square(action, dtype=np.float64).sum())


class Strict(Plain):
    """Refuses an action that is not in its space; pays the action's place between its bounds."""

    def __init__(self, space):
        self.action_space = space

    def reward(self, action):
        assert self.action_space.contains(action), (action, action.dtype, self.action_space)
        low, high = (
            self.action_space.low.astype(np.float64),
            self.action_space.high.astype(np.float64),
        )
        return -float(np.square((2 * action - high - low) / (high - low)).sum())


class OneArray(Plain):
    """Writes (episode, step) into one array, and (step, ) into one info."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self):
        self.array, self.info = np.zeros(2, np.float32), {"episode": {"r": 0.0}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.array[:] = self.episodes, 0
        return self.array, {"goal": None}

    def observe(self):
        return self.array

    def step(self, action):
        self.array[1] += 1
        self.info["contacts"] = np.zeros(int(self.array[1])) if self.array[1] % 2 else "none"
        return self.array, 0.0, False, False, self.info


class BadStart(Plain):
    """Its third episode begins with a value that is not a number."""

    def observe(self):
        return (
            np.full(3, np.nan) if self.episodes == 3 and self.steps % 10 == 0 else super().observe()
        )


class Spike(Plain):
    """In its 55th step an observation or a reward of this size."""

    def __init__(self, where, size):
        self.where, self.size = where, size

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.steps == 55 and self.where == "reward":
            reward = self.size
        if self.steps == 55 and self.where == "observation":
            obs[0] = self.size
        return obs, reward, *rest


class LateNan(Plain):
    """Not a number late in an episode, where only an evaluation gets."""

    def reward(self, action):
        return np.nan if self.steps > 250 else 1.0


class Endless(Plain):
    """No time limit, no terminal state; counts its steps over all instances."""

    total = 0

    def step(self, action):
        Endless.total += 1
        return np.zeros(3), 1.0, False, False, {}


Box = gym.spaces.Box
ACTIONS = {
    "Tenth": Box(-0.1, 0.1, (2,)),
    "Unit": Box(-1.0, 1.0, (2,)),
    "Thousands": Box(-2000.0, 2000.0, (2,)),
    "Half": Box(-1, 1, (2,), np.float16),
    "Double": Box(-0.7, 0.3, (2,), np.float64),
}
REFUSED = {
    "Integers": (Plain.observation_space, Box(0, 10, (1,), np.int64)),
    "Unlimited": (Plain.observation_space, Box(-1e10, 1e10, (1,))),
    "Overflowing": (Plain.observation_space, Box(-1e300, 1e300, (1,), np.float64)),
    "Point": (
        Plain.observation_space,
        Box(np.array([-1.0, 0.0]), np.array([1.0, 0.0]), dtype=np.float64),
    ),
    "Pictures": (Box(0, 255, (8, 8, 3), np.uint8), Plain.action_space),
    "DictOfImages": (gym.spaces.Dict(a=Box(0, 255, (8, 8), np.uint8)), Plain.action_space),
}


class Refused(Plain):
    def __init__(self, spaces):
        self.observation_space, self.action_space = spaces


with warnings.catch_warnings(action="ignore"):
    for name, space in ACTIONS.items():
        gym.register(f"{name}-v0", lambda space=space: Strict(space), max_episode_steps=10)
    for name, spaces in REFUSED.items():
        gym.register(f"{name}-v0", lambda spaces=spaces: Refused(spaces))
    for where in ("observation", "reward"):
        for size in ("1e39", "3e19", "nan"):
            made = lambda where=where, size=size: Spike(where, float(size))  # noqa: E731
            gym.register(f"Spike-{where}-{size}-v0", made, max_episode_steps=10)
    for kind, limit in ((OneArray, 5), (BadStart, 10), (LateNan, 300), (Endless, None)):
        gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=limit)


class Misbehaves(gym.Env):
    """Does what its `fault` says in its 51st step."""

    def __init__(self, fault):
        self.fault, self.steps = fault, 0
        self.observation_space = gym.spaces.Box(-1, 1, (3,))
        self.action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        obs, reward = np.zeros(3, dtype=np.float32), 0.0
        if self.steps > 50:
            if self.fault == "raises":
                raise ValueError("the simulator exploded")
            if self.fault == "nan":
                obs = obs + np.nan
            if self.fault == "infinite":
                reward = np.inf
            if self.fault == "shape":
                obs = np.zeros(4, dtype=np.float32)
        return obs, reward, False, False, {}


for fault in ("raises", "nan", "infinite", "shape"):
    gym.register(
        f"Misbehaves-{fault}-v0", lambda fault=fault: Misbehaves(fault), max_episode_steps=200
    )


def scaled_pendulum(factor):
    """Pendulum-v1 with its rewards multiplied."""
    env = gym.make("Pendulum-v1")
    return gym.wrappers.TransformReward(env, lambda reward: factor * reward)


for name, factor in {"Pendulum100th-v0": 0.01, "Pendulum100-v0": 100.0}.items():
    gym.register(name, lambda factor=factor: scaled_pendulum(factor))
