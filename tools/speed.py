"""Environment steps per second of scripts and of other libraries, in turns on one core.

    python tools/speed.py --contenders sac_continuous.py "diffsac_continuous.py --diffusion-steps 8"

Beside stable-baselines3 and sbx (`pip install stable-baselines3 sbx-rl`), at the same sizes:

    python tools/speed.py --contenders sac_continuous.py sb3:sac sbx:sac --to speed.csv

Two editions of a script, the older one from another checkout:

    python tools/speed.py --contenders ../old/ppo_continuous.py ppo_continuous.py --steps 100000

Each contender runs in a process and folder of its own, with one thread and without evaluation:
A B C A B C, so that a drift of the machine hits all alike. The clock runs over the second half of
the steps. Prints a table with ratios to the first contender in the same round; one that fails has
no figure there, and the exit status is 2. `--copies 8` runs each contender eight times at once, one
a core, and adds their speeds.
"""

import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = """
import sys, time, gymnasium as gym, torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
library, algorithm, env_id, device, steps = *sys.argv[1:5], int(sys.argv[5])
model_class = getattr(__import__(library), algorithm.upper())
torch.set_num_threads(1)

class Clock(BaseCallback):
    def _on_step(self):
        # from the first step of a rollout, so that rollouts and updates are as many
        if self.num_timesteps > steps // 2 and not hasattr(self, "start"):
            self.start = self.num_timesteps, time.time()
        return True

options = {"device": device} if library == "stable_baselines3" else {}
if algorithm == "ppo":
    envs = DummyVecEnv([lambda: gym.make(env_id)] * 8)
    options |= {"n_steps": 256, "batch_size": 64, "n_epochs": 10}
else:
    envs, options = gym.make(env_id), options | {"learning_starts": 500}
model, clock = model_class("MlpPolicy", envs, **options), Clock()
model.learn(steps, callback=clock)
print((model.num_timesteps - clock.start[0]) / (time.time() - clock.start[1]))
"""


def call(command, folder, core):
    """Run a command in `folder` on a core, counted from the last; its output."""
    threads = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    affinity = getattr(os, "sched_setaffinity", None)
    cores = sorted(os.sched_getaffinity(0)) if affinity else []
    pin = (lambda: affinity(0, {cores[-1 - core % len(cores)]})) if affinity else None
    environ = os.environ | threads
    options = {"cwd": folder, "env": environ, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command], preexec_fn=pin, **options)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:].strip())
    return done.stdout


def measure(contender, env_id, steps, device, core=0):
    """Steps per second of one run of a contender."""
    with tempfile.TemporaryDirectory() as folder:
        if contender.startswith(("sb3:", "sbx:")):
            library = {"sb3": "stable_baselines3", "sbx": "sbx"}[contender[:3]]
            command = ["-c", LIBRARY, library, contender[4:], env_id, device, str(steps)]
            return float(call(command, folder, core).splitlines()[-1])
        script, *own = contender.split()
        script = Path(script) if Path(script).exists() else ROOT / script
        flags = ["--env-id", env_id, "--total-timesteps", str(steps), "--eval-episodes", "1"]
        flags += ["--eval-frequency", "0", "--checkpoint-frequency", "0", "--device", device]
        flags += [] if "ppo" in script.name else ["--learning-starts", "500"]
        call([str(script.resolve()), *flags, *own], folder, core)  # of two the last counts
        (run,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        logged = [e for e in events.Scalars("charts/SPS") if e.step >= steps // 2]
        if len(logged) < 2:
            raise RuntimeError("--steps is too small for two log entries")
        first, last = logged[0], logged[-1]
        return (last.step - first.step) / (last.wall_time - first.wall_time)


def main(
    contenders: tuple[str, ...],
    env_id: str = "HalfCheetah-v4",
    steps: int = 4000,
    rounds: int = 3,
    copies: int = 1,
    device: str = "cpu",
    to: Path | None = None,
) -> None:
    """Measure all contenders in turns; `to` keeps the rounds as csv."""
    if len(set(contenders)) < len(contenders):
        print("error: a contender stands there twice", file=sys.stderr)
        sys.exit(2)
    rows = []
    for i in range(1, rounds + 1):
        for contender in contenders:
            one = partial(measure, contender, env_id, steps, device)
            try:
                with ThreadPoolExecutor(copies) as pool:
                    speed = sum(pool.map(one, range(copies)))
            except RuntimeError as error:  # the others are measured all the same
                print(f"error: {contender}: {error}", file=sys.stderr)
                speed = math.nan
            rows.append((env_id, contender, i, speed))
            print(f"round {i}: {contender}: {speed:.1f} steps/s", file=sys.stderr)
    rows = pd.DataFrame(rows, columns=["env_id", "contender", "round", "steps_per_s"])
    speeds = rows.pivot(index="round", columns="contender", values="steps_per_s")[list(contenders)]
    ratios = speeds.div(speeds[contenders[0]], axis=0)
    what = f"{env_id}, {device}, rounds: {rounds}" + (f", at once: {copies}" if copies > 1 else "")
    print(f"| {what} | steps/s, median | ratio, median | ratios |")
    print("|---|---|---|---|")
    for name in contenders:
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios[name])
        cells = f"{speeds[name].median():.1f} | {ratios[name].median():.2f} | {each}"
        print(f"| {name} | {cells} |")
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(to, index=False, float_format="%.4g")
    if speeds.isna().any(axis=None):
        sys.exit(2)


if __name__ == "__main__":
    tyro.cli(main)
