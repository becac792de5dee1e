"""Random combinations of flags: a script trains with them, or refuses them in one sentence."""

import contextlib
import dataclasses
import io
import math
import tempfile
import types
import typing
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.common import ON_POLICY, ROOT, SCRIPTS, run_script

STEPS = 50
POOLS = {
    int: [-1, 0, 1, 2, 3, 7, 16],
    float: [-1.0, 0.0, 1e-3, 0.1, 0.5, 0.99, 1.0, 2.0, math.inf, math.nan],
}
FIXED = {  # what would need a network, other packages, minutes, or what the other tests are about
    *(
        "exp_name",
        "env_id",
        "device",
        "torch_threads",
        "compile",
        "cuda_graph",
        "track",
        "async_envs",
    ),
    *("resume", "total_timesteps"),
}


class Short(gym.Env):
    """Random observations; episodes of random length up to 12 steps."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def observe(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return (
            self.observe(),
            -float(np.square(action).sum()),
            bool(self.np_random.random() < 0.1),
            False,
            {},
        )


gym.register("Short-v0", Short, max_episode_steps=12)


def kinds(field):
    """The types that a field may have: int | None has two."""
    union = typing.get_origin(field.type) in (types.UnionType, typing.Union)
    return typing.get_args(field.type) if union else (field.type,)


def flag_values(field):
    """A strategy for the words after a flag: typical, extreme and nonsensical values."""
    if bool in kinds(field):
        return st.sampled_from([["True"], ["False"]])
    if typing.get_origin(field.type) is typing.Literal:
        return st.sampled_from([[choice] for choice in typing.get_args(field.type)])
    values = [str(x) for kind in kinds(field) for x in POOLS.get(kind, [])]
    if is_rate(field):
        values = [
            "-1",
            "0",
            "0.001",
            "inf",
            "nan",
        ]  # a large one is accepted, and stops the run when a loss overflows
    return st.sampled_from([*values, "nonsense"]).map(lambda value: [value])


def is_rate(field):
    return "learning_rate" in field.name or field.name.endswith("_lr")


def commands(script):
    """A strategy for up to three flags with their values, beside those that keep a run short."""
    fields = {
        field.name: field for field in dataclasses.fields(script.Args) if field.name not in FIXED
    }
    words = "--env-id Short-v0 --device cpu --hidden-dim 16 --eval-episodes 1 --total-timesteps 50 "
    if script in ON_POLICY:
        words += " --num-envs 1 --num-steps 10 --num-minibatches 2 --update-epochs 2"
    else:
        words += " --learning-starts 20 --batch-size 16 --buffer-size 1000"
    if "critic_dim" in fields:
        words += " --critic-dim 16"
    if "diffusion_steps" in fields:
        words += " --diffusion-steps 3"

    def command(chosen):
        flags = []
        for name, values in chosen.items():
            flag = name.replace("_", "-")
            if values in (["True"], ["False"]):
                flags.append(f"--{flag}" if values == ["True"] else f"--no-{flag}")
            else:
                flags += [f"--{flag}", *values]
        return [*words.split(), *flags]

    return (
        st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)
        .flatmap(
            lambda names: st.fixed_dictionaries({name: flag_values(fields[name]) for name in names})
        )
        .map(command)
    )


def check(script, flags):
    """Run one command in an empty folder; return whether it was accepted."""
    error = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stderr(error),
        contextlib.redirect_stdout(io.StringIO()),
        pytest.MonkeyPatch.context() as monkeypatch,
        warnings.catch_warnings(action="ignore"),
    ):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        code = run_script(monkeypatch, script, *flags)
        checkpoints = list(Path(folder).glob("runs/*/checkpoint.pt"))
        if code == 0:
            (path,) = checkpoints
            checkpoint = torch.load(path, weights_only=True)
            assert checkpoint["global_step"] >= STEPS
            parts = [checkpoint.get(part, {}) for part in ("actor", "qf", "critic")]
            assert all(x.isfinite().all() for part in parts for x in part.values())
            args = script.Args(**checkpoint["args"])
            off_policy = "q_optimizer" in checkpoint
            due = args.utd * (STEPS - max(args.learning_starts, args.num_envs)) if off_policy else 1
            optimizer = checkpoint["q_optimizer" if off_policy else "optimizer"]
            assert optimizer["state"] or due < 2  # gradient steps were taken
        else:
            assert code == 2, (code, error.getvalue())
            lines = [
                line
                for line in error.getvalue().splitlines()
                if "error: " in line or "Error parsing" in line
            ]
            assert len(lines) == 1 and "Traceback" not in error.getvalue()
            assert not Path(folder, "runs").exists()
    return code == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_flags_are_accepted_or_refused(script, examples):
    accepted = []

    @settings(
        max_examples=examples,
        derandomize=examples <= 20,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(commands(script))
    def run(flags):
        accepted.append(check(script, flags))

    run()
    print(f"{script.__name__}: {sum(accepted)} of {len(accepted)} accepted")
    assert 0.1 < np.mean(accepted) < 0.9  # both kinds were tried


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_away_from_its_default(script):
    """All at once: what no random choice of three may meet."""
    flags = ["--env-id", "Short-v0", "--device", "cpu", "--total-timesteps", "50"]
    for field in dataclasses.fields(script.Args):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name in FIXED or (field.name == "bf16" and script in ON_POLICY):
            continue
        if bool in kinds(field):
            flags.append(f"--no-{flag[2:]}" if field.default else flag)
        elif typing.get_origin(field.type) is typing.Literal:
            flags += [flag, next(x for x in typing.get_args(field.type) if x != field.default)]
        elif field.name in ("v_min", "target_entropy"):
            flags += [flag, "-3"]
        else:
            large = int in kinds(field) or field.name == "alpha_anneal"
            flags += [flag, "0.002" if is_rate(field) else "2" if large else "0.5"]
    assert check(script, flags)
