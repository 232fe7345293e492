"""Clients: they take turns, and own states and slots."""

import hashlib
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path

from starlette.requests import Request

_NETWORK_BITS = 64
"""Prefix of an IPv6 address that one client has: it may choose the rest."""


@dataclass(frozen=True)
class Client:
    """The sender of a request, identified by address and key.

    Attributes:
        name: clients of different names take turns.
        owner: a hash of the key, or of the address if there is no key; owns slots and named
            states.
        is_sharing: whether all clients use the same states.
    """

    name: str
    owner: str
    is_sharing: bool = False

    @property
    def namespace(self) -> str:
        return "" if self.is_sharing else self.owner

    def folder(self, saved: Path) -> Path:
        return saved if self.is_sharing else saved / self.owner


def client_of(request: Request, api_key: str | None, *, is_sharing: bool) -> Client:
    """Returns the client of a request that has presented the key, if there is one."""
    address = request.client.host if request.client else ""
    identity = f"address\n{address}" if api_key is None else f"key\n{api_key}"
    owner = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return Client(network_of(address), owner, is_sharing)


def network_of(address: str) -> str:
    """Returns the network that counts as one client: an IPv4 address, or 64 bits of IPv6."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ip_network((int(parsed), _NETWORK_BITS), strict=False))
