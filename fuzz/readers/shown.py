"""What `inspect` prints of an input."""

import zlib
from typing import Any

from rgexport.artifacts.describe import as_json, as_text

_ONE_OF = 8


def shown(found: dict[str, Any], data: bytes) -> str:
    """Its JSON, and its tables where their layout can matter.

    Laying tables out takes as long as reading the file. JSON escapes whatever a terminal would
    obey: where there is nothing of that kind, the tables of one input in eight are made.
    """
    text = as_json(found)
    return text + as_text(found) if "\\" in text or zlib.crc32(data) % _ONE_OF == 0 else text
