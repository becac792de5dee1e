"""tools/plot.py: what a run logged arrives unchanged in csv, table and figure."""

import numpy as np
import pytest

import sac_continuous
from tests.common import run_script
from tools import plot

FLAGS = "--env-id Pendulum-v1 --total-timesteps 60 --learning-starts 40 --hidden-dim 16 --eval-episodes 2".split()


def test_export_table_and_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        flags = [*FLAGS, "--eval-frequency", 30, "--no-progress", "--seed", seed]
        assert run_script(monkeypatch, sac_continuous, *flags) == 0
    plot.export(sorted(tmp_path.glob("runs/*")), to=tmp_path / "results")
    files = sorted(tmp_path.glob("results/Pendulum-v1/*.csv"))
    assert [path.name for path in files] == ["sac_continuous__1.csv", "sac_continuous__2.csv"]
    runs = [plot.read_csv(path) for path in files]
    for run, run_dir in zip(runs, sorted(tmp_path.glob("runs/*")), strict=True):
        assert run.facts["env_id"] == "Pendulum-v1" and "--total-timesteps 60" in run.facts["command"]
        assert {"torch", "gymnasium", "mujoco", "numpy", "python", "commit"} <= run.facts.keys()
        logged = plot.read_events(run_dir).curves["eval/episodic_return"]
        assert [step for step, _ in logged] == [30, 60]
        np.testing.assert_allclose(run.curves["eval/episodic_return"], logged, rtol=1e-6)
    capsys.readouterr()
    plot.table(files)
    final = np.array([run.curves["eval/episodic_return"][-1][1] for run in runs])
    assert f"| Pendulum-v1 | sac | 1, 2 | 60 | {final.mean():.1f} ± {final.std():.1f} |" in capsys.readouterr().out
    plot.figure(files, to=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_export_thins_curves_to_one_value_in_an_interval(monkeypatch, tmp_path):
    steps = [2048 * i for i in range(1, 16)]  # as an on-policy run logs
    curves = {name: [(step, 0.5 * step) for step in steps] for name in ("eval/episodic_return", "losses/alpha")}
    facts = {"env_id": "Some-v0", "exp_name": "ppo", "seed": "3"}
    monkeypatch.setattr(plot, "read_events", lambda _: plot.Run(dict(facts), curves))
    plot.export([tmp_path], to=tmp_path / "results", every=10_000)
    run = plot.read_csv(tmp_path / "results" / "Some-v0" / "ppo__3.csv")
    assert [step for step, _ in run.curves["losses/alpha"]] == [8192, 18432, 28672, 30720]
    assert [step for step, _ in run.curves["eval/episodic_return"]] == steps


def test_a_metric_that_no_file_has_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        plot.figure([], to=tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()
