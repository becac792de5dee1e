"""Environment steps per second of the scripts and of stable-baselines3, in turns on one machine.

    pip install stable-baselines3
    python tools/speed.py --env-id HalfCheetah-v4 --rounds 3
    python tools/speed.py --contenders ppo_continuous sb3:ppo diffppo_continuous --steps 24576 --burn-in 8192

Every contender runs in a process of its own with one thread, the scripts' default sizes (off-policy: two layers of 256,
batches of 256, one gradient step per environment step; on-policy: two layers of 64, 8 environments, rollouts of 256
steps, 10 epochs of minibatches of 64) and no evaluation; A B C A B C, so that a drift of the machine hits all alike.
The clock runs from `burn_in` steps, when gradient steps have long begun, to `steps`. Prints a Markdown table with
ratios to the first contender, and writes csv.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
STARTS = 500  # steps with random actions


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    "environment"
    contenders: tuple[str, ...] = ("sac_continuous", "sb3:sac", "diffsac_continuous --diffusion-steps 8")
    "scripts with their flags, sb3:sac or sb3:ppo; the first one is the reference of the ratios"
    steps: int = 3000
    "environment steps of one run"
    burn_in: int = 1000
    "environment steps before the clock starts"
    rounds: int = 3
    "runs of each contender"
    to: Path | None = None
    "csv file for the single measurements"


def clocked(args, times):
    """Steps per second between the logged steps, {step: time}, that are nearest to `burn_in` and to `steps`."""
    first, last = (min(times, key=lambda step: abs(step - wanted)) for wanted in (args.burn_in, args.steps))
    return (last - first) / (times[last] - times[first])


def script_speed(command, args, folder):
    """Steps per second of a script, from the times at which it logged its losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script, *flags = command.split()
    flags += f"--env-id {args.env_id} --total-timesteps {args.steps}".split()
    flags += [] if "ppo" in script else ["--learning-starts", str(STARTS)]
    flags += "--eval-frequency 0 --eval-episodes 1 --checkpoint-frequency 0 --no-progress --device cpu".split()
    subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=folder, check=True, capture_output=True)
    events = EventAccumulator(str(next(Path(folder, "runs").glob("*"))), size_guidance={"scalars": 0})
    events.Reload()
    return clocked(args, {event.step: event.wall_time for event in events.Scalars("charts/SPS")})


def sb3_speed(algorithm, args):
    """Steps per second of stable-baselines3 at the same sizes."""
    import gymnasium as gym
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    torch.set_num_threads(1)
    times = {}

    class Clock(BaseCallback):
        def _on_step(self):
            times.setdefault(self.num_timesteps, time.time())
            return True

        def _on_rollout_start(self):  # on-policy: the update is over, as in the scripts' log
            times[self.num_timesteps] = time.time()

        _on_training_end = _on_rollout_start

    if algorithm == "ppo":
        envs = DummyVecEnv([lambda: gym.make(args.env_id)] * 8)
        model = stable_baselines3.PPO("MlpPolicy", envs, n_steps=256, batch_size=64, n_epochs=10, device="cpu")
    else:
        model_class = getattr(stable_baselines3, algorithm.upper())
        model = model_class("MlpPolicy", gym.make(args.env_id), learning_starts=STARTS, device="cpu")
    model.learn(args.steps, callback=Clock())
    return clocked(args, times)


def main(args: Args):
    os.environ["OMP_NUM_THREADS"] = "1"
    speeds = {contender: [] for contender in args.contenders}
    for round_ in range(args.rounds):
        for contender in args.contenders:
            with tempfile.TemporaryDirectory() as folder:
                if contender.startswith("sb3:"):
                    code = f"import runpy; m = runpy.run_path({str(__file__)!r}); from pathlib import Path; "
                    code += f"print(m['sb3_speed']({contender[4:]!r}, m['Args']({args.env_id!r}, steps={args.steps}, "
                    code += f"burn_in={args.burn_in})))"
                    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
                    speed = float(out.stdout.split()[-1])
                else:
                    speed = script_speed(contender, args, folder)
            speeds[contender].append(speed)
            print(f"round {round_ + 1}: {contender}: {speed:.1f} steps/s", file=sys.stderr)
    reference = np.array(speeds[args.contenders[0]])
    print(f"| {args.env_id}, one thread | steps/s, median of {args.rounds} | ratio to the first, median of rounds |")
    print("|---|---|---|")
    for contender, values in speeds.items():
        print(f"| {contender} | {np.median(values):.1f} | {np.median(np.array(values) / reference):.2f} |")
    if args.to:
        args.to.parent.mkdir(parents=True, exist_ok=True)
        with open(args.to, "w", newline="") as file:
            rows = [[args.env_id, name, i + 1, f"{v:.2f}"] for name, vs in speeds.items() for i, v in enumerate(vs)]
            csv.writer(file, lineterminator="\n").writerows([["env_id", "contender", "round", "steps_per_s"], *rows])


if __name__ == "__main__":
    main(tyro.cli(Args))
