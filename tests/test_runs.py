"""Whole runs of every script: what is stored, resumed, logged and refused."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import dime
import ppo_continuous
from tests.common import (
    OFF_POLICY,
    ON_POLICY,
    PAIR,
    ROOT,
    SCRIPTS,
    SECOND,
    WASSERSTEIN,
    make_actor,
    quiet,
    randomise,
    run_script,
)

SAME_STEP = AutoresetMode.SAME_STEP
SMALL = "--hidden-dim 16 --eval-episodes 2 --device cpu".split()
SMALL_OFF = [*SMALL, *"--batch-size 16 --learning-starts 40".split()]
SMALL_ON = [*SMALL, *"--num-envs 2 --num-steps 10 --num-minibatches 2 --update-epochs 2".split()]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


replaying = pytest.mark.parametrize(
    "script", [*OFF_POLICY, dime], ids=lambda script: script.__name__
)
off_policy = pytest.mark.parametrize("script", OFF_POLICY, ids=lambda script: script.__name__)
on_policy = pytest.mark.parametrize("script", ON_POLICY, ids=lambda script: script.__name__)


@pytest.fixture
def small(script):
    if script is dime:
        return [*SMALL_OFF, *"--no-progress --critic-dim 16 --diffusion-steps 3 --v-max 50".split()]
    return [*(SMALL_ON if script in ON_POLICY else SMALL_OFF), *quiet(script)]


@pytest.fixture(params=SECOND, ids=lambda script: script.__name__)
def second(request):
    """The scripts of the second edition; what the third does instead is in test_frame.py."""
    return request.param


def critic_metric(script):
    return "losses/critic_loss" if script in PAIR else "losses/qf_loss"


def run_dirs(tmp_path):
    return sorted((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else []


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def scalars(run_dir, name):
    """(step, value) of a TensorBoard curve, in order."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
@off_policy
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
        critic_metric(script),
        "losses/actor_loss",
        "losses/alpha",
        "losses/entropy",
        "charts/SPS",
    ):
        assert [step for step, _ in scalars(run_dirs(tmp_path)[0], name)] == [100, 200]
    for name in ("eval/episodic_return", "eval/episodic_return_mean_action"):
        assert [step for step, _ in scalars(run_dirs(tmp_path)[0], name)] == [200]
    assert not torch.equal(checkpoint["qf"]["weights.0"], checkpoint["qf_target"]["weights.0"])


@replaying
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
    # half a gradient step for each of the 3 environments' steps; second edition: updates after steps 42, 45, ... 147
    due = (150 - 40) // 2 if script in PAIR else 36 * 3 // 2
    assert load(run_dirs(tmp_path)[0])["q_optimizer"]["state"][0]["step"] == due


@off_policy
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


@off_policy
def test_checkpoint_holds_only_the_filled_part_of_the_buffer(script, tmp_path):
    buffer = script.ReplayBuffer(1_000_000, 3, 1, "cpu")
    buffer.add(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 1)), np.zeros(2), np.zeros(2))
    torch.save(buffer.state_dict(), tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size < 50_000


def flatten(value):
    if isinstance(value, dict):
        return [
            x
            for key in value
            if key not in ("args", "random_state", "lr")
            for x in flatten(value[key])
        ]
    return (
        [x for item in value for x in flatten(item)] if isinstance(value, list | tuple) else [value]
    )


def equal(first, second):
    """Whether two checkpoints hold the same values, to the bit."""
    pairs = list(zip(flatten(first), flatten(second), strict=True))
    assert len(pairs) > 20
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


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
    assert [function.__name__ for function in compiled] == ["update"]
    for name, value in first["actor"].items():
        torch.testing.assert_close(second["actor"][name], value)
    torch._dynamo.reset()


class NoHostReads(TorchDispatchMode):
    """Fails at what a CUDA graph cannot capture: a tensor read by the host, or made from the host's numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        ), function
        return function(*args, **(kwargs or {}))


def test_update_and_policy_are_free_of_host_reads(second, monkeypatch, tmp_path):
    """What --cuda-graph captures, run on the CPU under a guard."""
    script, guarded = second, []
    small = [*(SMALL_ON if script in ON_POLICY else SMALL_OFF), *quiet(script)]
    if script is dime:
        small += "--critic-dim 16 --diffusion-steps 3 --v-max 50".split()

    def guard(function):
        def call(*inputs):
            guarded.append(function.__name__)
            with NoHostReads():
                return function(*inputs)

        return call

    monkeypatch.setattr(script, "CudaGraph", guard)
    monkeypatch.setattr(script, "fail", lambda message: None)
    monkeypatch.setattr(sys, "argv", ["script"])
    adam = torch.optim.Adam
    monkeypatch.setattr(
        torch.optim, "Adam", lambda *a, **kwargs: adam(*a, **(kwargs | {"capturable": False}))
    )
    total = 20 if script in ON_POLICY else 44
    args = tyro.cli(
        script.Args,
        args=[*small, "--cuda-graph", "--env-id", "Pendulum-v1", "--total-timesteps", str(total)],
    )
    script.main(args)
    assert guarded.count("update") >= 4 and len(set(guarded)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_captured_update_is_the_eager_one(script, small, monkeypatch, tmp_path):
    flags = ["--env-id", "Pendulum-v1", *small, "--device", "cuda"]
    flags += ["--total-timesteps", 60 if script in ON_POLICY else 52]
    for more in ([], ["--cuda-graph"]):
        assert run_script(monkeypatch, script, *flags, *more) == 0
    first, second = (load(run_dir) for run_dir in sorted(run_dirs(tmp_path), key=os.path.getmtime))
    for name, value in first["actor"].items():
        torch.testing.assert_close(second["actor"][name], value)


def test_loaded_policy_acts_identically(second, tmp_path):
    script = second
    actor = make_actor(script, low=(-2.0, 0.0), high=(1.0, 3.0))
    randomise(actor)
    script.save_checkpoint(tmp_path / "checkpoint.pt", script.Args(), {"actor": actor})
    other = make_actor(script, low=(-2.0, 0.0), high=(1.0, 3.0))
    other.load_state_dict(script.load_checkpoint(tmp_path / "checkpoint.pt")["actor"])
    obs = torch.randn(5, 3)
    for policy in (actor, other):
        torch.manual_seed(1)
        policy.result = policy.get_action(obs)
    assert all(torch.equal(a, b) for a, b in zip(actor.result, other.result, strict=True))


def test_dime_counts_its_gradient_steps(monkeypatch, tmp_path):
    flags = "--env-id Hopper-v4 --total-timesteps 100 --critic-dim 16 --diffusion-steps 3".split()
    assert run_script(monkeypatch, dime, *flags, *SMALL_OFF, "--no-progress") == 0
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["q_optimizer"]["state"][0]["step"] == 2 * 60
    assert checkpoint["actor_optimizer"]["state"][0]["step"] == 2 * 60 // 3  # policy delay
    assert checkpoint["alpha_optimizer"]["state"][0]["step"] == 2 * 60 // 3
    assert (
        checkpoint["qf"]["norms.0.batches"] == 2 * 60
        and checkpoint["qf"]["norms.0.mean"].abs().max() > 0
    )
    for name in (
        "losses/qf_loss",
        "losses/clipped_targets",
        "losses/alpha",
        "diffusion/running_cost_per_dim",
    ):
        assert [step for step, _ in scalars(run_dir, name)] == [100]
    resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", 130]
    assert run_script(monkeypatch, dime, *resume) == 0
    after = load(run_dir)
    assert (
        after["actor_optimizer"]["state"][0]["step"] == 2 * 90 // 3
        and after["qf"]["norms.0.batches"] == 2 * 90
    )
    assert (
        run_script(monkeypatch, dime, *resume, "--v-max", 9) == 2
    )  # the logits belong to the atoms


def test_dime_temperature_target_is_four_nats_of_running_cost(monkeypatch, tmp_path):
    seen, temperature_loss = [], dime.temperature_loss

    def spy(log_alpha, log_prob, target_entropy):
        seen.append(target_entropy)
        return temperature_loss(log_alpha, log_prob, target_entropy)

    monkeypatch.setattr(dime, "temperature_loss", spy)
    monkeypatch.setattr(sys, "argv", ["script"])
    args = dime.Args(
        env_id="Pendulum-v1", total_timesteps=50, learning_starts=40, critic_dim=16, progress=False
    )
    args.hidden_dim, args.batch_size, args.eval_episodes = 16, 16, 1
    dime.main(args)
    assert seen[0] == pytest.approx(
        -(4 - 2.33523) + np.log(2), abs=1e-5
    )  # one action dimension, bounds +-2


@off_policy
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
    deadline = time.time() + 120
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
    steps = [x for x, _ in scalars(run_dir, critic_metric(script))]
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
    if script in SECOND:  # the third reseeds from seed and step
        assert torch.equal(before["random_state"]["cpu"], after["random_state"]["cpu"])


@off_policy
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


@replaying
def test_temperature_is_annealed_geometrically(script, small, monkeypatch, tmp_path):
    flags = "--no-autotune --alpha 0.1 --alpha-anneal 50 --total-timesteps 500".split()
    assert run_script(monkeypatch, script, "--env-id", "Pendulum-v1", *small, *flags) == 0
    logged = dict(scalars(run_dirs(tmp_path)[0], "losses/alpha"))
    for step in (
        100,
        200,
        300,
    ):  # the gradient step before environment step `step` sees the one before
        expected = 0.1 * 50 ** (1 - (step - 1) / 350)
        assert logged[step] == pytest.approx(
            expected, rel=0.012
        )  # DIME: an earlier one, by at most a step
    assert logged[400] == logged[500] == pytest.approx(0.1)
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", *small, "--alpha-anneal", 50)
        == 2
    )


@on_policy
def test_on_policy_temperature_is_annealed_geometrically(script, monkeypatch, tmp_path):
    training_rows, ppo_loss = script.training_rows, script.ppo_loss
    seen = []

    def spy_rows(actor, critic, return_scaler, rollout, alpha, args):
        rows, scale = training_rows(actor, critic, return_scaler, rollout, alpha, args)
        seen.append((alpha, scale, []))
        return rows, scale

    def spy_loss(actor, critic, batch, alpha, args):
        seen[-1][2].append(alpha)
        return ppo_loss(actor, critic, batch, alpha, args)

    monkeypatch.setattr(script, "training_rows", spy_rows)
    monkeypatch.setattr(script, "ppo_loss", spy_loss)
    monkeypatch.setattr(sys, "argv", ["script"])
    small = {
        "num_envs": 2,
        "num_steps": 10,
        "num_minibatches": 2,
        "update_epochs": 1,
        "eval_episodes": 1,
    }
    small |= {"env_id": "Pendulum-v1", "total_timesteps": 200, "progress": False}
    script.main(script.Args(alpha=0.1, alpha_anneal=50.0, **small))
    logged = scalars(run_dirs(tmp_path)[0], "losses/alpha")
    assert [step for step, _ in logged] == list(range(20, 201, 20))
    for i, ((_, value), (alpha, scale, in_loss)) in enumerate(zip(logged, seen, strict=True)):
        assert value == pytest.approx(0.1 * 50 ** max(0, 1 - 20 * i / 140))  # 70 % of 200 steps
        assert alpha == pytest.approx(value)
        assert in_loss and [float(x) for x in in_loss] == pytest.approx(
            [float(alpha * scale)] * len(in_loss)
        )
    assert run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--alpha-anneal", 0.5) == 2


@pytest.mark.parametrize("script", WASSERSTEIN, ids=lambda script: script.__name__)
def test_default_temperature_target_and_polyak_average(script, monkeypatch, tmp_path):
    flags = [
        "--env-id",
        "Pendulum-v1",
        *SMALL_OFF,
        "--learning-starts",
        40,
        "--total-timesteps",
        41,
    ]
    seen = {}
    losses = {
        name: getattr(script, name) for name in ("critic_loss", "policy_loss", "temperature_loss")
    }

    def spy(name):
        def loss(*arguments):
            seen[name] = arguments
            if name == "critic_loss":
                seen["target"] = [p.clone() for p in arguments[2].parameters()]
            return losses[name](*arguments)

        return loss

    for name in losses:
        monkeypatch.setattr(script, name, spy(name))
    monkeypatch.setattr(sys, "argv", ["script"])
    args = script.Args(
        env_id="Pendulum-v1", total_timesteps=41, learning_starts=40, tau=0.25, progress=False
    )
    args.hidden_dim, args.batch_size, args.eval_episodes = 16, 16, 1
    script.main(args)
    obs = seen["policy_loss"][3 if script in WASSERSTEIN else 2]
    assert flags and torch.equal(obs, seen["critic_loss"][3].obs)
    assert seen["temperature_loss"][2] == pytest.approx(
        np.log(2) - 1
    )  # -1 for actions in [-1, 1], bounds are +-2
    _, qf, qf_target = seen["critic_loss"][:3]
    for now, online, before in zip(
        qf_target.parameters(), qf.parameters(), seen["target"], strict=True
    ):
        torch.testing.assert_close(now, 0.25 * online + 0.75 * before)
        assert not torch.equal(now, before)


@pytest.mark.parametrize("script", [*WASSERSTEIN, dime], ids=lambda script: script.__name__)
def test_actions_come_from_the_policy_after_the_random_ones(script, monkeypatch, tmp_path):
    monkeypatch.setattr(
        script.Actor,
        "sample",
        lambda self, obs: (torch.full((len(obs), 1), 0.125), torch.zeros(len(obs))),
    )

    def loss(actor, *arguments):
        return sum(p.sum() for p in actor.parameters()), torch.zeros(16), torch.zeros(2, 1)

    monkeypatch.setattr(
        script, "policy_loss", loss if script in WASSERSTEIN else lambda *a: loss(*a)[:2]
    )
    monkeypatch.setattr(sys, "argv", ["script"])
    sizes = dict(critic_dim=16, diffusion_steps=3) if script is dime else {}
    args = script.Args(
        env_id="Pendulum-v1", total_timesteps=60, learning_starts=40, progress=False, **sizes
    )
    args.hidden_dim, args.batch_size, args.eval_episodes = 16, 16, 1
    script.main(args)
    actions = load(run_dirs(tmp_path)[0])["buffer"]["data"][2][:, 0]
    assert (
        (actions[:40] != 0.125).all()
        and actions[:40].abs().max() > 1.5
        and (actions[40:] == 0.125).all()
    )


def eval_envs(script, env_id):
    return SyncVectorEnv(
        [script.make_env(env_id, 1, i, False, "") for i in range(3)], autoreset_mode=SAME_STEP
    )


def test_evaluation_sums_rewards_over_one_episode(second, monkeypatch):
    script = second
    """The scripted environment pays 1 + 2 + 3 + 4 + 5 in its first episode; the other pays its action, 20 times."""
    envs = eval_envs(script, "tests.scripted_env:Scripted-v0")
    returns = script.evaluate(make_actor(script, 2), envs, 1, torch.device("cpu"))
    assert {name: list(values) for name, values in returns.items()} == {
        "episodic_return": [15.0] * 3,
        "episodic_return_mean_action": [15.0] * 3,
    }
    actor = make_actor(script, 1)
    monkeypatch.setattr(
        actor, "sample", lambda obs: (torch.full((len(obs), 1), 0.25), torch.zeros(len(obs)))
    )
    monkeypatch.setattr(actor, "mean_action", lambda obs: torch.full((len(obs), 1), -0.5))
    envs = eval_envs(script, "tests.scripted_env:PaysTheAction-v0")
    returns = script.evaluate(actor, envs, 1, torch.device("cpu"))
    assert (
        list(returns["episodic_return"]) == [5.0] * 3
        and list(returns["episodic_return_mean_action"]) == [-10.0] * 3
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint(script, small, signum, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 1_000_000, *small]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, flags)]
    )
    deadline = time.time() + 120
    while not list(tmp_path.glob("runs/*/events*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signum)
    assert process.wait(timeout=60) == 128 + signum
    assert load(run_dirs(tmp_path)[0])["global_step"] > 0


@on_policy
def test_ctrl_c_reaches_a_run_with_environments_in_processes(script, small, tmp_path):
    """A terminal sends it to all processes of the group; those of the environments must leave it to the script."""
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 1_000_000, *small, "--async-envs"]
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, flags)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list(tmp_path.glob("runs/*/events*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in error
    assert load(run_dirs(tmp_path)[0])["global_step"] > 0


@replaying
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


@pytest.mark.parametrize("script", [*WASSERSTEIN, dime], ids=lambda script: script.__name__)
def test_a_value_that_is_not_a_number_stops_the_run(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["script"])
    sizes = dict(critic_dim=16, diffusion_steps=3) if script is dime else {}
    args = script.Args(
        env_id="tests.scripted_env:NotANumber-v0", total_timesteps=2000, learning_starts=40, **sizes
    )
    args.hidden_dim, args.batch_size, args.progress, args.checkpoint_frequency = 16, 16, False, 5
    args.eval_episodes = 1
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    assert "a reward is not finite at step 51" in str(stop.value) and run_dirs(tmp_path)[
        0
    ].name in str(stop.value)
    checkpoint = load(run_dirs(tmp_path)[0])
    assert checkpoint["global_step"] == 50
    assert all(torch.isfinite(x).all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))

    losses = iter([0.0] * 10 + [float("nan")] * 1000)
    policy_loss = script.policy_loss

    def failing_loss(actor, *arguments):
        loss, *rest = policy_loss(actor, *arguments)
        return loss * (1 + next(losses)), *rest

    monkeypatch.setattr(script, "policy_loss", failing_loss)
    args.env_id, args.seed = "Pendulum-v1", 2
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    step = int(re.search(r"losses/\w+ is not finite at step (\d+)", str(stop.value))[1])
    assert (
        step == 52 if script is not dime else 52 < step < 62
    )  # two gradient steps, a third of them of the actor
    (run_dir,) = (run_dir for run_dir in run_dirs(tmp_path) if "Pendulum" in run_dir.name)
    checkpoint = load(run_dir)
    assert checkpoint["global_step"] == (step - 1) // 5 * 5
    assert all(torch.isfinite(x).all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))


def test_dictionary_observations_are_flattened(script, small, monkeypatch, tmp_path):
    flags = ["--env-id", "tests.scripted_env:Dict-v0", "--total-timesteps", 60]
    assert run_script(monkeypatch, script, *flags, *small) == 0
    actor = load(run_dirs(tmp_path)[0])["actor"]
    inputs = [
        actor[name].shape[-1]
        for name in ("fc1.weight", "fc_obs.weight", "normalizer.mean")
        if name in actor
    ]
    assert inputs == [2]


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
    assert checkpoint["actor"]["normalizer.count"] == pytest.approx(200)  # every observation, once
    assert checkpoint["return_scaler"]["normalizer.count"] == pytest.approx(200)
    names = [
        "losses/" + name
        for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
    ]
    for name in [*names, "losses/explained_variance", "charts/learning_rate", "charts/SPS"]:
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
    assert [step for step, _ in scalars(run_dir, "losses/value_loss")] == list(range(20, 301, 20))


@on_policy
def test_on_policy_rollout_at_terminations_and_truncations(script, small, monkeypatch, tmp_path):
    seen = []
    training_rows = script.training_rows

    def spy(actor, critic, return_scaler, rollout, *others):
        seen.append(rollout)
        return training_rows(actor, critic, return_scaler, rollout, *others)

    monkeypatch.setattr(script, "training_rows", spy)
    monkeypatch.setattr(sys, "argv", ["script"])
    args = script.Args(
        env_id="tests.scripted_env:Scripted-v0", total_timesteps=90, num_envs=3, num_steps=30
    )
    args.num_minibatches, args.eval_episodes, args.progress = 2, 1, False
    script.main(args)
    (rollout,) = seen
    np.testing.assert_array_equal(
        rollout.next_obs[..., 0], rollout.obs[..., 0]
    )  # never the next episode's
    np.testing.assert_array_equal(rollout.next_obs[..., 1], rollout.obs[..., 1] + 1)
    np.testing.assert_array_equal(rollout.rewards, rollout.next_obs[..., 1])
    odd = rollout.obs[..., 0] % 2 == 1
    np.testing.assert_array_equal(rollout.terminations, odd & (rollout.next_obs[..., 1] == 3))
    cut = ~odd & (rollout.next_obs[..., 1] == 5)
    np.testing.assert_array_equal(rollout.ends, rollout.terminations.bool() | cut)
    assert cut.sum() == 12 and rollout.terminations.sum() == 9
    assert scalars(run_dirs(tmp_path)[0], "charts/episodic_length")[:4] == [(15, 5.0)] * 3 + [
        (24, 3.0)
    ]


@pytest.mark.parametrize("flags,support", [("", (-200, 200)), ("--v-min -5", (-5, 200))])
def test_support_follows_the_environment_of_the_command_line(flags, support, monkeypatch, tmp_path):
    """Not that of the default environment; a flag comes first, and a resumed run keeps its own."""
    monkeypatch.setitem(
        sys.modules, "shimmy", types.ModuleType("shimmy")
    )  # which would register dm_control
    made = {"entry_point": "gymnasium.envs.classic_control:PendulumEnv", "max_episode_steps": 5}
    monkeypatch.setitem(
        gym.registry,
        "dm_control/pendulum-v0",
        gym.envs.registration.EnvSpec("dm_control/pendulum-v0", **made),
    )
    small = "--hidden-dim 8 --critic-dim 8 --eval-episodes 1 --no-progress --device cpu".split()
    command = ["--env-id", "dm_control/pendulum-v0", "--total-timesteps", 2, *small, *flags.split()]
    assert run_script(monkeypatch, dime, *command) == 0
    (run_dir,) = run_dirs(tmp_path)
    args = load(run_dir)["args"]
    assert (args["v_min"], args["v_max"]) == support
    assert (
        run_script(monkeypatch, dime, "--resume", run_dir / "checkpoint.pt", "--total-timesteps", 4)
        == 0
    )
    args = load(run_dir)["args"]
    assert (args["v_min"], args["v_max"], args["total_timesteps"]) == (*support, 4)


@pytest.mark.parametrize("network", ["actor", "critic"])
@on_policy
def test_a_weight_that_is_not_a_number_stays_out_of_the_checkpoint(
    script, network, monkeypatch, tmp_path
):
    """One that only the last gradient step has spoilt: losses are still finite then."""
    networks, updates = {}, []
    ppo_loss, update_statistics = script.ppo_loss, script.RunningNormalizer.update

    def spy(actor, critic, *arguments):
        networks.update(actor=actor, critic=critic)
        return ppo_loss(actor, critic, *arguments)

    def spoil(normalizer, *arguments):
        """The observations' statistics are updated after the gradient steps of each rollout."""
        update_statistics(normalizer, *arguments)
        updates.extend(
            [normalizer] if networks and normalizer is networks["actor"].normalizer else []
        )
        if len(updates) == 3:
            networks[network].net[0].weight.data[0, 0] = torch.nan

    monkeypatch.setattr(script, "ppo_loss", spy)
    monkeypatch.setattr(script.RunningNormalizer, "update", spoil)
    monkeypatch.setattr(sys, "argv", ["script"])
    sizes = {
        "num_envs": 1,
        "num_steps": 10,
        "num_minibatches": 2,
        "update_epochs": 1,
        "eval_episodes": 1,
    }
    args = script.Args(
        env_id="Pendulum-v1", total_timesteps=50, progress=False, checkpoint_frequency=10, **sizes
    )
    with pytest.raises(SystemExit, match="is not finite at step 30"):
        script.main(args)
    checkpoint = load(run_dirs(tmp_path)[0])
    assert checkpoint["global_step"] == 20
    assert all(torch.isfinite(x).all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))


@on_policy
def test_on_policy_value_that_is_not_a_number_stops_the_run(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["script"])
    sizes = {"num_envs": 1, "num_steps": 10, "num_minibatches": 2, "eval_episodes": 1}
    args = script.Args(
        env_id="tests.scripted_env:NotANumber-v0", total_timesteps=2000, progress=False, **sizes
    )
    args.checkpoint_frequency = 10
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    assert "a reward is not finite at step 51" in str(stop.value)
    checkpoint = load(run_dirs(tmp_path)[0])
    assert checkpoint["global_step"] == 50
    assert all(torch.isfinite(x).all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))


@on_policy
def test_normaliser_stands_still_between_rollout_and_update(script, monkeypatch, tmp_path):
    seen, draw, sample, ppo_loss = [], script.Actor.forward, script.Actor.sample, script.ppo_loss

    def spy_draw(self, obs, noise_scale=1.0):
        seen.append(("rollout", self.normalizer.mean.clone()))
        return draw(self, obs, noise_scale)

    def unseen_sample(self, obs):  # evaluation and metrics
        before = len(seen)
        result = sample(self, obs)
        del seen[before:]
        return result

    def spy_loss(actor, critic, batch, alpha, args):
        seen.append(("update", actor.normalizer.mean.clone()))
        if (
            len([kind for kind, _ in seen if kind == "update"]) % 280 == 1
        ):  # before the first gradient step
            *steps, old_log_prob, _, _, _ = batch
            log_prob = actor.log_density(*steps)
            log_prob = log_prob if isinstance(log_prob, torch.Tensor) else log_prob[0]
            torch.testing.assert_close(log_prob, old_log_prob, rtol=0, atol=2e-5)
        return ppo_loss(actor, critic, batch, alpha, args)

    monkeypatch.setattr(script.Actor, "forward", spy_draw)
    monkeypatch.setattr(script.Actor, "sample", unseen_sample)
    monkeypatch.setattr(script, "ppo_loss", spy_loss)
    monkeypatch.setattr(sys, "argv", ["script"])
    sizes = {
        "num_envs": 8,
        "num_steps": 35,
        "num_minibatches": 28,
        "hidden_dim": 16,
        "eval_episodes": 1,
    }
    script.main(
        script.Args(
            env_id="Pendulum-v1", total_timesteps=560, eval_frequency=0, progress=False, **sizes
        )
    )
    first, second = seen[: 35 + 280], seen[35 + 280 : 2 * (35 + 280)]
    for iteration in (first, second):
        assert [kind for kind, _ in iteration] == ["rollout"] * 35 + ["update"] * 280
        assert all(torch.equal(mean, iteration[0][1]) for _, mean in iteration)
    assert not torch.equal(first[0][1], second[0][1])


@on_policy
def test_worker_processes_give_the_same_run(script, small, monkeypatch, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 100, *small]
    assert run_script(monkeypatch, script, *flags) == 0
    time.sleep(1.1)
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
    "moviepy not installed": "--capture-video",
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
    "delta of two": "--delta-first 2",
    "growing delta": "--delta-first 0.1 --delta-last 0.2",
    "no prior": "--prior-std 0",
}
BAD_WASSERSTEIN = {
    "no step": "--n-step 0",
    "negative weight": "--kl-weights 0.1 -0.1",
    "bound not a number": "--kl-bounds nan 0.1",
}
BAD_DIME = {
    "no denoising step": "--diffusion-steps 0",
    "no support": "--v-min 5 --v-max 5",
    "one atom": "--num-atoms 1",
    "no prior": "--prior-std 0",
}


def bad_input():
    for script in SCRIPTS:
        cases = BAD | (BAD_ON_POLICY if script in ON_POLICY else BAD_OFF_POLICY)
        own = BAD_DIME if script is dime else BAD_DIFFUSION if "diff" in script.__name__ else {}
        if script is ppo_continuous:
            own = BAD_PPO
        if script in WASSERSTEIN:
            own = own | BAD_WASSERSTEIN
        for case, flags in (cases | own).items():
            if script in PAIR and case == "moviepy not installed":  # tools/enjoy.py films
                continue
            yield pytest.param(script, flags, id=f"{script.__name__}: {case}")


@pytest.mark.parametrize("script,flags", list(bad_input()))
def test_bad_input_is_refused_in_one_sentence(script, flags, monkeypatch, tmp_path, capsys):
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint")
    torch.save({"script": "another_script", "args": {}}, tmp_path / "other.pt")
    before = sorted(tmp_path.iterdir())
    find_spec = importlib.util.find_spec
    missing = ("wandb", "moviepy")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *p: None if n in missing else find_spec(n, *p)
    )
    assert run_script(monkeypatch, script, *flags.split(), "--total-timesteps", 10) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and sorted(tmp_path.iterdir()) == before
    sentence = [line for line in error.splitlines() if "error: " in line or "Error parsing" in line]
    assert len(sentence) == 1 and len(sentence[0]) > 25
