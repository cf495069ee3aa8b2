"""Prepare the OpenAPI description for the reference page, which works without JavaScript."""

from collections.abc import Mapping
from typing import Any


def operations(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Convert an OpenAPI description to template variables, with one dictionary per operation."""
    components = description.get("components", {}).get("schemas", {})
    return [
        {
            "method": method.upper(),
            "path": path,
            "summary": operation["summary"],
            "paragraphs": operation.get("description", "").split("\n\n"),
            "parameters": [_parameter(item) for item in operation.get("parameters", ())],
            "bodies": _contents(operation.get("requestBody", {}), components),
            "responses": [
                {
                    "status": status,
                    "description": response["description"],
                    "contents": _contents(response, components),
                }
                for status, response in sorted(operation["responses"].items())
            ],
        }
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]


def _parameter(parameter: Mapping[str, Any]) -> dict[str, Any]:
    schema = parameter["schema"]
    type_name = _type_name(schema)
    if "minimum" in schema and "maximum" in schema:
        type_name += f" from {schema['minimum']} to {schema['maximum']}"
    return {
        "name": parameter["name"],
        "type": type_name,
        "default": str(schema.get("default", "")).lower(),
        "description": parameter.get("description", ""),
    }


def _contents(holder: Mapping[str, Any], components: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the media types of a request or response body, and the fields of each media type."""
    return [
        {"type": media_type, "fields": list(_fields(content.get("schema", {}), components))}
        for media_type, content in holder.get("content", {}).items()
    ]


def _fields(schema: Mapping[str, Any], components: Mapping[str, Any], prefix: str = "") -> Any:
    """Yield the path, type and description of every field, including nested ones."""
    schema = _resolve(schema, components)
    for name, field in schema.get("properties", {}).items():
        inner = _resolve(field, components)
        path = prefix + name
        yield {
            "name": path,
            "type": _type_name(inner),
            "description": inner.get("description", ""),
        }
        items = _resolve(inner.get("items", {}), components)
        if "properties" in items:
            yield from _fields(items, components, f"{path}[].")


def _resolve(schema: Mapping[str, Any], components: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a $ref, or select the non-null type of an optional field."""
    if "$ref" in schema:
        return components[schema["$ref"].rpartition("/")[2]]  # type: ignore[no-any-return]
    if "anyOf" in schema:
        non_null = next(option for option in schema["anyOf"] if option.get("type") != "null")
        return {**schema, **non_null}
    return schema


def _type_name(schema: Mapping[str, Any]) -> str:
    """Return a readable type, such as `list of string`."""
    if "const" in schema:
        return f'"{schema["const"]}"'
    if schema.get("type") == "array":
        item_type = _type_name(schema.get("items", {}))
        return f"list of {item_type}"
    if schema.get("format") == "binary":
        return "file"
    if "contentEncoding" in schema:
        return f"{schema['contentEncoding']} string"
    return str(schema.get("type", "object"))
