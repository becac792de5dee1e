"""Curves, tables and csv files of runs.

Draw learning curves, one picture for each environment:

    python tools/plot.py figure runs/Pendulum-v1__* --to figures

Draw the last evaluation against an argument:

    python tools/plot.py figure runs/Humanoid-v4__* --to figures --against diffusion_steps

Print the last and the best evaluation as Markdown, and how likely each script beats its twin:

    python tools/plot.py table runs/Pendulum-v1__*
    python tools/plot.py compare runs/Pendulum-v1__*

The same of training episodes, means over the last 50,000 steps:

    python tools/plot.py compare runs/Humanoid-v4__* --metric charts/episodic_return --window 50000

Keep runs as csv files, with arguments, versions, commit and command; all commands read them too:

    python tools/plot.py export runs/Pendulum-v1__* --to my_results
"""

import itertools
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

try:
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.ticker import EngFormatter
    from scipy.stats import bootstrap, linregress, t, trim_mean, ttest_ind
except ImportError as error:
    print(f"error: {error}; pip install -r requirements-dev.txt", file=sys.stderr)
    sys.exit(2)

METRICS = r"(eval/.*|charts/.*|losses/(alpha|entropy|qf_values|approx_kl)|diffusion/.*)"
RETURN = "eval/episodic_return"
COLOURS = {  # Okabe and Ito: colour-blind safe
    "sac": "#0072B2",
    "diffsac": "#D55E00",
    "wpo": "#56B4E9",
    "diffwpo": "#E69F00",
    "crossq": "#7F7F7F",
    "dime": "#000000",
    "ppo": "#009E73",
    "diffppo": "#CC79A7",
}
MACHINE = """seed resume device torch_threads track compile cuda_graph total_timesteps
eval_frequency checkpoint_frequency async_envs""".split()  # arguments that change no curve
SPEED = "device torch_threads compile cuda_graph async_envs".split()  # that change the hours
TWINS = [("sac", "diffsac"), ("ppo", "diffppo"), ("wpo", "diffwpo"), ("crossq", "dime")]
Paths = Annotated[list[Path], tyro.conf.Positional]


@dataclass
class Run:
    """Facts of a run, and its curves: a table with the columns step, metric and value."""

    facts: dict[str, str]
    curves: pd.DataFrame


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def file_name(env_id):
    return re.sub(r"[^\w.-]", "-", env_id)


def read_events(folder):
    """A `Run` from TensorBoard's files; the commit is the one of the run's start, by the reflog."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    starts = events.Tensors("hyperparameters/text_summary")  # several if the run was resumed
    texts = [event.tensor_proto.string_val[0].decode() for event in starts]
    tables = [dict(line[1:-1].split("|", 1) for line in text.splitlines()[2:]) for text in texts]
    began = datetime.fromtimestamp(starts[0].wall_time, UTC).isoformat(timespec="seconds")

    def git(*words):
        if not shutil.which("git"):
            return ""
        words = ["git", "-C", str(folder), *words]
        done = subprocess.run(words, capture_output=True, text=True)
        return "" if done.stderr else done.stdout.strip()  # it warns of a reflog that is too young

    command = " && ".join(table["command"] for table in tables)
    if top := git("rev-parse", "--show-toplevel"):
        command = command.replace(f"{top}/", "")
    commit = git("rev-parse", "--verify", f"HEAD@{{{began}}}") or "unknown"
    facts = tables[-1] | {"command": command, "commit": commit, "began": began}
    names = [name for name in events.Tags()["scalars"] if re.fullmatch(METRICS, name)]
    rows = [(event.step, name, event.value) for name in names for event in events.Scalars(name)]
    return Run(facts, pd.DataFrame(rows, columns=["step", "metric", "value"]))


def write_csv(run, path):
    """Facts as `# key: value`, then the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in run.facts.items())
        run.curves.to_csv(file, index=False, float_format="%.7g", lineterminator="\n")


def read_csv(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    facts = dict(line[2:].split(": ", 1) for line in lines if ": " in line)
    return Run(facts, pd.read_csv(path, skiprows=len(lines)))


def read(paths):
    """(path, `Run`) of all run folders and csv files; a warning for what is neither."""
    runs = []
    for path in paths:
        try:
            run = read_csv(path) if path.suffix == ".csv" else read_events(path)
            runs += [(path, run)] if run.facts["env_id"] else []
        except (KeyError, OSError, ValueError):
            print(f"warning: {path} is no run", file=sys.stderr)
    return runs or fail("none of these is a run folder or a csv of one")


def export(
    runs: Paths,
    to: Path,
    every: int = 1000,
    distinguish: tuple[str, ...] = (),
    replace: bool = False,
) -> None:
    """Write TO/{environment}/{exp_name}__{seed}.csv, one for each run.

    Curves but evaluations and episodes keep one value in `every` steps. The arguments named by
    `distinguish` go into the file's name. A file of another run is left alone without `replace`.
    """
    read_runs, written = read(runs), set()
    distinguish = arguments(distinguish, read_runs)
    for _, run in read_runs:
        facts, curves = run.facts, run.curves
        values = [f"{key}-{facts.get(key)}" for key in distinguish]
        name = "__".join((facts["exp_name"], *values, facts["seed"]))
        path = to / file_name(facts["env_id"]) / f"{name}.csv"
        if path in written:
            fail(f"two runs would be {path}: name what they differ in by --distinguish")
        written.add(path)
        if path.exists() and not replace:
            if read_csv(path).facts.get("began") != facts["began"]:
                fail(f"{path} is of another run: choose another folder, or --replace it")
        whole = curves.metric.str.match("eval/|charts/episodic")
        interval = -(-curves.step // every)
        thin = curves[~whole].groupby([curves.metric, interval], sort=False).tail(1)
        curves = pd.concat([curves[whole], thin]).sort_values(["metric", "step"], kind="stable")
        write_csv(Run(facts, curves), path)
        print(path)


def hours(run, metric):
    """Hours of training until each value of a metric; none for a run that was resumed."""
    speed, curve = (run.curves[run.curves.metric == name] for name in ("charts/SPS", metric))
    if speed.empty or run.facts.get("resume", "None") != "None":
        return curve.iloc[:0]
    return curve.assign(value=np.interp(curve.step, speed.step, speed.step / speed.value / 3600))


def arguments(names, runs):
    """Names of arguments as runs log them; exit code 2 if no run has one of them."""
    names = [name.replace("-", "_") for name in names]
    for name in names:
        if not any(name in run.facts for _, run in runs):
            fail(f"none of the runs has an argument {name}")
    return names


def follows_the_total(facts):
    """Whether a run's learning rate or temperature falls until its total of steps."""
    return facts.get("anneal_lr") == "True" or float(facts.get("alpha_anneal", 1)) > 1


def warn_of_differences(name, env_id, runs, clock):
    """Seeds of one curve should have the same arguments (those before torch's version)."""
    facts = [run.facts for run in runs]
    matter = SPEED if clock else set(facts[0]) - set(MACHINE)
    if not clock and any(map(follows_the_total, facts)):
        matter |= {"total_timesteps"}
    for key in itertools.takewhile(lambda key: key != "torch", facts[0]):
        values = {fact.get(key, facts[0][key]) for fact in facts}
        if len(values) > 1 and key in matter:
            values = ", ".join(sorted(values))
            hint = f"--distinguish {key} draws them apart"
            print(f"warning: {name} on {env_id} mixes {key} {values}; {hint}", file=sys.stderr)


def windows(run, metric, size):
    """Means of a metric over each `size` steps, at their ends; without what is left at the end."""
    curve = run.curves[run.curves.metric == metric]
    ends = (-(-curve.step // size) * size).rename("step")
    means = curve.value.groupby(ends).mean().reset_index()
    return means[means.step <= run.curves.step.max()]


def curves_of(runs, metric, key=(), clock=False, window=None):
    """{environment: {(name, values of key): table with a row a step and a column a seed}}.

    With `clock` the values are hours of training, with `window` means over so many steps. A command
    without --distinguish has key None.
    """
    found, grouped = defaultdict(lambda: defaultdict(dict)), defaultdict(list)
    read_runs = read(runs)
    apart, key = key is not None, arguments(key or (), read_runs)
    for path, run in read_runs:
        curve = hours(run, metric) if clock else run.curves[run.curves.metric == metric]
        curve = windows(run, metric, window) if window else curve
        curve = curve.drop_duplicates("step", keep="last")
        name = run.facts["exp_name"].removesuffix("_continuous")
        if curve.empty:
            what = f"speeds, or was resumed, or has no {metric}" if clock else metric
            print(f"warning: {path} has no {what}: left out", file=sys.stderr)
            continue
        group, env_id = (name, *(str(run.facts.get(k)) for k in key)), run.facts["env_id"]
        columns = found[env_id][group]
        if run.facts["seed"] in columns:
            hint = ", or tell them apart by --distinguish ARGUMENT (or began)" * apart
            words = f"{path} is another run of {name} with seed {run.facts['seed']}"
            fail(f"{words}: leave one out{hint}")
        columns[run.facts["seed"]] = curve.set_index("step").value
        grouped[label(*group, key=key), env_id].append(run)
    tables = {
        env_id: {name: pd.DataFrame(columns).dropna() for name, columns in groups.items()}
        for env_id, groups in found.items()
    }
    for env_id, groups in tables.items():
        for name, table in groups.items():
            if table.empty:
                fail(f"the runs of {name[0]} on {env_id} have no steps of {metric} in common")
            ends = {seed: curve.index[-1] for seed, curve in found[env_id][name].items()}
            within = [curve.loc[: table.index[-1]] for curve in found[env_id][name].values()]
            if len(table) < max(map(len, within)):
                common = f"only the {len(table):,} steps that all seeds have"
                print(f"warning: {name[0]} on {env_id} keeps {common}", file=sys.stderr)
            if min(ends.values()) < max(ends.values()):
                ends = ", ".join(f"seed {seed} at {end:,}" for seed, end in ends.items())
                print(
                    f"warning: {name[0]} on {env_id} ends with the shortest: {ends}",
                    file=sys.stderr,
                )
    for (name, env_id), members in grouped.items():
        warn_of_differences(name, env_id, members, clock)
    if clock and not tables:
        fail("--over hours needs runs that were never resumed")
    kept = sorted({name for _, run in read_runs for name in run.curves.metric.unique()})
    return tables or fail(f"none of the runs has {metric}; there are {', '.join(kept)}")


def label(name, *values, key=()):
    """Name of a curve, with the values of the arguments that distinguish it."""
    return " ".join([name, *(f"{k}={value}" for k, value in zip(key, values, strict=True))])


def summary(values, stat):
    """Centre and band of values (points, seeds): mean and std, or IQM and a 95 % interval."""
    if stat == "mean":
        mean, std = values.mean(1), values.std(1)
        return mean, mean - std, mean + std
    iqm = partial(trim_mean, proportiontocut=0.25)
    centre = iqm(values, axis=1)
    if values.shape[1] == 1:
        return centre, centre, centre
    drawn = bootstrap((values,), iqm, axis=1, method="percentile", n_resamples=2000, rng=0)
    return centre, *drawn.confidence_interval


def draw_curves(axis, name, colour, table, x, stat):
    """Centre and band over the seeds, and each seed as a thin line."""
    centre, low, high = summary(table.to_numpy(), stat)
    seeds = f"{len(table.columns)} seed{'s' * (len(table.columns) > 1)}"
    dot = "o" if len(x) == 1 else None
    axis.plot(x, centre, color=colour, linewidth=2, marker=dot, label=f"{name} ({seeds})")
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(x, table, color=colour, linewidth=0.6, alpha=0.6)


def draw_finals(axis, name, colour, finals):
    """The last values of all seeds, over the argument that is the key of `finals`."""
    x = sorted(finals)
    bars = np.array([(finals[value].mean(), finals[value].std(ddof=0)) for value in x]).T
    axis.errorbar(x, *bars, color=colour, marker="o", capsize=3, label=name)
    for value in x:
        axis.plot([value] * len(finals[value]), finals[value], ".", color=colour, alpha=0.5)


def print_slope(name, argument, finals):
    """Print how the last values change when the argument doubles: least squares, 95 % interval."""
    x, y = np.array([(np.log2(x), y) for x, values in finals.items() for y in values]).T
    if len(finals) > 1 and len(x) > 2:
        fit = linregress(x, y)
        half = t.ppf(0.975, len(x) - 2) * fit.stderr
        form = "+,.0f" if abs(y).max() >= 1 else "+.2g"
        low, high = (f"{fit.slope + sign * half:{form}}" for sign in (-1, 1))
        runs = f"when {argument} doubles ({len(x)} runs)"
        print(f"{name}: {fit.slope:{form}} [{low}, {high}] {runs}")


def figure(
    runs: Paths,
    to: Path = Path("figures"),
    metric: str = RETURN,
    stat: Literal["mean", "iqm"] = "mean",
    over: Literal["steps", "hours"] = "steps",
    against: str | None = None,
    distinguish: tuple[str, ...] = (),
    published: Path | None = None,
    window: int | None = None,
) -> None:
    """Draw TO/{environment}.png: curves over the seeds, each seed as a thin line too.

    The band is one standard deviation, with `--stat iqm` a bootstrap interval of 95 %. `--over
    hours` of training instead of steps, without runs that were resumed. `--against` an argument of
    the runs: the values at the last step that all of a script reach, on a scale of powers of two
    (a linear one if any is zero or less); prints what doubling it changes. Runs that differ in the
    arguments named by `distinguish` are curves of their own. `--published` adds points of the same
    algorithms from a csv with the columns env_id, name, step, value and label. `--window` draws
    means over so many steps: of episodes (`--metric charts/episodic_return`) seeds have no steps in
    common.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    key = (against,) if against else distinguish
    if against and distinguish:
        fail("--against tells runs apart already: leave out --distinguish")
    if published and (against or over == "hours"):
        fail("--published needs environment steps on the axis")
    if window is not None and window < 1:
        fail("--window must be at least 1")
    if window and over == "hours":
        fail("--window needs environment steps on the axis")
    if published and not published.is_file():
        fail(f"there is no file {published}")
    clock = curves_of(runs, metric, key, clock=True) if over == "hours" else {}
    for env_id, groups in curves_of(runs, metric, key, window=window).items():
        if over == "hours" and env_id not in clock:
            continue
        if against and not all(re.fullmatch(r"[\d.e+-]+", str(value)) for _, value in groups):
            fail(f"the runs have no numeric argument {against}")
        drawing, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
        rest = itertools.cycle(["#999999", "#882255", "#44AA99", "#DDCC77"])
        for name in sorted({name for name, *_ in groups} if against else groups):
            colour = COLOURS.get(name if against else label(*name, key=key)) or next(rest)
            if against:
                tables = {float(x): table for (n, x), table in groups.items() if n == name}
                ends = {table.index[-1] for table in tables.values()}
                if len(ends) > 1:
                    print(f"warning: {name} at step {min(ends):,} on {env_id}", file=sys.stderr)
                finals = {x: table.loc[: min(ends)].iloc[-1] for x, table in tables.items()}
                draw_finals(axis, name, colour, finals)
                if min(finals) > 0:
                    print_slope(f"{name} on {env_id}", against, finals)
                continue
            values = groups[name]
            x = values.index
            if clock:
                if name not in clock[env_id]:
                    continue
                timed = clock[env_id][name]
                values, x = values[timed.columns], timed.mean(axis=1).reindex(x)
            draw_curves(axis, label(*name, key=key), colour, values, x, stat)
        if published:
            points = pd.read_csv(published, comment="#").query("env_id == @env_id")
            for (name, label_), point in points.groupby(["name", "label"]):
                if name in {name.split("_")[0] for name, *_ in groups}:
                    colour = COLOURS.get(name, "black")
                    axis.plot(point.step, point.value, "x", color=colour, label=label_)
        axis.set(title=env_id, ylabel=metric.split("/")[1].replace("_", " "))
        axis.set_xlabel("hours of training" if clock else "environment steps")
        if against:
            if min(float(x) for _, x in groups) > 0:
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter("{x:g}")
            axis.set_xlabel(against.replace("_", " "))
        elif not clock:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(frameon=False, fontsize=8)
        to.mkdir(parents=True, exist_ok=True)
        path = to / f"{file_name(env_id)}.png"
        drawing.savefig(path, dpi=150)
        plt.close(drawing)
        print(path)


def improvement(y, x, axis=-1):
    """Probability that a value of y is larger than one of x; a tie counts half."""
    return (np.sign(y[..., :, None] - x[..., None, :]) / 2 + 0.5).mean((-2, -1))


def compare(runs: Paths, metric: str = RETURN, window: int | None = None) -> None:
    """Print what each diffusion script gains over its Gaussian twin at their last common step.

    Difference of the means, with the 95 % interval of Welch's t-test, and probability of
    improvement (Agarwal et al. 2021, arXiv 2108.13264), with a bootstrap interval of 95 %. With few
    seeds the second is too narrow. `--window` takes means over so many steps, as in `figure`.
    """
    rows = []
    if window is not None and window < 1:
        fail("--window must be at least 1")
    tables = curves_of(runs, metric, key=None, window=window)
    for env_id, groups in sorted(tables.items()):
        for first, second in TWINS:
            for variant in sorted(name for (name,) in groups if name.split("_")[0] == second):
                if (first,) not in groups:
                    continue
                twin, own = groups[first,], groups[variant,]
                if not (steps := twin.index.intersection(own.index)).size:
                    continue
                x, y = twin.loc[steps[-1]].to_numpy(), own.loc[steps[-1]].to_numpy()
                cells = [env_id, f"{first} → {variant}", f"{steps[-1]:,}", f"{len(x)}, {len(y)}"]
                cells += [f"{y.mean() - x.mean():+,.0f}", f"{improvement(y, x):.2f}"]
                if min(len(x), len(y)) > 1:
                    low, high = ttest_ind(y, x, equal_var=False).confidence_interval()
                    cells[-2] += f" [{low:+,.0f}, {high:+,.0f}]"
                    drawn = bootstrap((y, x), improvement, method="percentile", rng=0)
                    low, high = drawn.confidence_interval
                    cells[-1] += f" [{low:.2f}, {high:.2f}]"
                rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        fail("there is no pair: names begin with those of a script and of its twin")
    print("| environment | pair | steps | seeds | difference | probability of improvement |")
    print("|---|---|---|---|---|---|", *rows, sep="\n")


def table(runs: Paths, metric: str = RETURN, distinguish: tuple[str, ...] = ()) -> None:
    """Print the last and the best evaluation, mean and (population) std over the seeds."""
    tables = curves_of(runs, metric, distinguish)
    print("| environment | algorithm | seeds | steps | final | best |\n|---|---|---|---|---|---|")
    for env_id, groups in sorted(tables.items()):
        for name, values in sorted(groups.items()):
            cells = [
                env_id,
                label(*name, key=distinguish),
                ", ".join(sorted(values.columns)),
                f"{values.index[-1]:,}",
            ]
            for x in (values.iloc[-1], values.max()):
                spread = f" ± {x.std(ddof=0):.1f}" if len(x) > 1 else ""
                cells.append(f"{x.mean():.1f}{spread}")
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"figure": figure, "table": table, "compare": compare, "export": export}
    )
