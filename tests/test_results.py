"""The figures of README, pages and results/ are what the tools make of the curves."""

import itertools
import re
from collections import defaultdict
from functools import cache

import pandas as pd
import pytest
from scipy.stats import ttest_ind

from tests.common import ROOT
from tools import plot

RESULTS = ROOT / "results"
FOLDERS = ["Pendulum-v1", "HalfCheetah-v4", "Humanoid-v4"]
EPISODES = {"metric": "charts/episodic_return", "window": 50_000}
NUMBER = r"(−?\d[\d,]*)"
# "(−32 to 350)", "(−96, −338 to 146)", "interval −32 to 350"; not "(242 to 405 a seed)"
INTERVAL = rf"(?:\((?:{NUMBER[1:-1]}, )?|interval ){NUMBER} to {NUMBER}(?:[);.,]|$)"
SPREAD = r"(−?\d[\d,]*) ± (\d[\d,]*)(?![\d.])"  # of returns
ELSEWHERE = {  # published by others; means of training episodes (docs/ppo.md)
    ("1,443", "46"), ("716", "49"), ("994", "456"), ("6,156", "699"),
    ("6,031", "608"), ("5,530", "307"),
}  # fmt: skip
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def paths(*environments):
    return sorted(path for name in environments for path in (RESULTS / "curves" / name).iterdir())


def number(text):
    return int(text.replace("−", "-").replace(",", ""))


@cache
def curves(environment, metric=plot.RETURN, window=None):
    """{name: table with a row a step and a column a seed}"""
    groups = plot.curves_of(paths(environment), metric, window=window)[environment]
    return {name: table for (name,), table in groups.items()}


@cache
def differences():
    """{(low, high): difference} of any two algorithms, at 100,000 steps and at their last one."""
    found = {}
    for environment in FOLDERS[1:]:
        for kind in ({}, EPISODES):
            for (_, x), (_, y) in itertools.permutations(curves(environment, **kind).items(), 2):
                common = x.index.intersection(y.index)
                for step in {100_000, *common[-1:]} & set(common):
                    first, second = x.loc[step], y.loc[step]
                    interval = ttest_ind(second, first, equal_var=False).confidence_interval()
                    found[tuple(map(round, interval))] = round(second.mean() - first.mean())
    return found


def comparisons(capsys, tmp_path):
    """Both parts of compare.md: pairs of twins, and returns against K."""
    runs = [path for path in paths("Humanoid-v4") if re.match("diff.*_continuous", path.name)]
    runs += sorted((RESULTS / "ablations" / "diffusion_steps_humanoid").iterdir())
    parts = []
    for options in ({}, EPISODES):
        capsys.readouterr()
        plot.compare(paths(*FOLDERS[1:]), **options)
        parts.append(capsys.readouterr().out + "\n")
        plot.figure(runs, to=tmp_path, against="diffusion_steps", **options)
        lines = capsys.readouterr().out.splitlines()
        parts[-1] += "".join(f"* {line}\n" for line in lines if line.startswith("diff"))
    return parts


def test_tables_are_those_of_the_curves(capsys, tmp_path):
    plot.table(paths(*FOLDERS))
    assert capsys.readouterr().out == (RESULTS / "table.md").read_text()
    text = (RESULTS / "compare.md").read_text()
    first, second = re.fullmatch("Final .*:\n\n(.*)\nTraining .*:\n\n(.*)", text, re.S).groups()
    assert [first, second] == comparisons(capsys, tmp_path)


def cell(name, environment, steps):
    """Mean and standard deviation over the seeds, in brackets their number; or an empty cell."""
    if environment == "double well":
        rows = (RESULTS / "toys" / "double_well.md").read_text()
        distance = re.search(rf"\| {name}(?:, K = 8)?, [^|]* (\d) runs \|[^|]*\| (.*?) \|", rows)
        return f"{distance[2]} ({distance[1]})"
    table = curves(environment).get(name)
    if table is None or steps not in table.index:
        return ""
    values = table.loc[steps]
    spread = f"{values.mean():,.0f} ± {values.std(ddof=0):,.0f} ({len(values)})"
    return spread.replace("-", "−")


def test_every_cell_of_the_table_in_readme():
    text = (ROOT / "README.md").read_text()
    table = re.search(r"\| environment, steps \|.*?\|\n(?=\n)", text, re.S)[0]
    head, _, *rows = table.splitlines()
    names, filled = [name.strip().lower() for name in head.split("|")[2:-1]], 0
    for title, *cells in ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows):
        environment, off_policy, on_policy = re.fullmatch(
            r"(.*?), ([\d,]+)(?: \(.*?([\d,]+)\))?(?::.*)?", title
        ).groups()
        for name, content in zip(names, cells, strict=True):
            steps = on_policy if name.endswith("ppo") else off_policy
            assert content == (cell(name, environment, number(steps)) if steps else ""), title
            filled += content != ""
    assert filled >= 32


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_interval_of_a_page(page):
    lines = page.read_text().splitlines()
    quoted = [(line, *match) for line in lines for match in re.findall(INTERVAL, line)]
    if page.name == "README.md":
        assert len(quoted) >= 9
    known = dict(differences())
    slopes = r": ([+-]\S+) \[([+-]\S+), ([+-]\S+)\] when"
    for row in re.findall(slopes, (RESULTS / "compare.md").read_text()):
        slope, *interval = map(number, row)
        known[tuple(interval)] = slope
    for line, *interval in quoted:
        low, high = map(number, interval)
        assert (low, high) in known, line
        assert abs(known[low, high]) in [abs(number(x)) for x in re.findall(NUMBER, line)], line


@cache
def spreads():
    """(mean, standard deviation) over seeds of all evaluations, at every step, and of the best."""
    tables, groups = [], defaultdict(list)
    for path in sorted((RESULTS / "ablations").rglob("*__[0-9]*.csv")):
        groups[path.parent, path.stem.rpartition("__")[0]].append(plot.read_csv(path))
    for metric in (plot.RETURN, f"{plot.RETURN}_mean_action"):
        tables += [table for name in FOLDERS for table in curves(name, metric).values()]
        for runs in groups.values():
            values = [run.curves[run.curves.metric == metric] for run in runs]
            values = [value.drop_duplicates("step", keep="last") for value in values]
            tables.append(pd.concat([value.set_index("step").value for value in values], axis=1))
    cheetah = curves("HalfCheetah-v4")
    for pair in ("sac", "wpo"), ("diffsac", "diffwpo"):  # README takes them together
        tables.append(pd.concat([cheetah[name] for name in pair], axis=1))
    found = set()
    for table in tables:
        for values in (*table.dropna().to_numpy(), table.max().to_numpy()):
            found.add((round(values.mean()), round(values.std())))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_mean_and_standard_deviation_of_a_page(page):
    quoted = set(re.findall(SPREAD, page.read_text())) - ELSEWHERE
    missing = [pair for pair in quoted if tuple(map(number, pair)) not in spreads()]
    assert missing == []


def test_every_distance_of_a_page_is_in_the_tables_of_the_toys():
    tables = "".join(path.read_text() for path in RESULTS.glob("toys/*.md"))
    quoted = {x for page in PAGES for x in re.findall(r"0\.\d{3} ± 0\.\d{3}", page.read_text())}
    assert len(quoted) >= 15 and [x for x in quoted if x not in tables] == []
