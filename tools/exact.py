"""The policy without the critics: train the actor of an off-policy script on the exact soft values of toys/.

    python tools/exact.py diffwpo_continuous --env-id toys:TurningGMM-v0 --no-autotune --alpha 1 --total-timesteps 10000
    python tools/multimodality.py table runs/<run>/checkpoint.pt

What such a policy still misses is due to the policy, its loss and the number of gradient steps; what the script's own
misses beyond that, at as many steps and the same batch size, is due to the critics and to exploration. The flags are
the script's; --total-timesteps counts gradient steps of the actor (by plain Adam, for DIME too), on batches of random
headings, and --alpha-anneal works as in the script. Flags of critics, buffer and environments have no effect.

The soft value of an action is its reward plus a constant: in the double well at every temperature, in the GMM at
alpha = 1. While the GMM's temperature is annealed, the reward stands in for the value.
"""

import importlib
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toys  # noqa: E402, F401  (registers the environments)

SCRIPTS = ("wpo_continuous", "diffwpo_continuous", "dime")


class ExactValues:
    """The reward in place of twin critics, differentiable in the action."""

    def __init__(self, env):
        self.env = env

    def __call__(self, obs, actions, step=1e-4):
        """Values (2, ...) at obs (..., 2) and actions (..., 1); their gradient is a central difference."""
        heading = np.arctan2(obs[..., 1].double().numpy(), obs[..., 0].double().numpy())
        action = actions.detach()[..., 0].double().numpy()
        value = self.env.reward(heading, action)
        slope = (
            self.env.reward(heading, action + step) - self.env.reward(heading, action - step)
        ) / (2 * step)
        value, slope = (torch.as_tensor(x, dtype=actions.dtype) for x in (value, slope))
        return (value + slope * (actions - actions.detach())[..., 0]).expand(2, *value.shape)

    value = __call__


def train(script, args):
    """Train an actor of the module `script` and return it."""
    torch.manual_seed(args.seed)
    random = np.random.default_rng(args.seed)
    env = gym.make(args.env_id).unwrapped
    actor, values = script.Actor(env.observation_space, env.action_space, args), ExactValues(env)
    wasserstein = "wpo" in script.__name__
    optimizer = torch.optim.Adam(actor.parameters(), lr=args.policy_lr, fused=True)
    for step in tqdm(range(args.total_timesteps), disable=not args.progress, mininterval=1):
        alpha = args.alpha * args.alpha_anneal ** max(0.0, 1 - step / (0.7 * args.total_timesteps))
        headings = env.first_headings(random, (args.batch_size,))
        obs = torch.as_tensor(env.observe(headings), dtype=torch.float32)
        before, after = (
            ((actor,), (args,)) if wasserstein else ((), ())
        )  # no trust region: the actor is its target
        loss = script.policy_loss(actor, *before, values, obs, torch.tensor(alpha), *after)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            sys.exit(f"error: the loss is not finite at step {step}")
    return actor


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        sys.exit(f"error: the first argument must be one of {' '.join(SCRIPTS)}")
    script = importlib.import_module(sys.argv[1])
    args = tyro.cli(script.Args, args=sys.argv[2:])
    if not args.env_id.startswith("toys:") or args.autotune:
        sys.exit("error: only for the environments in toys/, with --no-autotune")
    args.exp_name = script.Args.exp_name.removesuffix("_continuous") + "_exact"
    torch.set_num_threads(args.torch_threads)
    start = time.time()
    actor = train(script, args)
    path = script.make_run_dir(args) / "checkpoint.pt"
    script.save_checkpoint(path, args, {"actor": actor}, global_step=args.total_timesteps)
    print(f"{path} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
