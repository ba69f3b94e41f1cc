"""The parts of JSON Schema that the schemas of the package use, strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).resolve().parents[1] / "packaging/schemas"


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    return found


TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


def faults(schema: dict[str, Any], value: Any, place: str = "") -> list[str]:
    """The parts of JSON Schema that ours uses; a field that is not described is a fault too."""
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{place}: {value!r}"]
    named = schema["type"]
    kinds = [named] if isinstance(named, str) else named
    allowed = tuple(kind for name in kinds for kind in TYPES[name])
    if not isinstance(value, allowed) or (isinstance(value, bool) and "boolean" not in kinds):
        return [f"{place}: {value!r} is no {' or '.join(kinds)}"]
    found: list[str] = []
    if isinstance(value, list) and "items" in schema:
        for item in value:
            found += faults(schema["items"], item, f"{place}[]")
    if isinstance(value, dict):
        found += [
            f"{place}.{key} is missing" for key in schema.get("required", ()) if key not in value
        ]
        described, rest = schema.get("properties"), schema.get("additionalProperties")
        for key, item in value.items():
            if described is not None and key in described:
                found += faults(described[key], item, f"{place}.{key}")
            elif rest is not None:
                found += faults(rest, item, f"{place}.{key}")
            elif described is not None:
                found.append(f"{place}.{key} is not described")
    return found
