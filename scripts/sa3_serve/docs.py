"""Render the OpenAPI document as a static page without scripts or network requests."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any


def render(document: Mapping[str, Any]) -> str:
    """Return a page of every route and field of an OpenAPI document."""
    info = document["info"]
    parts = [f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}</h1>"]
    parts.append('<p>The same as JSON: <a href="/openapi.json">/openapi.json</a></p>')
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(route.get('summary', ''))}. {html.escape(route.get('description', ''))}</p>")
            for field in route.get("parameters", []):
                parts.append(f"<p><code>?{html.escape(field['name'])}</code> {html.escape(_about(field))}</p>")
            for kind, body in route.get("requestBody", {}).get("content", {}).items():
                parts.append(f"<h3>{html.escape(kind)}</h3>{_fields(body['schema'])}")
    head = '<meta charset="utf-8"><title>sa3_serve: reference</title><link rel="stylesheet" href="/page.css">'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>'


def _fields(schema: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_about(field))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _about(field: Mapping[str, Any]) -> str:
    """Return the description, values and range of a field."""
    variants = [field, *field.get("anyOf", []), field.get("schema", {})]
    limits = {
        key: variant[key]
        for variant in variants
        for key in ("minimum", "maximum", "maxLength", "enum")
        if key in variant
    }
    parts = [str(field.get("description", "")), *(f"{key} {value}" for key, value in limits.items())]
    if "default" in field:
        parts.append(f"default {field['default']}")
    return "; ".join(part for part in parts if part)
