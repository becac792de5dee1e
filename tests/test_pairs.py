"""The pairs are meant to be read side by side: small diffs, and shared definitions of exactly the same text."""

import ast
import subprocess

import pytest

from tests.common import ROOT

BUDGETS = {("sac_continuous.py", "diffsac_continuous.py"): (25, 100)}  # lines removed, lines added
SHARED = """fail make_env Batch ReplayBuffer SoftQNetwork critic_loss policy_loss temperature_loss evaluate
save_checkpoint load_checkpoint restore_checkpoint make_run_dir check_finite""".split()


def definitions(file):
    """The text of every function and class at the top level of a file."""
    source = (ROOT / file).read_text()
    nodes = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


@pytest.mark.parametrize("pair", BUDGETS)
def test_diff_stays_within_its_budget(pair):
    files = [ROOT / file for file in pair]
    out = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", *files], capture_output=True, text=True, check=False
    )
    added, removed = (int(count) for count in out.stdout.split()[:2])
    assert removed <= BUDGETS[pair][0] and added <= BUDGETS[pair][1], f"-{removed}/+{added}"


@pytest.mark.parametrize("pair", BUDGETS)
def test_shared_definitions_are_the_same_text(pair):
    first, second = (definitions(file) for file in pair)
    assert [name for name in SHARED if first[name] != second[name]] == []
    assert "# DIFF:" in (ROOT / pair[1]).read_text()
