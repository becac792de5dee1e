"""tools/plot.py: what a run logged arrives in csv, table and figure. tools/enjoy.py: returns."""

import json
import os
import re
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
import torch

import sac_continuous
from tests.common import ROOT, SCRIPTS, make_actor, make_args, randomise, run_script, save_policy
from tools import enjoy, plot, speed

FLAGS = "--env-id Pendulum-v1 --total-timesteps 60 --learning-starts 40 --hidden-dim 16".split()
RETURN = "eval/episodic_return"


def refused(capsys, function, *arguments, **options):
    """The one sentence with which a tool refuses something."""
    with pytest.raises(SystemExit) as exit_:
        function(*arguments, **options)
    assert exit_.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if "error: " in line][-1]


def values(run, metric):
    return run.curves[run.curves.metric == metric].set_index("step").value


def test_export_table_and_figure(monkeypatch, tmp_path, capsys):
    for seed in (1, 2):
        flags = [*FLAGS, "--eval-episodes", 2, "--eval-frequency", 30, "--seed", seed]
        assert run_script(monkeypatch, sac_continuous, *flags) == 0
    folders = sorted(tmp_path.glob("runs/*"))
    (tmp_path / "runs" / "benchmark").mkdir()  # no run, and no obstacle either
    plot.export([tmp_path / "runs" / "benchmark", *folders], to=tmp_path / "results")
    assert "runs/benchmark is no run" in capsys.readouterr().err
    files = sorted(tmp_path.glob("results/Pendulum-v1/*.csv"))
    assert [path.name for path in files] == ["sac_continuous__1.csv", "sac_continuous__2.csv"]
    for path, folder in zip(files, folders, strict=True):
        run, logged = plot.read_csv(path), plot.read_events(folder)
        assert run.facts == logged.facts and "--total-timesteps 60" in run.facts["command"]
        assert {"torch", "gymnasium", "mujoco", "numpy", "python", "commit"} <= run.facts.keys()
        curve = values(run, RETURN)
        assert list(curve.index) == [30, 60]
        np.testing.assert_allclose(curve, values(logged, RETURN), rtol=1e-6)
    final = np.array([values(plot.read_csv(path), RETURN)[60] for path in files])
    row = f"| Pendulum-v1 | sac | 1, 2 | 60 | {final.mean():.1f} ± {final.std():.1f} |"
    for paths in (files, folders):
        plot.table(paths)
        assert row in capsys.readouterr().out
        plot.figure(paths, to=tmp_path / "figures")
        picture = tmp_path / "figures" / "Pendulum-v1.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()


def test_an_empty_argument_of_a_run_is_exported(monkeypatch, tmp_path):
    assert run_script(monkeypatch, sac_continuous, *FLAGS, "--exp-name", "") == 0
    plot.export(sorted(tmp_path.glob("runs/*")), to=tmp_path / "results")
    assert plot.read_csv(next(tmp_path.glob("results/*/*.csv"))).facts["exp_name"] == ""


def test_exported_commit_is_the_one_of_the_runs_start(monkeypatch, tmp_path):
    clock = int(time.time())

    def git(*words, at=clock):
        stamp = {"GIT_AUTHOR_DATE": f"{at} +0200", "GIT_COMMITTER_DATE": f"{at} +0200"}
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", *words]
        environment = os.environ | stamp
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    commits = []
    for at in (clock - 200, clock - 100, clock + 100):  # the last one after the run
        git("commit", "-q", "--allow-empty", "-m", "x", at=at)
        commits.append(git("rev-parse", "HEAD"))
    assert run_script(monkeypatch, sac_continuous, *FLAGS) == 0
    folder = next(tmp_path.glob("runs/*"))
    assert plot.read_events(folder).facts["commit"] == commits[1]
    git("init", "-q", "later")
    git("-C", "later", "commit", "-q", "--allow-empty", "-m", "x", at=clock + 100)
    copy = shutil.copytree(folder, tmp_path / "later" / "run")
    assert plot.read_events(copy).facts["commit"] == "unknown"  # the clone is younger than the run


def make_run(curves, **facts):
    """A `Run` from {metric: [(step, value), ...]}."""
    rows = [(step, name, value) for name, curve in curves.items() for step, value in curve]
    facts = {"env_id": "Some-v0", "exp_name": "ppo", "seed": "3", "began": "then"} | facts
    return plot.Run(facts, pd.DataFrame(rows, columns=["step", "metric", "value"]))


def test_export_thins_curves_to_one_value_in_an_interval(monkeypatch, tmp_path):
    steps = [2048 * i for i in range(1, 16)]  # as an on-policy run logs
    run = make_run({name: [(s, 0.5 * s) for s in steps] for name in (RETURN, "losses/alpha")})
    monkeypatch.setattr(plot, "read_events", lambda _: run)
    plot.export([tmp_path], to=tmp_path / "results", every=10_000)
    run = plot.read_csv(tmp_path / "results" / "Some-v0" / "ppo__3.csv")
    assert list(values(run, "losses/alpha").index) == [8192, 18432, 28672, 30720]
    assert list(values(run, RETURN).index) == steps


def test_export_replaces_no_other_run(monkeypatch, tmp_path, capsys):
    """A run that has gone on replaces itself; another one is refused, and nothing is lost."""
    for began, steps in (("then", "2"), ("then", "2"), ("later", "4")):
        run = make_run({RETURN: [(10, float(steps))]}, began=began, diffusion_steps=steps)
        monkeypatch.setattr(plot, "read_events", lambda _, run=run: run)
        plot.export([tmp_path], to=tmp_path / "sweep", distinguish=("diffusion-steps",))
        if began == "then":
            plot.export([tmp_path], to=tmp_path / "results")
        else:
            error = refused(capsys, plot.export, [tmp_path], to=tmp_path / "results")
            assert "ppo__3.csv is of another run" in error
    twice = lambda: plot.export([tmp_path, tmp_path], to=tmp_path / "twice", replace=True)
    assert "two runs would be" in refused(capsys, twice)
    draw = lambda: plot.export([tmp_path], to=tmp_path / "sweep", distinguish=("nothing",))
    assert "none of the runs has an argument nothing" in refused(capsys, draw)
    names = [path.name for path in sorted(tmp_path.glob("sweep/Some-v0/*.csv"))]
    assert names == ["ppo__diffusion_steps-2__3.csv", "ppo__diffusion_steps-4__3.csv"]
    path = tmp_path / "results/Some-v0/ppo__3.csv"
    assert plot.read_csv(path).facts["diffusion_steps"] == "2"
    plot.export([tmp_path], to=tmp_path / "results", replace=True)
    assert plot.read_csv(path).facts["diffusion_steps"] == "4"


def a_run(tmp_path, name, seed, returns, first=600, every=600, **facts):
    """A csv with evaluations after 600, 1200, ... steps."""
    curve = [(first + every * i, value) for i, value in enumerate(returns)]
    facts = {key: str(value) for key, value in facts.items()}
    run = make_run({RETURN: curve}, exp_name=name, seed=str(seed), **facts)
    path = tmp_path / f"{name}__{seed}__{len(list(tmp_path.glob('*.csv')))}.csv"
    plot.write_csv(run, path)
    return path


def test_interquartile_mean_and_its_interval():
    centre, low, high = plot.summary(np.array([[0.0, 1.0, 2.0, 100.0]]), "iqm")
    assert centre[0] == 1.5 and 0 <= low[0] < 1.5 < high[0] <= 100
    assert plot.summary(np.full((3, 1), 7.0), "iqm")[1].tolist() == [7.0] * 3
    mean, low, high = plot.summary(np.array([[0.0, 1.0, 2.0, 100.0]]), "mean")
    std = np.std([0, 1, 2, 100])
    assert mean[0] == 25.75 and high[0] - mean[0] == pytest.approx(std) == mean[0] - low[0]


def test_figures_of_both_kinds(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    name = "diffsac_continuous"
    sweep = [(k, s) for k in (1, 4) for s in (1, 2)]
    files = [a_run(tmp_path, name, s, [1.0, 2.0 * k + s], diffusion_steps=k) for k, s in sweep]
    plot.figure(files, to=tmp_path, against="diffusion_steps")
    bars = drawn[-1].axes[0].containers[0]
    np.testing.assert_allclose(bars[0].get_xydata(), [[1, 3.5], [4, 9.5]])
    # residuals of 0.5, two degrees of freedom: a standard error of 0.35, t = 4.30
    assert (
        "diffsac on Some-v0: +3 [+1, +5] when diffusion_steps doubles (4 runs)"
        in capsys.readouterr().out
    )
    negative = [a_run(tmp_path, name, 1, [1.0], target_entropy=x) for x in (-3.0, -6.0)]
    plot.figure(negative, to=tmp_path, against="target_entropy")
    assert [drawing.axes[0].get_xscale() for drawing in drawn] == ["log", "linear"]
    files = [a_run(tmp_path, "sac_continuous", seed, [1.0, 8.0 + seed]) for seed in (1, 2)]
    plot.figure(files, to=tmp_path)
    curve, *thin = drawn[-1].axes[0].lines
    assert curve.get_label() == "sac (2 seeds)" and len(thin) == 2
    np.testing.assert_allclose(curve.get_xydata(), [[600, 1], [1200, 9.5]])
    plot.figure(files, to=tmp_path, stat="iqm")
    assert len(drawn) == 4


def test_gain_over_the_twin(tmp_path, capsys):
    """Values of the last common step; a tie counts half; no interval of a single seed."""
    files = [a_run(tmp_path, "sac_continuous", s, [0.0, x, 99.0]) for s, x in enumerate((1, 3, 4))]
    files += [a_run(tmp_path, "diffsac_continuous", s, [0.0, x]) for s, x in enumerate((2, 4))]
    files += [a_run(tmp_path, "diffsac_chain", 1, [0.0, 9.0]), a_run(tmp_path, "ppo", 1, [0.0])]
    plot.compare(files)
    both, alone = capsys.readouterr().out.splitlines()[2:]
    assert alone == "| Some-v0 | sac → diffsac_chain | 1,200 | 3, 1 | +6 | 1.00 |"
    # Welch: variances 7/9 and 1 of the means, 2.43 degrees of freedom, t = 3.66
    assert both.startswith("| Some-v0 | sac → diffsac | 1,200 | 3, 2 | +0 [-5, +5] | ")
    low, high = map(float, both.split("0.58 [")[1].rstrip("] |").split(", "))
    assert 0 <= low < 3.5 / 6 < high <= 1


def test_training_episodes_are_compared_by_their_means(tmp_path, capsys):
    """Episodes end at other steps in every run; those after the last whole window do not count."""
    files = []
    returns = {("sac", 1): 1.0, ("sac", 2): 3.0, ("diffsac", 1): 7.0, ("diffsac", 2): 9.0}
    for (name, seed), x in returns.items():
        episodes = [(seed, 50.0), (100 + seed, x - 1), (200, x + 1), (201, 99.0)]
        run = make_run({"charts/episodic_return": episodes}, exp_name=name, seed=str(seed))
        files.append(tmp_path / f"{name}_{seed}.csv")
        plot.write_csv(run, files[-1])
    plot.compare(files, metric="charts/episodic_return", window=100)
    assert "| sac → diffsac | 200 | 2, 2 | +6 [-0, +12] | 1.00" in capsys.readouterr().out
    draw = lambda: plot.figure(files, to=tmp_path, over="hours", window=100)
    assert "--window needs" in refused(capsys, draw)


def test_figure_over_hours_and_published_points(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    files = []
    for seed, pace in ((1, 2.0), (2, 0.5)):  # 600 steps take 300 and 1200 seconds
        curve = {RETURN: [(600, 1.0), (1200, 2.0)]}
        curve["charts/SPS"] = [(300, pace), (600, pace), (1200, pace)]
        files.append(tmp_path / f"{seed}.csv")
        plot.write_csv(make_run(curve, seed=str(seed)), files[-1])
    resumed = make_run(curve | {RETURN: [(600, 90.0), (1200, 90.0)]}, seed="3", resume="a file")
    files.append(tmp_path / "resumed.csv")
    plot.write_csv(resumed, files[-1])
    resumed.facts["env_id"] = "Other-v0"
    plot.write_csv(resumed, tmp_path / "other.csv")
    plot.figure([*files, tmp_path / "other.csv"], to=tmp_path, over="hours")
    assert not (tmp_path / "Other-v0.png").exists() and len(drawn) == 1
    line = drawn[-1].axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [(300 + 1200) / 2 / 3600, 1500 / 3600])
    assert list(line.get_ydata()) == [1, 2] and line.get_label() == "ppo (2 seeds)"
    draw = lambda: plot.figure(files[-1:], to=tmp_path, over="hours")
    assert "--over hours needs runs that were never resumed" in refused(capsys, draw)
    files.pop()
    plot.figure(files, to=tmp_path, metric="charts/SPS", over="hours")
    hours = drawn[-1].axes[0].lines[0].get_xdata()
    np.testing.assert_allclose(hours[1:], [1500 / 2 / 3600, 1500 / 3600])
    table = "# source\nenv_id,name,step,value,label\n"
    table += "Some-v0,ppo,900,7,theirs\nOther-v0,ppo,900,8,no\nSome-v0,sac,900,9,no\n"
    (tmp_path / "published.csv").write_text(table)
    plot.figure(files, to=tmp_path, published=tmp_path / "published.csv")
    for flags in ({"over": "hours"}, {"against": "gamma"}):
        refused(capsys, plot.figure, files, published=tmp_path / "published.csv", **flags)
    points = [line for line in drawn[-1].axes[0].lines if line.get_marker() == "x"]
    assert [(line.get_label(), *line.get_xydata()[0]) for line in points] == [("theirs", 900, 7)]


def test_a_seed_that_ends_early_is_named(tmp_path, capsys):
    files = [a_run(tmp_path, "sac", seed, [1.0] * count) for seed, count in ((1, 3), (2, 1))]
    plot.table(files)
    out, error = capsys.readouterr()
    assert "| sac | 1, 2 | 600 |" in out
    assert "ends with the shortest: seed 1 at 1,800, seed 2 at 600" in error


def test_steps_that_a_seed_lacks_are_told(tmp_path, capsys):
    plot.table([a_run(tmp_path, "sac", s, [1.0, 9.0, 2.0], every=s) for s in (600, 1200)])
    out, error = capsys.readouterr()
    assert "| 1,800 | 5.5" in out and "keeps only the 2 steps that all seeds have" in error


def test_finals_are_compared_at_one_step(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    sizes = ((1, [1.0, 2.0, 3.0]), (4, [5.0, 6.0]))
    files = [a_run(tmp_path, "diffsac", 1, returns, diffusion_steps=k) for k, returns in sizes]
    plot.figure(files, to=tmp_path, against="diffusion_steps")
    assert list(drawn[-1].axes[0].lines[0].get_ydata()) == [2, 6]
    assert "diffsac at step 1,200" in capsys.readouterr().err
    draw = lambda: plot.figure(files, to=tmp_path, against="diffusion_steps", distinguish=("seed",))
    assert "leave out --distinguish" in refused(capsys, draw)


@pytest.mark.parametrize("schedule", [{}, {"anneal_lr": "True"}, {"alpha_anneal": "10.0"}])
def test_totals_matter_where_a_schedule_follows_them(schedule, tmp_path, capsys):
    facts = [{"total_timesteps": total} | schedule for total in (1200, 2400)]
    plot.table([a_run(tmp_path, "ppo", seed, [1.0], **fact) for seed, fact in enumerate(facts)])
    assert ("mixes total_timesteps" in capsys.readouterr().err) is bool(schedule)


def test_seeds_with_other_arguments_are_named(tmp_path, capsys):
    """Not those that differ in the machine alone; drawn apart they are no fault."""
    facts = [{"q_lr": lr, "device": device} for lr, device in ((1e-3, "cpu"), (3e-4, "cuda"))]
    files = [a_run(tmp_path, "sac", seed, [1.0], **fact) for seed, fact in enumerate(facts)]
    plot.table(files)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: sac on ") and "mixes q_lr 0.0003, 0.001;" in warning
    plot.table(files, distinguish=("q_lr",))
    assert not capsys.readouterr().err


def test_runs_of_one_seed_are_told_apart_by_an_argument(tmp_path, capsys):
    """And one without an evaluation is left out, the others are shown."""
    files = [a_run(tmp_path, "diffsac", 1, [1.0, 2.0 * k], diffusion_steps=k) for k in (1, 4)]
    files += [a_run(tmp_path, "sac", 1, []), a_run(tmp_path, "diffsac", 1, [7.0])]
    plot.table(files, distinguish=("diffusion_steps",))
    out, error = capsys.readouterr()
    assert "| diffsac diffusion_steps=None | 1 | 600 | 7.0 |" in out
    for k in (1, 4):
        assert f"| diffsac diffusion_steps={k} | 1 | 1,200 | {2.0 * k} |" in out
    assert f"has no {RETURN}: left out" in error and "| sac" not in out


def test_runs_that_do_not_belong_in_one_curve_are_refused(tmp_path, capsys):
    other = [a_run(tmp_path, "diffsac", 1, [1.0, 2.0], diffusion_steps=k) for k in (1, 4)]
    apart = [a_run(tmp_path, "sac", seed, [1.0, 2.0], first=600 + seed) for seed in (1, 2)]
    for draw in (plot.table, lambda files: plot.figure(files, to=tmp_path)):
        assert "another run of diffsac with seed 1" in refused(capsys, draw, other)
        assert f"no steps of {RETURN} in common" in refused(capsys, draw, apart)
        assert "none of these is a run" in refused(capsys, draw, [tmp_path / "nothing"])
    assert "none of the runs has losses/alpha" in refused(
        capsys, plot.table, other[:1], "losses/alpha"
    )
    for flags in ({"against": "nothing"}, {"distinguish": ("diffusion-step",)}):
        draw = lambda flags=flags: plot.figure(other[:1], to=tmp_path, **flags)
        assert "none of the runs has an argument" in refused(capsys, draw)
    draw = lambda: plot.figure(other[:1], to=tmp_path, against="env_id")
    assert "no numeric argument env_id" in refused(capsys, draw)
    assert "there is no pair" in refused(capsys, plot.compare, other[:1])
    assert "--distinguish" not in refused(capsys, plot.compare, other)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_enjoy_evaluates_a_checkpoint_of_any_script(script, monkeypatch, tmp_path, capsys):
    """The scripted environment pays 1 + 2 + 3 + 4 + 5 in its first episode to any policy."""
    args = make_args(script, env_id="tests.scripted_env:Scripted-v0", hidden_dim=16)
    actor = script.Actor(2, 1, args)
    save_policy(script, tmp_path / "checkpoint.pt", args, actor, global_step=7, obs_dim=2)
    for mean_action in (False, True):
        enjoy.main(enjoy.Args(tmp_path / "checkpoint.pt", episodes=1, mean_action=mean_action))
        out = json.loads(capsys.readouterr().out)
        assert (out["mean_return"], out["lengths"], out["global_step"]) == (15.0, [5], 7)
        assert out["mean_action"] is mean_action


TABLE = (ROOT / "results" / "policies" / "README.md").read_text()
POLICIES = re.findall(r"^\| `(.*\.pt)` \|.*\| ([\d,]+) \|$", TABLE, re.M)


@pytest.mark.parametrize("name,median", POLICIES, ids=[row[0] for row in POLICIES])
def test_kept_policies_reproduce_their_returns(name, median, capsys):
    """The median of three episodes without noise: processors differ, and single ones end early."""
    path = ROOT / "results" / "policies" / name
    assert path.stat().st_size < 2_000_000
    enjoy.main(enjoy.Args(path, episodes=3, mean_action=True))
    found = np.median(json.loads(capsys.readouterr().out)["returns"])
    assert found == pytest.approx(float(median.replace(",", "")), rel=0.5)


def test_every_kept_policy_is_in_the_table():
    kept = {path.name for path in (ROOT / "results" / "policies").glob("*.pt")}
    assert kept == {name for name, _ in POLICIES}


def test_enjoy_acts_with_the_policy_of_the_checkpoint(monkeypatch, tmp_path, capsys):
    """An environment that pays the action, 20 times: the mean action of a known actor."""
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
    assert "no checkpoint" in refused(capsys, enjoy.main, enjoy.Args(tmp_path / "garbage.pt"))
    path = tmp_path / "checkpoint.pt"
    for flags in (
        {"env_id": "MountainCarContinuous-v0"},
        {"env_id": "Nothing-v0"},
        {"seed": -1},
        {"episodes": 0},
    ):
        assert refused(capsys, enjoy.main, enjoy.Args(path, **flags))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "display" in refused(capsys, enjoy.main, enjoy.Args(path, render=True))


def test_flags_of_a_contender_come_last(monkeypatch, capsys):
    """So that they count; two contenders of one name would be one row."""

    def call(command, *_):
        raise RuntimeError(" ".join(command))

    monkeypatch.setattr(speed, "call", call)
    with pytest.raises(RuntimeError, match="--learning-starts 500 --learning-starts 9$"):
        speed.measure("sac_continuous.py --learning-starts 9", "Pendulum-v1", 100, "cpu")
    assert "twice" in refused(capsys, speed.main, ("a.py", "a.py"))


def test_speed_goes_on_after_a_contender_that_fails(monkeypatch, tmp_path, capsys):
    def measure(contender, *_):
        if contender == "b.py":
            raise RuntimeError("b.py: out of memory")
        return 20.0

    monkeypatch.setattr(speed, "measure", measure)
    with pytest.raises(SystemExit) as exit_:
        speed.main(("a.py", "b.py", "c.py"), rounds=1, copies=2, to=tmp_path / "speed.csv")
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and "out of memory" in printed.err
    assert "| b.py | nan | nan | nan |" in printed.out
    assert "| c.py | 40.0 | 1.00 | 1.00 |" in printed.out
    table = pd.read_csv(tmp_path / "speed.csv").steps_per_s
    assert table.isna().tolist() == [False, True, False]
