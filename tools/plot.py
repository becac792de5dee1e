"""Curves, figures and tables from run folders.

    python tools/plot.py export runs/* --to results      one csv per run: curves, arguments, versions, commit, command
    python tools/plot.py figure results/HalfCheetah-v4/*.csv --to docs/images/halfcheetah.png
    python tools/plot.py table results/*/*.csv           final and best evaluation, as Markdown
    python tools/plot.py ablation results/Humanoid-v4/*.csv --to docs/images/k.png     final return against an argument
    python tools/plot.py reach results/HalfCheetah-v4/*.csv --to docs/images/time.png  wall-clock time to reach a return

A curve is `eval/episodic_return` unless --metric names another. The band is one standard deviation over the seeds, or,
with --stat iqm, a bootstrap interval of 95 % around the interquartile mean.
"""

import csv
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from scipy.stats import trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

METRICS = re.compile(r"(eval/.*|charts/.*|losses/(alpha|entropy|qf_values|approx_kl)|diffusion/.*)")
# Okabe and Ito: colour-blind safe
COLOURS = {
    "sac": "#0072B2",
    "diffsac": "#D55E00",
    "wpo": "#56B4E9",
    "diffwpo": "#E69F00",
    "dime": "#000000",
}
COLOURS |= {"ppo": "#009E73", "diffppo": "#CC79A7"}


@dataclass
class Run:
    """One csv: `facts` of the run and `curves`, {metric: [(environment step, value), ...]}."""

    facts: dict[str, str]
    curves: dict[str, list[tuple[int, float]]]


def read_events(run_dir):
    """Read a run folder's TensorBoard events, and the commit that was checked out beside it when the run began."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    starts = events.Tensors("hyperparameters/text_summary")  # several if the run was resumed
    texts = [event.tensor_proto.string_val[0].decode() for event in starts]
    tables = [
        dict(line.strip("|").split("|", 1) for line in text.splitlines()[2:]) for text in texts
    ]
    facts = tables[-1]
    facts["command"] = " && ".join(table["command"] for table in tables)

    def git(*words):
        words = ["git", "-C", str(run_dir), *words]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    facts = {key: value.replace(f"{top}/", "") if top else value for key, value in facts.items()}
    began = datetime.fromtimestamp(starts[0].wall_time, UTC).isoformat(timespec="seconds")
    facts["commit"] = (
        git("rev-parse", "--verify", f"HEAD@{{{began}}}") or "unknown"
    )  # by the reflog
    facts |= {name: version(name) for name in ("mujoco", "numpy") if name not in facts}
    curves = {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }
    return Run(
        facts, {name: curve for name, curve in sorted(curves.items()) if METRICS.fullmatch(name)}
    )


def write_csv(run, path):
    """Facts as `# key: value` lines, then step,metric,value; seven significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in run.facts.items())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "metric", "value"])
        writer.writerows(
            [step, name, f"{value:.7g}"]
            for name, curve in run.curves.items()
            for step, value in curve
        )


def read_csv(path):
    lines = Path(path).read_text().splitlines()
    facts = dict(
        line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line
    )
    curves = defaultdict(list)
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        curves[row["metric"]].append((int(row["step"]), float(row["value"])))
    return Run(facts, dict(curves))


BOOKKEEPING = {
    "commit",
    "command",
    "python",
    "torch",
    "gymnasium",
    "mujoco",
    "numpy",
    "resume",
    "progress",
    "track",
}
BOOKKEEPING |= {
    "wandb_project_name",
    "wandb_entity",
    "capture_video",
    "checkpoint_frequency",
    "torch_threads",
}


def export(
    runs: Annotated[list[Path], tyro.conf.Positional],
    to: Path = Path("results"),
    every: int = 1000,
    distinguish: tuple[str, ...] = (),
) -> None:
    """Write the curves of run folders as csv; other than evaluations and episodes, one value in `every` steps.

    The file is {exp_name}__{seed}.csv; the arguments named by `distinguish`, such as diffusion_steps, go into its name.
    A file of a run with other arguments is not replaced: exit code 1.
    """
    for run_dir in runs:
        run = read_events(run_dir)
        for name, curve in run.curves.items():
            if not name.startswith(("eval/", "charts/episodic")):
                newest = {
                    -(-step // every): (step, value) for step, value in curve
                }  # the last of each interval
                run.curves[name] = list(newest.values())
        env_id = re.sub(r"[^\w.-]", "-", run.facts["env_id"])
        parts = [
            run.facts["exp_name"],
            *(f"{key}-{run.facts[key]}" for key in distinguish),
            run.facts["seed"],
        ]
        path = to / env_id / f"{'__'.join(parts)}.csv"
        if path.exists():
            old = read_csv(path).facts
            keys = sorted(
                key
                for key in (old.keys() & run.facts.keys()) - BOOKKEEPING
                if old[key] != run.facts[key]
            )
            if keys:
                sys.exit(
                    f"error: {path} is of a run with other {', '.join(keys)}: delete it, or use --distinguish"
                )
        write_csv(run, path)
        print(path)


def by_algorithm(files, metric):
    """{(environment, experiment): {seed: (steps, values)}} of csv files that have this metric.

    Two runs of one seed, with other arguments perhaps, do not belong in one curve: exit code 1.
    """
    groups = defaultdict(dict)
    for path in files:
        run = read_csv(path)
        if metric in run.curves:
            seeds = groups[run.facts["env_id"], run.facts["exp_name"]]
            if run.facts["seed"] in seeds:
                sys.exit(
                    f"error: {path} is another run of {run.facts['exp_name']} with seed {run.facts['seed']}"
                )
            seeds[run.facts["seed"]] = np.array(run.curves[metric]).T
    return dict(sorted(groups.items()))


def colours(names):
    """{experiment: colour}: the script's own, others in turn."""
    rest = iter(3 * ["#999999", "#882255", "#44AA99", "#DDCC77"])
    return {
        name: COLOURS.get(name.removesuffix("_continuous")) or next(rest)
        for name in sorted(set(names))
    }


def summary(values, stat, resamples=2000):
    """Centre and band, each (points,), of values (seeds, points): mean and standard deviation, or IQM and interval."""
    if stat == "mean":
        return values.mean(0), values.mean(0) - values.std(0), values.mean(0) + values.std(0)
    random = np.random.default_rng(0)
    drawn = trim_mean(
        values[random.integers(len(values), size=(resamples, len(values)))], 0.25, axis=1
    )
    return trim_mean(values, 0.25, axis=0), *np.quantile(drawn, (0.025, 0.975), axis=0)


def panels(env_ids):
    """A figure with one axis for each environment."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(
        1, len(env_ids), figsize=(5.2 * len(env_ids), 3.6), squeeze=False, layout="constrained"
    )
    return fig, axes[0]


def save(fig, to):
    """Write a figure, with the folders on the way."""
    to.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(to, dpi=150)
    plt.close(fig)


def label(name, seeds):
    """Name of an experiment in a legend."""
    return f"{name.removesuffix('_continuous')} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"


def figure(
    files: Annotated[list[Path], tyro.conf.Positional],
    to: Path,
    metric: str = "eval/episodic_return",
    stat: Literal["mean", "iqm"] = "mean",
) -> None:
    """Draw learning curves over the seeds, each seed as a thin line too; one panel per environment."""
    groups = by_algorithm(files, metric)
    if not groups:
        raise SystemExit(f"error: none of the files has {metric}")
    env_ids = sorted({env_id for env_id, _ in groups})
    colour = colours(name for _, name in groups)
    fig, axes = panels(env_ids)
    for axis, env_id in zip(axes, env_ids, strict=True):
        for (group_env, name), seeds in groups.items():
            if group_env != env_id:
                continue
            steps = sorted(set.intersection(*(set(curve[0]) for curve in seeds.values())))
            if not steps:
                sys.exit(
                    f"error: the runs of {name} on {env_id} have no steps of {metric} in common"
                )
            values = np.array(
                [
                    [dict(zip(*curve, strict=True))[step] for step in steps]
                    for curve in seeds.values()
                ]
            )
            centre, low, high = summary(values, stat)
            axis.plot(steps, centre, color=colour[name], linewidth=2, label=label(name, seeds))
            axis.fill_between(steps, low, high, color=colour[name], alpha=0.15, linewidth=0)
            for row in values:
                axis.plot(steps, row, color=colour[name], linewidth=0.6, alpha=0.6)
        axis.set(
            title=env_id, xlabel="environment steps", ylabel=metric.split("/")[1].replace("_", " ")
        )
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(frameon=False)
    save(fig, to)


def ablation(
    files: Annotated[list[Path], tyro.conf.Positional],
    to: Path,
    argument: str = "diffusion_steps",
    metric: str = "eval/episodic_return",
) -> None:
    """Draw the last evaluation against an argument of the runs, on a scale of powers of two: mean, std, each seed."""
    points = defaultdict(lambda: defaultdict(list))
    for path in files:
        run = read_csv(path)
        if metric in run.curves and argument in run.facts:
            key = run.facts["env_id"], run.facts["exp_name"]
            points[key][float(run.facts[argument])].append(run.curves[metric][-1][1])
    if not points:
        raise SystemExit(f"error: none of the files has {metric} and {argument}")
    env_ids = sorted({env_id for env_id, _ in points})
    colour = colours(name for _, name in points)
    fig, axes = panels(env_ids)
    for (env_id, name), finals in sorted(points.items()):
        axis = axes[env_ids.index(env_id)]
        x = sorted(finals)
        mean, std = (np.array([f(finals[value]) for value in x]) for f in (np.mean, np.std))
        axis.errorbar(
            x,
            mean,
            std,
            color=colour[name],
            marker="o",
            capsize=3,
            label=name.removesuffix("_continuous"),
        )
        for value in x:
            axis.plot(
                [value] * len(finals[value]), finals[value], ".", color=colour[name], alpha=0.5
            )
        axis.set_xscale("log", base=2)
        axis.set(
            title=env_id,
            xlabel=argument.replace("_", " "),
            ylabel="final " + metric.split("/")[1].replace("_", " "),
        )
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.legend(frameon=False)
    save(fig, to)


def times_to(run, levels, metric):
    """Minutes until a run first evaluates at each level, by its own steps per second; infinite where it never does."""
    steps, values = np.array(run.curves[metric]).T
    speed_steps, speeds = np.array(run.curves["charts/SPS"]).T
    minutes = steps / np.interp(steps, speed_steps, speeds) / 60
    best = np.maximum.accumulate(values)
    return np.array(
        [minutes[np.argmax(best >= level)] if best[-1] >= level else np.inf for level in levels]
    )


def reach(
    files: Annotated[list[Path], tyro.conf.Positional],
    to: Path,
    metric: str = "eval/episodic_return",
    levels: int = 40,
) -> None:
    """Draw the median wall-clock time over the seeds to reach a return, as far as more than half of them reach it."""
    groups = defaultdict(list)
    for path in files:
        run = read_csv(path)
        if metric in run.curves and "charts/SPS" in run.curves:
            groups[run.facts["env_id"], run.facts["exp_name"]].append(run)
    if not groups:
        raise SystemExit(f"error: none of the files has {metric} and charts/SPS")
    env_ids = sorted({env_id for env_id, _ in groups})
    colour = colours(name for _, name in groups)
    fig, axes = panels(env_ids)
    for axis, env_id in zip(axes, env_ids, strict=True):
        here = {
            name: runs for (group_env, name), runs in sorted(groups.items()) if group_env == env_id
        }
        values = [
            value for runs in here.values() for run in runs for _, value in run.curves[metric]
        ]
        grid = np.linspace(min(values), max(values), levels)
        for name, runs in here.items():
            median = np.median([times_to(run, grid, metric) for run in runs], axis=0)
            axis.plot(median, grid, color=colour[name], linewidth=2, label=label(name, runs))
        axis.set(
            title=env_id,
            xlabel="minutes to reach it",
            ylabel=metric.split("/")[1].replace("_", " "),
        )
        axis.legend(frameon=False)
    save(fig, to)


def table(
    files: Annotated[list[Path], tyro.conf.Positional], metric: str = "eval/episodic_return"
) -> None:
    """Print the last and the best evaluation, mean and standard deviation over the seeds, as a Markdown table."""
    print("| environment | algorithm | seeds | steps | final | best |\n|---|---|---|---|---|---|")
    for (env_id, name), seeds in by_algorithm(files, metric).items():
        final = np.array([values[-1] for _, values in seeds.values()])
        best = np.array([values.max() for _, values in seeds.values()])
        steps = min(int(steps[-1]) for steps, _ in seeds.values())
        cells = [env_id, name.removesuffix("_continuous"), ", ".join(sorted(seeds)), f"{steps:,}"]
        print(
            "| "
            + " | ".join(cells + [f"{x.mean():.1f} ± {x.std():.1f}" for x in (final, best)])
            + " |"
        )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"export": export, "figure": figure, "table": table, "ablation": ablation, "reach": reach}
    )
