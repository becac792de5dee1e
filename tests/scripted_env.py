"""Environments with a known course, for the tests: `tests.scripted_env:Scripted-v0` and others."""

import gymnasium as gym
import numpy as np


class Scripted(gym.Env):
    """Observation (episode, t), reward t. Odd episodes terminate after 3 steps, even ones are cut off after 5."""

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
