"""The gateway's description in OpenAPI's form, at `/openapi.json`.

It names the fields that people use; vLLM takes more, and the gateway passes on what it does not know.
"""

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 1}
_FLAG: Schema = {"type": "boolean"}


def _number(least: float, most: float) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": True}


_MESSAGE = _object(
    {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, _list(_object({"type": {"enum": ["text"]}, "text": _TEXT}, "type", "text"))]},
    },
    "role",
)

_SAMPLING: dict[str, Schema] = {
    "model": _TEXT,
    "max_tokens": _COUNT,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": {"type": "integer", "minimum": -1},
    "n": _COUNT,
    "stream": _FLAG,
    "stream_options": _object({"include_usage": _FLAG}),
    "stop": {"anyOf": [_TEXT, _list(_TEXT)]},
    "seed": {"type": "integer"},
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 2),
    "response_format": _object({"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": _object({})}),
    "ignore_eos": _FLAG,
}

_CHAT = _object(
    {
        **_SAMPLING,
        "messages": _list(_MESSAGE),
        "max_completion_tokens": _COUNT,
        "logprobs": _FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "tools": _list(_object({"type": {"enum": ["function"]}, "function": _object({"name": _TEXT}, "name")})),
    },
    "model",
    "messages",
)

_TOKENS = _list({"type": "integer", "minimum": 0})
_COMPLETION = _object(
    {
        **_SAMPLING,
        "prompt": {"anyOf": [_TEXT, _list(_TEXT), _TOKENS, _list(_TOKENS)]},
        "echo": _FLAG,
        "logprobs": {"type": "integer", "minimum": 0},
        "suffix": _TEXT,
    },
    "model",
    "prompt",
)

_RESPONSE = _object(
    {
        **{key: _SAMPLING[key] for key in ("model", "temperature", "top_p", "stream")},
        "input": {"anyOf": [_TEXT, _list(_MESSAGE)]},
        "instructions": _TEXT,
        "max_output_tokens": _COUNT,
    },
    "model",
    "input",
)
_TOKENIZE = _object({"model": _TEXT, "prompt": _TEXT, "messages": _list(_MESSAGE)}, "model")
_DETOKENIZE = _object({"model": _TEXT, "tokens": _TOKENS}, "model", "tokens")

_ERROR = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT, "param": {}, "code": {}}, "message", "type", "param", "code")},
    "error",
)


_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"enum": ["model"]},
        "created": {"type": "integer"},
        "owned_by": _TEXT,
        "root": _TEXT,
        "parent": {"type": ["string", "null"]},
        "max_model_len": {"type": ["integer", "null"]},
    },
    *("id", "object", "created", "owned_by", "root", "parent", "max_model_len"),
)
_MODELS = _object({"object": {"enum": ["list"]}, "data": _list(_MODEL)}, "object", "data")
_READINESS = _object({"ready": _FLAG, "missing": _list(_TEXT), "stale": _list(_TEXT)}, "ready", "missing", "stale")


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _answers(content: Schema, *errors: int) -> Schema:
    refused = {"description": "an error in OpenAI's form", "content": _json(_ERROR)}
    answers = {"200": {"description": "the answer", "content": content}}
    return answers | {str(status): refused for status in (*errors, 403)}


def _completion(summary: str, schema: Schema) -> Schema:
    body = {"required": True, "content": _json(schema)}
    content = {**_json(_object({})), "text/event-stream": {}}
    answers = _answers(content, 400, 401, 404, 413, 415, 429, 500, 503)
    return {"post": {"summary": summary, "requestBody": body, "responses": answers, "security": [{"key": []}]}}


def _read(
    summary: str, content: Schema, *errors: int, guarded: bool = False, parameter: str | None = None
) -> dict[str, Schema]:
    security: Schema = {"security": [{"key": []}]} if guarded else {}
    named = [{"name": parameter, "in": "path", "required": True, "schema": _TEXT}] if parameter else []
    answers = _answers(content, *errors)
    return {"get": {"summary": summary, "parameters": named, "responses": answers, **security}}


def _readiness() -> dict[str, Schema]:
    described = _read("Every model has an engine", _json(_READINESS))
    described["get"]["responses"]["503"] = {"description": "not every model has one", "content": _json(_READINESS)}
    return described


DESCRIPTION: Schema = {
    "openapi": "3.1.0",
    "info": {"title": "Danlu", "version": "1", "description": "Base models, adapters and merged models behind one /v1"},
    "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    "paths": {
        "/v1/chat/completions": _completion("Answer a conversation", _CHAT),
        "/v1/completions": _completion("Continue a text", _COMPLETION),
        "/v1/responses": _completion("Answer, in the form of OpenAI's responses", _RESPONSE),
        "/tokenize": _completion("The tokens of a prompt or of a conversation", _TOKENIZE),
        "/detokenize": _completion("The text of tokens", _DETOKENIZE),
        "/v1/models": _read("Models, adapters and aliases, with their parents", _json(_MODELS), 401, guarded=True),
        "/v1/models/{model}": _read("One of them", _json(_MODEL), 401, 404, 503, guarded=True, parameter="model"),
        "/health": _read("The gateway lives", _json(_object({"status": _TEXT}, "status"))),
        "/ready": _readiness(),
        "/metrics": _read("Counters in Prometheus' form", {"text/plain": {"schema": _TEXT}}, 401, guarded=True),
        "/openapi.json": _read("This description", _json(_object({}))),
    },
}
