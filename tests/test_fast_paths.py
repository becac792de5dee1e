"""--compile, --bf16 and --cuda-graph against the plain update."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sac_continuous as sac
from tests.common import (
    CATEGORICAL,
    OFF_POLICY,
    ON_POLICY,
    SCRIPTS,
    equal,
    load,
    make_actor,
    make_args,
    over,
    run_args,
    run_dirs,
    run_script,
)


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
    find_spec = importlib.util.find_spec
    found = lambda name, *rest: name == "tensordict" or find_spec(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(script, "fail", lambda message: None)
    adam = torch.optim.Adam
    monkeypatch.setattr(
        torch.optim, "Adam", lambda *a, **kw: adam(*a, **(kw | {"capturable": False}))
    )
    script.main(run_args(script, total_timesteps=50, cuda_graph=True))
    act = "act" if script in ON_POLICY else "sample"
    assert guarded.count("update") >= 10 and guarded.count(act) >= 10


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


needs_bf16 = pytest.mark.skipif(not sac.has_bf16("cpu"), reason="needs bfloat16 instructions")


def test_compiled_update_is_the_eager_one(script, small, monkeypatch, tmp_path):
    """torch.compile with a backend that keeps eager's kernels and random numbers."""
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
@over(OFF_POLICY)
def test_bf16_changes_products_alone(script, small, monkeypatch, tmp_path):
    """Weights stay float32 and near those without it; equal seeds stay equal to the bit."""
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 60, *small]
    for more in ([], ["--bf16"], ["--bf16"]):
        assert run_script(monkeypatch, script, *flags, *more) == 0
    runs = sorted(run_dirs(tmp_path), key=os.path.getmtime)
    exact, first, second = (load(run_dir) for run_dir in runs)
    assert equal(first, second)
    for network in ("actor", "qf"):
        for name, value in first[network].items():
            torch.testing.assert_close(value, exact[network][name], rtol=0, atol=0.02)
        assert any(
            not torch.equal(value, exact[network][name]) for name, value in first[network].items()
        )


@needs_bf16
@over(OFF_POLICY)
def test_bf16_leaves_what_comes_out_of_networks_in_float32(script):
    actor, obs = make_actor(script), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        values = list(actor.sample(obs))
        values.append(script.SoftQNetwork(3, 1, make_args(script))(obs, values[0]))
    assert [value.dtype for value in values] == [torch.float32] * len(values)


def test_bf16_is_refused_without_its_instructions(script, monkeypatch, tmp_path, capsys):
    read_text = Path.read_text
    flags = lambda path: "flags : sse avx2" if "cpuinfo" in str(path) else read_text(path)
    monkeypatch.setattr(Path, "read_text", flags)
    assert run_script(monkeypatch, script, "--bf16", "--device", "cpu") == 2
    reason = "--bf16 is for off-policy scripts" if script in ON_POLICY else "--bf16 needs"
    assert reason in capsys.readouterr().err and not run_dirs(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_captured_update_is_the_eager_one(script, small, monkeypatch, tmp_path):
    flags = ["--env-id", "Pendulum-v1", *small, "--device", "cuda"]
    flags += ["--total-timesteps", 60 if script in ON_POLICY else 52]
    for more in ([], ["--cuda-graph"]):
        assert run_script(monkeypatch, script, *flags, *more) == 0
    first, second = (load(run_dir) for run_dir in sorted(run_dirs(tmp_path), key=os.path.getmtime))
    for name, value in first["actor"].items():
        torch.testing.assert_close(second["actor"][name], value)
