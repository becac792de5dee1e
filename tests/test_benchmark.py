"""tools/benchmark.py: every cell runs once, through failures, interruptions and kills."""

import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

from tests.common import ROOT, SCRIPTS

spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools" / "benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

SMALL = "--env-id Pendulum-v1 --hidden-dim 16 --batch-size 16 --learning-starts 40"
SMALL += " --eval-episodes 1 --device cpu"
QUICK = f"sac_continuous.py {SMALL} --total-timesteps 60"
LONG = f"sac_continuous.py {SMALL} --total-timesteps 1000 --checkpoint-frequency 100"


def call(tmp_path, *commands, seeds=(1,), wait=True, **popen):
    words = [
        sys.executable,
        ROOT / "tools" / "benchmark.py",
        "suite",
        "--folder",
        tmp_path,
        "--workers",
        "2",
    ]
    words += ["--seeds", *map(str, seeds), "--commands", *commands]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **popen)
    return (process.communicate(timeout=1200)[1], process.returncode) if wait else process


def cells(tmp_path):
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(tmp_path.glob("suite/*/status.json"))
    }


def starts(tmp_path):
    return [log.read_text().count("$ ") for log in sorted(tmp_path.glob("suite/*/log.txt"))]


def checkpoints(tmp_path):
    return [
        torch.load(path, weights_only=True)
        for path in sorted(tmp_path.glob("suite/*/runs/*/checkpoint.pt"))
    ]


def wait_for(condition, seconds=1200):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_braces_stand_for_a_sweep():
    assert benchmark.expand("x.py --a {1,2} --b {c,d}") == [
        f"x.py --a {a} --b {b}" for a in (1, 2) for b in "cd"
    ]
    assert benchmark.expand("x.py") == ["x.py"]


def test_long_commands_have_folders_of_their_own(tmp_path):
    """File systems allow 255 bytes; what tells cells apart may stand anywhere in their names."""
    commands = [
        f"{script}.py --x {'y' * 400} --lr {lr} {'z' * 400} --seed {s}"
        for script in "ab"
        for lr in "12"
        for s in "34"
    ]
    folders = [benchmark.Cell(command, tmp_path).folder for command in commands]
    for folder in folders:
        folder.mkdir()  # would fail if it were there, or its name too long
    assert [folder.name[0] + folder.name[-1] for folder in folders] == [
        "a3",
        "a4",
        "a3",
        "a4",
        "b3",
        "b4",
        "b3",
        "b4",
    ]


def test_every_cell_runs_once(tmp_path):
    grid = (QUICK.replace("--batch-size 16", "--batch-size {8,16}"),)
    error, code = call(tmp_path, *grid)
    assert code == 0 and "2 done" in error
    assert [status["state"] for status in cells(tmp_path).values()] == ["done"] * 2
    assert call(tmp_path, *grid)[1] == 0  # nothing is left to do
    assert starts(tmp_path) == [1] * 2
    assert call(tmp_path, *grid, seeds=(1, 2))[1] == 0  # only the new seed
    assert starts(tmp_path) == [1] * 4
    assert {(c["args"]["seed"], c["args"]["batch_size"]) for c in checkpoints(tmp_path)} == {
        (seed, size) for seed in (1, 2) for size in (8, 16)
    }


def test_flags_are_added_to_every_command(tmp_path):
    assert call(tmp_path, QUICK, "--flags", "--utd {1,0.5} --alpha 0.5")[1] == 0
    found = {(c["args"]["utd"], c["args"]["alpha"]) for c in checkpoints(tmp_path)}
    assert found == {(1, 0.5), (0.5, 0.5)}


def test_failures_are_told_at_the_end_and_tried_again(tmp_path):
    bad = f"sac_continuous.py {SMALL} --total-timesteps 60 --gamma 2"
    error, code = call(tmp_path, bad, QUICK)
    assert (
        code == 1 and "failed with exit code 2" in error and "--gamma must lie in [0, 1]" in error
    )
    assert sorted(status["state"] for status in cells(tmp_path).values()) == ["done", "failed"]
    assert call(tmp_path, bad, QUICK)[1] == 1
    assert sorted(starts(tmp_path)) == [1, 2]
    error, code = call(tmp_path, "nowhere.py")
    assert code == 2 and "does not exist" in error


def test_a_cell_that_cannot_start_leaves_the_others_alone(tmp_path):
    blocked = benchmark.Cell(f"{QUICK} --seed 1", tmp_path / "suite").folder
    (blocked / "log.txt").mkdir(parents=True)
    error, code = call(tmp_path, QUICK, seeds=(1, 2))
    assert code == 1 and f"error: {blocked}" in error and "Traceback" not in error
    assert [status["state"] for status in cells(tmp_path).values()] == ["done"]


def kill_tree(process):
    """SIGKILL to the runner and to its trainings, as at a power cut."""
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_training_that_was_killed_goes_on(tmp_path, monkeypatch):
    """Out of memory, say: it counts as failed, but its checkpoint stays; relative folders too."""
    process = call("here", LONG, wait=False)
    wait_for(lambda: checkpoints(tmp_path / "here"))
    for pid in trainings(tmp_path / "here"):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == 1
    (before,) = checkpoints(tmp_path / "here")
    assert before["global_step"] < 1000
    assert call("here", LONG)[1] == 0
    (log,) = Path("here").glob("suite/*/log.txt")
    assert log.read_text().count("$ ") == 2 and "--resume" in log.read_text()
    (after,) = checkpoints(tmp_path / "here")
    assert after["global_step"] == 1000


@pytest.mark.parametrize("trainings_die_too", [True, False])
def test_after_sigkill_a_second_call_finishes_the_grid(trainings_die_too, tmp_path):
    process = call(tmp_path, LONG, QUICK, wait=False)
    wait_for(lambda: list(tmp_path.glob("suite/*1000*/runs/*/checkpoint.pt")))
    if trainings_die_too:
        kill_tree(process)
    else:
        process.kill()
        process.wait()
    assert "running" in [status["state"] for status in cells(tmp_path).values()]
    assert call(tmp_path, LONG, QUICK)[1] == 0
    assert [status["state"] for status in cells(tmp_path).values()] == ["done"] * 2
    assert sorted(c["global_step"] for c in checkpoints(tmp_path)) == [
        60,
        1000,
    ]  # one run folder each
    (log,) = tmp_path.glob("suite/*1000*/log.txt")
    assert log.read_text().count("$ ") == 2 and "--resume" in log.read_text()


def trainings(tmp_path):
    """Process numbers of the trainings of a grid."""
    links = [link for link in Path("/proc").glob("[0-9]*/cwd") if os.path.exists(link)]
    return [int(x.parent.name) for x in links if os.readlink(x).startswith(f"{tmp_path}/suite")]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_leave_checkpoints(signum, tmp_path):
    heed = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    process = call(tmp_path, LONG, wait=False, preexec_fn=heed)
    wait_for(lambda: list(tmp_path.glob("suite/*/runs/*/checkpoint.pt")))
    process.send_signal(signum)
    assert process.wait(timeout=1200) == 128 + signum
    (status,) = cells(tmp_path).values()
    assert status["state"] == "cut off" and status["code"] == 130
    assert 100 <= checkpoints(tmp_path)[0]["global_step"] < 1000


def test_a_signal_that_the_training_gets_too_leaves_a_checkpoint(tmp_path):
    """As scancel, which sends SIGTERM to every process of a job. Wide: it takes time to write."""
    wide = LONG.replace("dim 16", "dim 2048").replace("starts 40", "starts 90000")
    wide = wide.replace("1000 --checkpoint-frequency 100", "90000")
    process = call(tmp_path, wide, wait=False)
    log = lambda: "".join(path.read_text() for path in tmp_path.glob("suite/*/log.txt"))
    wait_for(lambda: "run folder" in log())
    for pid in (*trainings(tmp_path), process.pid):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=1200) == 143
    assert checkpoints(tmp_path)[0]["global_step"] < 90000


def test_a_refused_resume_loses_nothing(tmp_path):
    """Exit code 2: memory is short, a card is missing, another process trains in the folder."""
    process = call(tmp_path, LONG, wait=False)
    wait_for(lambda: list(tmp_path.glob("suite/*/runs/*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    process.wait(timeout=1200)
    (run_dir,) = tmp_path.glob("suite/*/runs/*")
    with open(run_dir / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        error, code = call(tmp_path, LONG)
    assert code == 1 and "another process is training" in error
    assert call(tmp_path, LONG)[1] == 0
    assert [c["global_step"] for c in checkpoints(tmp_path)] == [1000]
    assert list(tmp_path.glob("suite/*/runs/*")) == [run_dir]


def test_two_calls_share_the_cells(tmp_path):
    first, second = (call(tmp_path, QUICK, seeds=(1, 2), wait=False) for _ in range(2))
    assert first.wait(timeout=1200) == 0 and second.wait(timeout=1200) == 0
    assert starts(tmp_path) == [1, 1]


@pytest.mark.parametrize(
    "suite,cells",
    [
        ("quick", 8),
        ("humanoid", 6),
        ("humanoid-on-policy", 2),
        ("mujoco", 32),
        ("diffusion-steps", 10),
        ("toy", 16),
        ("toy-steps", 5),
    ],
)
def test_suites_are_commands_that_the_scripts_accept(suite, cells, tmp_path):
    python = tmp_path / "python"
    # prints its number and what the suite would run
    python.write_text("#!/bin/sh\necho $$\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    process = subprocess.Popen(
        [ROOT / "benchmark.sh", suite, "--workers", "3"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    number, *words = process.communicate()[0].splitlines()
    assert int(number) == process.pid and process.returncode == 0  # a signal to it reaches python
    assert words[:2] == ["tools/benchmark.py", suite] and words[words.index("--workers") + 1] == "3"
    commands = [
        cell
        for command in words[words.index("--commands") + 1 :]
        for cell in benchmark.expand(command)
    ]
    assert len(set(commands)) == len(commands) == cells
    scripts = {script.__name__: script for script in SCRIPTS}
    for command in commands:
        name, *flags = command.split()
        args = tyro.cli(scripts[name.removesuffix(".py")].Args, args=flags)
        assert args.env_id in command and str(args.total_timesteps) in command


@pytest.mark.parametrize("flags", ["--workers 0", "--only 7", "--only -1", "--slurm"])
def test_mistakes_are_refused_in_one_sentence(flags, tmp_path):
    command = [sys.executable, ROOT / "tools" / "benchmark.py", "suite", "--folder", tmp_path]
    command += ["--seeds", "1", *flags.split(), "--commands", "sac_continuous.py"]
    environment = os.environ | {"PATH": str(tmp_path)}  # no sbatch in it
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_open_quotation_mark_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.Cell("sac_continuous.py --exp-name 'a", tmp_path)
    assert exit_.value.code == 2 and "cannot read the command" in capsys.readouterr().err


def test_a_system_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert benchmark.cores() == os.cpu_count()
