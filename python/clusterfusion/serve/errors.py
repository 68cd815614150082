"""What a client is told when a request cannot be served, in the OpenAI API's form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}

# What the engine's messages about a request may begin with, and the API's field.
_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_logprobs": "logprobs",
    "num_prompt_logprobs": "prompt_logprobs",
    "prompt": "prompt",
    "prompt_tokens": "prompt",
    "stop_strings": "stop",
    "stop_tokens": "stop_token_ids",
    **{
        name: name
        for name in (
            "frequency_penalty",
            "logit_bias",
            "min_p",
            "n",
            "presence_penalty",
            "repetition_penalty",
            "seed",
            "stop",
            "temperature",
            "top_k",
            "top_p",
        )
    },
}


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        status: The HTTP status.
        body: The OpenAI API's error body.
        headers: More headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Takes what a client is to read.

        Args:
            status: The HTTP status; the error's type follows from it.
            message: What was expected, what was found, what to do.
            param: The request's field that is to blame.
            code: A word for programs.
            headers: More headers of the answer.
        """
        super().__init__(message)
        self.status = status
        fallback = "invalid_request_error" if status < 500 else "server_error"
        kind = _TYPES.get(status, fallback)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = dict(headers or {})

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


class ClientGoneError(Exception):
    """The client has closed the connection: nobody reads an answer."""


def of_validation(error: ValidationError) -> ApiError:
    """Names the first field that is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    if not place and first["type"] == "value_error":  # of several fields: it begins with one
        return ApiError(400, message, param=message.split()[0], code="invalid_value")
    found = "" if first["type"] == "missing" else f"; found {_shown(first['input'])}"
    return ApiError(
        400,
        f"{'.'.join(place) or 'the body'}: {message}{found}",
        param=place[0] if place else None,
        code="missing_field" if first["type"] == "missing" else "invalid_value",
    )


def _shown(value: Any) -> str:
    """A value as a short piece of text, however large it is."""
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def of_engine(error: Exception, is_chat: bool) -> ApiError:
    """Puts what the engine raises at a request into the API's terms.

    Args:
        error: What it raises.
        is_chat: Whether the request has messages rather than a prompt.
    """
    message = str(error)
    if isinstance(error, ValueError | IndexError | TypeError | MemoryError | FileNotFoundError):
        named = re.match(r"(?:requests\[\d+\]: )?(?:the )?(\w+)", message)
        field = _FIELDS.get(named.group(1)) if named else None
        if is_chat and field == "prompt":
            field = "messages"
        return ApiError(400, message, param=field, code="invalid_value")
    return ApiError(500, message, code="engine_error")
