"""The frame of all scripts: environments, normaliser, what a person sees, faults, checkpoints."""

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
import types
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffsac_continuous as diffsac
import sac_continuous as sac
from tests.common import (
    OFF_POLICY,
    ON_POLICY,
    ROOT,
    SCRIPTS,
    STEPWISE,
    TWINS,
    equal,
    flatten,
    load,
    run_dirs,
    run_script,
    scalars,
    small_flags,
)

SMALL = (
    "--hidden-dim 16 --eval-episodes 2 --device cpu --batch-size 16 --learning-starts 40".split()
)
PENDULUM = ["--env-id", "Pendulum-v1", *SMALL]
SIZES = {
    "hidden_dim": 16,
    "batch_size": 16,
    "eval_episodes": 1,
    "learning_starts": 40,
    "device": "cpu",
}


def over(scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


def make_args(script, **flags):
    """`Args` of a run of some seconds in one environment."""
    words = [*small_flags(script), "--num-envs", "1", "--eval-episodes", "1"]
    args = script.tyro.cli(script.Args, args=words)
    vars(args).update({"env_id": "Pendulum-v1"} | flags)
    return args


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", ["script.py"])


class Plain(gym.Env):
    """Normal observations, episodes of 10 steps; subclasses change one thing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    steps = episodes = 0

    def observe(self):
        return self.np_random.normal(size=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes += 1
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), self.reward(action), False, False, {}

    def reward(self, action):
        return -float(np.square(action, dtype=np.float64).sum())


class Strict(Plain):
    """Refuses an action that is not in its space; pays the action's place between its bounds."""

    def __init__(self, space):
        self.action_space = space

    def reward(self, action):
        assert self.action_space.contains(action), (action, action.dtype, self.action_space)
        low, high = (
            self.action_space.low.astype(np.float64),
            self.action_space.high.astype(np.float64),
        )
        return -float(np.square((2 * action - high - low) / (high - low)).sum())


class OneArray(Plain):
    """Writes (episode, step) into one array, and (step, ) into one info."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self):
        self.array, self.info = np.zeros(2, np.float32), {"episode": {"r": 0.0}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.array[:] = self.episodes, 0
        return self.array, {"goal": None}

    def observe(self):
        return self.array

    def step(self, action):
        self.array[1] += 1
        self.info["contacts"] = np.zeros(int(self.array[1])) if self.array[1] % 2 else "none"
        return self.array, 0.0, False, False, self.info


class BadStart(Plain):
    """Its third episode begins with a value that is not a number."""

    def observe(self):
        return (
            np.full(3, np.nan) if self.episodes == 3 and self.steps % 10 == 0 else super().observe()
        )


class Spike(Plain):
    """In its 55th step an observation or a reward of this size."""

    def __init__(self, where, size):
        self.where, self.size = where, size

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.steps == 55 and self.where == "reward":
            reward = self.size
        if self.steps == 55 and self.where == "observation":
            obs[0] = self.size
        return obs, reward, *rest


class LateNan(Plain):
    """Not a number late in an episode, where only an evaluation gets."""

    def reward(self, action):
        return np.nan if self.steps > 250 else 1.0


class Endless(Plain):
    """No time limit, no terminal state; counts its steps over all instances."""

    total = 0

    def step(self, action):
        Endless.total += 1
        return np.zeros(3), 1.0, False, False, {}


Box = gym.spaces.Box
ACTIONS = {
    "Tenth": Box(-0.1, 0.1, (2,)),
    "Unit": Box(-1.0, 1.0, (2,)),
    "Thousands": Box(-2000.0, 2000.0, (2,)),
    "Half": Box(-1, 1, (2,), np.float16),
    "Double": Box(-0.7, 0.3, (2,), np.float64),
}
REFUSED = {
    "Integers": (Plain.observation_space, Box(0, 10, (1,), np.int64)),
    "Unlimited": (Plain.observation_space, Box(-1e10, 1e10, (1,))),
    "Overflowing": (Plain.observation_space, Box(-1e300, 1e300, (1,), np.float64)),
    "Point": (
        Plain.observation_space,
        Box(np.array([-1.0, 0.0]), np.array([1.0, 0.0]), dtype=np.float64),
    ),
    "Image": (Box(0, 255, (8, 8, 3), np.uint8), Plain.action_space),
    "DictOfImages": (gym.spaces.Dict(a=Box(0, 255, (8, 8), np.uint8)), Plain.action_space),
}


class Refused(Plain):
    def __init__(self, spaces):
        self.observation_space, self.action_space = spaces


with warnings.catch_warnings(action="ignore"):
    for name, space in ACTIONS.items():
        gym.register(f"{name}-v0", lambda space=space: Strict(space), max_episode_steps=10)
    for name, spaces in REFUSED.items():
        gym.register(f"{name}-v0", lambda spaces=spaces: Refused(spaces))
    for where in ("observation", "reward"):
        for size in ("1e39", "3e19", "nan"):
            made = lambda where=where, size=size: Spike(where, float(size))  # noqa: E731
            gym.register(f"Spike-{where}-{size}-v0", made, max_episode_steps=10)
    for kind, limit in ((OneArray, 5), (BadStart, 10), (LateNan, 300), (Endless, None)):
        gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=limit)


def words(capsys):
    """What a run printed; no traceback is in it."""
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    return out, error


# environments


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


def test_neighbouring_seeds_share_no_start_state():
    train = {(seed, i): sac.env_seeds(seed, 8, 1)[i] for seed in range(20) for i in range(8)}
    evaluation = [value for seed in range(20) for value in sac.env_seeds(seed, 8, 0)]
    assert len({*train.values(), *evaluation}) == 2 * 160
    assert sac.env_seeds(3, 4, 1) == sac.env_seeds(3, 8, 1)[:4]


def test_a_module_in_the_users_folder_is_found(monkeypatch, tmp_path):
    code = "import gymnasium as gym\nfrom tests.test_frame import Plain\n"
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


# normaliser


def test_statistics_are_those_of_all_rows():
    rows, obs_rms = (
        np.random.default_rng(1).normal(3, 5, (1000, 4)) * [1, 10, 0.1, 0],
        sac.RunningMeanStd(4),
    )
    for part in np.split(rows, [1, 2, 3, 10, 200, 201, 900]):
        obs_rms.update(torch.as_tensor(part, dtype=torch.float32))
    mean, var = rows.mean(0), rows.var(0)
    torch.testing.assert_close(obs_rms.mean, torch.as_tensor(mean).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(obs_rms.var, torch.as_tensor(var).float(), rtol=1e-4, atol=1e-4)
    x = torch.tensor([[0.0, 1.0, 2.0, 1e9]])
    expected = np.clip((x.numpy() - mean) / np.sqrt(var + sac.RunningMeanStd.EPSILON), -10, 10)
    torch.testing.assert_close(obs_rms(x), torch.as_tensor(expected).float(), rtol=1e-3, atol=1e-3)
    disabled = sac.RunningMeanStd(4, enabled=False)
    disabled.update(x)
    assert disabled(x) is x and disabled.count == 0


@over(OFF_POLICY)
def test_normaliser_in_a_run(script, monkeypatch, tmp_path):
    """Raw rows in the buffer, normalised ones in the losses; frozen in evaluation; saved."""
    seen, critic_loss = [], script.critic_loss

    def spy(qf, batch, *rest):
        seen.append(batch)
        return critic_loss(qf, batch, *rest)

    monkeypatch.setattr(script, "critic_loss", spy)
    script.main(make_args(script, total_timesteps=60, eval_frequency=50, normalize_obs=True))
    checkpoint = load(run_dirs(tmp_path)[0])
    rows = checkpoint["buffer"]["data"][0]
    assert checkpoint["obs_rms"]["count"] == 60 == len(rows)  # not those of the evaluations
    torch.testing.assert_close(checkpoint["obs_rms"]["mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        checkpoint["obs_rms"]["var"], rows.var(0, correction=0), rtol=1e-4, atol=1e-5
    )
    obs_rms = script.RunningMeanStd(3)
    obs_rms.load_state_dict(checkpoint["obs_rms"])
    for mine, name in ((seen[-1].obs, "obs"), (seen[-1].next_obs, "next_obs")):
        stored = obs_rms(checkpoint["buffer"]["data"][0 if name == "obs" else 1])
        nearest = (
            torch.cdist(mine, stored, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        )
        assert nearest.max() < 1e-4, name
    script.main(make_args(script, total_timesteps=60, normalize_obs=False, seed=2))
    raw = load(max(run_dirs(tmp_path), key=os.path.getmtime))["buffer"]["data"][0]
    assert (
        torch.cdist(seen[-1].obs, raw, compute_mode="donot_use_mm_for_euclid_dist")
        .min(1)
        .values.max()
        == 0
    )


@over(SCRIPTS)
def test_loaded_policy_acts_identically(script, monkeypatch, tmp_path):
    made = []
    actor_class = script.Actor
    monkeypatch.setattr(
        script, "Actor", lambda *sizes: made.append(actor_class(*sizes)) or made[-1]
    )
    script.main(make_args(script, total_timesteps=60))
    checkpoint = script.load_checkpoint(run_dirs(tmp_path)[0] / "checkpoint.pt")
    actor, obs_rms = actor_class(3, 1, checkpoint["args"]), script.RunningMeanStd(3)
    actor.load_state_dict(checkpoint["actor"])
    obs_rms.load_state_dict(checkpoint["obs_rms"])
    obs = torch.randn(5, 3)
    assert torch.equal(actor.mean_action(obs_rms(obs)), made[0].mean_action(obs_rms(obs)))
    assert checkpoint["action_low"] == [-2.0] and checkpoint["action_high"] == [2.0]


# training


@over(TWINS)
def test_temperature_target_and_moving_averages(script, monkeypatch, tmp_path):
    seen = {}

    def spy(name, function):
        def call(*inputs):
            seen.setdefault(name, []).append(inputs)
            return function(*inputs)

        monkeypatch.setattr(script, name, call)

    spy("temperature_loss", script.temperature_loss)
    deepcopy, copies = script.copy.deepcopy, []

    def deepcopy_and_keep(model):
        copied = deepcopy(model)
        if isinstance(model, torch.nn.Module):
            copies.append((model, copied))
        return copied

    monkeypatch.setattr(script.copy, "deepcopy", deepcopy_and_keep)
    args = make_args(script, total_timesteps=41, tau=0.25)
    before = []
    count = script.Run.count
    keep = lambda: before.append(
        [[p.clone() for p in average.parameters()] for _, average in copies]
    )  # noqa: E731
    monkeypatch.setattr(script.Run, "count", lambda run, *a, **kw: (keep(), count(run, *a, **kw)))
    script.main(args)
    assert seen["temperature_loss"][0][2] == -1  # one action dimension, whatever its bounds
    for (model, average), old in zip(copies, before[-1], strict=True):
        for now, online, was in zip(average.parameters(), model.parameters(), old, strict=True):
            torch.testing.assert_close(now, 0.25 * online + 0.75 * was)
    assert len(copies) == (1 if script is sac else 2)


@over(OFF_POLICY)
def test_actions_come_from_the_policy_after_the_random_ones(script, monkeypatch, tmp_path):
    fixed = lambda self, obs: (torch.full((len(obs), 1), 0.125), torch.zeros(len(obs)))  # noqa: E731
    monkeypatch.setattr(script.Actor, "sample", fixed)
    monkeypatch.setattr(script, "descend", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_value_", lambda *_: None)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: None)
    script.main(make_args(script, total_timesteps=60))
    actions = load(run_dirs(tmp_path)[0])["buffer"]["data"][2][:, 0]
    assert (
        (actions[:40] != 0.125).all()
        and actions[:40].abs().max() > 0.8
        and (actions[40:] == 0.125).all()
    )


@pytest.mark.parametrize(
    "flags",
    ["--diffusion-steps 1", "--diffusion-steps 2", "--actor-gradient chain", "--kl-bound 1e-6"],
)
@over(STEPWISE)
def test_both_gradients_and_short_chains_train(script, flags, monkeypatch, tmp_path):
    flags_of_the_run = [*PENDULUM, "--total-timesteps", 100, *flags.split()]
    assert run_script(monkeypatch, script, *flags_of_the_run) == 0
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["actor_optimizer"]["state"][0]["step"] == 60
    by_step = "chain" not in flags
    bounded = by_step or script is not diffsac
    assert len(checkpoint["v_optimizer"]["state"]) == (6 if by_step else 0)
    names = [
        "control_energy",
        "noise_std_1",
        *(["kl_to_average", "in_trust_region"] if bounded else []),
    ]
    for name in names:
        assert [step for step, _ in scalars(run_dir, f"diffusion/{name}")] == [100]
    if flags == "--kl-bound 1e-6":
        ((_, share),) = scalars(run_dir, "diffusion/in_trust_region")
        assert share < 1


@over(STEPWISE)
def test_terminal_states_are_replaced_by_the_states_before(script, monkeypatch, tmp_path):
    """No action follows a terminal state: its row trains the actor at s."""
    seen, chain, critic_loss = {}, script.Actor.chain, script.critic_loss

    def spy_chain(self, obs, **rest):
        if len(obs) == 16:
            seen["obs"] = obs
        return chain(self, obs, **rest)

    def spy_loss(qf, batch, *rest):
        seen["batch"] = batch
        return critic_loss(qf, batch, *rest)

    monkeypatch.setattr(script.Actor, "chain", spy_chain)
    monkeypatch.setattr(script, "critic_loss", spy_loss)
    env_id = "tests.scripted_env:Scripted-v0"
    script.main(make_args(script, env_id=env_id, total_timesteps=60))
    ended = seen["batch"].terminations == 1
    assert 0 < ended.sum() < 16
    torch.testing.assert_close(seen["obs"][ended], seen["batch"].obs[ended])
    torch.testing.assert_close(seen["obs"][~ended], seen["batch"].next_obs[~ended])


class NoHostReads(TorchDispatchMode):
    """Fails at what a CUDA graph cannot capture: a tensor read by the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert function not in (aten._local_scalar_dense.default, aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


@over(SCRIPTS)
def test_update_and_policy_are_free_of_host_reads(script, monkeypatch, tmp_path):
    """What --cuda-graph captures, run on the CPU under a guard."""
    guarded = []

    def guard(function):
        def call(*inputs):
            guarded.append(function.__name__)
            with NoHostReads():
                return function(*inputs)

        return call

    fake = types.ModuleType("tensordict.nn")
    fake.CudaGraphModule = guard
    monkeypatch.setitem(sys.modules, "tensordict", types.ModuleType("tensordict"))
    monkeypatch.setitem(sys.modules, "tensordict.nn", fake)
    monkeypatch.setattr(script, "fail", lambda message: None)
    adam = torch.optim.Adam
    monkeypatch.setattr(
        torch.optim, "Adam", lambda *a, **kw: adam(*a, **(kw | {"capturable": False}))
    )
    script.main(make_args(script, total_timesteps=50, cuda_graph=True))
    act = "act" if script in ON_POLICY else "sample"
    assert guarded.count("update") >= 10 and guarded.count(act) >= 10


# values that are not finite


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
            [*command, f"tests.test_frame:{env_id}-v0"], capture_output=True, text=True
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
        [*command, "--env-id", "tests.test_frame:LateNan-v0"], capture_output=True, text=True
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
    args = make_args(script, total_timesteps=200, checkpoint_frequency=5)
    with pytest.raises(SystemExit, match="is not finite at step 5[45]"):
        script.main(args)
    checkpoint = load(run_dirs(tmp_path)[0])
    assert checkpoint["global_step"] == 50
    assert all(x.isfinite().all() for x in flatten(checkpoint) if isinstance(x, torch.Tensor))


# evaluation


def make_run(script, env_id, **flags):
    args = make_args(script, env_id=env_id, **({"eval_episodes": 3} | flags))
    script.set_up(args)
    envs = script.make_envs(env_id, 1)
    return script.Run(args, envs, {})


@over([sac, *ON_POLICY])
def test_evaluation_sums_rewards_over_one_episode(script, tmp_path):
    """One environment pays 1 + 2 + 3 + 4 + 5 in its first episode, the other one its action."""
    obs_rms, zeros = script.RunningMeanStd(1, enabled=False), torch.zeros
    actor = types.SimpleNamespace(
        sample=lambda obs: (torch.full((len(obs), 1), 0.25), zeros(len(obs))),
        mean_action=lambda obs: torch.full((len(obs), 1), -0.5),
    )
    for env_id, returns in (("Scripted", (15, 15)), ("PaysTheAction", (5, -10))):
        run = make_run(script, f"tests.scripted_env:{env_id}-v0")
        state = torch.get_rng_state()
        run.evaluate(actor, obs_rms)
        assert torch.equal(state, torch.get_rng_state())
        run.writer.close()
        for name, expected in zip(
            ("episodic_return", "episodic_return_mean_action"), returns, strict=True
        ):
            assert scalars(run.folder, f"eval/{name}") == [(0, expected)]


def test_an_episode_without_an_end_is_evaluated_for_10_000_steps(tmp_path):
    Endless.total = 0
    run = make_run(sac, "Endless-v0", eval_episodes=1)
    actor = types.SimpleNamespace(mean_action=lambda obs: torch.zeros(len(obs), 1))
    actor.sample = lambda obs: (actor.mean_action(obs), None)
    run.evaluate(actor, sac.RunningMeanStd(3, enabled=False))
    run.writer.close()
    assert scalars(run.folder, "eval/episodic_return") == [(0, 10_000)] and Endless.total == 20_000


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_evaluation_heeds_signals(signum, tmp_path):
    flags = ["--env-id", "tests.test_frame:Endless-v0", *SMALL, "--eval-frequency", "20"]
    command = [sys.executable, str(ROOT / "sac_continuous.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "evaluating" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signum)
    assert process.wait() == 128 + signum
    assert load(run_dirs(tmp_path)[0])["global_step"] == 20
    with pytest.raises(KeyError):  # it was cut short
        scalars(run_dirs(tmp_path)[0], "eval/episodic_return")


def test_a_closed_terminal_stops_a_run_but_for_nohup(tmp_path):
    """And a SIGINT stops one that a shell script has put into the background."""
    flags = ["--env-id", "tests.test_frame:Endless-v0", *SMALL, "--eval-frequency", "0"]
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


# what a person sees


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


def test_products_of_wide_networks_stay_float32(monkeypatch):
    """With oneDNN's kernels too: the errors are those of float32, not of bfloat16 (0.2)."""
    x, y = torch.randn(256, 256), torch.randn(256, 256)
    exact = x.double() @ y.double()
    for hidden_dim, precision in ((256, ("bf16", "none")), (64, ("none",))):
        sac.set_up(sac.Args(hidden_dim=hidden_dim, device="cpu"))
        assert torch.backends.mkldnn.matmul.fp32_precision in precision
        torch.testing.assert_close((x @ y).double(), exact, rtol=0, atol=2e-4)
    monkeypatch.setattr(sac, "instruction_sets", lambda: "flags : avx512f amx_bf16")
    sac.set_up(sac.Args(device="cpu"))
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # it would be bfloat16


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


# checkpoints


@pytest.mark.parametrize("frequency,saves", [(1000, 4), (0, 1)])
def test_checkpoints_by_the_clock(frequency, saves, monkeypatch, tmp_path):
    """Ten minutes after the last one, unless only the end is asked for."""
    now, saved, save = [1000.0], [], sac.Run.save
    monkeypatch.setattr(sac.time, "time", lambda: now[0])
    monkeypatch.setattr(sac.Run, "save", lambda run: (saved.append(run.step), save(run)))
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

    def save_and_look(run):
        save(run)
        maps.append([line for line in open("/proc/self/maps") if run.folder.name in line])

    monkeypatch.setattr(script.Run, "save", save_and_look)
    args = script.load_checkpoint(run_dirs(tmp_path)[0] / "checkpoint.pt")["args"]
    args.resume, args.total_timesteps = str(run_dirs(tmp_path)[0] / "checkpoint.pt"), 80
    script.main(args)
    assert maps == [[]]


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


@pytest.mark.parametrize("flags", ["--hidden-dim 100000000", "--buffer-size 100000000000000"])
def test_sizes_that_memory_cannot_hold_are_refused(flags, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (12 << 30,) * 2)"
    code = f"{limit}; import runpy, sys; sys.argv[0] = {str(ROOT / 'sac_continuous.py')!r}"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, *PENDULUM, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert not run_dirs(tmp_path)


def test_compile_without_a_compiler_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    assert run_script(monkeypatch, sac, *PENDULUM, "--compile") == 2 and not run_dirs(tmp_path)
    assert "C++ compiler" in words(capsys)[1]
    assert run_script(monkeypatch, sac, *PENDULUM, "--total-timesteps", 20) == 0


def test_more_steps_than_rows_are_refused_where_each_row_has_one(monkeypatch, tmp_path):
    flags = [*PENDULUM, "--total-timesteps", 50, "--diffusion-steps", 17]
    assert run_script(monkeypatch, diffsac, *flags) == 2 and not run_dirs(tmp_path)
    assert run_script(monkeypatch, diffsac, *flags, "--actor-gradient", "chain") == 0


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


def test_temperature_zero_and_flags_that_change_the_weights(monkeypatch, tmp_path):
    flags = [*PENDULUM, "--no-autotune", "--alpha", 0, "--total-timesteps", 60]
    assert run_script(monkeypatch, diffsac, *flags) == 0
    (run_dir,) = run_dirs(tmp_path)
    assert load(run_dir)["temperature"]["log_alpha"].exp() == 0
    resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", 70]
    assert run_script(monkeypatch, diffsac, *resume, "--no-learn-delta") == 2
    assert run_script(monkeypatch, diffsac, *resume) == 0


def test_the_last_checkpoint_is_written_once(monkeypatch, tmp_path):
    saved, save = [], sac.Run.save
    monkeypatch.setattr(sac.Run, "save", lambda run: (saved.append(run.step), save(run)))
    args = sac.Args(env_id="Pendulum-v1", total_timesteps=60, checkpoint_frequency=20, **SIZES)
    sac.main(args)
    assert saved == [20, 40, 60]
