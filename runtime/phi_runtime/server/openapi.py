"""What the server takes, as OpenAPI 3.1: made from the records that requests are read into."""

from html import escape
from typing import Any

import msgspec

from phi_runtime.server.requests import ChatRequest, ResponsesRequest, TextRequest
from phi_runtime.version import __version__

# The body and what the endpoint does.
_POSTS: dict[str, tuple[type, str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation."),
    "/v1/completions": (TextRequest, "Continue texts or tokens."),
    "/v1/responses": (ResponsesRequest, "Answer a conversation, in the Responses API's plain form."),
}
_GETS = {
    "/v1/models": "The model that is served.",
    "/health": "Whether the server is there, and how many requests are waiting.",
    "/metrics": "Counters as Prometheus reads them.",
    "/openapi.json": "This description.",
    "/docs": "This description, as a page.",
    "/": "A page to chat on.",
}


def openapi(model: str) -> dict[str, Any]:
    """The description; errors are `{"error": {"message", "type", "param", "code"}}`."""
    kinds = [kind for kind, _ in _POSTS.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    refused = {"description": "What was wrong, in error.message."}
    answers = {"200": {"description": "The answer, or its events where stream is set."}, "4XX": refused, "5XX": refused}
    paths: dict[str, Any] = {
        path: {"post": _operation(said) | {"requestBody": _body(schema), "responses": answers}}
        for (path, (_, said)), schema in zip(_POSTS.items(), schemas, strict=True)
    }
    paths |= {
        path: {"get": _operation(said) | {"responses": {"200": {"description": said}}}} for path, said in _GETS.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"phi-run serve: {model}", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "Where --token is set."}},
        },
    }


def _operation(said: str) -> dict[str, Any]:
    return {"summary": said, "security": [{}, {"token": []}]}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def page(description: dict[str, Any]) -> str:
    """The description as HTML, without scripts."""
    parts = [f"<h1>{escape(description['info']['title'])}</h1><p>Version {escape(description['info']['version'])}; "]
    parts.append("<a href='/openapi.json'>OpenAPI 3.1</a>. Errors are <code>{&quot;error&quot;: {...}}</code>.</p>")
    for path, methods in description["paths"].items():
        for method, said in methods.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(said['summary'])}</p>")
            body = said.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            name = body.get("$ref", "").rsplit("/", 1)[-1]
            if name:
                parts.append(_fields(description["components"]["schemas"][name]))
    parts.append("<h1>Records</h1>")
    taken = {kind.__name__ for kind, _ in _POSTS.values()}
    for name, schema in description["components"]["schemas"].items():
        if name not in taken:
            parts.append(f"<h2 id='{escape(name)}'>{escape(name)}</h2><p>{escape(schema.get('description', ''))}</p>")
            parts.append(_fields(schema))
    return _PAGE.replace("BODY", "\n".join(parts))


def _fields(schema: dict[str, Any]) -> str:
    needed = schema.get("required", ())
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' if name in needed else ''}<td>{_kind(field)}"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"<table><tr><th>field (* needed)<th>type{''.join(rows)}</table>" if rows else ""


def _kind(field: dict[str, Any]) -> str:
    """A field's type, in a few words."""
    if "$ref" in field:
        name = escape(field["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in field:
        return " or ".join(_kind(f) for f in field["anyOf"] if f.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"<code>{escape(str(v))}</code>" for v in field["enum"] if v is not None)
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    limits = [f"{word} {field[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in field]
    return escape(" ".join([str(field.get("type", "any")), *limits]))


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>phi-run serve</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 0; } p { margin: .3rem 0; }
table { border-collapse: collapse; margin: .4rem 0; } td, th { text-align: left; padding: .15rem 1rem .15rem 0; }
tr { border-bottom: 1px solid #8884; } @media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; }
a { color: #8bf; } }
</style>
BODY
</html>
"""
