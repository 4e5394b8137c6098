"""Checks that every relative link in our Markdown leads to a file that exists."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def broken_links() -> list[str]:
    """One line for each link that leads nowhere."""
    found = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("shoal/**/*.md")]:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                found.append(f"{page.relative_to(ROOT)}: {target} does not exist")
    return found


if __name__ == "__main__":
    problems = broken_links()
    print("\n".join(problems) or "docs: every link leads somewhere")
    sys.exit(bool(problems))
