"""Curves, figures and tables from run folders.

    python tools/plot.py export runs/* --to results      one csv per run: curves, arguments, versions, commit, command
    python tools/plot.py figure results/HalfCheetah-v4/*.csv --to docs/images/halfcheetah.png
    python tools/plot.py table results/*/*.csv           final and best evaluation, as Markdown

A curve is `eval/episodic_return` unless --metric names another. The band is one standard deviation over the seeds.
"""

import csv
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

METRICS = re.compile(r"(eval/.*|charts/.*|losses/(alpha|entropy|qf_values|approx_kl)|diffusion/.*)")
COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
]  # Okabe and Ito: colour-blind safe


@dataclass
class Run:
    """One csv: `facts` of the run and `curves`, {metric: [(environment step, value), ...]}."""

    facts: dict[str, str]
    curves: dict[str, list[tuple[int, float]]]


def read_events(run_dir):
    """Read a run folder's TensorBoard events, and the commit of the code beside it."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    text = events.Tensors("hyperparameters/text_summary")[-1].tensor_proto.string_val[0].decode()
    facts = dict(line.strip("|").split("|", 1) for line in text.splitlines()[2:])
    git = ["git", "-C", str(run_dir), "rev-parse", "HEAD"]
    facts["commit"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    facts |= {name: version(name) for name in ("mujoco", "numpy") if name not in facts}
    curves = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return Run(facts, {name: curve for name, curve in sorted(curves.items()) if METRICS.fullmatch(name)})


def write_csv(run, path):
    """Facts as `# key: value` lines, then step,metric,value; seven significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in run.facts.items())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "metric", "value"])
        writer.writerows([step, name, f"{value:.7g}"] for name, curve in run.curves.items() for step, value in curve)


def read_csv(path):
    lines = Path(path).read_text().splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    curves = defaultdict(list)
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        curves[row["metric"]].append((int(row["step"]), float(row["value"])))
    return Run(facts, dict(curves))


def export(runs: Annotated[list[Path], tyro.conf.Positional], to: Path = Path("results"), every: int = 1000) -> None:
    """Write the curves of run folders as csv; other than evaluations and episodes, one value in `every` steps."""
    for run_dir in runs:
        run = read_events(run_dir)
        for name, curve in run.curves.items():
            if not name.startswith(("eval/", "charts/episodic")):
                newest = {-(-step // every): (step, value) for step, value in curve}  # the last of each interval
                run.curves[name] = list(newest.values())
        env_id = re.sub(r"[^\w.-]", "-", run.facts["env_id"])
        path = to / env_id / f"{run.facts['exp_name']}__{run.facts['seed']}.csv"
        write_csv(run, path)
        print(path)


def by_algorithm(files, metric):
    """{(environment, experiment): {seed: (steps, values)}} of csv files that have this metric."""
    groups = defaultdict(dict)
    for path in files:
        run = read_csv(path)
        if metric in run.curves:
            groups[run.facts["env_id"], run.facts["exp_name"]][run.facts["seed"]] = np.array(run.curves[metric]).T
    return dict(sorted(groups.items()))


def figure(files: Annotated[list[Path], tyro.conf.Positional], to: Path, metric: str = "eval/episodic_return") -> None:
    """Draw mean and standard deviation over the seeds, and each seed as a thin line; one panel per environment."""
    groups = by_algorithm(files, metric)
    if not groups:
        raise SystemExit(f"error: none of the files has {metric}")
    env_ids = sorted({env_id for env_id, _ in groups})
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sorted({name for _, name in groups}))}
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, len(env_ids), figsize=(5.2 * len(env_ids), 3.6), squeeze=False, layout="constrained")
    for axis, env_id in zip(axes[0], env_ids, strict=True):
        for (group_env, name), seeds in groups.items():
            if group_env != env_id:
                continue
            steps = sorted(set.intersection(*(set(curve[0]) for curve in seeds.values())))
            values = np.array([[dict(zip(*curve, strict=True))[step] for step in steps] for curve in seeds.values()])
            label = f"{name.removesuffix('_continuous')} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
            axis.plot(steps, values.mean(0), color=colour[name], linewidth=2, label=label)
            axis.fill_between(
                steps, *(values.mean(0) + s * values.std(0) for s in (-1, 1)), color=colour[name], alpha=0.15
            )
            for row in values:
                axis.plot(steps, row, color=colour[name], linewidth=0.6, alpha=0.6)
        axis.set(title=env_id, xlabel="environment steps", ylabel=metric.split("/")[1].replace("_", " "))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(frameon=False)
    to.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(to, dpi=150)


def table(files: Annotated[list[Path], tyro.conf.Positional], metric: str = "eval/episodic_return") -> None:
    """Print the last and the best evaluation, mean and standard deviation over the seeds, as a Markdown table."""
    print("| environment | algorithm | seeds | steps | final | best |\n|---|---|---|---|---|---|")
    for (env_id, name), seeds in by_algorithm(files, metric).items():
        final = np.array([values[-1] for _, values in seeds.values()])
        best = np.array([values.max() for _, values in seeds.values()])
        steps = min(int(steps[-1]) for steps, _ in seeds.values())
        cells = [env_id, name.removesuffix("_continuous"), ", ".join(sorted(seeds)), f"{steps:,}"]
        print("| " + " | ".join(cells + [f"{x.mean():.1f} ± {x.std():.1f}" for x in (final, best)]) + " |")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"export": export, "figure": figure, "table": table})
