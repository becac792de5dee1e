"""When and how checkpoints are written; full disks."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import ppo_continuous
import sac_continuous as sac
from tests.common import (
    ON_POLICY,
    PENDULUM,
    ROOT,
    SCRIPTS,
    SIZES,
    load,
    over,
    run_args,
    run_dirs,
    run_script,
    small_flags,
)


@over(SCRIPTS)
def test_loaded_policy_acts_identically(script, monkeypatch, tmp_path):
    made = []
    actor_class = script.Actor
    monkeypatch.setattr(
        script, "Actor", lambda *sizes: made.append(actor_class(*sizes)) or made[-1]
    )
    script.main(run_args(script, total_timesteps=60))
    checkpoint = script.load_checkpoint(run_dirs(tmp_path)[0] / "checkpoint.pt")
    actor, obs_rms = actor_class(3, 1, checkpoint["args"]), script.RunningMeanStd(3)
    actor.load_state_dict(checkpoint["actor"])
    obs_rms.load_state_dict(checkpoint["obs_rms"])
    obs = torch.randn(5, 3)
    assert torch.equal(actor.mean_action(obs_rms(obs)), made[0].mean_action(obs_rms(obs)))
    assert checkpoint["action_low"] == [-2.0] and checkpoint["action_high"] == [2.0]


@pytest.mark.parametrize("frequency,saves", [(1000, 4), (0, 1)])
def test_checkpoints_by_the_clock(frequency, saves, monkeypatch, tmp_path):
    """Ten minutes after the last one, unless only the end is asked for."""
    now, saved, save = [1000.0], [], sac.Run.save
    monkeypatch.setattr(sac.time, "time", lambda: now[0])
    whole = lambda run: (saved.append(run.step), save(run))
    monkeypatch.setattr(sac.Run, "save", lambda run, *policy, **_: policy or whole(run))
    count = sac.Run.count

    def tick(run, *rest, **more):
        count(run, *rest, **more)
        now[0] += 30

    monkeypatch.setattr(sac.Run, "count", tick)
    args = sac.Args(
        env_id="Pendulum-v1", total_timesteps=70, checkpoint_frequency=frequency, **SIZES
    )
    sac.main(args)
    assert saved == ([21, 42, 63, 70] if saves == 4 else [70])


def test_two_processes_do_not_share_a_folder(monkeypatch, tmp_path):
    assert run_script(monkeypatch, sac, *PENDULUM, "--total-timesteps", 60) == 0
    path = run_dirs(tmp_path)[0] / "checkpoint.pt"
    command = [
        sys.executable,
        str(ROOT / "sac_continuous.py"),
        "--resume",
        str(path),
        "--total-timesteps",
    ]
    first = subprocess.Popen([*command, "1000000"], stdout=subprocess.PIPE, text=True)
    assert "run folder" in first.stdout.readline()
    before = path.read_bytes()
    second = subprocess.run([*command, "70"], capture_output=True, text=True)
    assert (
        second.returncode == 2
        and "another process" in second.stderr
        and path.read_bytes() == before
    )
    first.terminate()
    assert first.wait() == 128 + signal.SIGTERM and load(path.parent)["global_step"] > 60


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
@over([sac, *ON_POLICY])
def test_the_checkpoint_resumed_from_does_not_stay_mapped(script, monkeypatch, tmp_path):
    flags = ["--env-id", "Pendulum-v1", *small_flags(script), "--total-timesteps", 60]
    assert run_script(monkeypatch, script, *flags) == 0
    maps, save = [], script.Run.save

    def save_and_look(run, *policy, **only):
        save(run, *policy, **only)
        maps.append([line for line in open("/proc/self/maps") if run.folder.name in line])

    monkeypatch.setattr(script.Run, "save", save_and_look)
    args = script.load_checkpoint(run_dirs(tmp_path)[0] / "checkpoint.pt")["args"]
    args.resume, args.total_timesteps = str(run_dirs(tmp_path)[0] / "checkpoint.pt"), 80
    script.main(args)
    assert maps and not any(maps)


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    assert run_script(monkeypatch, sac, *PENDULUM, "--total-timesteps", 60) == 0
    path = run_dirs(tmp_path)[0] / "checkpoint.pt"
    size = path.stat().st_size // 2
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2)"
    code = f"{limit}; import runpy, sys; sys.argv[0] = {str(ROOT / 'sac_continuous.py')!r}"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, "--resume", str(path), "--total-timesteps", "90"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "the disk is full" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_last_checkpoint_is_written_once(monkeypatch, tmp_path):
    saved, save = [], sac.Run.save
    whole = lambda run: (saved.append(run.step), save(run))
    monkeypatch.setattr(sac.Run, "save", lambda run, *policy, **_: policy or whole(run))
    args = sac.Args(env_id="Pendulum-v1", total_timesteps=60, checkpoint_frequency=20, **SIZES)
    sac.main(args)
    assert saved == [20, 40, 60]


@pytest.mark.parametrize(
    "script", [sac, ppo_continuous], indirect=True
)  # the others save by the same text
def test_full_disk_leaves_the_last_checkpoint(script, flags, tmp_path):
    """A limit on the size of files, as a full disk: one sentence, the older checkpoint is whole."""
    words = [sys.executable, ROOT / f"{script.__name__}.py", "--env-id", "Pendulum-v1", *flags]
    assert subprocess.run([*words, "--total-timesteps", "20"], capture_output=True).returncode == 0
    (good,) = list(tmp_path.glob("runs/*/checkpoint.pt"))
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


def test_a_policy_that_cannot_be_written_costs_no_run(monkeypatch, tmp_path, capsys):
    save = torch.save

    def full(state, file):
        if "policy" in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    assert run_script(monkeypatch, sac, *PENDULUM, "--total-timesteps", 60) == 0
    assert load(run_dirs(tmp_path)[0])["global_step"] == 60
    assert re.search("cannot write .*policy_best.pt: the disk is full", capsys.readouterr().out)
    assert not list(tmp_path.glob("runs/*/*.tmp"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_under_the_curves_leaves_the_last_checkpoint(
    script, flags, monkeypatch, tmp_path
):
    """A thread writes event files; the run stops all the same, and later goes on without a gap."""
    command = ["--env-id", "Pendulum-v1", *flags, "--checkpoint-frequency", 100]
    assert run_script(monkeypatch, script, *command, "--total-timesteps", 200) == 0
    (good,) = list(tmp_path.glob("runs/*/checkpoint.pt"))
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
