"""Write the generated parts of the documentation and check every relative link.

`make docs` runs it; it ends with status 1 and one line for each link that leads nowhere.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from server.catalog.schema import models_schema

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)\s#]+)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def write_schema(target: Path) -> None:
    target.write_text(json.dumps(models_schema(), indent=2) + "\n")


def pages(root: Path) -> Iterator[Path]:
    yield from sorted(root.glob("*.md"))
    for folder in ("docs", "benchmarks", "models"):
        yield from sorted((root / folder).rglob("*.md"))


def dead_links(page: Path) -> list[str]:
    """Links of one page that name no file or folder; links to other hosts are not looked at."""
    text = FENCE.sub("", page.read_text())
    relative = [link for link in LINK.findall(text) if "://" not in link]
    return [link for link in relative if not (page.parent / link).exists()]


def main() -> int:
    write_schema(ROOT / "docs" / "models.schema.json")
    found = [(page, link) for page in pages(ROOT) for link in dead_links(page)]
    for page, link in found:
        sys.stderr.write(f"{page.relative_to(ROOT)}: {link} does not exist\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
