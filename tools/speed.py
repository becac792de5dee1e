"""Environment steps per second of the scripts, of stable-baselines3 and of sbx, in turns on one machine.

    pip install stable-baselines3 sbx-rl
    python tools/speed.py --env-id HalfCheetah-v4 --rounds 3
    python tools/speed.py --contenders ppo_continuous sb3:ppo sbx:ppo diffppo_continuous --steps 24576 --burn-in 8192
    python tools/speed.py --contenders "diffsac_continuous --diffusion-steps "{1,2,4,8,16}

Every contender runs in a process of its own with one thread, the scripts' default sizes (off-policy: two layers of 256,
batches of 256, one gradient step per environment step; on-policy: two layers of 64, 8 environments, rollouts of 256
steps, 10 epochs of minibatches of 64) and no evaluation; A B C A B C, so that a drift of the machine hits all alike.
The clock runs from `burn_in` steps, when gradient steps have long begun, to `steps`.

Of the scripts also: the time of one gradient step, the part of it that its matrix products would take at the rate of a
product of 256 x 256 matrices measured in the same process just before, and the peak memory of the process. Prints a
Markdown table with ratios to the first contender, of the best rounds: what else a machine does only slows a run down.
Writes all rounds as csv.
"""

import csv
import importlib
import json
import os
import resource
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
COLUMNS = ("steps_per_s", "update_ms", "matrix_fraction", "peak_mb")


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    "environment"
    contenders: tuple[str, ...] = (
        "sac_continuous",
        "sb3:sac",
        "diffsac_continuous --diffusion-steps 8",
    )
    "scripts with their flags, or {sb3,sbx}:{sac,ppo}; the first one is the reference of the ratios"
    steps: int = 3000
    "environment steps of one run"
    burn_in: int = 1000
    "environment steps before the clock starts"
    rounds: int = 3
    "runs of each contender"
    device: str = "cpu"
    "device of the scripts; the other libraries stay on the CPU"
    to: Path | None = None
    "csv file for the single measurements"


def clocked(args, times):
    """Steps per second between the logged steps, {step: time}, that are nearest to `burn_in` and to `steps`."""
    first, last = (
        min(times, key=lambda step: abs(step - wanted)) for wanted in (args.burn_in, args.steps)
    )
    return (last - first) / (times[last] - times[first])


def matrix_rate(seconds=0.5):
    """Floating-point operations per second in products of 256 x 256 matrices: the best of many short runs."""
    import torch

    a, best, end = torch.randn(256, 256), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(a, a)
        best = max(best, 10 * 2 * 256**3 / (time.perf_counter() - start))
    return best


def measure_script(command, args):
    """One run of a script in the current folder and process; returns a dict with the `COLUMNS`."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.flop_counter import FlopCounterMode

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    # on a GPU a step ends long after its launch, and a product of matrices on the CPU says nothing
    rate, wait = (
        (matrix_rate(), lambda: None)
        if args.device == "cpu"
        else (float("nan"), torch.cuda.synchronize)
    )
    name, *flags = command.split()
    flags += f"--env-id {args.env_id} --total-timesteps {args.steps} --device {args.device}".split()
    flags += [] if "ppo" in name else ["--learning-starts", str(STARTS)]
    flags += "--eval-frequency 0 --eval-episodes 1 --checkpoint-frequency 0 --compile".split()
    seconds, operations = [], []

    compile_ = torch.compile if "--compile" in command.split() else lambda function: function

    def instead_of_compiling(update):  # the one place where a script hands out its gradient step
        fast = compile_(update)

        def timed(*inputs):
            if len(seconds) == 5:
                with FlopCounterMode(display=False) as counter:
                    results = update(*inputs)
                operations.append(counter.get_total_flops())
                seconds.append(0.0)
                return results
            wait()
            start = time.perf_counter()
            results = fast(*inputs)
            wait()
            seconds.append(time.perf_counter() - start)
            return results

        return timed

    torch.compile = instead_of_compiling
    script = importlib.import_module(name)
    sys.argv = [f"{name}.py", *flags]
    script.main(tyro.cli(script.Args))
    events = EventAccumulator(str(next(Path("runs").glob("*"))), size_guidance={"scalars": 0})
    events.Reload()
    speed = clocked(args, {event.step: event.wall_time for event in events.Scalars("charts/SPS")})
    update = float(np.median(seconds[len(seconds) // 3 :]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(
        zip(COLUMNS, (speed, 1e3 * update, operations[0] / rate / update, peak), strict=True)
    )


def measure_library(library, algorithm, args):
    """Steps per second of stable-baselines3 or sbx at the same sizes, in the same form."""
    import gymnasium as gym
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

    model_class = getattr(
        importlib.import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[library]),
        algorithm.upper(),
    )
    options = {"device": "cpu"} if library == "sb3" else {}
    if algorithm == "ppo":
        envs = DummyVecEnv([lambda: gym.make(args.env_id)] * 8)
        model = model_class("MlpPolicy", envs, n_steps=256, batch_size=64, n_epochs=10, **options)
    else:
        model = model_class("MlpPolicy", gym.make(args.env_id), learning_starts=STARTS, **options)
    model.learn(args.steps, callback=Clock())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"steps_per_s": clocked(args, times), "peak_mb": peak}


def measure(contender, args):
    """Measure one contender in a process and folder of its own; returns a dict of `COLUMNS`, some may be missing."""
    call = f"measure_script({contender!r}, args)"
    if contender.startswith(("sb3:", "sbx:")):
        call = f"measure_library({contender[:3]!r}, {contender[4:]!r}, args)"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from speed import *; "
    code += f"args = Args({args.env_id!r}, steps={args.steps}, burn_in={args.burn_in}, device={args.device!r}); "
    code += f"print(json.dumps({call}))"
    one_thread = {
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code]
        # one core: XLA's threads do not always obey its flags
        core = {max(os.sched_getaffinity(0))} if hasattr(os, "sched_getaffinity") else None
        pin = (lambda: os.sched_setaffinity(0, core)) if core else None
        out = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | one_thread,
            capture_output=True,
            text=True,
            preexec_fn=pin,
        )
        if out.returncode:
            sys.exit(f"{contender} failed:\n{out.stderr[-2000:]}")
        return json.loads(out.stdout.splitlines()[-1])


def main(args: Args):
    rows = []
    for round_ in range(args.rounds):
        for contender in args.contenders:
            rows.append({"contender": contender, "round": round_ + 1} | measure(contender, args))
            print(
                f"round {round_ + 1}: {contender}: {rows[-1]['steps_per_s']:.1f} steps/s",
                file=sys.stderr,
            )

    def values(contender, column):
        return np.array([row.get(column, np.nan) for row in rows if row["contender"] == contender])

    title = f"{args.env_id}, one thread, best of {args.rounds} rounds (median)"
    print(f"| {title} | steps/s | ratio | update, ms | matrix products | peak, MB |")
    print("|---|---|---|---|---|---|")
    best = {contender: values(contender, "steps_per_s").max() for contender in args.contenders}
    for contender in args.contenders:
        speed, update, fraction, peak = (values(contender, column) for column in COLUMNS)
        own = (
            "| |"
            if np.isnan(update).any()
            else f"| {update.min():.2f} | {100 * fraction[update.argmin()]:.0f} %"
        )
        ratio = best[contender] / best[args.contenders[0]]
        print(
            f"| {contender} | {best[contender]:.1f} ({np.median(speed):.1f}) | {ratio:.2f} {own} | {peak.max():.0f} |"
        )
    if args.to:
        args.to.parent.mkdir(parents=True, exist_ok=True)
        with open(args.to, "w", newline="") as file:
            writer = csv.DictWriter(
                file, ["env_id", "contender", "round", *COLUMNS], lineterminator="\n"
            )
            writer.writeheader()
            for row in rows:
                numbers = {column: f"{row[column]:.4g}" for column in COLUMNS if column in row}
                writer.writerow({"env_id": args.env_id} | row | numbers)


if __name__ == "__main__":
    main(tyro.cli(Args))
