"""The OpenAPI document: what the server takes and gives."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from clusterfusion.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_REFERENCE = "#/components/schemas/"
_STRING: dict[str, Any] = {"type": "string"}
_INTEGER: dict[str, Any] = {"type": "integer"}
_ANYTHING: dict[str, Any] = {}


def document(version: str) -> dict[str, Any]:
    """Makes the document for a version of the package."""
    bodies: list[type[BaseModel]] = [
        CompletionRequest,
        ChatRequest,
        TokenizeRequest,
        DetokenizeRequest,
    ]
    _, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=_REFERENCE + "{model}"
    )
    schemas = found["$defs"] | _answers()
    return {
        "openapi": "3.1.0",
        "info": {"title": "ClusterFusion", "version": version},
        "paths": {
            "/v1/completions": {
                "post": _posts("Text behind a prompt", CompletionRequest, "Completion", True)
            },
            "/v1/chat/completions": {
                "post": _posts("The next message of a chat", ChatRequest, "ChatCompletion", True)
            },
            "/tokenize": {"post": _posts("Token ids of a text", TokenizeRequest, "Tokens")},
            "/detokenize": {"post": _posts("The text of token ids", DetokenizeRequest, "Text")},
            "/v1/models": {"get": _gets("Models", "Models")},
            "/v1/models/{name}": {
                "get": _gets("A model", "Model")
                | {
                    "parameters": [
                        {"name": "name", "in": "path", "required": True, "schema": _STRING}
                    ]
                }
            },
            "/tokenizer_info": {"get": _gets("Special tokens, chat template", "TokenizerInfo")},
            "/health": {"get": _gets("Whether it takes requests", "Status")},
            "/health/live": {"get": _gets("Whether it runs", "Status")},
            "/version": {"get": _gets("The package's version", "Version")},
            "/metrics": {
                "get": {
                    "summary": "Figures for Prometheus",
                    "responses": {
                        "200": {
                            "description": "Prometheus' text format",
                            "content": {"text/plain": {"schema": _STRING}},
                        }
                    },
                }
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _posts(summary: str, body: type[BaseModel], answer: str, streams: bool = False) -> Any:
    content = _json(answer)
    if streams:
        content |= {"text/event-stream": {"schema": _STRING}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body.__name__)},
        "responses": {"200": {"description": summary, "content": content}, **_errors()},
    }


def _gets(summary: str, answer: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": _json(answer)}, **_errors()},
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE + name}}}


def _errors() -> dict[str, Any]:
    told = {
        "400": "A field is wrong",
        "401": "No valid API key",
        "404": "There is no such model",
        "413": "The body is too large",
        "429": "Too much is under way: see Retry-After",
        "503": "The server is shutting down, or its engine failed",
        "504": "The deadline has passed",
    }
    return {
        status: {"description": text, "content": _json("Error")} for status, text in told.items()
    }


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required)}


def _answers() -> dict[str, Any]:
    error = _object(
        {
            "message": _STRING,
            "type": _STRING,
            "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]},
        }
    )
    usage = _object(
        {"prompt_tokens": _INTEGER, "completion_tokens": _INTEGER, "total_tokens": _INTEGER}
    )
    reason = {"enum": ["stop", "length", "abort"]}
    extras = {"prompt_token_ids": _ANYTHING, "token_ids": _ANYTHING, "prompt_logprobs": _ANYTHING}
    common = {"index": _INTEGER, "logprobs": {"type": ["object", "null"]}, "finish_reason": reason}
    message = _object({"role": {"const": "assistant"}, "content": _STRING})

    def generated(name: str, choice: dict[str, Any]) -> dict[str, Any]:
        return _object(
            {
                "id": _STRING,
                "object": {"const": name},
                "created": _INTEGER,
                "model": _STRING,
                "choices": {"type": "array", "items": choice},
                "usage": usage,
            }
        )

    model = _object(
        {"id": _STRING, "object": {"const": "model"}, "created": _INTEGER, "owned_by": _STRING},
        {"max_model_len": _INTEGER},
    )
    token_ids = {"type": "array", "items": _INTEGER}
    return {
        "Error": _object({"error": error}),
        "Completion": generated("text_completion", _object({**common, "text": _STRING}, extras)),
        "ChatCompletion": generated(
            "chat.completion", _object({**common, "message": message}, extras)
        ),
        "Model": model,
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": model}}),
        "Tokens": _object(
            {"count": _INTEGER, "max_model_len": _INTEGER, "tokens": token_ids},
            {"token_strs": {"type": "array", "items": _STRING}},
        ),
        "TokenizerInfo": {"type": "object"},
        "Text": _object({"prompt": _STRING}),
        "Status": _object({"status": _STRING}),
        "Version": _object({"version": _STRING}),
    }
