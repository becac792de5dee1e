"""--resume: what goes on, what is refused."""

import os
import subprocess
import sys
import time

import pytest
import torch

import diffsac_continuous as diffsac
from tests.common import (
    OFF_POLICY,
    PENDULUM,
    ROOT,
    TWINS,
    equal,
    load,
    over,
    run_dirs,
    run_script,
    scalars,
    sentence,
)


def test_temperature_zero_and_flags_that_change_the_weights(monkeypatch, tmp_path):
    flags = [*PENDULUM, "--no-autotune", "--alpha", 0, "--total-timesteps", 60]
    assert run_script(monkeypatch, diffsac, *flags) == 0
    (run_dir,) = run_dirs(tmp_path)
    assert load(run_dir)["temperature"]["log_alpha"].exp() == 0
    resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", 70]
    assert run_script(monkeypatch, diffsac, *resume, "--no-learn-delta") == 2
    assert run_script(monkeypatch, diffsac, *resume) == 0


@over(TWINS)
def test_resume_after_sigkill_goes_on(script, small, monkeypatch, tmp_path):
    flags = [
        "--env-id",
        "Pendulum-v1",
        "--checkpoint-frequency",
        100,
        "--total-timesteps",
        1_000_000,
        *small,
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, flags)]
    )
    deadline = time.time() + 1200
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    process.kill()
    process.wait()
    (run_dir,) = run_dirs(tmp_path)
    before = load(run_dir)
    step = before["global_step"]
    assert step >= 100 and before["buffer"]["size"] == step
    total = step + 150
    resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", total]
    assert run_script(monkeypatch, script, *resume) == 0
    after = load(run_dir)
    assert run_dirs(tmp_path) == [run_dir] and not list(run_dir.glob("*.tmp"))
    assert after["global_step"] == after["buffer"]["size"] == total
    assert after["args"]["hidden_dim"] == 16 and after["args"]["total_timesteps"] == total
    assert torch.equal(after["buffer"]["data"][0][:step], before["buffer"]["data"][0])
    assert (
        after["q_optimizer"]["state"][0]["step"] == before["q_optimizer"]["state"][0]["step"] + 150
    )
    steps = [x for x, _ in scalars(run_dir, "losses/critic_loss")]
    assert steps == list(
        range(100, total + 1, 100)
    )  # what came after the checkpoint is replaced, not doubled


def test_resumed_state_is_the_saved_state(script, small, monkeypatch, tmp_path):
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--total-timesteps", 100, *small)
        == 0
    )
    (run_dir,) = run_dirs(tmp_path)
    before = load(run_dir)
    assert (
        run_script(monkeypatch, script, "--resume", run_dir / "checkpoint.pt") == 0
    )  # nothing is left to do
    after = load(run_dir)
    assert equal(before, after)


def test_what_the_run_has_learned_with_cannot_change(script, small, monkeypatch, tmp_path, capsys):
    """The seed, the normaliser of observations, and a diffusion policy's prior."""
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 100, *small]
    assert run_script(monkeypatch, script, *flags) == 0
    (run_dir,) = run_dirs(tmp_path)
    has_prior = hasattr(script.Args, "prior_std")
    changes = ["--seed", 2], ["--no-normalize-obs"], *([["--prior-std", 0.7]] if has_prior else [])
    for flags in changes:
        resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", 120]
        assert run_script(monkeypatch, script, *resume, *flags) == 2
        assert "cannot be changed" in capsys.readouterr().err


@over(TWINS)
def test_flags_beside_resume_override_the_stored_ones(script, small, monkeypatch, tmp_path):
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--total-timesteps", 100, *small)
        == 0
    )
    (run_dir,) = run_dirs(tmp_path)
    flags = "--policy-lr 0.0 --q-lr 1e-5 --no-autotune --alpha 0.05".split()
    flags += "--buffer-size 60 --num-envs 2".split()
    resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", 120, *flags]
    before = load(run_dir)
    assert run_script(monkeypatch, script, *resume) == 0
    after = load(run_dir)
    assert all(torch.equal(before["actor"][name], after["actor"][name]) for name in before["actor"])
    assert not torch.equal(before["qf"]["weights.0"], after["qf"]["weights.0"])
    assert after["q_optimizer"]["param_groups"][0]["lr"] == 1e-5
    assert after["temperature"]["log_alpha"].exp().item() == pytest.approx(0.05)
    # the newest 60 of the first 100 transitions were kept, 20 new ones replaced the oldest of them
    torch.testing.assert_close(after["buffer"]["data"][0][20:], before["buffer"]["data"][0][60:])
    assert after["buffer"]["size"] == 60 and after["buffer"]["position"] == 20


@over(OFF_POLICY)
def test_flags_beside_resume_are_checked_together_with_the_run_own(
    script, small, monkeypatch, tmp_path
):
    """Alone, --alpha 0 does not go with the default --autotune."""
    flags = [
        "--env-id",
        "Pendulum-v1",
        *small,
        "--no-autotune",
        "--alpha",
        0.1,
        "--total-timesteps",
        60,
    ]
    assert run_script(monkeypatch, script, *flags) == 0
    resume = f"--resume={run_dirs(tmp_path)[0] / 'checkpoint.pt'}"
    assert run_script(monkeypatch, script, resume, "--alpha", 0, "--total-timesteps", 80) == 0
    assert load(run_dirs(tmp_path)[0])["args"]["alpha"] == 0
    assert run_script(monkeypatch, script, "--alpha", 0, "--autotune", resume) == 2
    flags = ["--alpha", 0.5, "--autotune", "--total-timesteps", 90]
    assert run_script(monkeypatch, script, resume, *flags) == 2  # zero it is, and would stay


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
    (good,) = list(tmp_path.glob("runs/*/checkpoint.pt"))
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
