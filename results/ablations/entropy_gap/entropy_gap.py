"""How far the entropy bound of a policy lies below its entropy, in nats.

    python results/ablations/entropy_gap/entropy_gap.py results/policies/*.pt > entropy_gap.csv

The entropy of 8,000 actions at a state is estimated by nearest neighbours (Kozachenko and Leonenko
1987) before squashing, the log-determinant of tanh is added. For a Gaussian policy the gap is zero:
what is found there is the error of the estimate. States: every 20th of an episode.
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from tools.enjoy import load_actor  # noqa: E402

SAMPLES, NEIGHBOUR, STATES = 8000, 4, 30


def entropy(latents):
    """Estimate from rows (samples, dim), after a linear map that makes them isotropic."""
    count, dim = latents.shape
    factor = np.linalg.cholesky(np.cov(latents.T) + 1e-9 * np.eye(dim))
    white = np.linalg.solve(factor, (latents - latents.mean(0)).T).T
    radius = cKDTree(white).query(white, NEIGHBOUR + 1)[0][:, NEIGHBOUR]
    ball = dim / 2 * np.log(np.pi) - gammaln(dim / 2 + 1)
    estimate = dim * np.log(radius).mean() + digamma(count) - digamma(NEIGHBOUR) + ball
    return estimate + np.log(np.diag(factor)).sum()


@torch.no_grad()
def main(paths):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("policy,state,bound,entropy,gap,action_std")
    for path in map(Path, paths):
        actor, checkpoint, module = load_actor(path)
        env = module.Interface(gym.make(checkpoint["args"].env_id))
        obs, _ = env.reset(seed=1)
        for step in range(20 * STATES):
            obs = torch.as_tensor(obs)
            if step % 20 == 10:
                actions, log_ratio = actor.sample(obs.expand(SAMPLES, -1))
                actions = actions.double().clamp(-1 + 1e-7, 1 - 1e-7)
                log_det = (1 - actions.square()).log().sum(1).mean().item()
                estimate = entropy(actions.atanh().numpy()) + log_det
                bound = -log_ratio.mean().item()
                numbers = (bound, estimate, estimate - bound, actions.std(0).mean().item())
                print(path.stem, step, *(f"{number:.3f}" for number in numbers), sep=",")
            obs, _, terminated, *_ = env.step(actor.sample(obs[None])[0][0].numpy())
            if terminated:
                obs, _ = env.reset()


if __name__ == "__main__":
    main(sys.argv[1:])
