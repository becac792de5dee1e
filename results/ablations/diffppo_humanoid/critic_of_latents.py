"""How far the values of a DiffPPO run depend on the chain, in units of the returns' std.

    python results/ablations/diffppo_humanoid/critic_of_latents.py CHECKPOINT > latents.csv

Standard deviation of V(s, a^k, k) over 16 chains of a state (mean over states), and over the states
(of the mean over chains); 512 steps of eight environments.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import diffppo_continuous as diffppo  # noqa: E402


@torch.no_grad()
def main(path):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    checkpoint = diffppo.load_checkpoint(path)
    args, obs_dim = checkpoint["args"], len(checkpoint["obs_rms"]["mean"])
    envs = diffppo.make_envs(args.env_id, 8)
    action_dim, steps = envs.single_action_space.shape[0], args.diffusion_steps
    actor = diffppo.Actor(obs_dim, action_dim, args)
    critic = diffppo.mlp(obs_dim + action_dim + steps, 1, args.hidden_dim, last_gain=1.0)
    obs_rms = diffppo.RunningMeanStd(obs_dim)
    for name, part in (("actor", actor), ("critic", critic), ("obs_rms", obs_rms)):
        part.load_state_dict(checkpoint[name])
    obs, _ = envs.reset(seed=1)
    seen = []
    for _ in range(512):
        seen.append(obs_rms(diffppo.to_tensor(obs, "cpu")))
        obs, *_ = envs.step(actor.sample(seen[-1])[0].numpy())
    states = torch.cat(seen[::8])
    chains = torch.stack([actor.latents(states) for _ in range(16)])
    print("k,std_over_chains,std_over_states")
    for k in range(1, steps + 1):
        step = torch.full((len(states),), k)
        values = [critic(diffppo.augment(states, chain[k], step, steps)) for chain in chains]
        values = torch.stack(values)[..., 0]
        print(f"{k},{values.std(0).mean():.4f},{values.mean(0).std():.4f}")


main(sys.argv[1])
