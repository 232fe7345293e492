"""The JSON schema of `validate --json`, made from the dataclasses that are written.

`python -m bench.result_schema > docs/validate.schema.json` publishes it.
"""

import dataclasses
import inspect
import json
import types
import typing
from typing import Any

from rgexport.validate.checks import Check, Outcome, Quality
from rgexport.validate.measure import Comparison
from rgexport.validate.result import SCHEMA_VERSION, Scope, ValidationResult

_PLAIN: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    float: {"type": ["number", "null"], "description": "null where it is not finite"},
    types.NoneType: {"type": "null"},
}
_OUTCOME = {"enum": list(typing.get_args(Outcome))}
_ADDED: dict[type, dict[str, Any]] = {
    ValidationResult: {"schema_version": {"const": SCHEMA_VERSION}, "verdict": _OUTCOME},
    Check: {"outcome": _OUTCOME, "passed": {"type": "boolean"}},
}
"""Keys that `ValidationResult.to_dict` adds to the fields of a class."""
_COMPUTED: dict[type, dict[str, Any]] = {
    ValidationResult: {"quality": Quality | None, "verdict_scope": Scope, "twin": Comparison}
}
"""The same, as type hints."""


def result_schema() -> dict[str, Any]:
    """One result, or a list where several artifacts were compared.

    Objects may have more fields than the schema names, since later versions add some.
    """
    definitions: dict[str, Any] = {}
    one = _reference(ValidationResult, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What `rgexport validate --json` writes",
        "oneOf": [one, {"type": "array", "items": one, "minItems": 2}],
        "$defs": dict(sorted(definitions.items())),
    }


def as_text() -> str:
    return json.dumps(result_schema(), indent=1, ensure_ascii=False)


def _reference(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in definitions:
        every = typing.get_type_hints(kind)
        hints = {f.name: every[f.name] for f in dataclasses.fields(kind)}
        hints = _COMPUTED.get(kind, {}) | hints
        properties = _ADDED.get(kind, {}) | {
            name: _describe(hint, definitions) for name, hint in hints.items()
        }
        definitions[name] = {
            "type": "object",
            "description": inspect.cleandoc(kind.__doc__ or ""),
            "properties": properties,
            "required": list(properties),
        }
    return {"$ref": f"#/$defs/{name}"}


def _describe(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _reference(hint, definitions)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_describe(kind, definitions) for kind in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _describe(inner[1], definitions)}
    if origin in (list, tuple):
        return {"type": "array", "items": _describe(inner[0], definitions)}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    raise TypeError(f"no schema is known for {hint}")


if __name__ == "__main__":
    print(as_text())
