"""Runs of all scripts: logs, seeds, replay, checkpoints, signals, refusals."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dime
import ppo_continuous
import sac_continuous
from tests.common import (
    CATEGORICAL,
    OFF_POLICY,
    ON_POLICY,
    ROOT,
    SCRIPTS,
    STEPWISE,
    TWINS,
    WASSERSTEIN,
    equal,
    flatten,
    load,
    make_actor,
    make_args,
    run_dirs,
    run_script,
    scalars,
    small_flags,
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


twins = pytest.mark.parametrize("script", TWINS, ids=lambda script: script.__name__)
off_policy = pytest.mark.parametrize("script", OFF_POLICY, ids=lambda script: script.__name__)
categorical = pytest.mark.parametrize("script", CATEGORICAL, ids=lambda script: script.__name__)
on_policy = pytest.mark.parametrize("script", ON_POLICY, ids=lambda script: script.__name__)


needs_bf16 = pytest.mark.skipif(
    not sac_continuous.has_bf16("cpu"), reason="needs bfloat16 instructions"
)


@pytest.fixture
def small(script):
    return small_flags(script)


def run_main(script, monkeypatch, **flags):
    """A short run of `main` in this process."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    args = script.tyro.cli(script.Args, args=["--env-id", "Pendulum-v1", *small_flags(script)])
    vars(args).update(flags)
    script.main(args)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
@twins
def test_trains_past_learning_starts(script, env_id, small, monkeypatch, tmp_path):
    assert (
        run_script(monkeypatch, script, "--env-id", env_id, "--total-timesteps", 200, *small) == 0
    )
    checkpoint = load(run_dirs(tmp_path)[0])
    for optimizer in ("actor_optimizer", "q_optimizer", "alpha_optimizer"):
        assert (
            checkpoint[optimizer]["state"][0]["step"] == 160
        )  # one gradient step per environment step
    for name in (
        "losses/critic_loss",
        "losses/actor_loss",
        "losses/alpha",
        "losses/entropy",
        "charts/SPS",
    ):
        assert [step for step, _ in scalars(run_dirs(tmp_path)[0], name)] == [100, 200]
    for name in ("eval/episodic_return", "eval/episodic_return_mean_action"):
        assert [step for step, _ in scalars(run_dirs(tmp_path)[0], name)] == [200]
    assert not torch.equal(checkpoint["qf"]["weights.0"], checkpoint["qf_target"]["weights.0"])


@off_policy
def test_replay_at_terminations_and_truncations_with_three_environments(
    script, small, monkeypatch, tmp_path
):
    flags = "--env-id tests.scripted_env:Scripted-v0 --num-envs 3 --total-timesteps 150 --utd 0.5".split()
    assert run_script(monkeypatch, script, *flags, *small) == 0
    obs, next_obs, actions, rewards, terminations = (
        x.numpy() for x in load(run_dirs(tmp_path)[0])["buffer"]["data"]
    )
    assert len(obs) == 150 and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(
        next_obs[:, 0], obs[:, 0]
    )  # never the first observation of the next episode
    np.testing.assert_array_equal(next_obs[:, 1], obs[:, 1] + 1)
    np.testing.assert_array_equal(rewards, next_obs[:, 1])
    odd = obs[:, 0] % 2 == 1
    np.testing.assert_array_equal(terminations, (odd & (next_obs[:, 1] == 3)).astype(np.float32))
    assert (next_obs[~odd, 1] == 5).sum() >= 18  # cut off: stored, and bootstrapped from
    for env in range(3):  # each environment's own course, without a gap
        ended = terminations[env::3] + (next_obs[env::3, 1] == 5)
        np.testing.assert_array_equal(
            obs[env::3][1:, 1], np.where(ended[:-1], 0, obs[env::3][:-1, 1] + 1)
        )
    # three environments finish together: each episode is logged, at the count of environment steps
    lengths = scalars(run_dirs(tmp_path)[0], "charts/episodic_length")
    assert lengths[:6] == [(15, 5.0)] * 3 + [(24, 3.0)] * 3 and len(lengths) == 36
    # half a gradient step for each of the 3 environments' steps
    steps = load(run_dirs(tmp_path)[0])["q_optimizer"]["state"][0]["step"]
    assert steps == (150 - 40) // 2


@twins
def test_buffer_is_a_ring(script):
    buffer = script.ReplayBuffer(5, 1, 1, "cpu")
    for t in range(0, 14, 2):  # two environments
        rows = np.array([[t], [t + 1]])
        buffer.add(rows, rows + 0.5, -rows, 10.0 * rows[:, 0], np.array([False, t == 8]))
    assert buffer.size == 5 and buffer.position == 14 % 5
    assert sorted(buffer.data.obs[:, 0].tolist()) == [9, 10, 11, 12, 13]
    batch = buffer.sample(400)
    assert set(batch.obs[:, 0].tolist()) == {9, 10, 11, 12, 13}
    torch.testing.assert_close(batch.next_obs, batch.obs + 0.5)
    torch.testing.assert_close(batch.actions, -batch.obs)
    torch.testing.assert_close(batch.rewards, 10 * batch.obs[:, 0])
    torch.testing.assert_close(batch.terminations, (batch.obs[:, 0] == 9).float())
    for capacity, kept in ((5, [9, 10, 11, 12, 13]), (3, [11, 12, 13]), (8, [9, 10, 11, 12, 13])):
        other = script.ReplayBuffer(capacity, 1, 1, "cpu")
        other.load_state_dict(buffer.state_dict())
        assert (other.position, other.size) == (len(kept) % capacity, len(kept))
        assert other.data.obs[: other.size, 0].tolist() == kept
        assert other.data.rewards[: other.size].tolist() == [10.0 * t for t in kept]


@twins
def test_checkpoint_holds_only_the_filled_part_of_the_buffer(script, tmp_path):
    buffer = script.ReplayBuffer(1_000_000, 3, 1, "cpu")
    buffer.add(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 1)), np.zeros(2), np.zeros(2))
    torch.save(buffer.state_dict(), tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size < 50_000


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


def test_compiled_update_is_the_eager_one(script, small, monkeypatch, tmp_path):
    """torch.compile with a backend that keeps eager's kernels, random numbers included, through some updates."""
    compile_ = torch.compile
    compiled = []

    def compile_with_eager_kernels(function):
        compiled.append(function)
        return compile_(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_with_eager_kernels)
    flags = [
        "--env-id",
        "Pendulum-v1",
        *small,
        *(["--diffusion-steps", 2] if "diff" in script.__name__ else []),
    ]
    flags += ["--total-timesteps", 20 if script in ON_POLICY else 42]
    for more in ([], ["--compile"]):
        assert run_script(monkeypatch, script, *flags, *more) == 0
    first, second = (load(run_dir) for run_dir in sorted(run_dirs(tmp_path), key=os.path.getmtime))
    names = ["update", "update_actor"] if script in CATEGORICAL else ["update"]
    assert [function.__name__ for function in compiled] == names
    for name, value in first["actor"].items():
        torch.testing.assert_close(second["actor"][name], value)
    torch._dynamo.reset()


@needs_bf16
def test_bf16_changes_products_alone(script, small, monkeypatch, tmp_path):
    """Weights stay float32 and near those without it; equal seeds stay equal to the bit."""
    steps = 40 if script in ON_POLICY else 60
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", steps, *small]
    for more in ([], ["--bf16"], ["--bf16"]):
        assert run_script(monkeypatch, script, *flags, *more) == 0
    runs = sorted(run_dirs(tmp_path), key=os.path.getmtime)
    exact, first, second = (load(run_dir) for run_dir in runs)
    assert equal(first, second)
    for network in ("actor", "critic" if script in ON_POLICY else "qf"):
        for name, value in first[network].items():
            torch.testing.assert_close(value, exact[network][name], rtol=0, atol=0.02)
        assert any(
            not torch.equal(value, exact[network][name]) for name, value in first[network].items()
        )


@needs_bf16
def test_bf16_leaves_what_comes_out_of_networks_in_float32(script):
    actor, obs = make_actor(script), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        values = list(actor.sample(obs))
        if script in OFF_POLICY:
            values.append(script.SoftQNetwork(3, 1, make_args(script))(obs, values[0]))
    assert [value.dtype for value in values] == [torch.float32] * len(values)


def test_bf16_is_refused_without_its_instructions(script, monkeypatch, tmp_path, capsys):
    read_text = Path.read_text
    flags = lambda path: "flags : sse avx2" if "cpuinfo" in str(path) else read_text(path)
    monkeypatch.setattr(Path, "read_text", flags)
    assert run_script(monkeypatch, script, "--bf16", "--device", "cpu") == 2
    assert "--bf16 needs" in capsys.readouterr().err and not run_dirs(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_captured_update_is_the_eager_one(script, small, monkeypatch, tmp_path):
    flags = ["--env-id", "Pendulum-v1", *small, "--device", "cuda"]
    flags += ["--total-timesteps", 60 if script in ON_POLICY else 52]
    for more in ([], ["--cuda-graph"]):
        assert run_script(monkeypatch, script, *flags, *more) == 0
    first, second = (load(run_dir) for run_dir in sorted(run_dirs(tmp_path), key=os.path.getmtime))
    for name, value in first["actor"].items():
        torch.testing.assert_close(second["actor"][name], value)


@categorical
def test_critics_learn_on_every_gradient_step_and_the_actor_on_every_third(
    script, small, monkeypatch, tmp_path
):
    flags = "--env-id Hopper-v4 --total-timesteps 100 --utd 2 --policy-delay 3".split()
    assert run_script(monkeypatch, script, *flags, *small) == 0
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["q_optimizer"]["state"][0]["step"] == 2 * 60
    assert checkpoint["actor_optimizer"]["state"][0]["step"] == 2 * 60 // 3
    assert checkpoint["alpha_optimizer"]["state"][0]["step"] == 2 * 60 // 3
    assert checkpoint["qf"]["norms.0.batches"] == 2 * 60
    assert checkpoint["qf"]["norms.0.mean"].abs().max() > 0
    for name in ("losses/critic_loss", "losses/clipped_targets", "losses/alpha"):
        assert [step for step, _ in scalars(run_dir, name)] == [100]
    resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", 130]
    assert run_script(monkeypatch, script, *resume) == 0
    after = load(run_dir)
    assert after["actor_optimizer"]["state"][0]["step"] == 2 * 90 // 3
    assert after["qf"]["norms.0.batches"] == 2 * 90
    for flags in (["--v-max", 9], ["--num-atoms", 11], ["--no-normalize-rewards"]):
        assert run_script(monkeypatch, script, *resume, *flags) == 2  # the critics' units


@pytest.mark.parametrize("num_atoms", [11, 1])
@categorical
def test_rewards_in_other_units_give_the_same_run(script, num_atoms, small, monkeypatch, tmp_path):
    """A factor 1/128 or 128 in front of the rewards; the scale's epsilon leaves a difference."""
    actors = {}
    for name in ("Pays128th-v0", "Pays-v0", "Pays128-v0"):
        flags = ["--env-id", f"tests.scripted_env:{name}", "--num-atoms", num_atoms, *small]
        assert run_script(monkeypatch, script, *flags, "--total-timesteps", 120) == 0
        checkpoint = load(max(run_dirs(tmp_path), key=os.path.getmtime))
        actors[name] = checkpoint["actor"]
        assert checkpoint["return_scaler"]["largest"] > 0
    for name in ("Pays128th-v0", "Pays128-v0"):
        for key, value in actors["Pays-v0"].items():
            torch.testing.assert_close(actors[name][key], value, rtol=0, atol=1e-3)


def test_dime_temperature_target_is_four_nats_of_running_cost(monkeypatch, tmp_path):
    seen, temperature_loss = [], dime.temperature_loss

    def spy(log_alpha, log_prob, target_entropy):
        seen.append(target_entropy)
        return temperature_loss(log_alpha, log_prob, target_entropy)

    monkeypatch.setattr(dime, "temperature_loss", spy)
    run_main(dime, monkeypatch, total_timesteps=50)
    assert seen[0] == pytest.approx(-(4 - 2.33523), abs=1e-5)  # one dimension, whatever its bounds


@twins
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


@twins
def test_flags_beside_resume_override_the_stored_ones(script, small, monkeypatch, tmp_path):
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--total-timesteps", 100, *small)
        == 0
    )
    (run_dir,) = run_dirs(tmp_path)
    flags = "--policy-lr 0.0 --q-lr 1e-5 --no-autotune --alpha 0.05 --buffer-size 60 --num-envs 2".split()
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


@off_policy
def test_temperature_is_annealed_geometrically(script, small, monkeypatch, tmp_path):
    flags = "--no-autotune --alpha 0.1 --alpha-anneal 50 --total-timesteps 500".split()
    assert run_script(monkeypatch, script, "--env-id", "Pendulum-v1", *small, *flags) == 0
    logged = dict(scalars(run_dirs(tmp_path)[0], "losses/alpha"))
    for step in (
        100,
        200,
        300,
    ):
        expected = 0.1 * 50 ** (1 - (step - 1) / 350)
        assert logged[step] == pytest.approx(expected, rel=0.012)  # DIME delays the actor
    assert logged[400] == logged[500] == pytest.approx(0.1)
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", *small, "--alpha-anneal", 50)
        == 2
    )


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


@on_policy
def test_ctrl_c_reaches_a_run_with_environments_in_processes(script, small, tmp_path):
    """A terminal sends it to all processes of the group; those of the environments must leave it to the script."""
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 1_000_000, *small, "--async-envs"]
    flags += ["--checkpoint-frequency", 20]
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, flags)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 1200
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=1200)[1]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in error
    assert load(run_dirs(tmp_path)[0])["global_step"] > 0


@off_policy
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


@pytest.mark.parametrize("space,size", [("Dict", 2), ("Discrete", 5)])
def test_observations_of_other_spaces_are_flattened(
    script, space, size, small, monkeypatch, tmp_path
):
    flags = ["--env-id", f"tests.scripted_env:{space}-v0", "--total-timesteps", 60]
    assert run_script(monkeypatch, script, *flags, *small) == 0
    assert load(run_dirs(tmp_path)[0])["obs_rms"]["mean"].shape == (size,)


@on_policy
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_on_policy_runs_are_logged_and_resumed(script, small, env_id, monkeypatch, tmp_path):
    assert (
        run_script(monkeypatch, script, "--env-id", env_id, "--total-timesteps", 200, *small) == 0
    )
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert (
        checkpoint["optimizer"]["state"][0]["step"] == 10 * 2 * 2
    )  # iterations, epochs, minibatches
    assert checkpoint["obs_rms"]["count"] == 200  # every observation, once
    assert checkpoint["return_scaler"]["rms.count"] == 200
    names = ["actor_loss", "critic_loss", "entropy", "approx_kl", "clipfrac", "explained_variance"]
    names = ["losses/" + name for name in (*names, "alpha")]
    for name in [*names, "charts/learning_rate", "charts/SPS"]:
        assert [step for step, _ in scalars(run_dir, name)] == list(range(20, 201, 20))
    rates = [value for _, value in scalars(run_dir, "charts/learning_rate")]
    assert rates == pytest.approx([3e-4 * (1 - i / 10) for i in range(10)], rel=1e-5)
    assert (
        run_script(
            monkeypatch, script, "--resume", run_dir / "checkpoint.pt", "--total-timesteps", 300
        )
        == 0
    )
    after = load(run_dir)
    assert run_dirs(tmp_path) == [run_dir] and after["global_step"] == 300
    assert after["optimizer"]["state"][0]["step"] == 15 * 2 * 2
    assert [step for step, _ in scalars(run_dir, "losses/critic_loss")] == list(range(20, 301, 20))


@on_policy
def test_on_policy_rollout_at_terminations_and_truncations(script, small, monkeypatch, tmp_path):
    seen, make_rows = [], script.make_rows

    def spy(actor, critic, obs_rms, return_scaler, rollout, *others):
        seen.append(rollout)
        return make_rows(actor, critic, obs_rms, return_scaler, rollout, *others)

    monkeypatch.setattr(script, "make_rows", spy)
    flags = dict(env_id="tests.scripted_env:Scripted-v0", total_timesteps=90)
    run_main(script, monkeypatch, num_envs=3, num_steps=30, **flags)
    (rollout,) = seen
    np.testing.assert_array_equal(
        rollout.next_obs[..., 0], rollout.obs[..., 0]
    )  # never the next episode's
    np.testing.assert_array_equal(rollout.next_obs[..., 1], rollout.obs[..., 1] + 1)
    np.testing.assert_array_equal(rollout.rewards, rollout.next_obs[..., 1])
    odd = rollout.obs[..., 0] % 2 == 1
    np.testing.assert_array_equal(rollout.terminations, odd & (rollout.next_obs[..., 1] == 3))
    cut = ~odd & (rollout.next_obs[..., 1] == 5)
    np.testing.assert_array_equal(rollout.dones, rollout.terminations.bool() | cut)
    assert cut.sum() == 12 and rollout.terminations.sum() == 9
    assert scalars(run_dirs(tmp_path)[0], "charts/episodic_length")[:4] == [(15, 5.0)] * 3 + [
        (24, 3.0)
    ]


@pytest.mark.parametrize("network", ["actor", "critic"])
@on_policy
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
        run_main(script, monkeypatch, total_timesteps=50, **flags)
    checkpoint = load(run_dirs(tmp_path)[0])
    assert checkpoint["global_step"] == 20
    assert all(torch.isfinite(x).all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))


@on_policy
def test_normaliser_stands_still_between_rollout_and_update(script, monkeypatch, tmp_path):
    """Of observations; and the ratios of the first minibatch are one."""
    seen, draw, ppo_loss = [], script.Actor.latents, script.ppo_loss
    forward, means = script.RunningMeanStd.forward, []

    def spy_forward(self, x):
        means.append(self.mean.clone())
        return forward(self, x)

    def spy_draw(self, obs):
        seen.append(("rollout", means[-1]))
        return draw(self, obs)

    def spy_loss(actor, critic, rows, alpha, args):
        loss, metrics = ppo_loss(actor, critic, rows, alpha, args)
        if seen[-1][0] == "rollout":  # before the first gradient step
            assert metrics["losses/approx_kl"].abs().max() < 1e-5
        seen.append(("update", means[-1]))
        return loss, metrics

    monkeypatch.setattr(script.RunningMeanStd, "forward", spy_forward)
    monkeypatch.setattr(script.Actor, "latents", spy_draw)
    monkeypatch.setattr(script, "ppo_loss", spy_loss)
    flags = dict(num_envs=8, num_steps=35, num_minibatches=28, update_epochs=10)
    monkeypatch.setattr(script.Run, "evaluate", lambda *_: None)
    run_main(script, monkeypatch, total_timesteps=560, **flags)
    first, second = seen[: 35 + 280], seen[35 + 280 :]
    for iteration in (first, second):
        assert [kind for kind, _ in iteration] == ["rollout"] * 35 + ["update"] * 280
        assert all(torch.equal(mean, iteration[0][1]) for _, mean in iteration)
    assert not torch.equal(first[0][1], second[0][1])


@on_policy
def test_on_policy_temperature_is_annealed_geometrically(script, monkeypatch, tmp_path):
    """And `ppo_loss` gets it in the units of the scaled rewards."""
    make_rows, ppo_loss, seen = script.make_rows, script.ppo_loss, []

    def spy_rows(actor, critic, obs_rms, return_scaler, rollout, alpha, args):
        made = make_rows(actor, critic, obs_rms, return_scaler, rollout, alpha, args)
        seen.append((alpha, made[1].item(), []))
        return made

    def spy_loss(actor, critic, rows, alpha, args):
        seen[-1][2].append(alpha.item())
        return ppo_loss(actor, critic, rows, alpha, args)

    monkeypatch.setattr(script, "make_rows", spy_rows)
    monkeypatch.setattr(script, "ppo_loss", spy_loss)
    run_main(script, monkeypatch, total_timesteps=200, alpha=0.1, alpha_anneal=50.0)
    logged = scalars(run_dirs(tmp_path)[0], "losses/alpha")
    assert [step for step, _ in logged] == list(range(20, 201, 20))
    for i, ((_, value), (alpha, scale, in_loss)) in enumerate(zip(logged, seen, strict=True)):
        assert value == pytest.approx(0.1 * 50 ** max(0, 1 - 20 * i / 140))  # 70 % of 200 steps
        assert alpha == pytest.approx(value) and scale != pytest.approx(1, abs=0.01)
        assert in_loss == pytest.approx([alpha * scale] * 4)
    assert run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--alpha-anneal", 0.5) == 2


@on_policy
def test_worker_processes_give_the_same_run(script, small, monkeypatch, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 100, *small]
    assert run_script(monkeypatch, script, *flags) == 0
    assert run_script(monkeypatch, script, *flags, "--async-envs") == 0
    first, second = (load(run_dir) for run_dir in run_dirs(tmp_path))
    assert equal(first, second)


BAD = {
    "unknown environment": "--env-id NoSuchThing-v0",
    "malformed environment": "--env-id a:b:c",
    "unknown module": "--env-id no_such_module:Thing-v0",
    "discrete actions": "--env-id CartPole-v1",
    "images": "--env-id tests.scripted_env:Image-v0",
    "unbounded actions": "--env-id tests.scripted_env:Unbounded-v0",
    "no environments": "--num-envs 0",
    "discount above one": "--gamma 1.5",
    "missing checkpoint": "--resume nowhere.pt",
    "unreadable checkpoint": "--resume garbage.pt",
    "another script's checkpoint": "--resume other.pt",
    "no such device": f"--device {'cuda' if torch.backends.mps.is_available() else 'mps'}",
    "wandb not installed": "--track",
    "graph without CUDA": "--cuda-graph --device cpu",
    "seed too large": "--seed 4294967296",
}
BAD_OFF_POLICY = {
    "no batch": "--batch-size 0",
    "negative size": "--buffer-size -5",
    "not a number": "--policy-lr nan",
    "infinite entropy": "--target-entropy inf",
    "nothing to anneal": "--no-autotune --alpha 0 --alpha-anneal 10",
    "annealing to no number": "--no-autotune --alpha-anneal nan",
}
BAD_ON_POLICY = {
    "no steps": "--num-steps 0",
    "too many minibatches": "--num-envs 1 --num-steps 8 --num-minibatches 8",
    "target KL not a number": "--target-kl nan",
    "negative target KL": "--target-kl -1",
    "nothing to anneal": "--alpha 0 --alpha-anneal 10",
    "not a rate": "--learning-rate nan",
}
BAD_PPO = {"no noise": "--initial-std 0"}
BAD_DIFFUSION = {
    "no denoising step": "--diffusion-steps 0",
    "delta of one": "--delta-first 1",
    "growing delta": "--delta-first 0.1 --delta-last 0.2",
    "no prior": "--prior-std 0",
}
BAD_WASSERSTEIN = {"no sample": "--action-samples 0", "negative weight": "--kl-weight-std -0.1"}
BAD_STEPWISE = {"no trust region": "--kl-bound 0"}
BAD_CATEGORICAL = {
    "no support": "--v-min 5 --v-max 5",
    "support of one sign": "--v-min -10 --v-max 0",
    "no atom": "--num-atoms 0",
}
BAD_DIME = {"no denoising step": "--diffusion-steps 0", "no prior": "--prior-std 0"}


def bad_input():
    for script in SCRIPTS:
        cases = BAD | (BAD_ON_POLICY if script in ON_POLICY else BAD_OFF_POLICY)
        own = BAD_DIME if script is dime else BAD_DIFFUSION if "diff" in script.__name__ else {}
        if script is ppo_continuous:
            own = BAD_PPO
        if script in CATEGORICAL:
            own = own | BAD_CATEGORICAL
        if script in STEPWISE:
            own = own | BAD_STEPWISE
        if script is WASSERSTEIN[0]:
            own = BAD_WASSERSTEIN
        for case, flags in (cases | own).items():
            yield pytest.param(script, flags, id=f"{script.__name__}: {case}")


@pytest.mark.parametrize("script,flags", list(bad_input()))
def test_bad_input_is_refused_in_one_sentence(script, flags, monkeypatch, tmp_path, capsys):
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint")
    torch.save({"script": "another_script", "args": {}}, tmp_path / "other.pt")
    before = sorted(tmp_path.iterdir())
    find_spec = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert run_script(monkeypatch, script, *flags.split(), "--total-timesteps", 10) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and sorted(tmp_path.iterdir()) == before
    sentence = [line for line in error.splitlines() if "error: " in line or "Error parsing" in line]
    assert len(sentence) == 1 and len(sentence[0]) > 25
