"""Signals end a run with a checkpoint."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.common import ON_POLICY, ROOT, SMALL, load, over, run_dirs


def test_a_closed_terminal_stops_a_run_but_for_nohup(tmp_path):
    """And a SIGINT stops one that a shell script has put into the background."""
    flags = ["--env-id", "tests.scripted_env:Endless-v0", *SMALL, "--eval-frequency", "0"]
    command = [sys.executable, str(ROOT / "sac_continuous.py"), *flags]

    def ignore_both():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=ignore_both)
    assert "run folder" in process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint(script, small, signum, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 1_000_000, *small]
    flags += ["--checkpoint-frequency", 20]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, flags)]
    )
    deadline = time.time() + 1200
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    assert process.wait(timeout=1200) == 128 + signum
    assert load(run_dirs(tmp_path)[0])["global_step"] > 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@over(ON_POLICY[:1])
def test_signals_to_a_group_spare_processes_of_environments(script, small, signum, tmp_path):
    """A terminal and `timeout` send them to the whole group."""
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 1_000_000, *small, "--async-envs"]
    flags += ["--checkpoint-frequency", 20]
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, flags)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 1200
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signum)
    error = process.communicate(timeout=1200)[1]
    assert process.returncode == 128 + signum and "Traceback" not in error
    assert load(run_dirs(tmp_path)[0])["global_step"] > 0
