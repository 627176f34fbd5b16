"""What the server takes, as OpenAPI 3.1: made from the records that requests are read into."""

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
