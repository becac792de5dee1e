"""Shared by the tests: small networks, reading runs, and running a script as its user would."""

import math
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import crossq_continuous
import diffppo_continuous
import diffsac_continuous
import diffwpo_continuous
import dime
import ppo_continuous
import sac_continuous
import wpo_continuous

ROOT = Path(__file__).resolve().parent.parent
WASSERSTEIN = [wpo_continuous, diffwpo_continuous]
STEPWISE = [diffsac_continuous, diffwpo_continuous]  # with a critic of the latents
TWINS = [sac_continuous, diffsac_continuous, *WASSERSTEIN]  # with SAC's critics
CATEGORICAL = [crossq_continuous, dime]
OFF_POLICY = [*TWINS, *CATEGORICAL]
ON_POLICY = [ppo_continuous, diffppo_continuous]
SCRIPTS = OFF_POLICY + ON_POLICY


def small_flags(script):
    """Flags of a run of some seconds."""
    words = "--hidden-dim 16 --eval-episodes 2 --device cpu"
    if script in ON_POLICY:
        words += " --num-envs 2 --num-steps 10 --num-minibatches 2 --update-epochs 2"
    else:
        words += " --batch-size 16 --learning-starts 40"
    if script in CATEGORICAL:
        words += " --critic-dim 16"
    if script is dime:
        words += " --diffusion-steps 3"
    return words.split()


SMALL = (
    "--hidden-dim 16 --eval-episodes 2 --device cpu --batch-size 16 --learning-starts 40".split()
)
PENDULUM = ["--env-id", "Pendulum-v1", *SMALL]
SIZES = {"hidden_dim": 16, "batch_size": 16, "eval_episodes": 1, "learning_starts": 40}
SIZES["device"] = "cpu"


def run_flags(script):
    """Flags of a run of some seconds with a checkpoint every 20 steps."""
    words = "--hidden-dim 16 --eval-episodes 1 --eval-frequency 0 --device cpu"
    words += " --checkpoint-frequency 20"
    if script in ON_POLICY:
        words += " --num-envs 2 --num-steps 10 --num-minibatches 2 --update-epochs 1"
    else:
        words += " --batch-size 16 --learning-starts 40"
    if "diff" in script.__name__ or script is dime:
        words += " --diffusion-steps 2"
    return [*words.split(), *(["--critic-dim", "16"] if script in CATEGORICAL else [])]


def over(scripts):
    """A test over these scripts."""
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


def run_args(script, **flags):
    """`Args` of a run of some seconds in one environment."""
    words = [*small_flags(script), "--num-envs", "1", "--eval-episodes", "1"]
    args = script.tyro.cli(script.Args, args=words)
    vars(args).update({"env_id": "Pendulum-v1"} | flags)
    return args


def run_main(script, **flags):
    """A short run of `main` in this process."""
    args = script.tyro.cli(script.Args, args=["--env-id", "Pendulum-v1", *small_flags(script)])
    vars(args).update(flags)
    script.main(args)


def make_args(script, **flags):
    """`Args` of small networks."""
    return script.Args(**({"critic_dim": 16} if script in CATEGORICAL else {}) | flags)


def make_actor(script, obs_dim=3, action_dim=1, **flags):
    return script.Actor(obs_dim, action_dim, make_args(script, **flags))


def save_policy(script, path, args, actor, global_step=0, obs_dim=3):
    """Write a checkpoint that holds an actor of one action dimension, as tools/ need it."""
    bounds = {"action_low": [-1.0], "action_high": [1.0]}
    state = bounds | {"script": script.__name__, "args": asdict(args), "global_step": global_step}
    parts = {"actor": actor, "obs_rms": script.RunningMeanStd(obs_dim, args.normalize_obs)}
    torch.save(state | {name: part.state_dict() for name, part in parts.items()}, path)


def run_dirs(tmp_path):
    return sorted((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else []


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def words(capsys):
    """What a run printed; no traceback is in it."""
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    return out, error


def sentence(capsys):
    """The one line on stderr that says what is wrong."""
    (line,) = [line for line in words(capsys)[1].splitlines() if line.startswith("error: ")]
    return line


def scalars(run_dir, name):
    """(step, value) of a TensorBoard curve, in order."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def flatten(value):
    """All values of a checkpoint but its arguments and learning rates, in order."""
    if isinstance(value, dict):
        return [x for key in value if key not in ("args", "lr") for x in flatten(value[key])]
    if isinstance(value, list | tuple):
        return [x for item in value for x in flatten(item)]
    return [value]


def equal(first, second):
    """Whether two checkpoints hold the same values, to the bit."""
    pairs = list(zip(flatten(first), flatten(second), strict=True))
    assert len(pairs) > 20
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def randomise(actor, scale=0.3):
    """Move all weights of an actor away from their special initial values."""
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def pathwise_loss(actor, qf, obs, alpha):
    """SAC's actor loss of any actor, and log_prob."""
    action, log_prob = actor.sample(obs)
    return (alpha * log_prob - qf(obs, action).amin(0)).mean(), log_prob


def set_delta(script, actor, delta):
    """Give a diffusion actor the coefficients delta, a list with step k at k - 1."""
    share = (torch.tensor(delta) - script.DELTA_MIN) / (script.DELTA_MAX - script.DELTA_MIN)
    with torch.no_grad():
        actor.delta_logit.copy_(torch.logit(share)[:, None])


def gauss_hermite(dimensions, points=3):
    """Nodes (points**dimensions, dimensions) and weights of a mean over N(0, I).

    Exact to degree 2 points - 1.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    grid = np.stack(np.meshgrid(*[nodes] * dimensions, indexing="ij"), axis=-1).reshape(
        -1, dimensions
    )
    weight_grid = np.stack(
        np.meshgrid(*[weights / weights.sum()] * dimensions, indexing="ij"), axis=-1
    )
    return torch.from_numpy(grid), torch.from_numpy(
        weight_grid.reshape(-1, dimensions).prod(axis=1)
    )


def log_normal(x, mean, std):
    """Log-density of independent normals, summed over the last axis."""
    return (
        -0.5 * ((x - mean) / std) ** 2
        - torch.log(std * torch.ones_like(x))
        - 0.5 * math.log(2 * math.pi)
    ).sum(-1)


def run_script(monkeypatch, script, *flags):
    """Run `python script.py flags...` in this process and folder; return its exit code."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script.__name__}.py"), *map(str, flags)])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    return 0
