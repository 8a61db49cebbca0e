"""The notes of a release: what CHANGELOG.md says of the version of the code. Run by ``make dist``.

Refuses a tag that is not that version, a citation of another one, and a version that the changelog still calls
unreleased or does not know.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version(root: Path) -> str:
    found = re.search(r'^__version__ = "([^"]+)"$', (root / "qz" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        sys.exit("qz/__init__.py has no __version__.")
    return found[1]


def notes(root: Path, tag: str) -> str:
    """The changelog's section of the version that ``tag`` names; without a tag, of the version of the code."""
    number = version(root)
    if tag and tag != f"v{number}":
        sys.exit(f"The tag is {tag} and the code is {number}: set __version__ in qz/__init__.py, or tag v{number}.")
    if f"\nversion: {number}\n" not in (root / "CITATION.cff").read_text(encoding="utf-8"):
        sys.exit(f"CITATION.cff has another version: write 'version: {number}' there.")
    sections = re.split(r"^## (.+)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for heading, text in zip(sections[1::2], sections[2::2], strict=True):
        if heading.split()[0] == number:
            if tag and not re.fullmatch(rf"{re.escape(number)} \(\d{{4}}-\d\d-\d\d\)", heading):
                sys.exit(f"CHANGELOG.md has '## {heading}': write '## {number} (YYYY-MM-DD)' before {tag} is released.")
            return text.strip() + "\n"
    sys.exit(f"CHANGELOG.md says nothing of {number}.")


if __name__ == "__main__":
    sys.stdout.write(notes(ROOT, sys.argv[1] if len(sys.argv) > 1 else ""))
