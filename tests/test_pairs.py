"""Pairs are read side by side: small diffs, shared definitions of exactly the same text."""

import ast
import difflib
import html
import re
import subprocess

import pytest

from tests.common import ROOT, SCRIPTS
from tools import diffs, sync

BUDGETS = {  # lines removed, lines added
    ("sac_continuous.py", "diffsac_continuous.py"): (30, 165),
    ("wpo_continuous.py", "diffwpo_continuous.py"): (60, 195),
    ("ppo_continuous.py", "diffppo_continuous.py"): (45, 140),
    ("sac_continuous.py", "wpo_continuous.py"): (40, 90),
    ("diffsac_continuous.py", "diffwpo_continuous.py"): (40, 90),
}
PAIRS = list(BUDGETS)[:3]  # the Gaussian policy becomes a diffusion policy
SHARED = {  # definitions, and methods, of the same text in both files
    PAIRS[0]: "SoftQNetwork squash critic_loss actor_loss temperature_loss",
    PAIRS[1]: "SoftQNetwork squash critic_loss temperature_loss",
    PAIRS[2]: "mlp squash log_normal gae actor_loss",
    ("sac_continuous.py", "wpo_continuous.py"): "SoftQNetwork squash Actor critic_loss",
    ("diffsac_continuous.py", "diffwpo_continuous.py"): """SoftQNetwork squash Chain Actor.kernels
    Actor.control Actor.end_cost Actor.outcome Actor.sample Actor.mean_action critic_loss
    latent_critic_network latent_critic_loss latent_value temperature_loss""",
}
MAIN_LINES = (40, 40, 15, 15, 20)  # changed lines of `main`, at most, of each edge
LINES = {  # above the frame, and whole
    "sac_continuous.py": (250, 740),
    "diffsac_continuous.py": (375, 870),
    "wpo_continuous.py": (310, 780),
    "diffwpo_continuous.py": (430, 920),
    "ppo_continuous.py": (275, 760),
    "diffppo_continuous.py": (370, 850),
    "dime.py": (400, 900),
}
MOST_OF_MAIN = 100


def definitions(file):
    """The text of every function, class and method of a file, by qualified name."""
    source, texts = (ROOT / file).read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            texts[node.name] = ast.get_source_segment(source, node)
            for child in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(child, ast.FunctionDef):
                    texts[f"{node.name}.{child.name}"] = ast.get_source_segment(source, child)
    return texts


@pytest.mark.parametrize("pair", BUDGETS)
def test_diff_stays_within_its_budget(pair):
    files = [ROOT / file for file in pair]
    out = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    added, removed = (int(count) for count in out.stdout.split()[:2])
    assert removed <= BUDGETS[pair][0] and added <= BUDGETS[pair][1], f"-{removed}/+{added}"
    assert f"−{removed} / +{added}" in (ROOT / "README.md").read_text()


def test_readme_states_the_lengths_of_the_scripts():
    lines = [
        len((ROOT / f"{name}_continuous.py").read_text().splitlines()) for name in ("sac", "ppo")
    ]
    assert (
        "| this repository | 1 ({}) | 1 ({}) |".format(*lines) in (ROOT / "README.md").read_text()
    )


@pytest.mark.parametrize("pair", BUDGETS)
def test_shared_definitions_are_the_same_text(pair):
    first, second = (definitions(file) for file in pair)
    assert [name for name in SHARED[pair].split() if first[name] != second[name]] == []
    diff = list(difflib.ndiff(first["main"].splitlines(), second["main"].splitlines()))
    changed = sum(line[0] in "+-" for line in diff)
    assert changed <= MAIN_LINES[list(BUDGETS).index(pair)], changed


@pytest.mark.parametrize("pair", BUDGETS)
def test_changed_lines_name_their_equation(pair):
    vanilla, changed = ((ROOT / file).read_text() for file in pair)
    diff = difflib.ndiff(vanilla.splitlines(), changed.splitlines())
    assert sum("# DIFF: (" in line for line in diff if line[0] == "+") >= 2
    assert changed.count("# DIFF:") == changed.count("# DIFF: (")
    docstring = ast.get_docstring(ast.parse(changed))
    for label in re.findall(r"# DIFF: (.*)", changed):
        for number in re.findall(r"\(W?\d+\)", label):
            assert number in docstring, label


def test_shared_sections_are_copies():
    files = {f"{script.__name__}.py" for script in SCRIPTS}
    assert set(LINES) == files == set(sync.SECTIONS["Frame"])
    for name, (first, *others) in sync.SECTIONS.items():
        source = (ROOT / first).read_text()
        for file in others:
            text = (ROOT / file).read_text()
            assert sync.synced(text, source, name) == text, "run tools/sync.py"
            begin = sync.section(text, name).start
            drifted = text[:begin] + text[begin:].replace("return", "return 1 *", 1)
            assert drifted != text and sync.synced(drifted, source, name) == text


@pytest.mark.parametrize("file", LINES)
def test_lengths(file):
    lines = (ROOT / file).read_text().splitlines()
    above = next(i for i, line in enumerate(lines) if line.startswith("# Frame: ")) - 1
    length = len(definitions(file)["main"].splitlines())
    longest = max(map(len, lines))
    assert above <= LINES[file][0] and len(lines) <= LINES[file][1], (above, len(lines))
    assert length <= MOST_OF_MAIN and longest <= 100, (length, longest)


def test_pages_of_the_diffs_show_the_scripts_as_they_are():
    assert {edge[:2] for edge in diffs.EDGES} == set(BUDGETS)
    stale = [
        name
        for name, text in diffs.pages().items()
        if (ROOT / "docs" / "diffs" / name).read_text() != text
    ]
    assert stale == [], "run tools/diffs.py"


@pytest.mark.parametrize("pair", BUDGETS)
def test_side_by_side_rows_hold_both_files_whole(pair):
    rows = diffs.side_by_side(*pair)
    for file, number, text, mark in ((pair[0], 0, 1, "del"), (pair[1], 3, 4, "ins")):
        lines = (ROOT / file).read_text().splitlines()
        here = [row for row in rows if row[number]]
        assert [row[number] for row in here] == list(range(1, len(lines) + 1))
        plain = [
            html.unescape(row[text].replace(f"<{mark}>", "").replace(f"</{mark}>", ""))
            for row in here
        ]
        assert plain == lines
    out = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", *(ROOT / file for file in pair)],
        capture_output=True,
        text=True,
    ).stdout.split()
    assert [
        str(sum(row[k] == kind for row in rows)) for k, kind in ((5, "ins"), (2, "del"))
    ] == out[:2]
