"""The requests that the server understands: the OpenAI API's fields, and vLLM's extras."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

INT32_MAX = 2**31 - 1
MOST_LOGPROBS = 100  # of the likeliest tokens at a place

_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS_SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= INT32_MAX


def _check_tokens(value: list[Any], name: str) -> None:
    for index, token in enumerate(value):
        if not _is_token(token):
            raise ValueError(f"expected token ids from 0 to {INT32_MAX} at {name}[{index}]")


def _prompt(value: Any) -> Any:
    """Checks a prompt, or a list of prompts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            "expected a text, a list of texts, a list of token ids or a list of such lists"
        )
    if type(value[0]) is int:
        _check_tokens(value, "prompt")
        return value
    for index, one in enumerate(value):
        if isinstance(one, str):
            continue
        if not isinstance(one, list) or not one:
            raise ValueError(f"expected a text or a list of token ids at prompt[{index}]")
        _check_tokens(one, f"prompt[{index}]")
    return value


def _stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if value is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a text or a list of texts")
    if len(texts) > 64:
        raise ValueError("expected 64 texts at most")
    if not all(texts):
        raise ValueError("an empty text stands at the beginning of every text: leave it out")
    return texts


def _logit_bias(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("expected an object of token ids and numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11):
            raise ValueError("expected token ids, as strings of digits, for names")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"expected a number from -100 to 100 for token {key}")
        biases[int(key)] = float(bias)
    _check_tokens(list(biases), "logit_bias")
    return biases


def _content(value: Any) -> Any:
    """A message's text: a string, or parts of type text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a text or a list of parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("only parts of type 'text' are understood")
        if not isinstance(part.get("text"), str):
            raise ValueError("expected a text in each part")
    return "".join(part["text"] for part in value)


def _schema(*choices: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(choices)})


_NULL = {"type": "null"}
Prompt = Annotated[
    Any,
    AfterValidator(_prompt),
    _schema(
        {"type": "string"},
        _TEXTS_SCHEMA,
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1},
    ),
]
Stop = Annotated[
    Any,
    AfterValidator(_stop),
    _schema(
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 64},
        _NULL,
    ),
]
LogitBias = Annotated[
    Any,
    AfterValidator(_logit_bias),
    _schema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        _NULL,
    ),
]
Content = Annotated[
    Any,
    AfterValidator(_content),
    _schema(
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        _NULL,
    ),
]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    def unknown_fields(self) -> list[str]:
        """Names of fields that are not part of the schema, those of fields included."""
        names = list(self.model_extra or {})
        for name, value in self:
            if isinstance(value, _Model):
                names += [f"{name}.{inner}" for inner in value.unknown_fields()]
        return sorted(names)


class StreamOptions(_Model):
    """What a stream tells beside the text.

    Attributes:
        include_usage: Whether a last chunk tells the numbers of tokens.
    """

    include_usage: bool | None = None


class GenerationRequest(_Model):
    """What completions and chat completions share; ``null`` stands for a field's default."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    logit_bias: LogitBias = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    # Extras, by vLLM's names.
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    prompt_logprobs: Alternatives | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    timeout: Annotated[float, Field(gt=0, le=1e6)] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options may be given with stream: true only")
        return self


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    echo: bool | None = None
    logprobs: Alternatives | None = None
    suffix: Literal[""] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported but for best_of = n: ask for n and choose")
        return self


class Message(_Model):
    """One turn of a chat."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content = None
    name: str | None = None


class ResponseFormat(_Model):
    """The form of the answer: text, and nothing else is supported."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    response_format: ResponseFormat | None = None
    tools: None = None
    functions: None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs may be given with logprobs: true only")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self


class TokenizeRequest(_Model):
    """The body of ``POST /tokenize``."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Model):
    """The body of ``POST /detokenize``."""

    tokens: list[TokenId]
    model: str | None = None
    skip_special_tokens: bool | None = None
