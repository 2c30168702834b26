"""Write the generated parts of the documentation: `make docs`."""

import json
from pathlib import Path

from server.catalog.schema import models_schema

DOCS = Path(__file__).resolve().parent


def main() -> None:
    (DOCS / "models.schema.json").write_text(json.dumps(models_schema(), indent=2) + "\n")


if __name__ == "__main__":
    main()
