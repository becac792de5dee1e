"""The pairs are meant to be read side by side: small diffs, and shared definitions of exactly the same text."""

import ast
import difflib
import html
import subprocess

import pytest

from tests.common import PAIR, ROOT, SECOND
from tools import diffs, sync

BUDGETS = {  # lines removed, lines added
    ("sac_continuous.py", "diffsac_continuous.py"): (30, 155),
    ("ppo_continuous.py", "diffppo_continuous.py"): (40, 120),
    ("wpo_continuous.py", "diffwpo_continuous.py"): (40, 120),
}
SHARED = {  # definitions, and methods, of the same text in both files of a pair
    (
        "sac_continuous.py",
        "diffsac_continuous.py",
    ): """SoftQNetwork squash Actor.sample critic_loss actor_loss
    temperature_loss""".replace("Actor.sample", "").split(),
    (
        "ppo_continuous.py",
        "diffppo_continuous.py",
    ): """fail make_env RunningNormalizer ReturnScaler mlp Critic
    Actor.squash Actor.get_action gae policy_loss RandomState evaluate save_checkpoint load_checkpoint
    restore_checkpoint make_run_dir check_finite""".split(),
    (
        "wpo_continuous.py",
        "diffwpo_continuous.py",
    ): """fail make_env Batch ReplayBuffer n_step_transitions SoftQNetwork
    Actor.squash Actor.get_action critic_loss kl_divergences temperature_loss RandomState evaluate save_checkpoint
    load_checkpoint restore_checkpoint make_run_dir check_finite""".split(),
}
FAMILY = """fail make_env RandomState evaluate save_checkpoint load_checkpoint restore_checkpoint make_run_dir
check_finite CudaGraph""".split()  # of the same text in all scripts of the second edition
MAIN_LINES = {  # changed lines of `main`, at most
    ("sac_continuous.py", "diffsac_continuous.py"): 40,
    ("ppo_continuous.py", "diffppo_continuous.py"): 8,
    ("wpo_continuous.py", "diffwpo_continuous.py"): 2,
}
LINES = {  # above the frame, and whole
    "sac_continuous.py": (250, 730),
    "diffsac_continuous.py": (370, 860),
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
    assert [name for name in SHARED[pair] if first[name] != second[name]] == []
    diff = difflib.ndiff(first["main"].splitlines(), second["main"].splitlines())
    assert sum(line[0] in "+-" for line in diff) <= MAIN_LINES[pair]
    end = "\n\n\n" if pair[0] == "sac_continuous.py" else "# Algorithm specific arguments"
    common = (ROOT / pair[0]).read_text().split("class Args:")[1].split(end)[0]
    assert common in (ROOT / pair[1]).read_text()


@pytest.mark.parametrize("pair", BUDGETS)
def test_changed_method_lines_name_their_equation(pair):
    vanilla, changed = ((ROOT / file).read_text() for file in pair)
    added = [
        line for line in difflib.ndiff(vanilla.splitlines(), changed.splitlines()) if line[0] == "+"
    ]
    assert sum("# DIFF: (" in line for line in added) >= 2
    assert changed.count("# DIFF:") == changed.count("# DIFF: (")
    wpo = pair[0].startswith("wpo")  # its own comments are of the edge from SAC, which is under way
    assert "# DIFF:" not in vanilla or wpo


def test_the_family_shares_its_frame():
    texts = [definitions(f"{script.__name__}.py") for script in SECOND]
    assert [name for name in FAMILY if len({text[name] for text in texts}) > 1] == []


def test_frame_and_replay_are_copies():
    source = (ROOT / sync.SOURCE).read_text()
    assert {sync.SOURCE, *sync.SIBLINGS} == {f"{script.__name__}.py" for script in PAIR}
    for file, names in sync.SIBLINGS.items():
        text = (ROOT / file).read_text()
        assert sync.synced(text, source, names) == text, "run tools/sync.py"
        drifted = text.replace("def load_checkpoint(path):", "def load_checkpoint(file):")
        drifted = drifted.replace("class ReplayBuffer:", "class Buffer:")
        assert drifted != text and sync.synced(drifted, source, names) == text


@pytest.mark.parametrize("file", LINES)
def test_lengths_of_the_third_edition(file):
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
