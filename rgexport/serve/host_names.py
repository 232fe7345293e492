"""Names of hosts in the addresses of HTTP requests."""

import ipaddress
import re
from collections.abc import Collection

ANY = "*"
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\s\[\]:/?#@,]+)(:\d{1,5})?", re.IGNORECASE)


def host_name(authority: str) -> str | None:
    """Returns the name or address of `host:port` in lower case without brackets, if valid."""
    match = _AUTHORITY.fullmatch(authority)
    return match[1].strip("[]").removesuffix(".").lower() if match else None


def is_allowed(authority: str, names: Collection[str]) -> bool:
    """Returns whether a request's `Host` is one of `names`, or an address instead of a name.

    A page can let its own name point to this machine (DNS rebinding), and is then of the same
    origin as a server here. It cannot do that with an address.
    """
    name = host_name(authority)
    return name is not None and (ANY in names or name in names or _is_address(name))


def authority_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
