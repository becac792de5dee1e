"""What a person sees while a script runs."""

import contextlib
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
import time

import pytest

import sac_continuous as sac
from tests.common import PENDULUM, ROOT, SIZES, load, run_dirs, run_script, words


def test_output_names_the_folder_and_how_to_resume(monkeypatch, tmp_path, capsys):
    """The command that is printed works, and a finished run says so."""
    monkeypatch.setattr(
        sac.time, "time", lambda clock=time.time: clock() + 1000 * len(run_dirs(tmp_path))
    )
    assert run_script(monkeypatch, sac, *PENDULUM, "--total-timesteps", 60) == 0
    out, error = words(capsys)
    folder = str(run_dirs(tmp_path)[0].relative_to(tmp_path))
    assert out.splitlines()[0] == f"run folder {folder}, step 0 of 60" and error == ""
    (line,) = re.findall(r"^step 60: episodic_return (-?\d+\.\d) ", out, re.M)
    assert float(line) < 0
    again = shlex.split(re.search("python (.*) --total-timesteps N", out)[1])
    assert again[1:] == ["--resume", f"{folder}/checkpoint.pt"]
    assert run_script(monkeypatch, sac, *again[1:]) == 0
    assert f"run folder {folder}, step 60 of 60" in words(capsys)[0]
    assert run_script(monkeypatch, sac, *again[1:], "--total-timesteps", 90) == 0
    assert load(run_dirs(tmp_path)[0])["global_step"] == 90


def test_plain_lines_without_a_terminal(monkeypatch, tmp_path, capsys):
    now = [1000.0]
    monkeypatch.setattr(sac.time, "time", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    sac.main(
        sac.Args(env_id="Pendulum-v1", total_timesteps=450, **(SIZES | {"learning_starts": 1000}))
    )
    lines = [line for line in words(capsys)[0].splitlines() if "steps/s" in line]
    assert 3 < len(lines) < 30
    assert re.fullmatch(r"step \d+: return -?\d+\.\d, \d+ steps/s, \d\d:\d\d left", lines[-1])


def test_time_left_follows_the_recent_speed(monkeypatch, tmp_path, capsys):
    """Not the mean since the start, when actions were random and nothing was learnt."""
    now, sample = [1000.0], sac.ReplayBuffer.sample
    monkeypatch.setattr(sac.time, "time", lambda: now.__setitem__(0, now[0] + 0.001) or now[0])
    slow = lambda *args: now.__setitem__(0, now[0] + 10) or sample(*args)
    monkeypatch.setattr(sac.ReplayBuffer, "sample", slow)
    flags = SIZES | {"learning_starts": 400, "checkpoint_frequency": 0}
    sac.main(sac.Args(env_id="Pendulum-v1", total_timesteps=460, **flags))
    found = re.findall(r"^step (\d+): .* (\d+):(\d\d) left$", words(capsys)[0], re.M)
    assert len(found) > 5
    for step, minutes, seconds in found[2:]:
        left = 60 * int(minutes) + int(seconds)
        assert left == pytest.approx(10 * (460 - int(step)), rel=0.05, abs=2)


def test_a_bar_on_a_terminal_and_none_elsewhere(tmp_path):
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [
        sys.executable,
        str(ROOT / "sac_continuous.py"),
        *PENDULUM,
        "--total-timesteps",
        "50",
    ]
    process = subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while block := os.read(leader, 1000):
            shown += block
    assert process.wait() == 0 and b"50/50" in shown


def test_a_closed_output_costs_no_checkpoint(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        str(ROOT / "sac_continuous.py"),
        *PENDULUM,
        "--total-timesteps",
        "60",
    ]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""
    assert load(run_dirs(tmp_path)[0])["global_step"] == 60
