"""Copy the frame, and the replay buffer, from sac_continuous.py into its siblings.

python tools/sync.py            write what differs
python tools/sync.py --check    exit code 1 and a list if anything differs
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "sac_continuous.py"
SIBLINGS = {
    "diffsac_continuous.py": ("Frame", "Replay")
}  # the others follow with their new edition


def section(text, name):
    """Where a section begins and ends: from its banner to the next banner or the last lines."""
    begin = re.search(rf"^# -+\n# {name}: ", text, re.M).start()
    end = re.search(r'^(# -+\n# \w+: |if __name__ == "__main__":)', text[begin + 1 :], re.M).start()
    return slice(begin, begin + 1 + end)


def synced(text, source, names):
    """`text` with its sections replaced by those of `source`."""
    for name in names:
        place = section(text, name)
        text = text[: place.start] + source[section(source, name)] + text[place.stop :]
    return text


def main():
    source, stale = (ROOT / SOURCE).read_text(), []
    for file, names in SIBLINGS.items():
        old = (ROOT / file).read_text()
        new = synced(old, source, names)
        if old != new:
            stale.append(file)
            print(f"{file} differs from {SOURCE}")
            if "--check" not in sys.argv:
                (ROOT / file).write_text(new)
    sys.exit(bool(stale and "--check" in sys.argv))


if __name__ == "__main__":
    main()
