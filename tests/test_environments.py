"""Environments: spaces, units of actions, observations and infos of any kind, faults."""

import os
import subprocess
import sys

import pytest
import torch

import diffsac_continuous as diffsac
import sac_continuous as sac
from tests.common import (
    OFF_POLICY,
    ON_POLICY,
    ROOT,
    SCRIPTS,
    SMALL,
    flatten,
    load,
    over,
    run_dirs,
    run_script,
    small_flags,
    words,
)
from tests.scripted_env import ACTIONS, REFUSED


def test_actions_lie_in_their_space_and_their_units_do_not_matter(monkeypatch, tmp_path):
    """Critics see [-1, 1]: the same run to the bit but for the rounding of other units."""
    for name in ACTIONS:
        assert (
            run_script(monkeypatch, sac, "--env-id", f"{name}-v0", *SMALL, "--total-timesteps", 150)
            == 0
        )
    runs = {run_dir.name.split("-v0")[0]: load(run_dir) for run_dir in run_dirs(tmp_path)}
    for name in ("Tenth", "Thousands", "Double"):
        for ours, unit in zip(flatten(runs[name]["qf"]), flatten(runs["Unit"]["qf"]), strict=True):
            torch.testing.assert_close(ours, unit, rtol=1e-3, atol=1e-4)
    actions = runs["Thousands"]["buffer"]["data"][2]
    assert actions.abs().max() <= 1 and actions.std() > 0.3


@over(SCRIPTS)
def test_units_of_the_actions_do_not_matter(script, monkeypatch, tmp_path):
    """Bounds of 0.1: critics and policy are those of bounds of 1, but for rounding."""
    for name in ("Tenth", "Unit"):
        flags = ["--env-id", f"{name}-v0", *small_flags(script), "--total-timesteps", 80]
        assert run_script(monkeypatch, script, *flags) == 0
    first, second = (load(run_dir) for run_dir in run_dirs(tmp_path))
    for part in {"actor", "qf", "critic"} & first.keys():
        for ours, unit in zip(flatten(first[part]), flatten(second[part]), strict=True):
            torch.testing.assert_close(ours, unit, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_spaces_that_cannot_be_trained_with_are_refused(name, monkeypatch, tmp_path, capsys):
    assert run_script(monkeypatch, diffsac, "--env-id", f"{name}-v0", *SMALL) == 2
    (line,) = words(capsys)[1].splitlines()
    assert (
        line.startswith(f"error: cannot train in {name}-v0")
        and len(line) < 230
        and not run_dirs(tmp_path)
    )


@over(OFF_POLICY)
def test_one_array_for_all_observations_and_any_infos(script, monkeypatch, tmp_path):
    flags = ["--env-id", "OneArray-v0", *small_flags(script), "--total-timesteps", 100]
    assert run_script(monkeypatch, script, *flags) == 0
    obs, next_obs, *_ = load(run_dirs(tmp_path)[0])["buffer"]["data"]
    torch.testing.assert_close(next_obs[:, 0], obs[:, 0])
    torch.testing.assert_close(next_obs[:, 1], obs[:, 1] + 1)


def test_a_module_in_the_users_folder_is_found(monkeypatch, tmp_path):
    code = "import gymnasium as gym\nfrom tests.scripted_env import Plain\n"
    (tmp_path / "my_module.py").write_text(
        code + 'gym.register("Mine-v0", Plain, max_episode_steps=10)\n'
    )
    command = [sys.executable, ROOT / "sac_continuous.py", "--env-id", "my_module:Mine-v0", *SMALL]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}"}
    assert subprocess.run([*command, "--total-timesteps", "20"], env=environment).returncode == 0


def test_the_default_environment_opens_without_warnings(tmp_path):
    command = [sys.executable, ROOT / "sac_continuous.py", *SMALL, "--total-timesteps", "20"]
    done = subprocess.run([*command, "--eval-episodes", "1"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and not (tmp_path / "MUJOCO_LOG.TXT").exists()


@pytest.mark.parametrize("space,size", [("Dict", 2), ("Discrete", 5)])
def test_observations_of_other_spaces_are_flattened(
    script, space, size, small, monkeypatch, tmp_path
):
    flags = ["--env-id", f"tests.scripted_env:{space}-v0", "--total-timesteps", 60]
    assert run_script(monkeypatch, script, *flags, *small) == 0
    assert load(run_dirs(tmp_path)[0])["obs_rms"]["mean"].shape == (size,)


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
    (path,) = list(tmp_path.glob("runs/*/checkpoint.pt"))
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == (
        100 if script in ON_POLICY else 40
    )  # the fault comes in the 51st step
    assert all(x.isfinite().all() for x in checkpoint["actor"].values())
