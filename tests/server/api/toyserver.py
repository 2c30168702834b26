"""`python -m tests.server.api.toyserver FOLDER PORT`: the server itself, with the toy as its model."""

import sys
from pathlib import Path

from server.app import run
from server.catalog import Catalog
from server.settings import Settings
from tests.server.pool.support import toy, write_gguf

CONTEXT = 60_000


def main(folder: Path, port: int) -> None:
    model = toy(write_gguf(folder / "toy.gguf", context=CONTEXT), preload=True, context=CONTEXT, parallel=16)
    run(Settings(cache=folder / "cache", port=port), Catalog((model,)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
