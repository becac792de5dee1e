"""What a user's machine does to a run, over all scripts: broken files, full disks, environments that misbehave."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import dime
import ppo_continuous
import sac_continuous
from tests.common import CATEGORICAL, ON_POLICY, ROOT, SCRIPTS, run_script


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


def run_flags(script):
    """Flags of a run of some seconds with a checkpoint every 20 steps."""
    words = "--hidden-dim 16 --eval-episodes 1 --eval-frequency 0 --device cpu --checkpoint-frequency 20"
    if script in ON_POLICY:
        words += " --num-envs 2 --num-steps 10 --num-minibatches 2 --update-epochs 1"
    else:
        words += " --batch-size 16 --learning-starts 40"
    if "diff" in script.__name__ or script is dime:
        words += " --diffusion-steps 2"
    return [*words.split(), *(["--critic-dim", "16"] if script in CATEGORICAL else [])]


@pytest.fixture
def flags(script):
    return run_flags(script)


def checkpoints(tmp_path):
    return list(tmp_path.glob("runs/*/checkpoint.pt"))


def sentence(capsys):
    """The one line on stderr that says what is wrong."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return line


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_broken_checkpoints_are_refused_and_execute_nothing(
    script, flags, monkeypatch, tmp_path, capsys
):
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--total-timesteps", 20, *flags)
        == 0
    )
    (good,) = checkpoints(tmp_path)
    whole = good.read_bytes()
    broken = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "flipped": whole[:200] + bytes(100) + whole[300:],
    }
    for name, data in broken.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
    torch.save({"script": script.__name__, "args": Malicious()}, tmp_path / "malicious.pt")
    torch.save({"script": script.__name__, "args": {"no_such_flag": 1}}, tmp_path / "flags.pt")
    (tmp_path / "folder.pt").mkdir()
    capsys.readouterr()
    for name in (*broken, "malicious", "flags", "folder"):
        assert run_script(monkeypatch, script, "--resume", tmp_path / f"{name}.pt") == 2, name
        assert f"{name}.pt" in sentence(capsys)
    assert not (tmp_path / "executed").exists()
    assert (
        run_script(monkeypatch, script, "--resume", good, "--env-id", "MountainCarContinuous-v0")
        == 2
    )
    assert "Pendulum-v1" in sentence(capsys)
    assert run_script(monkeypatch, script, "--resume", good, "--hidden-dim", 8) == 2
    assert "does not fit" in sentence(capsys)
    assert good.read_bytes() == whole


@pytest.mark.parametrize(
    "script", [sac_continuous, ppo_continuous], indirect=True
)  # the others save by the same text
def test_full_disk_leaves_the_last_checkpoint(script, flags, tmp_path):
    """A limit on the size of files, as a full disk: the run stops with one sentence, the older checkpoint is whole."""
    words = [sys.executable, ROOT / f"{script.__name__}.py", "--env-id", "Pendulum-v1", *flags]
    assert subprocess.run([*words, "--total-timesteps", "20"], capture_output=True).returncode == 0
    (good,) = checkpoints(tmp_path)
    before, size = good.read_bytes(), good.stat().st_size
    run = subprocess.run(
        [*words[:2], "--resume", good, "--total-timesteps", "100"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
    )
    assert run.returncode == 1
    assert "error: cannot write the checkpoint" in run.stderr and "Traceback" not in run.stderr
    assert good.read_bytes() == before and not list(tmp_path.glob("runs/*/*.tmp"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_under_the_curves_leaves_the_last_checkpoint(
    script, flags, monkeypatch, tmp_path
):
    """Event files are written by a thread; the run must stop all the same, and later go on without a gap."""
    command = ["--env-id", "Pendulum-v1", *flags, "--checkpoint-frequency", 100]
    assert run_script(monkeypatch, script, *command, "--total-timesteps", 200) == 0
    (good,) = checkpoints(tmp_path)
    before = good.read_bytes()

    write = RecordWriter.write

    def full(writer, data):
        """Full from the next checkpoint on, at step 300."""
        if good.read_bytes() != before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        assert run_script(monkeypatch, script, "--resume", good, "--total-timesteps", 1000) == 1
    assert torch.load(good, weights_only=True)["global_step"] == 300
    assert run_script(monkeypatch, script, "--resume", good, "--total-timesteps", 500) == 0
    events = EventAccumulator(str(good.parent), size_guidance={"scalars": 0})
    events.Reload()
    logged = 20 if script in ON_POLICY else 100
    assert [event.step for event in events.Scalars("charts/SPS")] == list(
        range(logged, 501, logged)
    )


class Misbehaves(gym.Env):
    """Does what its `fault` says in its 51st step."""

    def __init__(self, fault):
        self.fault, self.steps = fault, 0
        self.observation_space = gym.spaces.Box(-1, 1, (3,))
        self.action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        obs, reward = np.zeros(3, dtype=np.float32), 0.0
        if self.steps > 50:
            if self.fault == "raises":
                raise ValueError("the simulator exploded")
            if self.fault == "nan":
                obs = obs + np.nan
            if self.fault == "infinite":
                reward = np.inf
            if self.fault == "shape":
                obs = np.zeros(4, dtype=np.float32)
        return obs, reward, False, False, {}


for fault in ("raises", "nan", "infinite", "shape"):
    gym.register(
        f"Misbehaves-{fault}-v0", lambda fault=fault: Misbehaves(fault), max_episode_steps=200
    )


@pytest.mark.parametrize("fault", ["raises", "nan", "infinite", "shape"])
@pytest.mark.filterwarnings("ignore")
def test_environments_that_misbehave_leave_the_last_checkpoint(
    script, fault, flags, monkeypatch, tmp_path
):
    command = ["--env-id", f"Misbehaves-{fault}-v0", "--total-timesteps", 400, *flags]
    if fault in ("nan", "infinite"):
        assert run_script(monkeypatch, script, *command) == 1
    else:  # a fault of the environment's code: its traceback is what its author needs
        with pytest.raises(ValueError):
            run_script(monkeypatch, script, *command)
    (path,) = checkpoints(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == (
        100 if script in ON_POLICY else 40
    )  # the fault comes in the 51st step
    assert all(x.isfinite().all() for x in checkpoint["actor"].values())


@pytest.mark.parametrize("obstacle", ["file", "read-only"])
def test_runs_folder_that_cannot_be_made(script, obstacle, flags, monkeypatch, tmp_path, capsys):
    if obstacle == "file":
        (tmp_path / "runs").write_text("in the way")
    else:
        makedirs = os.makedirs

        def refuse(path, *arguments, **options):
            if str(path).startswith("runs"):
                raise PermissionError(13, "Permission denied")
            return makedirs(path, *arguments, **options)

        monkeypatch.setattr(os, "makedirs", refuse)
        monkeypatch.setattr(Path, "mkdir", refuse)
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--total-timesteps", 20, *flags)
        == 2
    )
    assert "cannot make the folder" in sentence(capsys)
