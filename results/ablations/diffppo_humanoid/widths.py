"""Widths of the policies of PPO and DiffPPO on Humanoid-v4 at the states that they visit.

    python results/ablations/diffppo_humanoid/widths.py runs/*/policy.pt > widths.csv

128 actions at every twentieth step of two episodes, up to step 400, without the squashing: their
standard deviation, and the distance of their mean from the mean action; means over dimensions.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from tools import enjoy


def unsquash(actions):
    return actions.clamp(-0.9999, 0.9999).atanh()


print("script,seed,std,distance_of_mean_action")
for path in sys.argv[1:]:
    actor, checkpoint, module = enjoy.load_actor(path)
    env = enjoy.make_env(enjoy.Args(Path(path)), checkpoint, module)
    torch.manual_seed(0)
    stds, distances = [], []
    for seed in range(2):
        obs, _ = env.reset(seed=seed)
        for step in range(400):
            obs = torch.as_tensor(obs)[None]
            with torch.no_grad():
                if step % 20 == 0:
                    drawn = unsquash(actor.sample(obs.expand(128, -1))[0])
                    stds.append(drawn.std(0))
                    mean_action = unsquash(actor.mean_action(obs))[0]
                    distances.append((drawn.mean(0) - mean_action).abs())
                action = actor.sample(obs)[0][0].numpy()
            obs, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                break
    means = [f"{torch.stack(values).mean():.3f}" for values in (stds, distances)]
    print(checkpoint["script"], checkpoint["args"].seed, *means, sep=",")
