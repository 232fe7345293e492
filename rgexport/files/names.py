"""Names of files: their endings, and what other systems would read into them."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE
)


def without_ending(name: str, endings: Iterable[str]) -> str:
    """Returns `name` without the one of `endings` that it has.

    Any other dot belongs to the name: `Path.stem` would turn `text-4.25` into `text-4`.
    """
    return name.removesuffix(next(filter(name.endswith, endings), ""))


def stays_inside(name: str) -> bool:
    """Whether a path, taken from a file of others, leads into its folder on every system."""
    path = PurePosixPath(name)
    plain = name.isprintable() and not set(name) & set("\\:") and path.parts
    return bool(plain) and not path.is_absolute() and ".." not in path.parts


def windows_objection(name: str) -> str:
    """Returns why Windows could not store a file of this name, or "" if it could."""
    if _DEVICE.fullmatch(name):
        return "is the name of a device"
    if bad := sorted({c for c in name if c in '<>:"|?*\\/' or c < " "}):
        return f"has {' '.join(map(repr, bad))}, which names cannot have"
    return "ends in a dot or space, which would be lost" if name[-1:] in (".", " ") else ""
