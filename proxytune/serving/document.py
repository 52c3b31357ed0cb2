"""The OpenAPI document of the routes: what each takes, and in which form it answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from proxytune.serving.protocol import Chat, Completion, Tokenize

REFERENCE = "#/components/schemas/{model}"
ERRORS = {
    400: "the request asks for what cannot be done",
    401: "the key is missing or wrong",
    403: "asked by a name that is not this machine's own",
    404: "no such model",
    413: "the body is too large",
    415: "the body is not sent as JSON",
    429: "too many requests wait",
    499: "the client has gone",
    500: "a bug, or a model that failed",
    503: "the server is shutting down",
}
TEXT = {"type": "string"}
TEXT_OR_NULL = {"type": ["string", "null"]}
COUNT = {"type": "integer", "minimum": 0}


def _object(**properties: Any) -> dict[str, Any]:
    """A JSON object that has all of these, and maybe more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


CARD = _object(id=TEXT, object={"const": "model"}, created=COUNT, steering={"type": "array"})
CHOICE = _object(index=COUNT, finish_reason={"enum": ["stop", "length"]})
USAGE = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
ANSWERS = {
    "Error": _object(error=_object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL)),
    "Model": CARD,
    "Models": _object(object={"const": "list"}, data={"type": "array", "items": CARD}),
    "Reply": _object(
        id=TEXT, object=TEXT, created=COUNT, model=TEXT, choices={"type": "array", "items": CHOICE}, usage=USAGE
    ),
    "Tokens": _object(count=COUNT, tokens={"type": "array", "items": COUNT}),
    "Health": _object(status={"const": "ok"}),
}


def told(
    answer: str | None = None, *errors: int, takes: type[BaseModel] | None = None, streams: bool = False
) -> dict[str, Any]:
    """What a route's decorator says of it. answer: a name in ANSWERS, None for plain text; errors: besides 401, 403."""
    content = {"application/json": {"schema": _reference(answer)}} if answer else {"text/plain": {"schema": TEXT}}
    if streams:
        content["text/event-stream"] = {"schema": _object(data=TEXT)}
    problems = {"content": {"application/json": {"schema": _reference("Error")}}}
    responses: dict[int, Any] = {200: {"description": "the answer", "content": content}}
    responses |= {status: {"description": ERRORS[status], **problems} for status in sorted({401, 403, *errors})}
    extra: dict[str, Any] = {}
    if takes:
        body = {"application/json": {"schema": _reference(takes.__name__)}}
        extra["requestBody"] = {"required": True, "content": body}
    return {"responses": responses, "openapi_extra": extra}


def document(api: FastAPI) -> dict[str, Any]:
    found = get_openapi(title="proxytune", version="1", routes=api.routes)
    _, bodies = models_json_schema([(k, "validation") for k in (Completion, Chat, Tokenize)], ref_template=REFERENCE)
    found["components"] = {
        "schemas": bodies["$defs"] | ANSWERS,
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path == "/health" else [{"key": []}]
            operation["responses"].pop("422", None)  # FastAPI's own way to refuse, which no route here uses
    return found


def _reference(name: str) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=name)}
