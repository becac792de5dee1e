"""A bandit: another target action at every step, and a quadratic loss.

    PYTHONPATH=results/ablations/diffppo_bandit python ppo_continuous.py \
        --env-id bandit:Bandit-v0 --total-timesteps 150000 --gamma 0.5
"""

import gymnasium as gym
import numpy as np


class Bandit(gym.Env):
    """s ~ N(0, I_8); reward -|a - 0.8 tanh(W s)|^2, 17 actions; an episode has ten steps."""

    def __init__(self):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (17,), np.float32)
        self.weights = 1.5 / 8**0.5 * np.random.default_rng(0).normal(size=(17, 8))

    def observe(self):
        self.state = self.np_random.normal(size=8).astype(np.float32)
        return self.state

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        reward = -float(np.square(action - 0.8 * np.tanh(self.weights @ self.state)).sum())
        self.steps += 1
        return self.observe(), reward, self.steps == 10, False, {}


gym.register("Bandit-v0", entry_point=Bandit)
