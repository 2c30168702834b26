"""Write the generated parts of the documentation: `make docs`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs import pictures
from server.catalog.schema import models_schema

DOCS = Path(__file__).resolve().parent
TABLE = re.compile(r"(<!-- measured: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    (DOCS / "models.schema.json").write_text(json.dumps(models_schema(), indent=2) + "\n")
    page = DOCS / "quantization.md"
    page.write_text(with_tables(page.read_text(), pictures.figures()))
    pictures.main()


def with_tables(page: str, figures: dict[str, Any]) -> str:
    """The text between `measured` and `end` marks: a table of the variants that the mark names."""

    def table(mark: re.Match[str]) -> str:
        return "\n".join((mark[1].rstrip(), "", *rows(mark[2].split(), figures), "", mark[3]))

    return TABLE.sub(table, page)


def rows(names: list[str], figures: dict[str, Any]) -> Iterator[str]:
    yield "| variant | model | bits a weight | KL, prose | KL, own text | top-1, prose |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        for model, variants in figures.items():
            if one := variants.get(name):
                prose, own = one[pictures.PROSE], one[pictures.OWN]
                bits, top1 = one["bits_per_weight"], prose["top1"]
                yield (
                    f"| {name} | {model} | {bits:.2f} | {_estimate(prose)} | {_estimate(own)} | {top1:.1%} |"
                )


def _estimate(found: dict[str, Any]) -> str:
    return "{:.4f} ± {:.4f}".format(*found["kl"])


if __name__ == "__main__":
    main()
