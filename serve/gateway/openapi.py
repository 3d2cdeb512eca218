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


def _answers(*errors: int) -> Schema:
    refused = {"description": "an error in OpenAI's form", "content": {"application/json": {"schema": _ERROR}}}
    return {"200": {"description": "the answer"}, **{str(status): refused for status in errors}}


def _completion(summary: str, schema: Schema) -> Schema:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    answers = _answers(400, 401, 404, 413, 415, 429, 503)
    return {"post": {"summary": summary, "requestBody": body, "responses": answers, "security": [{"key": []}]}}


def _read(summary: str, *errors: int, guarded: bool = False, parameter: str | None = None) -> Schema:
    security: Schema = {"security": [{"key": []}]} if guarded else {}
    named = [{"name": parameter, "in": "path", "required": True, "schema": _TEXT}] if parameter else []
    return {"get": {"summary": summary, "parameters": named, "responses": _answers(*errors), **security}}


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
        "/v1/models": _read("Models, adapters and aliases, with their parents", 401, guarded=True),
        "/v1/models/{model}": _read("One of them", 401, 404, guarded=True, parameter="model"),
        "/health": _read("The gateway lives"),
        "/ready": _read("Every model has an engine", 503),
        "/metrics": _read("Counters in Prometheus' form", 401, guarded=True),
        "/openapi.json": _read("This description"),
    },
}
