"""Equal seeds make equal runs, other seeds share nothing."""

import os

import torch

import sac_continuous as sac
from tests.common import OFF_POLICY, ON_POLICY, equal, load, over, run_dirs, run_script, small_flags


def test_neighbouring_seeds_share_no_start_state():
    train = {(seed, i): sac.env_seeds(seed, 8, 1)[i] for seed in range(20) for i in range(8)}
    evaluation = [value for seed in range(20) for value in sac.env_seeds(seed, 8, 0)]
    assert len({*train.values(), *evaluation}) == 2 * 160
    assert sac.env_seeds(3, 4, 1) == sac.env_seeds(3, 8, 1)[:4]


@over(OFF_POLICY)
def test_a_resumed_run_draws_other_noise_and_other_episodes(script, monkeypatch, tmp_path):
    """Not those of the beginning; and two resumptions of one checkpoint are equal to the bit."""
    flags = ["--env-id", "Pendulum-v1", *small_flags(script), "--total-timesteps", 60]
    assert run_script(monkeypatch, script, *flags) == 0
    (run_dir,) = run_dirs(tmp_path)
    before, after = (run_dir / "checkpoint.pt").read_bytes(), []
    for _ in range(2):
        (run_dir / "checkpoint.pt").write_bytes(before)
        resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", 100]
        assert run_script(monkeypatch, script, *resume) == 0
        after.append(load(run_dir))
        assert torch.initial_seed() == 1 + 60
    assert equal(*after)
    rows = after[0]["buffer"]["data"][0]
    assert torch.cdist(rows[60:61], rows[:1]).item() > 1e-3


def test_equal_seeds_make_equal_runs_to_the_bit(script, small, monkeypatch, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--num-envs", 2, *small]
    for seed, eval_frequency in (
        (3, 0),
        (3, 60),
        (4, 0),
    ):  # evaluation must not disturb the training
        more = ["--seed", seed, "--eval-frequency", eval_frequency, "--total-timesteps", 300]
        assert run_script(monkeypatch, script, *flags, *more) == 0
    first, second, other = (
        load(run_dir) for run_dir in sorted(run_dirs(tmp_path), key=os.path.getmtime)
    )
    assert equal(first, second) and not equal(first, other)


@over(ON_POLICY)
def test_worker_processes_give_the_same_run(script, small, monkeypatch, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 100, *small]
    assert run_script(monkeypatch, script, *flags) == 0
    assert run_script(monkeypatch, script, *flags, "--async-envs") == 0
    first, second = (load(run_dir) for run_dir in run_dirs(tmp_path))
    assert equal(first, second)
