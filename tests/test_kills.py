"""SIGKILL at any moment, in the middle of writing a checkpoint above all, then --resume."""

import io
import multiprocessing
import os
import random
import runpy
import signal
import sys
import time

import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.common import ON_POLICY, ROOT, run_flags

INTERVAL = 100  # environment steps from checkpoint to checkpoint
STAGES = ("half written", "written", "on the disk", "renamed")
forkserver = multiprocessing.get_context(
    "forkserver"
)  # has imported everything: a trial costs a second, not six
forkserver.set_forkserver_preload(["tests.common"])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run(script, flags, folder, steps, stage):
    """A process `python script flags` that counts steps, killed when a checkpoint is `stage`."""
    os.chdir(folder)
    sys.argv = [str(script), *flags]
    step, save, replace = SyncVectorEnv.step, torch.save, os.replace

    def counted_step(envs, actions):
        result = step(envs, actions)
        steps.value += envs.num_envs
        return result

    def half_save(checkpoint, file):
        whole = io.BytesIO()
        save(checkpoint, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()

    def replace_and_die(*paths):
        replace(*paths)
        die()

    SyncVectorEnv.step = counted_step
    if stage == "half written":
        torch.save = half_save
    if stage == "written":
        os.fsync = lambda file: die()
    if stage == "on the disk":
        os.replace = lambda *paths: die()
    if stage == "renamed":
        os.replace = replace_and_die
    runpy.run_path(sys.argv[0], run_name="__main__")


def kill_and_resume(script, folder, moments):
    """One run, killed at each of `moments`: a stage, or seconds after the start or first step."""
    flags = [*run_flags(script), "--env-id", "Pendulum-v1", "--checkpoint-frequency", str(INTERVAL)]
    best = None  # the last checkpoint
    for moment in moments:
        before = torch.load(best, weights_only=True)["global_step"] if best else 0
        command = ["--resume", str(best)] if best else [*flags, "--total-timesteps", "1000000000"]
        steps = forkserver.Value("q", 0)
        stage = moment if moment in STAGES else None
        process = forkserver.Process(
            target=run,
            args=(ROOT / f"{script.__name__}.py", command, folder, steps, stage),
            daemon=True,
        )
        process.start()
        if not stage:
            since, seconds = moment
            deadline = time.time() + 1200
            while since == "first step" and not steps.value:
                assert process.is_alive() and time.time() < deadline
                time.sleep(0.001)
            time.sleep(seconds)
            process.kill()
        process.join(1200)
        assert process.exitcode == -signal.SIGKILL, (moment, process.exitcode)
        done = before + steps.value
        for path in folder.glob("runs/*/checkpoint.pt"):
            best = path
        after = 0
        if best:  # whole, whenever the kill came: every tensor is read
            checkpoint = torch.load(best, weights_only=True)
            after = checkpoint["global_step"]
            assert all(x.isfinite().all() for x in checkpoint["actor"].values())
        # a kill within the writing of a checkpoint loses what came since the one before
        assert done - INTERVAL <= after <= done, moment
        if stage == "renamed":
            assert after == done
    assert best and len(list(folder.glob("runs/*/checkpoint.pt"))) == 1
    total = after + INTERVAL
    command = ["--resume", str(best), "--total-timesteps", str(total)]
    process = forkserver.Process(
        target=run, args=(ROOT / f"{script.__name__}.py", command, folder, steps, None)
    )
    process.start()
    process.join(1200)
    assert process.exitcode == 0
    checkpoint = torch.load(best, weights_only=True)
    assert checkpoint["global_step"] == total and not list(best.parent.glob("*.tmp"))
    if script not in ON_POLICY:
        assert checkpoint["buffer"]["size"] == total
    events = EventAccumulator(str(best.parent), size_guidance={"scalars": 0})
    events.Reload()
    logged = 20 if script in ON_POLICY else 100
    curve = [event.step for event in events.Scalars("losses/critic_loss")]
    assert curve == list(range(logged, total + 1, logged))  # nothing lost, nothing twice


def test_killed_while_a_checkpoint_is_written(script, tmp_path):
    kill_and_resume(script, tmp_path, [STAGES[-1], *STAGES[:-1]])  # the first leaves a checkpoint


@pytest.mark.slow
def test_killed_at_twenty_random_moments(script, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    moments = [("start", draw.uniform(0, 1)) for _ in range(4)]
    moments += [("first step", draw.uniform(0, 1.5)) for _ in range(12)]
    moments += STAGES
    draw.shuffle(moments)
    kill_and_resume(script, tmp_path, moments)
