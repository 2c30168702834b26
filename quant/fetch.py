"""One file of a hub over HTTP into a folder of blobs: resumed where it broke off, checked before it counts.

What has come of a file lies in "<checksum>.part" and outlives the process. A file bears its checksum as its
name only after its bytes gave it.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import BadSource, DownloadBroken
from quant.files import shown
from quant.locks import lock_file

CHUNK = 1 << 20  # bytes
PATIENCE = 6  # tries in a row that bring nothing
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds after each of them
TIMEOUT_S = 30.0  # without a byte
BUSY = frozenset({408, 429, 500, 502, 503, 504})
Advance = Callable[[int], None]  # bytes that came; negative: that are thrown away


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A file as the hub describes it. `checksum`: sha256, or the sha1 of a git blob (40 digits)."""

    name: str
    url: str
    size: int
    checksum: str


class Broken(Exception):
    """The transfer ended early. One line."""


def fetch(remote: Remote, blobs: Path, advance: Advance) -> Path:
    """The file, downloaded if it is not there.

    Raises BadSource naming it for a wrong checksum, DownloadBroken where nothing comes any more.
    """
    blob = blobs / remote.checksum
    blobs.mkdir(parents=True, exist_ok=True)
    with lock_file(blobs / f"{remote.checksum}.lock"):
        if blob.exists():
            advance(remote.size)
            return blob
        part = blobs / f"{remote.checksum}.part"
        resumed = part.exists()
        _complete(remote, part, advance)
        if (found := checksum_of(part, remote)) != remote.checksum and resumed:  # its beginning may be older
            part.unlink()
            advance(-remote.size)
            _complete(remote, part, advance)
            found = checksum_of(part, remote)
        if found != remote.checksum:
            part.unlink()
            kind = "sha256" if len(remote.checksum) == 64 else "git sha1"
            raise BadSource(
                f"{shown(remote.name)}: its {kind} is {found}, but the hub says {remote.checksum}"
            )
        part.replace(blob)
    return blob


def checksum_of(file: Path, remote: Remote) -> str:
    """Of the kind that the hub gives."""
    if len(remote.checksum) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {remote.size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _complete(remote: Remote, part: Path, advance: Advance) -> None:
    """`part` has the file's size when it returns."""
    advance(part.stat().st_size if part.exists() else 0)
    tries = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have > remote.size:
            part.unlink()
            advance(-have)
            continue
        if have == remote.size and part.exists():
            return
        try:
            _go_on(remote, part, have, advance)
        except Broken as error:
            came = part.stat().st_size > have if part.exists() else False
            tries = 0 if came else tries + 1
            if tries >= PATIENCE:
                raise DownloadBroken(
                    f"{shown(remote.name)} broke off after {have:,} of {remote.size:,} bytes: {error}"
                ) from error
            time.sleep(PAUSES[min(tries, len(PAUSES) - 1)])


def _go_on(remote: Remote, part: Path, have: int, advance: Advance) -> None:
    """Ask for what is missing and append it. Raises Broken; what came until then is kept."""
    with _answer(remote, have) as response, part.open("ab", buffering=0) as stream:
        if have and not _continues(response, have):
            stream.truncate(0)
            advance(-have)
            have = 0
        for chunk in response.iter_raw():
            room = remote.size - have
            stream.write(chunk[:room])
            have += min(len(chunk), room)
            advance(min(len(chunk), room))
            if len(chunk) > room:
                raise BadSource(
                    f"{shown(remote.name)} is longer than the {remote.size:,} bytes that the hub says"
                )
        os.fsync(stream.fileno())
    if have < remote.size:
        raise Broken("the connection ended")


def _continues(response: Any, have: int) -> bool:
    """Whether the answer begins where we ended; else it is the whole file."""
    span = str(response.headers.get("content-range", ""))
    return bool(response.status_code == 206 and span.startswith(f"bytes {have}-"))


@contextmanager
def _answer(remote: Remote, have: int) -> Iterator[Any]:
    """The hub's answer to a request for the bytes from `have` on, to be read inside.

    Raises Broken, or the hub's own refusal.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # its client's
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    ask = get_session().stream("GET", remote.url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S)
    try:
        with ask as response:
            if response.status_code in BUSY:
                raise Broken(f"the hub answers {response.status_code}")
            hf_raise_for_status(response)
            yield response
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise Broken(type(error).__name__) from error
