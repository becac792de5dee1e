"""Evaluate, watch or film the policy of a checkpoint of any script.

Returns of ten episodes, as JSON:

    python tools/enjoy.py CHECKPOINT

In a window, without noise, or as films in the folder `videos` (needs moviepy):

    python tools/enjoy.py CHECKPOINT --mean-action --render
    python tools/enjoy.py CHECKPOINT --video videos --episodes 2
"""

import importlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

DISPLAYS = {"DISPLAY", "WAYLAND_DISPLAY"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]  # checkpoint or policy that one of the scripts wrote
    episodes: int = 10  # one after the other
    mean_action: bool = False  # act without noise
    render: bool = False  # show a window
    video: Path | None = None  # folder for a film of each episode
    seed: int = 0  # of actions and the first episode; the next ones count on
    env_id: str | None = None  # one with the same spaces, such as the -v5 of a -v4


def fail(message):
    print(f"error: {' '.join(str(message).split())[:200]}", file=sys.stderr)
    sys.exit(2)


class Normalised:
    """The methods of an actor, on observations as the environment gives them."""

    def __init__(self, actor, obs_rms):
        self.actor, self.obs_rms = actor, obs_rms

    def __getattr__(self, name):
        method = getattr(self.actor, name)
        return lambda obs: method(self.obs_rms(obs))


def load_actor(path):
    """The actor of a checkpoint, whichever script wrote it; the checkpoint; the script's module."""
    try:
        script = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["script"]
    except FileNotFoundError:
        fail(f"there is no {path} (policy_best.pt comes with the first evaluation)")
    except Exception as error:
        fail(f"{path} is no checkpoint of these scripts ({type(error).__name__})")
    if not (ROOT / f"{script}.py").exists():
        fail(f"there is no {script}.py here")
    module = importlib.import_module(script)
    checkpoint = module.load_checkpoint(path)
    obs_dim, action_dim = len(checkpoint["obs_rms"]["mean"]), len(checkpoint["action_low"])
    actor = module.Actor(obs_dim, action_dim, checkpoint["args"])
    obs_rms = module.RunningMeanStd(obs_dim, checkpoint["args"].normalize_obs)
    actor.load_state_dict(checkpoint["actor"])
    obs_rms.load_state_dict(checkpoint["obs_rms"])
    return Normalised(actor, obs_rms), checkpoint, module


def follow(env):
    """Let the camera of a MuJoCo environment follow its body: gymnasium's stands still."""
    if renderer := getattr(env.unwrapped, "mujoco_renderer", None):
        import mujoco

        number = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if number >= 0:
            renderer.camera_id = number  # of films; a window has its own
            if env.unwrapped.render_mode == "human":
                renderer.viewer.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
                renderer.viewer.cam.fixedcamid = number


def make_env(args, checkpoint, module):
    """The environment of the checkpoint, or another one with the same spaces."""
    env_id = args.env_id or checkpoint["args"].env_id
    if args.episodes < 1 or args.seed < 0:
        fail("--episodes must be at least 1, and --seed not negative")
    if args.video and not importlib.util.find_spec("moviepy"):
        fail("--video needs the package moviepy: pip install moviepy")
    if args.render and sys.platform == "linux":
        if not os.environ.keys() & DISPLAYS:
            fail("--render needs a display; to film without one: --video videos --episodes 1")
    if args.video and sys.platform == "linux" and not os.environ.keys() & DISPLAYS:
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported
    mode = "human" if args.render else "rgb_array" if args.video else None
    module.make_envs(env_id, 1).close()  # refuses what the script refuses
    try:
        env = gym.make(env_id, **({"render_mode": mode} if mode else {}))
        if mode:
            env.reset(seed=args.seed)
            env.render()  # fails here, before a film is begun
            follow(env)
        if args.video:
            name = f"{env_id}-{checkpoint['script']}-{checkpoint['args'].seed}"
            name, every = re.sub(r"[^\w.-]", "-", name), lambda episode: True
            env = gym.wrappers.RecordVideo(env, str(args.video), every, name_prefix=name)
        env = module.Interface(env)
    except Exception as error:  # of pictures above all: packages and drivers of all kinds
        fail(f"cannot open {env_id}{' for pictures (docs/pictures.md)' * bool(mode)}: {error}")
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    if sizes != (len(checkpoint["obs_rms"]["mean"]), len(checkpoint["action_low"])):
        fail(f"the policy is of {checkpoint['args'].env_id}, whose spaces {env_id} does not have")
    return env


def main(args: Args):
    actor, checkpoint, module = load_actor(args.checkpoint)
    env = make_env(args, checkpoint, module)
    policy = actor.mean_action if args.mean_action else lambda obs: actor.sample(obs)[0]
    torch.manual_seed(args.seed)
    returns, lengths = [], []
    for episode in range(args.episodes):
        obs, _ = env.reset(seed=args.seed + episode)
        total, length, ended = 0.0, 0, False
        while not ended and length < 10_000:  # as the scripts' evaluations
            with torch.no_grad():
                action = policy(torch.as_tensor(obs)[None])[0].numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, ended = total + reward, length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
        print(f"episode {episode + 1}: return {total:.1f}", file=sys.stderr)
    env.close()
    facts = {"checkpoint": str(args.checkpoint), "env_id": env.unwrapped.spec.id}
    facts |= {"global_step": checkpoint["global_step"], "mean_action": args.mean_action}
    facts |= {"episodes": args.episodes, "seed": args.seed}
    numbers = {"mean_return": np.mean(returns), "std_return": np.std(returns)}
    print(json.dumps(facts | numbers | {"returns": returns, "lengths": lengths}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
