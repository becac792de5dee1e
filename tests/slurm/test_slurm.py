"""A grid through a real Slurm, as `tests/slurm/start.sh` makes one: array, requeue, limit."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch

from tests.common import ROOT

pytestmark = pytest.mark.skipif(
    not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="needs Slurm",
)
FLAGS = "--env-id Pendulum-v1 --hidden-dim 16 --batch-size 16 --learning-starts 40"
FLAGS += " --eval-episodes 1 --device cpu"
LONG = f"sac_continuous.py {FLAGS} --total-timesteps 4000 --checkpoint-frequency 100"


def slurm(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def submit(tmp_path, seeds, command=LONG):
    words = [
        sys.executable,
        ROOT / "tools" / "benchmark.py",
        "suite",
        "--folder",
        tmp_path,
        "--seeds",
        *map(str, seeds),
    ]
    out = slurm(*words, "--slurm", "--slurm-args", "--time=01:00:00 --mem=0", "--commands", command)
    return out.split()[-1] if "Submitted" in out else None


def states(tmp_path):
    return [
        json.loads(path.read_text())["state"]
        for path in sorted(tmp_path.glob("suite/*/status.json"))
    ]


def wait_for(condition, seconds=500):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, slurm("squeue")
        time.sleep(0.5)


def checkpoint(tmp_path, seed):
    found = list(tmp_path.glob(f"suite/*seed-{seed}/runs/*/checkpoint.pt")) or list(
        tmp_path.glob(f"suite/*seed_{seed}/runs/*/checkpoint.pt")
    )
    return found[0] if found else None


@pytest.mark.parametrize("how", ["preempted", "at its time limit"])
def test_a_task_of_an_array_goes_on_and_leaves_the_others_alone(how, tmp_path):
    """The last task of an array has the number of the whole array."""
    job = submit(tmp_path, (1, 2))
    wait_for(lambda: checkpoint(tmp_path, 1) and checkpoint(tmp_path, 2))
    if how == "preempted":
        slurm("scontrol", "requeue", f"{job}_1")
    else:
        slurm("scancel", "--batch", "--signal=USR1", f"{job}_1")
    wait_for(lambda: states(tmp_path) == ["done", "done"])
    for seed in (1, 2):
        assert torch.load(checkpoint(tmp_path, seed), weights_only=True)["global_step"] == 4000
    logs = [path.read_text() for path in sorted(tmp_path.glob("suite/*/log.txt"))]
    assert [log.count("$ ") for log in logs] == [1, 2] and "--resume" in logs[1]
    assert submit(tmp_path, (1, 2)) is None  # all cells are done


def test_cancelled_task_writes_a_checkpoint_and_stays_away(tmp_path):
    job = submit(tmp_path, (1,), LONG.replace("--checkpoint-frequency 100", ""))
    log = lambda: "".join(path.read_text() for path in tmp_path.glob("suite/*/log.txt"))
    wait_for(lambda: "run folder" in log())  # before the first checkpoint that is due
    slurm("scancel", job)
    wait_for(lambda: states(tmp_path) == ["cut off"])
    time.sleep(3)
    assert job not in slurm("squeue", "-h", "-o", "%F")
    assert torch.load(checkpoint(tmp_path, 1), weights_only=True)["global_step"] < 4000
