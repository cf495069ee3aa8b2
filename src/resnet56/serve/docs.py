"""The API's description as a page: a reader needs no script and nothing from elsewhere."""

from collections.abc import Mapping
from typing import Any


def chapters(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An OpenAPI description as what the template shows: a chapter an operation."""
    components = description.get("components", {}).get("schemas", {})
    return [
        {
            "method": method.upper(),
            "path": path,
            "summary": operation["summary"],
            "text": operation.get("description", "").split("\n\n"),
            "options": [_option(one) for one in operation.get("parameters", ())],
            "bodies": _contents(operation.get("requestBody", {}), components),
            "answers": [
                {
                    "status": status,
                    "meaning": answer["description"],
                    "contents": _contents(answer, components),
                }
                for status, answer in sorted(operation["responses"].items())
            ],
        }
        for path, operations in description["paths"].items()
        for method, operation in operations.items()
    ]


def _option(parameter: Mapping[str, Any]) -> dict[str, Any]:
    schema = parameter["schema"]
    kind = _kind(schema)
    if "minimum" in schema and "maximum" in schema:
        kind += f" from {schema['minimum']} to {schema['maximum']}"
    return {
        "name": parameter["name"],
        "kind": kind,
        "default": str(schema.get("default", "")).lower(),
        "about": parameter.get("description", ""),
    }


def _contents(holder: Mapping[str, Any], components: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The media types of a body or an answer, and the fields of each."""
    return [
        {"type": media_type, "fields": list(_fields(content.get("schema", {}), components))}
        for media_type, content in holder.get("content", {}).items()
    ]


def _fields(schema: Mapping[str, Any], components: Mapping[str, Any], prefix: str = "") -> Any:
    """Name, kind and meaning of every field, those within fields after a dot."""
    schema = _resolve(schema, components)
    for name, field in schema.get("properties", {}).items():
        inner = _resolve(field, components)
        kind, path = _kind(inner), prefix + name
        yield {"name": path, "kind": kind, "about": inner.get("description", "")}
        items = _resolve(inner.get("items", {}), components)
        if "properties" in items:
            yield from _fields(items, components, f"{path}[].")


def _resolve(schema: Mapping[str, Any], components: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a $ref stands for; of several possible types, the one that is not null."""
    if "$ref" in schema:
        return components[schema["$ref"].rpartition("/")[2]]  # type: ignore[no-any-return]
    if "anyOf" in schema:
        real = next(one for one in schema["anyOf"] if one.get("type") != "null")
        return {**schema, **real}
    return schema


def _kind(schema: Mapping[str, Any]) -> str:
    """`list of string` and the like."""
    if "const" in schema:
        return f'"{schema["const"]}"'
    if schema.get("type") == "array":
        inner = _kind(schema.get("items", {}))
        return f"list of {inner}"
    if schema.get("format") == "binary":
        return "file"
    if "contentEncoding" in schema:
        return f"{schema['contentEncoding']} string"
    return str(schema.get("type", "object"))
