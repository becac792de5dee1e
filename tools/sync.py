"""Copy the sections that several scripts share from the first of each list into the others.

python tools/sync.py            write what differs
python tools/sync.py --check    exit code 1 and a list if anything differs
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFF_POLICY = [
    "sac_continuous.py",
    "diffsac_continuous.py",
    "wpo_continuous.py",
    "diffwpo_continuous.py",
    "crossq_continuous.py",
    "dime.py",
]
ON_POLICY = ["ppo_continuous.py", "diffppo_continuous.py"]
RETURNS = [*ON_POLICY, "crossq_continuous.py", "dime.py"]
SECTIONS = {
    "Frame": OFF_POLICY + ON_POLICY,
    "Replay": OFF_POLICY,
    "Rollout": ON_POLICY,
    "Returns": RETURNS,
}


def section(text, name):
    """Where a section begins and ends: from its banner to the next banner or the last lines."""
    begin = re.search(rf"^# -+\n# {name}: ", text, re.M).start()
    end = re.search(r'^(# -+\n# \w+: |if __name__ == "__main__":)', text[begin + 1 :], re.M).start()
    return slice(begin, begin + 1 + end)


def synced(text, source, name):
    """`text` with the section `name` of `source` in the place of its own."""
    place = section(text, name)
    return text[: place.start] + source[section(source, name)] + text[place.stop :]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit code 1 if stale")
    check, stale = parser.parse_args().check, []
    for name, (first, *others) in SECTIONS.items():
        source = (ROOT / first).read_text()
        for file in others:
            old = (ROOT / file).read_text()
            new = synced(old, source, name)
            if old != new:
                stale.append(file)
                what = "differs from" if check else "replaced by"
                print(f"{file}: {name} {what} that of {first}")
                if not check:
                    (ROOT / file).write_text(new)
    sys.exit(bool(stale and check))


if __name__ == "__main__":
    main()
