"""Requests for new text: from the API's fields to the engine's options, and answers back."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from clusterfusion.serve.errors import ApiError
from clusterfusion.serve.feed import Event, Result
from clusterfusion.serve.schema import GenerationRequest
from clusterfusion.serve.service import Job, Service, check_vocabulary, fresh_seeds

# Chunks that are sent at once: a slow reader holds up the rest.
_MOST_CHUNKS = 64

# Entries of log-probabilities that one answer may hold.
_MOST_LOGPROBS = 4_000_000

quoted = json.encoder.encode_basestring  # as dumps(..., ensure_ascii=False) writes a str


def dumps(value: Any) -> str:
    """JSON without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class JsonResponse(Response):
    """An answer in JSON, UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return dumps(content).encode()


class EventStream(Response):
    """Server-sent events.

    The head goes out with the first of them, so that an error before it has its own status; an
    error behind it is the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[str]) -> None:
        """Takes pieces of the body: one or more whole events each."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all of it."""
        started = False
        async with aclosing(self._chunks):  # type: ignore[type-var]
            try:
                async for chunk in self._chunks:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": self.status_code,
                                "headers": self.raw_headers,
                            }
                        )
                    body = chunk.encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            except ApiError as error:
                if not started:
                    raise
                scope["state"]["record"].error = str(error)
                body = f"data: {dumps(error.body)}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class Answer(Protocol):
    """How an endpoint words what the engine computes."""

    object: str  # of a whole answer
    chunk_object: str
    id_prefix: str

    def opening(self) -> list[str]:
        """Choices, in JSON, that a stream begins with."""

    async def chunk(self, job: Job, event: Event) -> str:
        """A choice, in JSON, of a stream."""

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        """A choice of a whole answer."""


def engine_options(
    service: Service,
    request: GenerationRequest,
    num_prompts: int,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> dict[str, Any]:
    """The engine's options for a request.

    Raises:
        ApiError: Fields contradict each other, or name tokens that the model does not have.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise ApiError(
            400,
            f"min_tokens: expected {max_tokens} (max_tokens) at most, found {min_tokens}",
            param="min_tokens",
            code="invalid_value",
        )
    vocab_size = service.engine.config.vocab_size
    stop_tokens = request.stop_token_ids or []
    check_vocabulary(stop_tokens, vocab_size, "stop_token_ids")
    check_vocabulary(list(request.logit_bias or {}), vocab_size, "logit_bias")
    if request.stop and not service.engine.info.has_tokenizer:
        raise ApiError(400, "stop: the model has no tokenizer: use stop_token_ids", param="stop")
    seed = fresh_seeds(num_prompts) if request.seed is None else request.seed % 2**64
    return {
        "max_new_tokens": max_tokens,
        "temperature": _default(request.temperature, 1.0),
        "top_p": _default(request.top_p, 1.0),
        "top_k": max(_default(request.top_k, 0), 0),
        "min_p": _default(request.min_p, 0.0),
        "repetition_penalty": _default(request.repetition_penalty, 1.0),
        "frequency_penalty": _default(request.frequency_penalty, 0.0),
        "presence_penalty": _default(request.presence_penalty, 0.0),
        "logit_bias": request.logit_bias,
        "min_new_tokens": min_tokens,
        "seed": seed,
        "stop": request.stop,
        "stop_tokens": stop_tokens,
        "ignore_eos": bool(request.ignore_eos),
        "skip_special_tokens": _default(request.skip_special_tokens, True),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }


def check_answer_size(
    prompts: Sequence[Sequence[int]], n: int, max_tokens: int, options: dict[str, Any]
) -> None:
    """Refuses answers whose log-probabilities nobody could hold."""
    of_new = 0 if options["logprobs"] is None else 1 + options["logprobs"]
    of_prompt = 0 if options["prompt_logprobs"] is None else 1 + options["prompt_logprobs"]
    new_tokens = min(max_tokens, 1 << 20)
    entries = sum(n * (of_prompt * len(prompt) + of_new * new_tokens) for prompt in prompts)
    if entries > _MOST_LOGPROBS:
        raise ApiError(
            400,
            f"the answer might hold {entries} log-probabilities, and {_MOST_LOGPROBS} is the most: "
            "ask for fewer texts, tokens or logprobs",
            param="logprobs",
            code="answer_too_large",
        )


async def answer_request(
    service: Service,
    http: Request,
    request: GenerationRequest,
    prompts: list[list[int]],
    options: dict[str, Any],
    answer: Answer,
) -> Response:
    """Computes the answer, or the stream of it."""
    n = request.n or 1
    check_answer_size(prompts, n, min(options["max_new_tokens"], _room(service)), options)
    record = http.state.record
    record.stream = bool(request.stream)
    head = {
        "id": f"{answer.id_prefix}-{record.id}",
        "object": answer.chunk_object if request.stream else answer.object,
        "created": int(time.time()),
        "model": request.model or service.model_names[0],
    }
    keeps_apart = bool(request.return_token_ids)
    work = service.job(
        http,
        prompts,
        n,
        request.timeout,
        streams=record.stream,
        keeps_apart=keeps_apart,
        **options,
    )
    if request.stream:
        return EventStream(_stream(work, request, head, answer, n))
    async with work as job:
        results = await job.results(n)
    choices = [answer.choice(index, result) for index, result in enumerate(results)]
    return JsonResponse({**head, "choices": choices, "usage": _usage(results, n)})


async def _stream(
    work: Any, request: GenerationRequest, head: dict[str, Any], answer: Answer, n: int
) -> AsyncIterator[str]:
    """Pieces of the stream: what came in one burst in each."""
    options = request.stream_options
    wants_usage = options is not None and bool(options.include_usage)
    begin = f'data: {dumps(head)[:-1]},"choices":['
    end = "]" + (',"usage":null' if wants_usage else "") + "}\n\n"
    async with work as job:
        opening = "".join(f"{begin}{choice}{end}" for choice in answer.opening())
        async for burst in job.bursts():
            for first in range(0, len(burst), _MOST_CHUNKS):
                events = burst[first : first + _MOST_CHUNKS]
                chunks = [f"{begin}{await answer.chunk(job, event)}{end}" for event in events]
                yield opening + "".join(chunks)
                opening = ""
        results = await job.results(n)
    last = ""
    if wants_usage:
        last = f"data: {dumps({**head, 'choices': [], 'usage': _usage(results, n)})}\n\n"
    yield last + "data: [DONE]\n\n"


def _room(service: Service) -> int:
    return service.engine.info.max_positions


def _usage(results: Sequence[Result], n: int) -> dict[str, Any]:
    prompt_tokens = sum(len(result.prompt_tokens) for result in results[::n])
    new_tokens = sum(len(result.tokens) for result in results)
    cached = sum(result.statistics.prefix_hit_tokens for result in results[::n])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value
