"""Values that are not finite stop a run; its last checkpoint stays whole."""

import subprocess
import sys

import pytest
import torch

from tests.common import (
    OFF_POLICY,
    ON_POLICY,
    ROOT,
    SCRIPTS,
    SMALL,
    flatten,
    load,
    over,
    run_args,
    run_dirs,
    run_main,
    run_script,
    small_flags,
)


@over(SCRIPTS)
@pytest.mark.parametrize("where", ["observation", "reward"])
@pytest.mark.parametrize("size", ["1e39", "3e19", "nan"])
def test_a_value_that_overflows_stops_the_run(script, where, size, monkeypatch, tmp_path, capsys):
    flags = [*small_flags(script), "--num-envs", 1, "--checkpoint-frequency", 5]
    flags += ["--env-id", f"Spike-{where}-{size}-v0", "--total-timesteps", 100]
    assert run_script(monkeypatch, script, *flags) == 1
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["global_step"] == 50
    assert all(x.isfinite().all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))


def test_the_fault_is_named(monkeypatch, tmp_path, capfd):
    command = [
        sys.executable,
        str(ROOT / "sac_continuous.py"),
        *SMALL,
        "--total-timesteps",
        "400",
        "--env-id",
    ]
    for env_id, fault in (
        ("Spike-reward-nan", "a reward is not finite at step 55"),
        ("BadStart", "an observation is not"),
    ):
        done = subprocess.run(
            [*command, f"tests.scripted_env:{env_id}-v0"], capture_output=True, text=True
        )
        assert (
            done.returncode == 1
            and fault in done.stderr
            and "runs/" in done.stderr
            and "Traceback" not in done.stderr
        )


def test_a_return_that_is_not_a_number_is_named(monkeypatch, tmp_path):
    command = [sys.executable, str(ROOT / "sac_continuous.py"), *SMALL, "--total-timesteps", "100"]
    done = subprocess.run(
        [*command, "--env-id", "tests.scripted_env:LateNan-v0"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "eval/episodic_return is not finite" in done.stderr


@over(OFF_POLICY)
def test_a_loss_that_is_not_a_number_leaves_the_last_checkpoint(script, monkeypatch, tmp_path):
    calls, critic_loss, utd = [], script.critic_loss, script.Args().utd

    def failing(*inputs):
        calls.append(None)
        loss, *rest = critic_loss(*inputs)
        return loss * (float("nan") if len(calls) > 12 * utd else 1), *rest

    monkeypatch.setattr(script, "critic_loss", failing)
    args = run_args(script, total_timesteps=200, checkpoint_frequency=5)
    with pytest.raises(SystemExit, match="an action is not finite at step 5[45]"):
        script.main(args)
    checkpoint = load(run_dirs(tmp_path)[0])
    assert checkpoint["global_step"] == 50
    assert all(x.isfinite().all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))


@over(ON_POLICY)
def test_a_loss_of_ppo_that_is_not_a_number_leaves_the_last_checkpoint(
    script, monkeypatch, tmp_path
):
    rollouts, make_rows, ppo_loss = [], script.make_rows, script.ppo_loss

    def counting(*inputs):
        rollouts.append(None)
        return make_rows(*inputs)

    def failing(*inputs):
        loss, metrics = ppo_loss(*inputs)
        return loss * (float("nan") if len(rollouts) == 3 else 1), metrics

    monkeypatch.setattr(script, "make_rows", counting)
    monkeypatch.setattr(script, "ppo_loss", failing)
    with pytest.raises(SystemExit, match="losses/.* is not finite at step 30"):
        flags = dict(eval_frequency=0, checkpoint_frequency=10, num_envs=1)
        run_main(script, total_timesteps=50, **flags)
    checkpoint = load(run_dirs(tmp_path)[0])
    assert checkpoint["global_step"] == 20
    assert all(x.isfinite().all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("network", ["actor", "critic"])
@over(ON_POLICY)
def test_a_weight_that_is_not_a_number_stays_out_of_the_checkpoint(
    script, network, monkeypatch, tmp_path
):
    """One that only the last gradient step has spoilt: losses are still finite then."""
    networks, updates = {}, []
    ppo_loss, due = script.ppo_loss, script.Run.due

    def spy(actor, critic, *arguments):
        networks.update(actor=actor.net, critic=critic)
        return ppo_loss(actor, critic, *arguments)

    def spoil(run, frequency):
        updates.append(run.step)
        if run.step == 30:
            networks[network][0].weight.data[0, 0] = torch.nan
        return due(run, frequency)

    monkeypatch.setattr(script, "ppo_loss", spy)
    monkeypatch.setattr(script.Run, "due", spoil)
    with pytest.raises(SystemExit, match="is not finite at step 30"):
        flags = dict(eval_frequency=0, checkpoint_frequency=10, num_envs=1)
        run_main(script, total_timesteps=50, **flags)
    checkpoint = load(run_dirs(tmp_path)[0])
    assert checkpoint["global_step"] == 20
    assert all(torch.isfinite(x).all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))
