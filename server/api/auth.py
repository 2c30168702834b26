"""Who may ask for what. Every route but the two probes depends on it; unknown routes too.

Decided on `scope["path"]`, which no header can change, and on the key alone.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

from server.errors import Forbidden, Unauthorized
from server.settings import Settings, read_keys

OPEN_PATHS = frozenset({"/health", "/ready"})
SALT_CHARS = 32


@dataclass(frozen=True, slots=True)
class Caller:
    salt: str  # of the prefix cache: callers with different keys share nothing
    admin: bool
    known: bool = False  # by one of the configured keys


@dataclass(frozen=True, slots=True)
class Keys:
    """sha256 digests of the keys, from files and variables.

    Empty `admin`: only loopback peers are administrators, and only while there are no user keys either,
    since a proxy on this machine makes every caller a loopback peer.
    """

    user: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, user: Sequence[str], admin: Sequence[str]) -> "Keys":
        return cls(tuple(map(_stored, user)), tuple(map(_stored, admin)))

    @classmethod
    def read(cls, settings: Settings) -> "Keys":
        """Raises ValueError for a file that holds no key: an empty file must not open the server."""
        found = []
        for path, given in (
            (settings.api_keys_file, settings.api_keys),
            (settings.admin_keys_file, settings.admin_keys),
        ):
            keys = () if path is None else read_keys(path)
            if path is not None and not keys:
                raise ValueError(f"{path.name} holds no key")
            found.append((*keys, *given))
        return cls.of(*found)

    def caller(self, scope: Scope) -> Caller:
        """Raises Unauthorized."""
        key = _key(Headers(scope=scope))
        digest = _digest(key or "")
        admin = _among(digest, self.admin)
        user = _among(digest, self.user)
        if not (admin or user) and (self.user or (self.admin and is_admin_path(scope["path"]))):
            raise Unauthorized("a valid API key is required: Authorization: Bearer <key>, or x-api-key")
        local = not self.admin and not self.user and _is_loopback(scope)
        salt = digest.hex()[:SALT_CHARS] if key else ""
        return Caller(salt=salt, admin=admin or local, known=admin or user)


def authenticate(request: Request) -> Caller | None:
    """The dependency of every route. None only for the two probes."""
    return caller_of(request.app.state.services.keys, request.scope)


def caller_of(keys: Keys, scope: Scope) -> Caller | None:
    if scope["path"] in OPEN_PATHS:
        return None
    caller = keys.caller(scope)
    if is_admin_path(scope["path"]) and not caller.admin:
        raise Forbidden("this route needs an admin key" + ("" if keys.admin else " (none is configured)"))
    return caller


def salt_of(request: Request) -> str:
    """Of the caller that `authenticate` has let in."""
    keys: Keys = request.app.state.services.keys
    return keys.caller(request.scope).salt


def is_admin_path(path: str) -> bool:
    return path.startswith(("/quantize", "/admin"))


def _key(headers: Headers) -> str | None:
    """OpenAI's way to send it, or Anthropic's where there is no `Authorization` at all."""
    if "authorization" not in headers:
        return headers.get("x-api-key") or None
    scheme, _, key = headers["authorization"].partition(" ")
    return key if scheme.lower() == "bearer" and key else None


def _stored(entry: str) -> bytes:
    """A key as it is configured: itself, or "sha256:" and the digest of its bytes in hex."""
    if found := re.fullmatch(r"sha256:([0-9a-f]{64})", entry):
        return bytes.fromhex(found[1])
    return _digest(entry)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _among(digest: bytes, known: tuple[bytes, ...]) -> bool:
    """Compares with every key, so that time tells nothing about which one came near."""
    return any([hmac.compare_digest(digest, one) for one in known])


def _is_loopback(scope: Scope) -> bool:
    """The peer itself is on this machine, and is no proxy that says to speak for another."""
    if scope["client"] is None or {"forwarded", "x-forwarded-for"}.intersection(Headers(scope=scope).keys()):
        return False
    try:
        return ipaddress.ip_address(scope["client"][0]).is_loopback
    except ValueError:
        return False
