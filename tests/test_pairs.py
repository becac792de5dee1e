"""Pairs are read side by side: small diffs, shared definitions of exactly the same text."""

import ast
import difflib
import re
import tomllib

import pytest

from tests.common import ROOT, SCRIPTS
from tools import pairs, sync

SHARED = {  # definitions, and methods, of the same text in both files
    "sac → diffsac": "SoftQNetwork squash critic_loss actor_loss temperature_loss",
    "ppo → diffppo": "mlp squash log_normal gae actor_loss",
    "wpo → diffwpo": "SoftQNetwork squash critic_loss temperature_loss",
    "crossq → dime": """lecun_normal BatchRenorm SoftQNetwork squash project critic_loss actor_loss
    temperature_loss""",
    "sac → crossq": "squash Actor temperature_loss",
    "sac → wpo": "SoftQNetwork squash Actor critic_loss",
    "diffsac → diffwpo": """SoftQNetwork squash Chain Actor.kernels Actor.control Actor.end_cost
    Actor.outcome Actor.sample Actor.mean_action critic_loss latent_critic_network
    latent_critic latent_critic_loss temperature_loss""",
}
LINES = {  # above the frame, and whole
    "sac_continuous.py": (242, 824),
    "diffsac_continuous.py": (383, 965),
    "wpo_continuous.py": (281, 863),
    "diffwpo_continuous.py": (390, 972),
    "ppo_continuous.py": (280, 858),
    "diffppo_continuous.py": (370, 943),
    "crossq_continuous.py": (340, 953),
    "dime.py": (405, 1018),
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


each_pair = pytest.mark.parametrize("pair", pairs.PAIRS, ids=pairs.title)


@each_pair
def test_diff_stays_within_its_budget(pair):
    removed, added = pairs.changed(pair)
    assert removed <= pair.removed and added <= pair.added, f"-{removed}/+{added}"


def test_readme_has_the_table_of_the_pairs():
    assert pairs.readme_table() in (ROOT / "README.md").read_text(), "run tools/pairs.py"


def test_readme_states_the_lengths_of_the_scripts():
    sac, ppo = (len((ROOT / f"{x}_continuous.py").read_text().splitlines()) for x in ("sac", "ppo"))
    assert f"| this repository | 1 ({sac}) | 1 ({ppo}) |" in (ROOT / "README.md").read_text()


@each_pair
def test_shared_definitions_are_the_same_text(pair):
    first, second = (definitions(file) for file in pair[:2])
    assert [name for name in SHARED[pairs.title(pair)].split() if first[name] != second[name]] == []
    diff = list(difflib.ndiff(first["main"].splitlines(), second["main"].splitlines()))
    assert sum(line[0] in "+-" for line in diff) <= pair.main


@each_pair
def test_changed_lines_name_their_equation(pair):
    vanilla, changed = ((ROOT / file).read_text() for file in pair[:2])
    diff = difflib.ndiff(vanilla.splitlines(), changed.splitlines())
    assert sum("# DIFF: (" in line for line in diff if line[0] == "+") >= 2
    assert changed.count("# DIFF:") == changed.count("# DIFF: (")
    docstring = ast.get_docstring(ast.parse(changed))
    for label in re.findall(r"# DIFF: (.*)", changed):
        for number in re.findall(r"\(W?\d+\)", label):
            assert number in docstring, label


def test_a_copied_file_carries_its_requirements():
    """Inline script metadata (PEP 723), by the standard's own expression: `uv run` reads it."""
    regex = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = re.finditer(regex, (ROOT / "sac_continuous.py").read_text())
    lines = [line[2:] for line in block["content"].splitlines()]
    metadata = tomllib.loads("\n".join(lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert metadata["requires-python"].replace(">=3.", "py3") == project["target-version"]
    wanted = [line for line in (ROOT / "requirements.txt").read_text().split() if line]
    assert metadata["dependencies"] == wanted


def test_shared_sections_are_copies():
    files = {f"{script.__name__}.py" for script in SCRIPTS}
    assert set(LINES) == files == set(sync.SECTIONS["Frame"])
    for name, (first, *others) in sync.SECTIONS.items():
        source = (ROOT / first).read_text()
        for file in others:
            text = (ROOT / file).read_text()
            assert sync.synced(text, source, name) == text, "run tools/sync.py"
            place = sync.section(text, name)
            drifted = text[: place.stop] + "# more\n" + text[place.stop :]
            assert drifted != text and sync.synced(drifted, source, name) == text


@pytest.mark.parametrize("file", LINES)
def test_lengths(file):
    lines = (ROOT / file).read_text().splitlines()
    above = next(i for i, line in enumerate(lines) if line.startswith("# Frame: ")) - 1
    length = len(definitions(file)["main"].splitlines())
    longest = max(map(len, lines))
    assert above <= LINES[file][0] and len(lines) <= LINES[file][1], (above, len(lines))
    assert length <= MOST_OF_MAIN and longest <= 100, (length, longest)
