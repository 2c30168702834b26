"""One digest for equal values, however they were written; and for equal files, wherever they lie."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from quant.files import open_regular


def canonical_digest(value: Any) -> str:
    """Hex sha256 of a JSON value; the order of keys does not count."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def content_digest(path: Path) -> str:
    """Hex sha256 of a small file, remembered while it does not change. Raises OSError, BadSource."""
    status = path.stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=64)
def _digest_of(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
