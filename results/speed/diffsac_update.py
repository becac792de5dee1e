"""Time of one gradient step of SAC and DiffSAC in turns, in one process: `update` of each script.

taskset -c 0 python results/speed/diffsac_update.py > results/speed/diffsac_update.csv
"""

import importlib
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ROUNDS, UPDATES = 7, 40
SIZES = {"HalfCheetah-v4": (17, 6), "Humanoid-v4": (376, 17)}
CONTENDERS = {
    "sac": ("sac_continuous", {}),
    "diffsac step K=8": ("diffsac_continuous", {"diffusion_steps": 8}),
    "diffsac step K=16": ("diffsac_continuous", {"diffusion_steps": 16}),
    "diffsac chain K=8": ("diffsac_continuous", {"actor_gradient": "chain"}),
}


class Captured(Exception):
    pass


def update_of(name, env_id, flags):
    """The function `update` inside the script's main, before the first environment step."""
    script = importlib.import_module(name)

    def capture(args, device, update, act):
        raise Captured(update)

    script.speed_up, script.Run = capture, lambda *_: None
    try:
        script.main(script.Args(env_id=env_id, buffer_size=1, device="cpu", **flags))
    except Captured as caught:
        return script, caught.args[0]


print(f"# one gradient step, one thread, {ROUNDS} rounds of {UPDATES} in turns, random batches")
print("env_id,contender,median_ms,best_ms,ratio_of_medians,ratio_of_bests")
for env_id, (obs_dim, action_dim) in SIZES.items():
    updates = {key: update_of(name, env_id, flags) for key, (name, flags) in CONTENDERS.items()}
    times = {key: [] for key in updates}
    for i in range(ROUNDS + 1):  # the first warms up
        for key, (script, update) in updates.items():
            shapes = ((256, obs_dim), (256, obs_dim), (256, action_dim), (256,))
            batch = script.Batch(*map(torch.randn, shapes), torch.zeros(256))
            batch = batch._replace(actions=batch.actions.tanh())
            start = time.perf_counter()
            for _ in range(UPDATES):
                update(batch)
            times[key] += [1000 * (time.perf_counter() - start) / UPDATES] if i else []
    first = times["sac"]
    for key, values in times.items():
        median, best = statistics.median(values), min(values)
        ratios = median / statistics.median(first), best / min(first)
        cells = (f"{x:.2f}" for x in (median, best, *ratios))
        print(",".join((env_id, key, *cells)), flush=True)
