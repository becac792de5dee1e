"""What cannot work is refused in one sentence, with exit code 2."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffsac_continuous as diffsac
import dime
import ppo_continuous
import sac_continuous as sac
from tests.common import (
    CATEGORICAL,
    ON_POLICY,
    PENDULUM,
    ROOT,
    SCRIPTS,
    STEPWISE,
    WASSERSTEIN,
    run_dirs,
    run_script,
    sentence,
    words,
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


def test_cuda_graphs_without_tensordict_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_script(monkeypatch, sac, "--cuda-graph", "--device", "cuda") == 2
    assert "pip install tensordict" in capsys.readouterr().err and not run_dirs(tmp_path)


def test_a_checkpoint_that_is_not_there_is_refused(script, monkeypatch, tmp_path, capsys):
    for path in (tmp_path / "nothing.pt", tmp_path):
        assert run_script(monkeypatch, script, "--resume", path) == 2
        assert "there is no file" in capsys.readouterr().err


def test_more_steps_than_rows_are_refused_where_each_row_has_one(monkeypatch, tmp_path):
    flags = [*PENDULUM, "--total-timesteps", 50, "--diffusion-steps", 17]
    for script in STEPWISE:
        assert run_script(monkeypatch, script, *flags) == 2 and not run_dirs(tmp_path)
    assert run_script(monkeypatch, diffsac, *flags, "--actor-gradient", "chain") == 0


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
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    assert run_script(monkeypatch, script, *flags.split(), "--total-timesteps", 10) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and sorted(tmp_path.iterdir()) == before
    sentence = [line for line in error.splitlines() if "error: " in line or "Error parsing" in line]
    assert len(sentence) == 1 and len(sentence[0]) > 25


@pytest.mark.parametrize("obstacle", ["file", "read-only"])
def test_runs_folder_that_cannot_be_made(script, obstacle, flags, monkeypatch, tmp_path, capsys):
    if obstacle == "file":
        (tmp_path / "runs").write_text("in the way")
    else:
        makedirs = os.makedirs

        def refuse(path, *arguments, **options):
            if str(path).startswith("runs"):
                raise PermissionError(13, "Permission denied")
            return makedirs(path, *arguments, **options)

        monkeypatch.setattr(os, "makedirs", refuse)
        monkeypatch.setattr(Path, "mkdir", refuse)
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--total-timesteps", 20, *flags)
        == 2
    )
    assert "cannot make the folder" in sentence(capsys)
