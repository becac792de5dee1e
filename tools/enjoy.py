"""Evaluate, watch or film the policy of a checkpoint of any script.

    python tools/enjoy.py runs/<run>/checkpoint.pt                            returns of 10 episodes as JSON
    python tools/enjoy.py runs/<run>/checkpoint.pt --mean-action --render     in a window
    python tools/enjoy.py runs/<run>/checkpoint.pt --video videos --episodes 2

Without a display set MUJOCO_GL=egl. Videos need moviepy, Pendulum's pictures pygame.
"""

import importlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]
    "written by one of the scripts"
    episodes: int = 10
    "episodes to run, one after the other"
    mean_action: bool = False
    "act without noise"
    render: bool = False
    "show a window"
    video: Path | None = None
    "folder for one video of each episode"
    seed: int = 0
    "seed of the first episode and of the actions; the next episodes count on"
    env_id: str | None = None
    "another environment with the same spaces, such as the -v5 of a -v4"


class Normalised:
    """The methods of an actor, on observations as the environment gives them."""

    def __init__(self, actor, obs_rms):
        self.actor, self.obs_rms = actor, obs_rms

    def __getattr__(self, name):
        method = getattr(self.actor, name)
        return lambda obs: method(self.obs_rms(obs))


def load_actor(path):
    """The actor of a checkpoint, whichever script wrote it, the checkpoint, and a wrapper for the environment."""
    try:
        script = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["script"]
    except Exception as error:
        sys.exit(f"error: {path} is no checkpoint of these scripts ({type(error).__name__})")
    if not (ROOT / f"{script}.py").exists():
        sys.exit(f"error: there is no {script}.py here")
    module = importlib.import_module(script)
    checkpoint = module.load_checkpoint(path)
    args = checkpoint["args"]
    envs = module.make_envs(args.env_id, 1)
    obs_dim, action_dim = (
        envs.single_observation_space.shape[0],
        envs.single_action_space.shape[0],
    )
    envs.close()
    actor = module.Actor(obs_dim, action_dim, args)
    obs_rms = module.RunningMeanStd(obs_dim, args.normalize_obs)
    actor.load_state_dict(checkpoint["actor"])
    obs_rms.load_state_dict(checkpoint["obs_rms"])
    return Normalised(actor, obs_rms), checkpoint, module.Interface


def main(args: Args):
    actor, checkpoint, wrap = load_actor(args.checkpoint)
    env_id = args.env_id or checkpoint["args"].env_id
    if env_id.startswith("dm_control/"):
        import shimmy  # noqa: F401
    if args.video and not importlib.util.find_spec("moviepy"):
        sys.exit("error: --video needs the package moviepy")
    mode = "human" if args.render else "rgb_array" if args.video else None
    env = gym.make(env_id, render_mode=mode) if mode else gym.make(env_id)
    if args.video:
        prefix = re.sub(r"[^\w.-]", "-", env_id)
        env = gym.wrappers.RecordVideo(
            env, str(args.video), episode_trigger=lambda _: True, name_prefix=prefix
        )
    env = wrap(env)
    torch.manual_seed(args.seed)
    returns, lengths = [], []
    for episode in range(args.episodes):
        obs, _ = env.reset(seed=args.seed + episode)
        total, length, ended = 0.0, 0, False
        while not ended:
            with torch.no_grad():
                rows = torch.as_tensor(np.asarray(obs), dtype=torch.float32)[None]
                action = actor.mean_action(rows) if args.mean_action else actor.sample(rows)[0]
            obs, reward, terminated, truncated, _ = env.step(action[0].numpy())
            total, length, ended = total + float(reward), length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    env.close()
    facts = {
        "checkpoint": str(args.checkpoint),
        "env_id": env_id,
        "global_step": checkpoint["global_step"],
    }
    facts |= {"mean_action": args.mean_action, "episodes": args.episodes, "seed": args.seed}
    numbers = {
        "mean_return": np.mean(returns),
        "std_return": np.std(returns),
        "returns": returns,
        "lengths": lengths,
    }
    print(json.dumps(facts | numbers, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
