"""tools/plot.py: what a run logged arrives unchanged in csv, table and figure. tools/enjoy.py: returns of a policy."""

import json
import os
import subprocess
import time

import numpy as np
import pytest
import torch

import sac_continuous
from tests.common import SCRIPTS, make_actor, make_args, randomise, run_script, save_policy
from tools import enjoy, plot

FLAGS = "--env-id Pendulum-v1 --total-timesteps 60 --learning-starts 40 --hidden-dim 16 --eval-episodes 2".split()


def test_export_table_and_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        flags = [*FLAGS, "--eval-frequency", 30, "--seed", seed]
        assert run_script(monkeypatch, sac_continuous, *flags) == 0
    plot.export(sorted(tmp_path.glob("runs/*")), to=tmp_path / "results")
    files = sorted(tmp_path.glob("results/Pendulum-v1/*.csv"))
    assert [path.name for path in files] == ["sac_continuous__1.csv", "sac_continuous__2.csv"]
    runs = [plot.read_csv(path) for path in files]
    for run, run_dir in zip(runs, sorted(tmp_path.glob("runs/*")), strict=True):
        assert (
            run.facts["env_id"] == "Pendulum-v1" and "--total-timesteps 60" in run.facts["command"]
        )
        assert {"torch", "gymnasium", "mujoco", "numpy", "python", "commit"} <= run.facts.keys()
        logged = plot.read_events(run_dir).curves["eval/episodic_return"]
        assert [step for step, _ in logged] == [30, 60]
        np.testing.assert_allclose(run.curves["eval/episodic_return"], logged, rtol=1e-6)
    capsys.readouterr()
    plot.table(files)
    final = np.array([run.curves["eval/episodic_return"][-1][1] for run in runs])
    assert (
        f"| Pendulum-v1 | sac | 1, 2 | 60 | {final.mean():.1f} ± {final.std():.1f} |"
        in capsys.readouterr().out
    )
    plot.figure(files, to=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_exported_commit_is_the_one_of_the_runs_start(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    clock = int(time.time())

    def git(*words, at=clock):
        stamp = {"GIT_AUTHOR_DATE": f"{at} +0200", "GIT_COMMITTER_DATE": f"{at} +0200"}
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", *words]
        return subprocess.run(
            command, env=os.environ | stamp, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    commits = []
    for at in (clock - 200, clock - 100, clock + 100):  # the last one after the run
        git("commit", "-q", "--allow-empty", "-m", "x", at=at)
        commits.append(git("rev-parse", "HEAD"))
    assert run_script(monkeypatch, sac_continuous, *FLAGS) == 0
    assert plot.read_events(next(tmp_path.glob("runs/*"))).facts["commit"] == commits[1]


def test_export_thins_curves_to_one_value_in_an_interval(monkeypatch, tmp_path):
    steps = [2048 * i for i in range(1, 16)]  # as an on-policy run logs
    curves = {
        name: [(step, 0.5 * step) for step in steps]
        for name in ("eval/episodic_return", "losses/alpha")
    }
    facts = {"env_id": "Some-v0", "exp_name": "ppo", "seed": "3"}
    monkeypatch.setattr(plot, "read_events", lambda _: plot.Run(dict(facts), curves))
    plot.export([tmp_path], to=tmp_path / "results", every=10_000)
    run = plot.read_csv(tmp_path / "results" / "Some-v0" / "ppo__3.csv")
    assert [step for step, _ in run.curves["losses/alpha"]] == [8192, 18432, 28672, 30720]
    assert [step for step, _ in run.curves["eval/episodic_return"]] == steps


def test_export_does_not_replace_runs_with_other_arguments(monkeypatch, tmp_path):
    facts = {"env_id": "Some-v0", "exp_name": "ppo", "seed": "3", "commit": "a"}
    curves = {"eval/episodic_return": [(10, 1.0)]}
    for steps, commit in (("2", "a"), ("2", "b"), ("4", "b")):
        run = plot.Run(facts | {"diffusion_steps": steps, "commit": commit}, curves)
        monkeypatch.setattr(plot, "read_events", lambda _, run=run: run)
        plot.export([tmp_path], to=tmp_path / "sweep", distinguish=("diffusion_steps",))
        if steps == "2":  # another commit is a run made again
            plot.export([tmp_path], to=tmp_path / "results")
        else:
            with pytest.raises(
                SystemExit, match="other diffusion_steps: delete it, or use --distinguish"
            ):
                plot.export([tmp_path], to=tmp_path / "results")
    names = [path.name for path in sorted(tmp_path.glob("sweep/Some-v0/*.csv"))]
    assert names == ["ppo__diffusion_steps-2__3.csv", "ppo__diffusion_steps-4__3.csv"]
    assert plot.read_csv(tmp_path / "results/Some-v0/ppo__3.csv").facts["diffusion_steps"] == "2"


def a_run(tmp_path, name, seed, values, speed=60.0, **facts):
    """A csv with evaluations after 600, 1200, ... steps, at `speed` steps per second: 10 seconds apart by default."""
    steps = [600 * (i + 1) for i in range(len(values))]
    curves = {"eval/episodic_return": list(zip(steps, values, strict=True))}
    curves["charts/SPS"] = [(step, speed) for step in steps]
    facts = {"env_id": "Some-v0", "exp_name": name, "seed": str(seed)} | {
        k: str(v) for k, v in facts.items()
    }
    path = tmp_path / f"{name}__{seed}__{len(list(tmp_path.glob('*.csv')))}.csv"
    plot.write_csv(plot.Run(facts, curves), path)
    return path


def test_interquartile_mean_and_its_interval():
    values = np.array([[0.0], [1.0], [2.0], [100.0]])
    centre, low, high = plot.summary(values, "iqm")
    assert centre[0] == 1.5 and 0 <= low[0] < 1.5 < high[0] <= 100
    assert plot.summary(np.full((4, 3), 7.0), "iqm")[1].tolist() == [7.0] * 3
    mean, low, high = plot.summary(values, "mean")
    assert mean[0] == 25.75 and high[0] - mean[0] == pytest.approx(values.std()) == mean[0] - low[0]


def test_time_to_return(tmp_path):
    run = plot.read_csv(a_run(tmp_path, "sac_continuous", 1, [10.0, 50.0, 40.0, 80.0], speed=30.0))
    minutes = plot.times_to(run, [5.0, 50.0, 60.0, 90.0], "eval/episodic_return")
    np.testing.assert_allclose(minutes, [20 / 60, 40 / 60, 80 / 60, np.inf])


def test_figures_of_all_kinds(tmp_path, monkeypatch):
    files = [
        a_run(tmp_path, "diffsac_continuous", s, [1.0, 2.0 * k + s], diffusion_steps=k)
        for k in (1, 4)
        for s in (1, 2)
    ]
    drawn = []
    monkeypatch.setattr(plot, "save", lambda fig, to: drawn.append(fig))
    plot.ablation(files, to=tmp_path / "k.png")
    bars = drawn[-1].axes[0].containers[0]
    np.testing.assert_allclose(bars[0].get_xydata(), [[1, 3.5], [4, 9.5]])
    files = [
        a_run(tmp_path, "sac_continuous", 1, [1.0, 9.0]),
        a_run(tmp_path, "diffsac_continuous", 1, [1.0, 9.0], speed=30.0),
    ]
    plot.reach(files, to=tmp_path / "time.png", levels=2)
    lines = {line.get_label(): line.get_xydata() for line in drawn[-1].axes[0].lines}
    np.testing.assert_allclose(lines["sac (1 seed)"], [[10 / 60, 1], [20 / 60, 9]])
    np.testing.assert_allclose(lines["diffsac (1 seed)"], [[20 / 60, 1], [40 / 60, 9]])
    plot.figure(files, to=tmp_path / "iqm.png", stat="iqm")
    assert len(drawn[-1].axes[0].lines) == 4
    for draw in (plot.ablation, plot.reach):
        with pytest.raises(SystemExit, match="none of the files"):
            draw([], to=tmp_path / "none.png")


def test_runs_that_do_not_belong_in_one_curve_are_refused(tmp_path):
    other = [
        a_run(tmp_path, "diffsac_continuous", 1, [1.0, 2.0], diffusion_steps=k) for k in (1, 4)
    ]
    apart = [a_run(tmp_path, "sac_continuous", seed, [1.0, 2.0]) for seed in (1, 2)]
    apart[1].write_text(
        apart[1].read_text().replace("\n600,", "\n601,").replace("\n1200,", "\n1201,")
    )
    for draw in (plot.table, lambda files: plot.figure(files, to=tmp_path / "figure.png")):
        with pytest.raises(SystemExit, match="another run of diffsac_continuous with seed 1"):
            draw(other)
    with pytest.raises(SystemExit, match="no steps of eval/episodic_return in common"):
        plot.figure(apart, to=tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_a_metric_that_no_file_has_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        plot.figure([], to=tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_enjoy_evaluates_a_checkpoint_of_any_script(script, monkeypatch, tmp_path, capsys):
    """The scripted environment pays 1 + 2 + 3 + 4 + 5 in its first episode, whatever the policy does."""
    monkeypatch.chdir(tmp_path)
    args = make_args(script, env_id="tests.scripted_env:Scripted-v0", hidden_dim=16)
    actor = script.Actor(2, 1, args)
    save_policy(script, tmp_path / "checkpoint.pt", args, actor, global_step=7, obs_dim=2)
    for mean_action in (False, True):
        enjoy.main(enjoy.Args(tmp_path / "checkpoint.pt", episodes=1, mean_action=mean_action))
        out = json.loads(capsys.readouterr().out)
        assert (out["mean_return"], out["lengths"], out["global_step"]) == (15.0, [5], 7)
        assert out["mean_action"] is mean_action


def test_enjoy_acts_with_the_policy_of_the_checkpoint(monkeypatch, tmp_path, capsys):
    """An environment that pays the action, 20 times: the mean action of a known actor."""
    monkeypatch.chdir(tmp_path)
    actor = make_actor(sac_continuous, 1, hidden_dim=16)
    randomise(actor, 0.0)
    with torch.no_grad():
        actor.fc_mean.weight.zero_()
        actor.fc_mean.bias.fill_(0.5)
    args = sac_continuous.Args(env_id="tests.scripted_env:PaysTheAction-v0", hidden_dim=16)
    save_policy(sac_continuous, tmp_path / "checkpoint.pt", args, actor, obs_dim=1)
    enjoy.main(enjoy.Args(tmp_path / "checkpoint.pt", episodes=2, mean_action=True))
    assert json.loads(capsys.readouterr().out)["returns"] == pytest.approx(
        [20 * np.tanh(0.5)] * 2, rel=1e-5
    )
    (tmp_path / "garbage.pt").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="no checkpoint"):
        enjoy.main(enjoy.Args(tmp_path / "garbage.pt"))
