"""Which Host headers are answered: a page of another site that points its own name at this machine is not."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from server.settings import Settings, is_loopback

WILDCARDS = frozenset({"0.0.0.0", "::", ""})
HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%]{2,64}\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Hosts:
    """Names are compared without their port, in lower case.

    Rebinding needs a name, so that an address in the header proves that none was used: addresses are answered
    where the server listens beyond loopback, and loopback addresses everywhere.
    """

    names: frozenset[str]
    addresses: bool = False
    every: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "Hosts":
        names = frozenset(_bare(name) for name in ("localhost", settings.host, *settings.allowed_hosts))
        return cls(names, addresses=not is_loopback(settings.host), every="*" in settings.allowed_hosts)

    def allow(self, values: Iterable[str]) -> bool:
        """`values`: every Host header of a request; none at all is what HTTP/1.0 sends."""
        given = list(values)
        if len(given) > 1:
            return False
        if not given:
            return True
        found = HOST.fullmatch(given[0])
        return found is not None and self._known(_bare(found["name"]))

    def _known(self, name: str) -> bool:
        if self.every or name in self.names - WILDCARDS or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.addresses or address.is_loopback


def _bare(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()
